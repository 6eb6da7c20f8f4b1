package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// watches are connections through the VIP on which nobody says anything.
type watches struct {
	conns []net.Conn
	ended sync.WaitGroup

	mu    sync.Mutex
	ends  []time.Time // of those that were reset
	eofs  []time.Time // of those that were closed in order
	wrong []error     // what they had that was neither
}

func openWatches(t *testing.T, m *lab.Mesh, n int) *watches {
	t.Helper()
	return openWatchesFrom(t, m, n, m.Client.Sources)
}

func openWatchesFrom(t *testing.T, m *lab.Mesh, n int, sources []netip.Addr) *watches {
	t.Helper()
	w := &watches{}
	t.Cleanup(func() {
		for _, c := range w.conns {
			c.Close()
		}
		w.ended.Wait()
	})
	for i := range n {
		dialer := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: sources[i%len(sources)].AsSlice()}}
		c, err := m.Client.Host.DialContext(context.Background(), &dialer, "tcp", m.VIP().String())
		if err != nil {
			t.Fatal(err)
		}
		w.conns = append(w.conns, c)
		w.ended.Go(func() {
			_, err := c.Read(make([]byte, 1))
			w.mu.Lock()
			defer w.mu.Unlock()
			if errors.Is(err, unix.ECONNRESET) {
				w.ends = append(w.ends, time.Now())
			} else if errors.Is(err, io.EOF) {
				w.eofs = append(w.eofs, time.Now())
			} else if !errors.Is(err, net.ErrClosed) {
				w.wrong = append(w.wrong, err)
			}
		})
	}
	return w
}

// after returns how long after a moment the middle one and the last one of all knew.
func (w *watches) after(t *testing.T, from time.Time) (middle, last time.Duration) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		w.mu.Lock()
		ends, eofs, wrong := slices.Clone(w.ends), len(w.eofs), w.wrong
		w.mu.Unlock()
		if len(ends)+eofs+len(wrong) == len(w.conns) || time.Now().After(deadline) {
			if len(ends) != len(w.conns) {
				t.Fatalf("%d of %d watches were reset, %d closed; others have %v", len(ends), len(w.conns), eofs, wrong)
			}
			slices.SortFunc(ends, time.Time.Compare)
			return ends[len(ends)/2].Sub(from), ends[len(ends)-1].Sub(from)
		}
		time.Sleep(time.Millisecond)
	}
}

// noticed waits until a node's agent relays so many connections: the client of one that it
// has not accepted yet, and that never sends anything, cannot be told.
func noticed(t *testing.T, n *lab.Node, connections uint32) {
	t.Helper()
	if err := lab.Await(10*time.Second, func() error {
		status, err := n.Status()
		if err != nil {
			return err
		}
		relayed := uint32(0)
		for _, b := range status.GetBackends() {
			relayed += b.GetConnections()
		}
		if relayed < connections {
			return fmt.Errorf("%s relays %d of %d connections", n.Name, relayed, connections)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestCrashTellsIdleClients cuts the owner's power: clients that only wait learn it from
// the next owner, in milliseconds and not when they next speak, also those that have just
// connected.
func TestCrashTellsIdleClients(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 20})
	n := owner(t, m)
	healthy(t, m)
	w := openWatches(t, m, 1000)
	noticed(t, n, 1000)
	cut := time.Now()
	if err := n.PowerOff(); err != nil {
		t.Fatal(err)
	}
	middle, last := w.after(t, cut)
	h := m.Recorder.Between(cut, time.Now())
	taken := h.Spans[len(h.Spans)-1].From
	t.Logf("after the cut: taken over %v, half of the clients know %v, all %v", taken.Sub(cut), middle, last)
	if last > 2*time.Second {
		t.Errorf("the last client knew %v after the cut", last)
	}
}

// TestSamePortElsewhere has a client use the port again from which it was connected with the
// owner before: nothing of that connection may be left there when the VIP comes back, or the
// kernel would take the next one's packets for it, and never reset it.
func TestSamePortElsewhere(t *testing.T) {
	m := newMesh(t, lab.Options{Witnesses: 1})
	healthy(t, m)
	const port = 45000
	connect := func() (ended chan error) {
		t.Helper()
		dialer := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: m.Client.Sources[0].AsSlice(), Port: port}}
		c, err := m.Client.Host.DialContext(context.Background(), &dialer, "tcp", m.VIP().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ended = make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			c.Close()
			ended <- err
		}()
		return ended
	}
	for range 2 { // to the other candidate, and back
		n := owner(t, m)
		ended := connect()
		noticed(t, n, 1)
		cut := time.Now()
		if err := n.Port().Isolate(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the connection with %s ended with %v, want a reset", n.Name, err)
			}
			t.Logf("reset %v after %s was cut", time.Since(cut), n.Name)
		case <-time.After(5 * time.Second):
			t.Errorf("the connection with %s was not reset", n.Name)
		}
		if err := n.Port().Rejoin(); err != nil {
			t.Fatal(err)
		}
		healthy(t, m)
	}
}

// TestClientsUnheardOfAreTold lets clients connect while the only other candidate does not hear
// the owner, and then cuts the owner off: a third member knows who they are.
func TestClientsUnheardOfAreTold(t *testing.T) {
	m := newMesh(t, lab.Options{Witnesses: 1})
	n := owner(t, m)
	healthy(t, m)
	other := m.Nodes[0]
	if other == n {
		other = m.Nodes[1]
	}
	lift, err := m.Switch.Partition(lab.Frames{}, []*lab.Port{n.Port()}, []*lab.Port{other.Port()})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second) // long unheard
	if now := owner(t, m); now != n {
		t.Fatalf("%s owns the VIP, %s did", now.Name, n.Name)
	}
	const clients = 50
	w := openWatches(t, m, clients)
	noticed(t, n, clients)
	cut := time.Now()
	if err := n.Port().Isolate(); err != nil {
		t.Fatal(err)
	}
	_, last := w.after(t, cut)
	t.Logf("all clients know %v after the cut", last)
	if last > 3*time.Second {
		t.Errorf("the last client knew %v after the cut", last)
	}
	if err := errors.Join(lift(), n.Port().Rejoin()); err != nil {
		t.Fatal(err)
	}
}
