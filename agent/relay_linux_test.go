package agent_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	traffic "github.com/hamesh/hamesh/deploy/lab/load"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// What the relay promises. What was measured is logged; what is asserted holds on a busy
// machine too.
const (
	resetWithin    = 50 * time.Millisecond   // an established connection, once its server is seen dead
	unreadyWithin  = 1100 * time.Millisecond // fall × interval of the checks, and 100 ms
	hungWithin     = 1200 * time.Millisecond
	meanwhile      = 150 * time.Millisecond // a new connection up to its answer, while another's server fails
	recoversWithin = time.Second
)

// withoutRamp lets a backend that is back have all of its clients at once.
func withoutRamp(_ string, config map[string]any) {
	config["proxies"].([]any)[0].(map[string]any)["slowStart"] = "0s"
}

func within(t *testing.T, what string, took, promised time.Duration) {
	t.Helper()
	limit := 2*promised + 100*time.Millisecond
	if raceDetector {
		limit = 4*promised + 500*time.Millisecond
	}
	t.Logf("%s: %v (promised: %v)", what, took.Round(100*time.Microsecond), promised)
	if took > limit {
		t.Errorf("%s: %v, more than %v", what, took, limit)
	}
}

// strike is what clients saw of a fault of one API server.
type strike struct {
	victim   string
	from, to time.Time // just before the fault, and when it was complete
	samples  []lab.Sample
	streams  map[int]string        // whose each stream was, when the fault came
	clients  map[netip.Addr]string // and whose each client
}

// observe lets clients connect and hold streams, strikes once the server of each of them is
// known, and goes on for some time.
func observe(t *testing.T, m *lab.Mesh, victim *lab.Node, fault func() error, then time.Duration) strike {
	t.Helper()
	const streams = 30
	run := load(t, m, lab.Load{Rate: 100, Streams: streams})
	s := strike{victim: victim.Name}
	err := lab.Await(30*time.Second, func() error {
		s.streams, s.clients = make(map[int]string), make(map[netip.Addr]string)
		for _, sample := range run.Samples() {
			switch sample.Kind {
			case lab.Line:
				s.streams[sample.Stream] = sample.Backend
			case lab.Request:
				s.clients[sample.Source] = sample.Backend
			}
		}
		if len(s.streams) < streams || len(s.clients) < len(m.Client.Sources) {
			return fmt.Errorf("%d of %d streams, %d of %d clients have had an answer", len(s.streams), streams, len(s.clients), len(m.Client.Sources))
		}
		return nil
	})
	if err == nil {
		s.from = time.Now()
		err = fault()
		s.to = time.Now()
		time.Sleep(then)
	}
	samples, e := run.Stop()
	if err := errors.Join(err, e); err != nil {
		t.Fatal(err)
	}
	s.samples = samples
	return s
}

// broken returns when the victim's streams broke, the first and the last, and fails unless
// all of them did and no others.
func (s strike) broken(t *testing.T) (first, last time.Time) {
	t.Helper()
	breaks, owned := 0, 0
	for _, backend := range s.streams {
		if backend == s.victim {
			owned++
		}
	}
	seen := make(map[int]bool)
	for _, sample := range s.samples {
		if sample.Kind != lab.Broken || seen[sample.Stream] || sample.End.Before(s.from) {
			continue
		}
		seen[sample.Stream] = true
		if sample.Backend != s.victim {
			t.Errorf("a stream of %s broke: %s", sample.Backend, sample.Error)
			continue
		}
		breaks++
		if first.IsZero() || sample.End.Before(first) {
			first = sample.End
		}
		if sample.End.After(last) {
			last = sample.End
		}
	}
	if owned == 0 || breaks != owned {
		t.Fatalf("%d of the %d streams of %s broke", breaks, owned, s.victim)
	}
	return first, last
}

// slowest is the longest that good new connections took which were due in some time, and
// that some clients made.
func (s strike) slowest(from, to time.Time, who func(backend string) bool) (longest time.Duration, failed map[string]int) {
	failed = make(map[string]int)
	for _, sample := range s.samples {
		if sample.Kind != lab.Request || sample.Start.Before(from) || !sample.Start.Before(to) || !who(s.clients[sample.Source]) {
			continue
		}
		if sample.Error != "" {
			failed[sample.Error]++
			continue
		}
		longest = max(longest, sample.End.Sub(sample.Start))
	}
	return longest, failed
}

// lastServed is when the last connection was due that the victim still answered.
func (s strike) lastServed() (last time.Time) {
	for _, sample := range s.samples {
		if sample.Kind == lab.Request && sample.Backend == s.victim && sample.Start.After(last) {
			last = sample.Start
		}
	}
	return last
}

func (s strike) others(backend string) bool { return backend != s.victim }
func (s strike) its(backend string) bool    { return backend == s.victim }

func anybody(string) bool { return true }

// TestRelay checks how soon clients are rid of an API server that fails, and that nobody
// else notices.
func TestRelay(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60, Edit: withoutRamp})
	owner(t, m)
	healthy(t, m)
	victim := m.Nodes[1]

	t.Run("killed", func(t *testing.T) {
		s := observe(t, m, victim, victim.API.Kill, 2*time.Second)
		_, last := s.broken(t)
		// Its kernel resets its connections while the process ends.
		within(t, "its last connection reset after the kill", last.Sub(s.to), resetWithin)
		slowest, failed := s.slowest(s.to, time.Now(), anybody)
		within(t, "slowest new connection", slowest, meanwhile)
		if len(failed) > 0 {
			t.Errorf("new connections failed: %v", failed)
		}
		if err := victim.API.Start(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})

	for what, end := range map[string]func(*lab.Node) error{"agent killed": (*lab.Node).KillAgent, "agent stopped": (*lab.Node).StopAgent} {
		t.Run(what, func(t *testing.T) {
			// Its API server is well: nobody loses a connection to it.
			owner := owner(t, m)
			victim := m.Nodes[slices.IndexFunc(m.Nodes, func(n *lab.Node) bool { return n != owner })]
			s := observe(t, m, victim, func() error { return end(victim) }, 2*time.Second)
			if !slices.Contains(slices.Collect(maps.Values(s.streams)), victim.Name) {
				t.Error("it serves nobody")
			}
			for _, sample := range s.samples {
				if sample.Kind == lab.Broken && sample.End.After(s.from) {
					t.Errorf("%v after the fault a stream of %s broke: %s", sample.End.Sub(s.from), sample.Backend, sample.Error)
				}
			}
			slowest, failed := s.slowest(s.from, time.Now(), anybody)
			within(t, "slowest new connection", slowest, meanwhile)
			if len(failed) > 0 {
				t.Errorf("new connections failed: %v", failed)
			}
			if err := victim.StartAgent(); err != nil {
				t.Fatal(err)
			}
			healthy(t, m)
		})
	}

	t.Run("not ready", func(t *testing.T) {
		s := observe(t, m, victim, victim.API.Sick, unreadyWithin+2*time.Second)
		if s.lastServed().Before(s.from) {
			t.Fatal("no client of it came after the fault")
		}
		within(t, "last new connection to it after the fault", s.lastServed().Sub(s.from), unreadyWithin)
		first, last := s.broken(t)
		within(t, "its connections reset, from the first to the last", last.Sub(first), resetWithin)
		slowest, failed := s.slowest(s.from, time.Now(), s.others)
		within(t, "slowest new connection of the others' clients", slowest, meanwhile)
		if len(failed) > 0 {
			t.Errorf("of the others' clients, new connections failed: %v", failed)
		}
		if err := victim.API.Well(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})

	t.Run("hung", func(t *testing.T) {
		s := observe(t, m, victim, victim.API.Freeze, hungWithin+2*time.Second)
		first, last := s.broken(t)
		within(t, "detected", first.Sub(s.from), hungWithin)
		within(t, "its connections reset, from the first to the last", last.Sub(first), resetWithin)
		slowest, failed := s.slowest(s.from, last, s.others)
		within(t, "meanwhile, slowest new connection of the others' clients", slowest, meanwhile)
		if len(failed) > 0 {
			t.Errorf("of the others' clients, new connections failed: %v", failed)
		}
		// Its own clients' connections are accepted by its kernel; others answer them.
		slowest, failed = s.slowest(s.to, last, s.its)
		within(t, "meanwhile, slowest new connection of its own clients", slowest, meanwhile)
		if len(failed) > 0 {
			t.Errorf("of its own clients, new connections failed: %v", failed)
		}
		slowest, failed = s.slowest(last, time.Now(), anybody)
		within(t, "then, slowest new connection of all", slowest, meanwhile)
		if len(failed) > 0 {
			t.Errorf("once it was detected, new connections failed: %v", failed)
		}
		if err := victim.API.Thaw(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	})

	t.Run("all killed, one started", func(t *testing.T) {
		each(t, m, (*lab.APIServer).Kill)
		allDown(t, m)
		run := load(t, m, lab.Load{Rate: 100})
		started := time.Now()
		if err := victim.API.Start(); err != nil {
			t.Fatal(err)
		}
		var first time.Time
		err := lab.Await(10*time.Second, func() error {
			for _, sample := range run.Samples() {
				if sample.Error == "" {
					first = sample.End
					return nil
				}
			}
			return errors.New("no connection succeeds")
		})
		_, e := run.Stop()
		if err := errors.Join(err, e); err != nil {
			t.Fatal(err)
		}
		within(t, "first success after the start", first.Sub(started), recoversWithin)
		each(t, m, (*lab.APIServer).Start)
		healthy(t, m)
	})

	t.Run("all not ready, one well", func(t *testing.T) {
		each(t, m, (*lab.APIServer).Sick)
		allDown(t, m)
		source := clientOfAnother(t, m, victim)
		recovered := time.Now()
		if err := victim.API.Well(); err != nil {
			t.Fatal(err)
		}
		err := lab.Await(10*time.Second, func() error {
			_, status, err := readyz(m, source)
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("HTTP %d", status)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		within(t, "first ready answer to another server's client", time.Since(recovered), recoversWithin)
		each(t, m, (*lab.APIServer).Well)
		healthy(t, m)
	})
}

func each(t *testing.T, m *lab.Mesh, do func(*lab.APIServer) error) {
	t.Helper()
	for _, n := range m.Nodes {
		if err := do(n.API); err != nil {
			t.Fatal(err)
		}
	}
}

// allDown waits until every agent says so of every API server.
func allDown(t *testing.T, m *lab.Mesh) {
	t.Helper()
	if err := lab.Await(10*time.Second, func() error {
		for _, n := range m.Nodes {
			s, err := n.Status()
			if err != nil {
				return err
			}
			for _, b := range s.GetBackends() {
				if b.GetState() != hameshv1.BackendState_BACKEND_STATE_DOWN {
					return fmt.Errorf("%s says that %s is %v", n.Name, b.GetName(), b.GetState())
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// clientOfAnother is a client's address that is not the node's to serve, as long as none is
// well.
func clientOfAnother(t *testing.T, m *lab.Mesh, node *lab.Node) netip.Addr {
	t.Helper()
	for _, source := range m.Client.Sources {
		backend, status, err := readyz(m, source)
		if err != nil || status != http.StatusInternalServerError {
			t.Fatalf("with no server ready, a client is answered %d by %q: %v", status, backend, err)
		}
		if backend != node.Name {
			return source
		}
	}
	t.Fatalf("every client comes to %s", node.Name)
	return netip.Addr{}
}

// readyz asks the VIP over a new connection whether the API server is ready, and returns
// which one has answered.
func readyz(m *lab.Mesh, source netip.Addr) (backend string, status int, err error) {
	trust, err := m.TLS()
	if err != nil {
		return "", 0, err
	}
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: trust,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			from := &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
			return m.Client.Host.DialContext(ctx, from, network, address)
		},
	}}
	response, err := client.Get("https://" + m.VIP().String() + "/readyz")
	if err != nil {
		return "", 0, err
	}
	defer response.Body.Close()
	return response.Header.Get("Server"), response.StatusCode, nil
}

// TestReconnect checks that everybody comes in at once after a takeover, and is spread over
// the API servers.
func TestReconnect(t *testing.T) {
	clients := 5000
	if raceDetector {
		clients = 500
	}
	m, sources, backends := newCheapMesh(t)
	before := owner(t, m)
	healthy(t, m)
	g, err := traffic.StartGenerator(m.Client.Host, traffic.Ends{
		Targets: []netip.AddrPort{m.VIP()}, From: sources.Addr().Next(), Sources: clients,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() }) // ends with the mesh in any case
	if _, err := g.Hold(clients); err != nil {
		t.Fatal(err)
	}
	if err := before.KillAgent(); err != nil {
		t.Fatal(err)
	}
	if err := lab.Await(5*time.Second, func() error {
		if now := m.Recorder.Now(); len(now) != 1 || now[0] == before.Name {
			return fmt.Errorf("the kernels with the address are those of %v", now)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	asked := served(t, backends)
	r, err := g.Churn(traffic.Churn{Rate: float64(clients), Most: clients, For: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	lost, err := g.Hold(clients)
	if err != nil {
		t.Fatal(err)
	}
	after := served(t, backends)
	t.Logf("%d connections were lost with the agent; of those that were due within a second, %d good, failed %v; p50 %v, p99 %v, slowest %v; %d are held again",
		lost, r.Good, r.Failed, r.P50, r.P99, r.Max, clients)
	if r.Failures() > 0 || r.Good < clients*8/10 {
		t.Errorf("%d clients were served, %d not: %v", r.Good, r.Failures(), r.Failed)
	}
	if lost != clients {
		t.Errorf("%d connections are known to have ended with the agent, want all %d", lost, clients)
	}
	for i, n := range m.Nodes {
		share := float64(after[i]-asked[i]) / float64(r.Good)
		t.Logf("%s served %.1f %%", n.Name, 100*share)
		// A third each; but the API server of the node whose agent has died has fewer, as
		// long as only its silence is known and not yet that its node lives.
		least, most := 0.28, 0.55
		if n == before {
			least, most = 0, 0.39
		}
		if share < least || share > most {
			t.Errorf("%s served %.1f %%, want %.0f to %.0f %%", n.Name, 100*share, 100*least, 100*most)
		}
	}
}

// served is how many connections each backend was asked on until now.
func served(t *testing.T, backends []*traffic.Backend) (asked []int64) {
	t.Helper()
	for _, b := range backends {
		s, err := b.Served()
		if err != nil {
			t.Fatal(err)
		}
		asked = append(asked, s.Asked)
	}
	return asked
}
