package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func configFile(n *lab.Node) string { return filepath.Join(filepath.Dir(n.LogFile()), "agent.yaml") }

// reload rewrites a node's configuration and asks its agent to read it again.
func reload(t *testing.T, n *lab.Node, text []byte) {
	t.Helper()
	if err := os.WriteFile(configFile(n), text, 0o600); err != nil {
		t.Fatal(err)
	}
	status, err := n.AgentStatus()
	if err != nil {
		t.Fatal(err)
	}
	pid := 0
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "Pid:"); ok {
			if _, err := fmt.Sscan(value, &pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	if pid == 0 {
		t.Fatalf("no Pid in the status of the agent of %s", n.Name)
	}
	if err := unix.Kill(pid, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// original is a node's configuration as it stands.
func original(t *testing.T, n *lab.Node) []byte {
	t.Helper()
	b, err := os.ReadFile(configFile(n))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// edited is a node's configuration with a change.
func edited(t *testing.T, n *lab.Node, edit func(config, proxy map[string]any)) []byte {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal(original(t, n), &config); err != nil {
		t.Fatal(err)
	}
	edit(config, config["proxies"].([]any)[0].(map[string]any))
	b, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// awaitStatus waits for what one agent says.
func awaitStatus(t *testing.T, n *lab.Node, condition func(*hameshv1.GetStatusResponse) error) {
	t.Helper()
	err := lab.Await(30*time.Second, func() error {
		s, err := n.Status()
		if err != nil {
			return err
		}
		return condition(s)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// refusal is the problem that an agent has with its configuration; nil: none.
func refusal(s *hameshv1.GetStatusResponse) *hameshv1.Problem {
	for _, p := range s.GetProblems() {
		if p.GetCode() == "CONFIG_REFUSED" {
			return p
		}
	}
	return nil
}

// TestReloadByHangup checks that SIGHUP puts a changed configuration into force: while
// clients come and go, without one of them noticing, and whole or not at all.
func TestReloadByHangup(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60, Edit: func(_ string, config map[string]any) {
		proxy := config["proxies"].([]any)[0].(map[string]any)
		proxy["onDown"], proxy["slowStart"] = "drain", "0s"
	}})
	owner := owner(t, m)
	healthy(t, m)
	gone := m.Nodes[1].Name
	backends := func(s *hameshv1.GetStatusResponse) (names []string) {
		for _, b := range s.GetBackends() {
			names = append(names, b.GetName())
		}
		return names
	}

	t.Run("a backend is removed and added, and nobody notices", func(t *testing.T) {
		from := time.Now()
		run := load(t, m, lab.Load{Rate: 100, Streams: 30})
		time.Sleep(time.Second)
		began := time.Now()
		whole := map[*lab.Node][]byte{}
		for _, n := range m.Nodes {
			whole[n] = original(t, n)
			reload(t, n, edited(t, n, func(_, proxy map[string]any) {
				all := proxy["backends"].([]any)
				proxy["backends"] = []any{all[0], all[2]}
			}))
		}
		for _, n := range m.Nodes {
			awaitStatus(t, n, func(s *hameshv1.GetStatusResponse) error {
				if names := backends(s); len(names) != 2 || names[1] == gone {
					return fmt.Errorf("%s has the backends %v", n.Name, names)
				}
				return nil
			})
		}
		removed := time.Now()
		time.Sleep(time.Second)
		added := time.Now()
		for _, n := range m.Nodes {
			reload(t, n, whole[n])
		}
		healthy(t, m)
		for _, n := range m.Nodes {
			awaitStatus(t, n, func(s *hameshv1.GetStatusResponse) error {
				if names := backends(s); len(names) != 3 {
					return fmt.Errorf("%s has the backends %v", n.Name, names)
				}
				return nil
			})
		}
		back := time.Now()
		time.Sleep(time.Second)
		samples, err := run.Stop()
		if err != nil {
			t.Fatal(err)
		}
		r := lab.Summarize(samples, from, time.Now())
		without, after := lab.Summarize(samples, removed, added), lab.Summarize(samples, back, time.Now())
		t.Logf("%d requests, %d failed %v; %d streams, %d broken %v; longest gap %v; back after %v",
			r.Requests, r.Failed, r.Errors, r.Streams, r.Broken, r.Breaks, lab.Summarize(samples, began, time.Now().Add(-time.Second)).Gap, back.Sub(added).Round(time.Millisecond))
		unfailing(t, r, 0)
		if r.Broken > 0 {
			t.Errorf("%d of %d streams broke: %v", r.Broken, r.Streams, r.Breaks)
		}
		if n := without.Backends[gone]; n > 0 {
			t.Errorf("%d new connections came to %s when it was removed", n, gone)
		}
		if after.Backends[gone] == 0 {
			t.Errorf("no new connection came to %s when it was back: %v", gone, after.Backends)
		}
		never(t, m, from, 0)
	})

	t.Run("a file that is refused changes nothing", func(t *testing.T) {
		good := original(t, owner)
		for _, c := range []struct {
			name         string
			text         []byte
			finding, fix string
		}{
			{"a bad one", edited(t, owner, func(_, proxy map[string]any) {
				proxy["backends"] = proxy["backends"].([]any)[:1]
				proxy["onDwn"] = "close"
			}), "proxies[0].onDwn: is not a known key", "did you mean onDown?"},
			{"one that takes a restart", edited(t, owner, func(config, proxy map[string]any) {
				proxy["backends"] = proxy["backends"].([]any)[:1]
				config["metrics"] = map[string]any{"listen": "127.0.0.1:7445"}
			}), "metrics.listen: is 127.0.0.1:7445, was 127.0.0.1:7444", "restart the agent to change it"},
		} {
			reload(t, owner, c.text)
			awaitStatus(t, owner, func(s *hameshv1.GetStatusResponse) error {
				p := refusal(s)
				if !strings.Contains(p.GetMessage(), c.finding) || !strings.Contains(p.GetFix(), c.fix) {
					return fmt.Errorf("%s: the problem is %v", c.name, p)
				}
				if names := backends(s); len(names) != 3 {
					t.Errorf("%s: the backends are %v", c.name, names)
				}
				return nil
			})
			if !strings.Contains(owner.Log(), c.finding) {
				t.Errorf("%s: %q is not in the log", c.name, c.finding)
			}
			if now := m.Recorder.Now(); len(now) != 1 || now[0] != owner.Name {
				t.Errorf("%s: the VIP is on %v", c.name, now)
			}
		}
		reload(t, owner, good)
		healthy(t, m)
		awaitStatus(t, owner, func(s *hameshv1.GetStatusResponse) error {
			if p := refusal(s); p != nil {
				return fmt.Errorf("the problem is %v", p)
			}
			return nil
		})
	})

	t.Run("events tell of each", func(t *testing.T) {
		stdout, stderr, status, err := owner.Hactl("events", "-o", "wide")
		if err != nil || status != 0 {
			t.Fatalf("status %d, %v: %s", status, err, stderr)
		}
		for _, want := range []string{
			m.Nodes[0].Name + "   config-reloaded", "proxies[0].backends: " + gone + " is removed",
			owner.Name + "   config-refused", "metrics.listen: is 127.0.0.1:7445, was 127.0.0.1:7444",
		} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%q is not in the events:\n%s", want, stdout)
			}
		}
	})

	t.Run("the log", func(t *testing.T) {
		reload(t, owner, edited(t, owner, func(config, _ map[string]any) {
			config["log"] = map[string]any{"level": "info", "format": "json"}
		}))
		if err := lab.Await(10*time.Second, func() error {
			if !strings.Contains(owner.Log(), `"@message":"configuration: log.format: is json, was text"`) {
				return fmt.Errorf("the log of %s is not in JSON", owner.Name)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}
