package agent_test

import (
	"context"
	"errors"
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

// TestCrashTellsIdleClients cuts the owner's power: clients that only wait learn it from
// the next owner, in milliseconds and not when they next speak.
func TestCrashTellsIdleClients(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 20})
	n := owner(t, m)
	healthy(t, m)
	w := openWatches(t, m, 1000)
	time.Sleep(1500 * time.Millisecond) // the others know of them
	cut := time.Now()
	if err := n.PowerOff(); err != nil {
		t.Fatal(err)
	}
	middle, last := w.after(t, cut)
	h := m.Recorder.Between(cut, time.Now())
	taken := h.Spans[len(h.Spans)-1].From
	t.Logf("after the cut: taken over %v, half of the clients know %v, all %v", taken.Sub(cut), middle, last)
	if last > 3*time.Second {
		t.Errorf("the last client knew %v after the cut", last)
	}
}
