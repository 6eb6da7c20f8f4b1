package announce

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
)

var (
	vip4 = Target{"four", netip.MustParseAddr("10.77.0.100"), "eth0"}
	vip6 = Target{"six", netip.MustParseAddr("fd77::100"), "eth0"}
)

const ms = time.Millisecond

// lost is the name of a VIP that may not be announced.
const lost = "lost"

// memory is a wire that remembers when it was used.
type memory struct {
	start time.Time
	slow  time.Duration

	mu   sync.Mutex
	sent map[string][]time.Duration
	err  error
}

func (m *memory) announce(t Target) error {
	time.Sleep(m.slow)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.sent[t.VIP] = append(m.sent[t.VIP], time.Since(m.start))
	return nil
}

func (m *memory) close() {}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// times returns what was sent for the VIP since it was last asked.
func (m *memory) times(vip string) []time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.sent[vip]
	delete(m.sent, vip)
	return d
}

// inBubble runs f with an announcer on a wire in memory, by a clock that jumps.
func inBubble(t *testing.T, f func(t *testing.T, a *Announcer, m *memory, first func() []First)) {
	synctest.Test(t, func(t *testing.T) {
		var firsts []First
		a := New(hclog.NewNullLogger(), Config{
			LeaseTTL:  3 * time.Second,
			May:       func(vip string) bool { return vip != lost },
			Announced: func(f First) { firsts = append(firsts, f) },
		})
		m := &memory{start: time.Now(), sent: make(map[string][]time.Duration)}
		a.open = func() (wire, error) { return m, nil }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- a.Run(ctx) }()
		f(t, a, m, func() []First {
			synctest.Wait()
			return firsts
		})
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func want(t *testing.T, got []time.Duration, want ...time.Duration) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("announced at %v, want %v", got, want)
	}
}

var burst = []time.Duration{0, 20 * ms, 100 * ms, 300 * ms, 1100 * ms, 2200 * ms, 3100 * ms}

func TestBeats(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, first func() []First) {
		a.Start(vip4, 7)
		time.Sleep(34 * time.Second)
		want(t, m.times("four"), append(slices.Clone(burst), 13100*ms, 23100*ms, 33100*ms)...)
		if got := first(); !slices.Equal(got, []First{{"four", 7, 0}}) {
			t.Errorf("first announcements: %v", got)
		}
		if s, ok := a.Stats("four"); !ok || s != (Stats{Sent: 10}) {
			t.Errorf("stats %+v %t", s, ok)
		}
	})
}

func TestStartAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, first func() []First) {
		a.Start(vip4, 7)
		time.Sleep(5 * time.Second)
		m.times("four")
		a.Start(vip4, 7)
		time.Sleep(time.Second)
		want(t, m.times("four"))
		a.Start(vip4, 8)
		time.Sleep(50 * ms)
		want(t, m.times("four"), 6*time.Second, 6020*ms)
		if got := first(); !slices.Equal(got, []First{{"four", 7, 0}, {"four", 8, 0}}) {
			t.Errorf("first announcements: %v", got)
		}
	})
}

func TestStop(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, _ func() []First) {
		a.Start(vip4, 7)
		a.Start(vip6, 7)
		time.Sleep(50 * ms)
		a.Stop("four")
		a.Stop("four")
		a.Refresh("four")
		time.Sleep(time.Second)
		want(t, m.times("four"), 0, 20*ms)
		want(t, m.times("six"), 0, 20*ms, 100*ms, 300*ms)
		if _, ok := a.Stats("four"); ok {
			t.Error("stopped, and has statistics")
		}
	})
}

func TestRefresh(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, _ func() []First) {
		a.Start(vip4, 7)
		time.Sleep(5 * time.Second)
		m.times("four")
		a.Refresh("four")
		time.Sleep(5 * time.Second)
		want(t, m.times("four"), 5000*ms, 6100*ms)
		// Asked for without end, it keeps its distance.
		for range 95 {
			a.Refresh("four")
			time.Sleep(10 * ms)
		}
		a.Stop("four")
		want(t, m.times("four"), 10000*ms, 10200*ms, 10400*ms, 10600*ms, 10800*ms)
	})
}

func TestFailuresAreTriedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, first func() []First) {
		broken := errors.New("broken")
		m.fail(broken)
		a.Start(vip4, 7)
		time.Sleep(150 * ms)
		if s, _ := a.Stats("four"); s != (Stats{Failed: 3, Err: broken}) {
			t.Errorf("stats %+v", s)
		}
		if got := first(); len(got) > 0 {
			t.Errorf("first announcements: %v", got)
		}
		m.fail(nil)
		time.Sleep(time.Second)
		want(t, m.times("four"), 300*ms, 1100*ms)
		if got := first(); !slices.Equal(got, []First{{"four", 7, 300 * ms}}) {
			t.Errorf("first announcements: %v", got)
		}
		if s, _ := a.Stats("four"); s != (Stats{Sent: 2, Failed: 3}) {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestLateBeatsAreNotMadeUpFor(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, _ func() []First) {
		m.slow = 250 * ms
		a.Start(vip4, 7)
		time.Sleep(time.Second)
		want(t, m.times("four"), 250*ms, 550*ms)
	})
}

func TestRunFailsWithoutSockets(t *testing.T) {
	a := New(hclog.NewNullLogger(), Config{LeaseTTL: time.Second})
	broken := errors.New("broken")
	a.open = func() (wire, error) { return nil, broken }
	if err := a.Run(t.Context()); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
}

// What is due may not go out if the VIP has been lost meanwhile.
func TestAnnouncerAsks(t *testing.T) {
	inBubble(t, func(t *testing.T, a *Announcer, m *memory, first func() []First) {
		a.Start(vip4, 1)
		a.Start(Target{lost, vip4.Addr, "eth0"}, 1)
		time.Sleep(time.Minute)
		if sent := m.times(lost); len(sent) > 0 {
			t.Errorf("announced after %v though it may not be", sent)
		}
		if len(m.times("four")) == 0 || len(first()) != 1 {
			t.Error("the other one was not announced")
		}
	})
}
