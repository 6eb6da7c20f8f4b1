package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// handing waits until a node forwards packets of unknown connections, and keeps connections,
// or does not.
func handing(t *testing.T, m *lab.Mesh, n *lab.Node, forwards, keeps bool) {
	t.Helper()
	if err := lab.Await(3*time.Second, func() error {
		f, k, err := n.Handing(m.VIP().Addr())
		if err == nil && (f != forwards || k != keeps) {
			err = fmt.Errorf("%s forwards: %v, keeps: %v; want %v, %v", n.Name, f, k, forwards, keeps)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// onlyTheAddress waits until of all that agents do to a node, nothing is there but the
// address with its holder.
func onlyTheAddress(t *testing.T, m *lab.Mesh) {
	t.Helper()
	if err := lab.Await(5*time.Second, func() error {
		holders := m.Recorder.Now()
		for _, n := range m.Nodes {
			left, err := n.Remains()
			if err != nil {
				return err
			}
			holds := slices.Equal(holders, []string{n.Name})
			if holds != (len(left) == 1) || holds && !strings.HasPrefix(left[0], "address "+m.VIP().Addr().String()+"/") {
				return fmt.Errorf("the address is with %v; %s has %v", holders, n.Name, left)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// over waits until every watch has ended, and returns when the last one did.
func (w *watches) over(t *testing.T, from time.Time) (last time.Duration, reset, closed int) {
	t.Helper()
	if err := lab.Await(10*time.Second, func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if reset, closed = len(w.ends), len(w.eofs); reset+closed < len(w.conns) {
			return fmt.Errorf("of %d watches %d were reset, %d closed, others have %v", len(w.conns), reset, closed, w.wrong)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, at := range slices.Concat(w.ends, w.eofs) {
		last = max(last, at.Sub(from))
	}
	return last, reset, closed
}

// TestDeathDuringDrain has a node die, in the ways there are, while it serves connections of
// a VIP that it gave away: its clients know as soon as those of an owner that dies, the new
// owner forwards no more, and when it is back, nothing of its earlier life is left.
func TestDeathDuringDrain(t *testing.T) {
	const each = 20
	m := newMesh(t, lab.Options{Clients: 5 * each})
	owner(t, m)
	healthy(t, m)
	// Each time with other addresses: for a minute a node knows the ports of connections that
	// ended with its agent, and its kernel then answers for new ones with the same.
	sources := slices.Collect(slices.Chunk(m.Client.Sources, each))
	for i, c := range []struct {
		name      string
		die, back func(*lab.Node) error
	}{
		{"agent killed", (*lab.Node).KillAgent, (*lab.Node).StartAgent},
		{"agent and guard killed", (*lab.Node).KillAll, (*lab.Node).StartAgent},
		{"power cut", (*lab.Node).PowerOff, (*lab.Node).PowerOn},
		{
			"link cut and agent frozen",
			func(n *lab.Node) error { return errors.Join(n.Port().Isolate(), n.Freeze()) },
			func(n *lab.Node) error { return errors.Join(n.Port().Rejoin(), n.Thaw()) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			giver := owner(t, m)
			w := openWatchesFrom(t, m, 200, sources[i])
			time.Sleep(1500 * time.Millisecond) // the others know of them
			taker := m.Nodes[0]
			if taker == giver {
				taker = m.Nodes[1]
			}
			move(t, m, taker)
			handing(t, m, giver, false, true)
			handing(t, m, taker, true, false)
			time.Sleep(500 * time.Millisecond)
			died := time.Now()
			if err := c.die(giver); err != nil {
				t.Fatal(err)
			}
			last, reset, closed := w.over(t, died)
			handing(t, m, taker, false, false)
			t.Logf("%d of its clients were reset, %d closed, the last one after %v", reset, closed, last)
			if last < 0 {
				t.Errorf("a connection ended before: the move broke it")
			}
			if last > 3*time.Second {
				t.Errorf("the last client knew %v after its death", last)
			}
			if err := c.back(giver); err != nil {
				t.Fatal(err)
			}
			healthy(t, m)
			onlyTheAddress(t, m)
		})
	}
	t.Run("the owner and its guard killed while it forwards", func(t *testing.T) {
		giver := owner(t, m)
		w := openWatchesFrom(t, m, 50, sources[4])
		taker := m.Nodes[0]
		if taker == giver {
			taker = m.Nodes[1]
		}
		move(t, m, taker)
		handing(t, m, taker, true, false)
		if err := taker.KillAll(); err != nil {
			t.Fatal(err)
		}
		if err := taker.StartAgent(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
		handing(t, m, taker, false, false)
		for _, c := range w.conns {
			c.Close()
		}
		onlyTheAddress(t, m)
	})
}

// TestKeptOutliveTheForwarder cuts the owner off while a drained node still serves connections
// that it had before: whoever takes the VIP sends their packets on to it, though nobody has
// given it the VIP.
func TestKeptOutliveTheForwarder(t *testing.T) {
	m := newMesh(t, lab.Options{})
	healthy(t, m)
	keeper := owner(t, m)
	run := load(t, m, lab.Load{Streams: 40, Interval: 50 * time.Millisecond})
	if err := lab.Await(10*time.Second, func() error {
		if r := lab.Summarize(run.Samples(), time.Time{}, time.Now()); r.Streams < 40 {
			return fmt.Errorf("%d of 40 streams have begun", r.Streams)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status, err := keeper.Hactl("drain", keeper.Name); err != nil || status != 0 {
		t.Fatalf("drain: %d %s %v", status, stderr, err)
	}
	var forwarder *lab.Node
	if err := lab.Await(10*time.Second, func() error {
		n, err := m.WaitOwner(0)
		if err == nil && n == keeper {
			err = fmt.Errorf("%s still has the VIP", n.Name)
		}
		forwarder = n
		return err
	}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // the segment has turned
	cut := time.Now()
	if err := forwarder.Port().Isolate(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	r := lab.Summarize(run.Samples(), cut, time.Now())
	t.Logf("%s was cut, which forwarded to %s: %d of %d streams broke %v, longest silence %v", forwarder.Name, keeper.Name, r.Broken, r.Streams, r.Breaks, r.Silence)
	samples, err := run.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range samples {
		if s.Kind == lab.Broken && s.End.After(cut) && s.Backend != forwarder.Name {
			t.Errorf("the stream of %v with the API server of %s broke: %s", s.Source, s.Backend, s.Error)
		}
	}
	if r.Silence > 2*time.Second {
		t.Errorf("a stream was silent for %v", r.Silence)
	}
	if err := forwarder.Port().Rejoin(); err != nil {
		t.Fatal(err)
	}
}
