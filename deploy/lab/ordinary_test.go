//go:build linux

package lab_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// TestOrdinary checks what patient clients report of a server that answers, is lost, and
// is silent.
func TestOrdinary(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, Clients: 5})
	node := m.Nodes[0]
	const delay = 100 * time.Millisecond
	run, err := m.Client.StartOrdinary(lab.Ordinary{
		Target: direct(node), Calls: 50, Connections: 5, Slow: 5, Watches: 5, Delay: delay, SlowDelay: 10 * time.Second,
	})
	must(t, err)
	kinds := func(samples []lab.Sample, is func(lab.Sample) bool) map[lab.Kind]int {
		n := make(map[lab.Kind]int)
		for _, s := range samples {
			if is(s) {
				n[s.Kind]++
			}
		}
		return n
	}
	must(t, lab.Await(soon, func() error {
		if n := kinds(run.Samples(), func(s lab.Sample) bool { return s.Error == "" }); n[lab.Call] < 10 || n[lab.Kept] < 10 {
			return fmt.Errorf("wait for answers: %v", n)
		}
		return nil
	}))
	must(t, lab.Await(soon, func() error {
		pending, err := run.UnderWay()
		if n := kinds(pending, func(s lab.Sample) bool { return s.Unfinished && !s.Connected.IsZero() }); n[lab.Watch] != 5 || n[lab.Kept] != 10 {
			return fmt.Errorf("under way: %v, %w", n, err)
		}
		return err
	}))
	killed := time.Now()
	must(t, node.API.Kill())
	must(t, lab.Await(soon, func() error {
		n := kinds(run.Samples(), func(s lab.Sample) bool { return s.Error != "" && s.Connected.Before(killed) && !s.Connected.IsZero() })
		if n[lab.Watch] != 5 || n[lab.Kept] < 8 { // the others were between two requests
			return fmt.Errorf("wait for errors: %v", n)
		}
		return nil
	}))
	must(t, node.API.Start())
	must(t, node.API.Freeze())
	frozen := time.Now()
	time.Sleep(10 * delay)
	samples, err := run.Stop()
	must(t, err)

	if w := lab.Judge(samples, []lab.Fault{{At: killed, Node: node.Name}}, nil, time.Second); w.Connected < 8 || w.Known < time.Millisecond || w.Known > time.Second || w.Unfinished == 0 {
		t.Errorf("%d were connected and knew after %s, %d unfinished", w.Connected, w.Known, w.Unfinished)
	}
	ports := make(map[string]bool)
	for _, s := range samples {
		switch {
		case s.Error == "" && !s.Unfinished:
			if s.Backend != node.Name || s.Connected.IsZero() || s.Port == 0 || s.End.Sub(s.Start) < delay {
				t.Fatalf("an answer: %+v", s)
			}
			if s.Kind == lab.Kept {
				ports[fmt.Sprint(s.Source, s.Port)] = true
			}
		case s.Unfinished && s.End.Sub(frozen) < 10*delay:
			t.Errorf("unfinished before the end: %+v", s)
		}
	}
	if len(ports) > 10 {
		t.Errorf("kept connections had %d ports, so they were not kept", len(ports))
	}
}
