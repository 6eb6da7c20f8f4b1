package agent_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// TestRollingRestart moves the VIP of a mesh under load, and restarts one agent after the
// other: each drained before, as an operator does it, and then not.
func TestRollingRestart(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60})
	owner(t, m)
	healthy(t, m)
	t.Run("three moves in ten seconds", func(t *testing.T) {
		moveUnderLoad(t, m, m.VIP(), m.Client.Sources, m.Recorder, func(to *lab.Node) { move(t, m, to) })
	})
	t.Run("drained before", func(t *testing.T) {
		// Connections are cut with the agent that relays them, so what a drain has not seen
		// end by then breaks; nothing else does.
		byRestart, byMove, r := roll(t, m, drainFirst)
		if byMove > brokenAtMost() {
			t.Errorf("%d streams broke that no restarted agent had: %v", byMove, r.Breaks)
		}
		if byRestart == 0 {
			t.Error("no agent had a stream when it was restarted")
		}
		unfailing(t, r, 0)
	})
	if raceDetector {
		return // what follows is about the product's own times
	}
	t.Run("as they are", func(t *testing.T) {
		_, byMove, r := roll(t, m, restartOnly)
		if byMove > brokenAtMost() {
			t.Errorf("%d streams broke that no restarted agent had: %v", byMove, r.Breaks)
		}
		unfailing(t, r, r.Requests/100)
	})
}

// preparation is what happens to a node before its agent is restarted.
type preparation int

const (
	_ preparation = iota
	drainFirst
	restartOnly
)

// roll restarts every agent under load. It returns how many streams broke while the agent
// was restarted that may have had them, and how many at any other time.
func roll(t *testing.T, m *lab.Mesh, p preparation) (byRestart, byMove int, r lab.Report) {
	t.Helper()
	const streams = 60
	run := load(t, m, lab.Load{Rate: 100, Streams: streams})
	from := time.Now()
	awaitStreams(t, run, from, streams)
	from = time.Now()
	type window struct{ from, to time.Time }
	var restarts []window
	for _, n := range m.Nodes {
		if p == drainFirst {
			stdout, stderr, status, err := n.Hactl("drain", n.Name, "--wait", "--timeout", "3s")
			if err != nil || status > 1 {
				t.Fatalf("drain %s: status %d, %v\n%s%s", n.Name, status, err, stdout, stderr)
			}
			t.Logf("%s: %s%s", n.Name, stdout, stderr)
			if now := m.Recorder.Now(); len(now) != 1 || now[0] == n.Name {
				t.Fatalf("%s is drained, and the kernels with the address are those of %v", n.Name, now)
			}
		}
		w := window{from: time.Now()}
		if err := n.StopAgent(); err != nil {
			t.Fatal(err)
		}
		w.to = time.Now().Add(100 * time.Millisecond) // until the last client has noticed
		restarts = append(restarts, w)
		if err := n.StartAgent(); err != nil {
			t.Fatal(err)
		}
		if p == drainFirst {
			everywhere(t, m, nodeIs(n.Name, hameshv1.NodeState_NODE_STATE_DRAINED))
			hactl(t, n, 0, "", "undrain", n.Name)
		}
		healthy(t, m)
		// Clients of its API server come back slowly; and a new round begins with streams.
		if err := lab.Await(10*time.Second, func() error {
			if now := m.Recorder.Now(); len(now) != 1 {
				return fmt.Errorf("the kernels with the address are those of %v", now)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
	}
	to := time.Now()
	samples, err := run.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range samples {
		if s.Kind != lab.Broken || s.End.Before(from) || s.End.After(to) {
			continue
		}
		if slices.ContainsFunc(restarts, func(w window) bool { return !s.End.Before(w.from) && !s.End.After(w.to) }) {
			byRestart++
		} else {
			byMove++
		}
	}
	r = lab.Summarize(samples, from, to)
	t.Logf("%d streams: %d broke with the agent that was restarted, %d otherwise %v; %d requests, %d failed %v, longest gap %v",
		r.Streams, byRestart, byMove, r.Breaks, r.Requests, r.Failed, r.Errors, r.Gap)
	return byRestart, byMove, r
}
