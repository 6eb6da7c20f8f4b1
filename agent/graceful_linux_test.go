package agent_test

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// stops is how often TestServerStops stops a server in each way.
var stops = flag.Int("stops", 1, "how often a server is stopped in each way")

// backend is what the status says of a node's API server.
func backend(s *hameshv1.GetStatusResponse, name string) *hameshv1.Backend {
	for _, b := range s.GetBackends() {
		if b.GetName() == name {
			return b
		}
	}
	return nil
}

// patient is a load of ordinary clients that keep their connections.
type patient struct {
	t   *testing.T
	run *lab.Run
}

// ordinary starts such a load through the VIP, which ends with the test.
func ordinary(t *testing.T, m *lab.Mesh, o lab.Ordinary) patient {
	t.Helper()
	o.Target = m.VIP()
	run, err := m.Client.StartOrdinary(o)
	if err != nil {
		t.Fatal(err)
	}
	return patient{t, run}
}

func (p patient) spread() map[string]int { return lab.Spread(p.run.Samples()) }
func (p patient) count() int             { return len(lab.Finished(p.run.Samples(), lab.Kept)) }

// stop ends the load and returns the requests that have ended.
func (p patient) stop() []lab.Sample {
	p.t.Helper()
	samples, err := p.run.Stop()
	if err != nil {
		p.t.Fatal(err)
	}
	return lab.Finished(samples, lab.Kept)
}

// failures are the requests that failed, with what they say.
func failures(calls []lab.Sample) (all []string) {
	for _, c := range calls {
		if c.Error != "" {
			all = append(all, fmt.Sprintf("client %v after %v: %s", c.Source, c.End.Sub(c.Start).Round(time.Millisecond), c.Error))
		}
	}
	return all
}

// TestServerStops stops an API server in good order under requests of half a second each, as
// creates with a slow webhook are: none fails, whether it says so before it stops or not.
func TestServerStops(t *testing.T) {
	const requests = 500
	m := newMesh(t, lab.Options{Clients: 30, Edit: withoutRamp})
	owner(t, m)
	for range *stops {
		for _, delay := range []time.Duration{2 * time.Second, 0} {
			t.Run(fmt.Sprintf("delay %v", delay), func(t *testing.T) {
				healthy(t, m)
				r := ordinary(t, m, lab.Ordinary{Connections: 30, Delay: 500 * time.Millisecond})
				var victim *lab.Node
				if err := lab.Await(10*time.Second, func() error {
					spread := r.spread()
					for _, n := range m.Nodes {
						if victim == nil || spread[n.Name] > spread[victim.Name] {
							victim = n
						}
					}
					if r.count() < 60 {
						return fmt.Errorf("%d requests, %v", r.count(), spread)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				before := r.spread()
				stopped := make(chan error, 1)
				began := time.Now()
				go func() { stopped <- victim.API.Stop(delay) }()
				if delay > 0 {
					awaitStatus(t, m.Nodes[0], func(s *hameshv1.GetStatusResponse) error {
						b := backend(s, victim.Name)
						if !b.GetNotReady() || b.GetState() != hameshv1.BackendState_BACKEND_STATE_DOWN || !strings.HasPrefix(b.GetReason(), "not ready: shutdown failed (HTTP 500)") {
							return fmt.Errorf("backend %v", b)
						}
						return nil
					})
					t.Logf("not ready after %v", time.Since(began).Round(time.Millisecond))
				}
				if err := <-stopped; err != nil {
					t.Error(err)
				}
				if err := lab.Await(30*time.Second, func() error {
					if n := r.count(); n < requests {
						return fmt.Errorf("%d of %d requests", n, requests)
					}
					return nil
				}); err != nil {
					t.Error(err)
				}
				after := r.spread()
				calls := r.stop()
				failed := failures(calls)
				t.Logf("%s stopped within %v; %d requests, %d failed; clients by server: %v, then %v", victim.Name, time.Since(began).Round(time.Millisecond), len(calls), len(failed), before, after)
				if len(failed) > 0 || len(calls) < requests {
					t.Errorf("of %d requests %d failed: %s", len(calls), len(failed), strings.Join(failed[:min(len(failed), 5)], "; "))
				}
				if before[victim.Name] == 0 || after[victim.Name] > 0 {
					t.Errorf("%s had %d clients, and has %d", victim.Name, before[victim.Name], after[victim.Name])
				}
				if err := victim.API.Start(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
	healthy(t, m)

	t.Run("hung while not ready", func(t *testing.T) {
		victim := m.Nodes[1]
		r := ordinary(t, m, lab.Ordinary{Connections: 30, Delay: 20 * time.Millisecond, Every: 100 * time.Millisecond})
		if err := lab.Await(10*time.Second, func() error {
			spread, all := r.spread(), 0
			for _, n := range spread {
				all += n
			}
			if all < 30 || spread[victim.Name] == 0 {
				return fmt.Errorf("clients by server: %v", spread)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		clients := r.spread()[victim.Name]
		if err := victim.API.Unready(); err != nil {
			t.Fatal(err)
		}
		awaitStatus(t, m.Nodes[0], func(s *hameshv1.GetStatusResponse) error {
			if b := backend(s, victim.Name); !b.GetNotReady() || !strings.HasPrefix(b.GetReason(), "not ready: informer-sync failed (HTTP 500)") {
				return fmt.Errorf("backend %v", b)
			}
			return nil
		})
		time.Sleep(time.Second)
		if n := r.spread()[victim.Name]; n != clients {
			t.Errorf("of its %d clients %d are with it while it is not ready", clients, n)
		}
		// Hung, it is as any server that hangs: its clients are rid of it.
		hung := time.Now()
		if err := victim.API.Freeze(); err != nil {
			t.Fatal(err)
		}
		if err := lab.Await(10*time.Second, func() error {
			if spread := r.spread(); spread[victim.Name] > 0 || spread[m.Nodes[0].Name]+spread[m.Nodes[2].Name] < 30 {
				return fmt.Errorf("clients by server: %v", spread)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		within(t, "clients of one that is not ready elsewhere after it hung", time.Since(hung), 2*hungWithin)
		if err := errors.Join(victim.API.Thaw(), victim.API.Well()); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})
}

// TestServersRefuseAnonymous lets all API servers refuse who shows no certificate, as CIS
// hardening wants it: with one for the checks that changes nothing. Without one, status says
// what to do, and clients are served all the same.
func TestServersRefuseAnonymous(t *testing.T) {
	var m *lab.Mesh
	certified := true
	edit := func(_ string, config map[string]any) {
		check := config["proxies"].([]any)[0].(map[string]any)["healthCheck"].(map[string]any)
		if certified {
			files := m.ClientFiles()
			check["certFile"], check["keyFile"], check["caFile"] = files.Certificate, files.Key, m.ServerCA()
		}
	}
	m = newMesh(t, lab.Options{Edit: edit, Agentless: true}) // so that the files are known
	for _, n := range m.Nodes {
		if err := n.StartAgent(); err != nil {
			t.Fatal(err)
		}
	}
	before := owner(t, m)
	healthy(t, m)
	each(t, m, (*lab.APIServer).RefuseAnonymous)
	from := time.Now()
	r := ordinary(t, m, lab.Ordinary{Connections: 5, Delay: time.Millisecond, Every: 50 * time.Millisecond})
	time.Sleep(4 * time.Second) // throughFall checks through the proxy, and more
	healthy(t, m)
	everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
		for _, n := range s.GetNodes() {
			if !n.GetEligible() {
				return fmt.Errorf("%s is not eligible: %s", n.GetName(), n.GetReason())
			}
		}
		return nil
	})
	if now := owner(t, m); now != before {
		t.Errorf("%s owns the VIP, %s did", now.Name, before.Name)
	}
	never(t, m, from, 0)

	certified = false
	for _, n := range m.Nodes {
		if err := errors.Join(n.StopAgent(), n.StartAgent()); err != nil {
			t.Fatal(err)
		}
	}
	restarted := time.Now()
	owner(t, m)
	everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
		if s.GetState() != hameshv1.State_STATE_DEGRADED {
			return fmt.Errorf("state %v: %v", s.GetState(), s.GetProblems())
		}
		codes := map[string]bool{}
		for _, p := range s.GetProblems() {
			codes[p.GetCode()] = true
			if !slices.Contains([]string{"BACKEND_DOWN", "NO_BACKEND"}, p.GetCode()) {
				continue
			}
			if !strings.Contains(p.GetFix(), "set healthCheck.certFile and keyFile") {
				return fmt.Errorf("problem %v", p)
			}
		}
		if !codes["BACKEND_DOWN"] || !codes["NO_BACKEND"] || codes["NODE_NOT_ELIGIBLE"] {
			return fmt.Errorf("problems %v", s.GetProblems())
		}
		return nil
	})
	if err := lab.Await(10*time.Second, func() error {
		// Without a certificate of their own that is the answer that they get.
		if !slices.ContainsFunc(lab.Finished(r.run.Samples(), lab.Kept), func(s lab.Sample) bool {
			return s.Start.After(restarted) && s.Error == "401 Unauthorized"
		}) {
			return errors.New("no client is answered")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
