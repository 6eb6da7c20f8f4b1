package agent_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// What upgrades are tested under; with the race detector, which makes everything several
// times slower, less.
var (
	upgradeStreams = 500
	upgradeRate    = 200.0
	upgrades       = 10
)

func init() {
	if raceDetector {
		upgradeStreams, upgradeRate, upgrades = 60, 40, 4
	}
}

// upgrade wants a node's agent to be upgraded.
func upgrade(t *testing.T, n *lab.Node) (pid int) {
	t.Helper()
	pid = n.AgentPID()
	if pid == 0 {
		t.Fatalf("the agent of %s does not run", n.Name)
	}
	if err := unix.Kill(pid, unix.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	return pid
}

// succeeded waits until another process is a node's agent.
func succeeded(t *testing.T, n *lab.Node, former int) {
	t.Helper()
	if err := lab.Await(40*time.Second, func() error {
		if now := n.AgentPID(); now == former || now == 0 {
			return fmt.Errorf("the agent of %s is process %d, was %d", n.Name, now, former)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// told counts what a node has recorded of one kind.
func told(t *testing.T, n *lab.Node, kind string) (lines []string) {
	t.Helper()
	stdout, stderr, _, err := n.Hactl("events")
	if err != nil {
		t.Fatal(err, stderr)
	}
	for line := range strings.Lines(stdout) {
		if strings.Contains(line, kind) && strings.Contains(line, n.Name) {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestUpgrades upgrades agents in place, the owner's as well as others', under load: nobody
// notices.
func TestUpgrades(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60})
	first := owner(t, m)
	healthy(t, m)
	streams := load(t, m, lab.Load{Streams: upgradeStreams, Interval: 500 * time.Millisecond})
	if err := lab.Await(30*time.Second, func() error {
		open := map[int]bool{}
		for _, s := range streams.Samples() {
			open[s.Stream] = open[s.Stream] || s.Kind == lab.Line
		}
		if len(open) < upgradeStreams {
			return fmt.Errorf("%d of %d streams are open", len(open), upgradeStreams)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	from := time.Now()
	requests := load(t, m, lab.Load{Rate: upgradeRate})
	time.Sleep(time.Second)
	holder := first
	for i := range upgrades {
		n := m.Nodes[i%len(m.Nodes)]
		if i%2 == 0 {
			n = holder
		}
		begun := time.Now()
		pid := upgrade(t, n)
		succeeded(t, n, pid)
		took := time.Since(begun)
		healthy(t, m)
		now := owner(t, m)
		t.Logf("upgraded %s in %v, healthy after %v; owner %s, was %s", n.Name, took.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond), now.Name, holder.Name)
		if n != holder && now != holder {
			t.Errorf("the upgrade of %s has moved the VIP from %s to %s", n.Name, holder.Name, now.Name)
		}
		if n == holder && now == holder {
			t.Errorf("%s has the VIP again", n.Name)
		}
		holder = now
	}
	time.Sleep(2 * time.Second)
	r, q := stop(t, streams, from), stop(t, requests, from)
	r.Requests, r.Failed, r.Errors, r.Failures, r.Max = q.Requests, q.Failed, q.Errors, q.Failures, q.Max
	t.Logf("%d streams, %d broken %v, %d unopened, longest silence %v; %d requests, %d failed %v, slowest %v", r.Streams, r.Broken, r.Breaks, r.Unopened, r.Silence, r.Requests, r.Failed, r.Errors, r.Max)
	for _, n := range m.Nodes {
		b, err := os.ReadFile(n.LogFile())
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if _, frozen, ok := strings.Cut(strings.TrimSpace(line), " frozen="); ok {
				t.Logf("%s: connections stood still for %s", n.Name, frozen)
			}
		}
	}
	if r.Streams != upgradeStreams || r.Broken > 0 {
		t.Errorf("%d of %d streams broke: %v", r.Broken, r.Streams, r.Breaks)
	}
	unfailing(t, r, 0)
	// Longer than on other planned moves: meanwhile a process starts on the same processors.
	never(t, m, from, 3*planned)
	done := 0
	for _, n := range m.Nodes {
		done += len(told(t, n, "upgrade-done"))
	}
	if done != upgrades {
		t.Errorf("%d upgrades are told as events, want %d", done, upgrades)
	}
}

// TestUpgradeRefused checks that the agent that runs goes on where the new program does not,
// at whatever point that shows.
func TestUpgradeRefused(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 20})
	n := owner(t, m)
	healthy(t, m)
	good, err := os.Readlink(n.Program())
	if err != nil {
		t.Fatal(err)
	}
	script := func(body string) func() error {
		return func() error { return os.WriteFile(n.Program(), []byte("#!/bin/sh\n"+body+"\n"), 0o755) }
	}
	// late has a good program get a signal when it has been found fit and starts its store,
	// which takes long enough: at once, before it has taken over.
	late := func(signal string) func() error {
		return script(fmt.Sprintf(`n=$(grep -c 'simple token is not' %[1]s)
( while [ $(grep -c 'simple token is not' %[1]s) -le $n ]; do sleep 0.002; done; kill -%[2]s $$ ) &
exec %[3]s "$@"`, n.LogFile(), signal, good))
	}
	for _, c := range []struct {
		name    string
		install func() error // makes what is in place of the program
		reason  string
		moves   bool // it is found out when the VIP has moved
	}{
		{"is not there", func() error { return nil }, "no such file", false},
		{"is not executable", func() error { return os.WriteFile(n.Program(), []byte("x"), 0o644) }, "permission denied", false},
		{"is no program", func() error { return os.WriteFile(n.Program(), []byte("x"), 0o755) }, "exec format error", false},
		{"exits", script("exit 3"), "exit status 3", false},
		{"crashes", script("kill -SEGV $$"), "signal: segmentation fault", false},
		{"hangs", script("exec sleep 600"), "has not done in", false},
		{"crashes later", late("KILL"), "signal: killed", true},
		{"hangs later", late("STOP"), "has not done in", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, _, _, err := m.Node("cp-1").Hactl("move-vip", "kube-api", "--to", n.Name, "--wait"); err != nil {
				t.Fatal(err)
			}
			healthy(t, m)
			before := len(told(t, n, "upgrade-refused"))
			from := time.Now()
			run := load(t, m, lab.Load{Rate: upgradeRate / 4, Streams: 40})
			time.Sleep(time.Second)
			if err := os.Remove(n.Program()); err != nil {
				t.Fatal(err)
			}
			if err := c.install(); err != nil {
				t.Fatal(err)
			}
			pid := upgrade(t, n)
			if err := lab.Await(30*time.Second, func() error {
				if s, err := n.Status(); err != nil {
					return err
				} else if s.GetReportedBy() != n.Name {
					return fmt.Errorf("%s answers for %s", s.GetReportedBy(), n.Name)
				}
				all := told(t, n, "upgrade-refused")
				if len(all) <= before {
					return fmt.Errorf("%s has not told of a refusal", n.Name)
				}
				if !strings.Contains(all[len(all)-1], c.reason) {
					t.Errorf("the reason is not %q: %s", c.reason, all[len(all)-1])
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if now := n.AgentPID(); now != pid {
				t.Errorf("the agent is process %d, was %d", now, pid)
			}
			if log, err := os.ReadFile(n.LogFile()); err != nil || !strings.Contains(string(log), c.reason) {
				t.Errorf("%q is not in the log: %v", c.reason, err)
			}
			healthy(t, m)
			time.Sleep(time.Second)
			r := stop(t, run, from)
			t.Logf("%d streams, %d broken %v; %d requests, %d failed %v, slowest %v", r.Streams, r.Broken, r.Breaks, r.Requests, r.Failed, r.Errors, r.Max)
			if r.Broken > 0 {
				t.Errorf("%d of %d streams broke: %v", r.Broken, r.Streams, r.Breaks)
			}
			unfailing(t, r, 0)
			if now := owner(t, m); (now != n) != c.moves {
				t.Errorf("%s has the VIP, %s had it", now.Name, n.Name)
			}
		})
		if err := os.Remove(n.Program()); err != nil {
			t.Log(err) // it was not there
		}
		if err := os.Symlink(good, n.Program()); err != nil {
			t.Fatal(err)
		}
	}
	pid := upgrade(t, n)
	succeeded(t, n, pid)
	healthy(t, m)
}
