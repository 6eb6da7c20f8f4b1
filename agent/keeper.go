package agent

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/vip"
)

// kernel is what the keeper needs of package vip.
type kernel interface {
	Set(desired func() []vip.Address) (held []vip.Address, err error)
	Withdraw(netip.Addr) error
}

// keeper makes the desired addresses true and says what the kernel really has.
//
// Putting on and renewing is one goroutine's work; taking off is another's per VIP, with
// a timer of its own: it takes the address off when it is told to, or when the right
// lapses and nobody has said more, however long anything else hangs.
type keeper struct {
	kernel   kernel
	lifetime time.Duration
	report   func(ownership.AddressState)
	// onHeld and onGone are called when an address has come to be there for an epoch, and
	// when it is there no more.
	onHeld func(vip string, epoch int64)
	onGone func(vip string)
	// take and give are called before an address is put on, and before it is taken off
	// because it goes to another member.
	take, give func(ownership.Hold)
	log        hclog.Logger

	slots []*slot
	wake  chan struct{} // one token: put on or renew now
}

// slot is one VIP.
type slot struct {
	addr  vip.Address
	wake  chan struct{} // one token: the hold has changed
	mu    sync.Mutex
	hold  ownership.Hold
	until time.Time // when the right lapses, on Go's monotonic clock
	// lapsed: taken off because the right lapsed; put on again if the machine, which was
	// late, finds that it had been confirmed in time.
	lapsed bool
}

func newKeeper(k kernel, addresses []vip.Address, lifetime time.Duration, log hclog.Logger) *keeper {
	keep := &keeper{kernel: k, lifetime: lifetime, log: log, wake: make(chan struct{}, 1)}
	for _, a := range addresses {
		a.Lifetime = lifetime
		keep.slots = append(keep.slots, &slot{addr: a, wake: make(chan struct{}, 1)})
	}
	return keep
}

func (k *keeper) String() string { return "address keeper" }

// set takes the desired state, one hold per slot in the slots' order. It never blocks.
func (k *keeper) set(holds []ownership.Hold, at ownership.Instant) {
	for i, h := range holds {
		s := k.slots[i]
		// A single member's right has no deadline; a day is as good, and renewed all along.
		left := min(h.Until.Sub(at), 24*time.Hour)
		s.mu.Lock()
		changed := h.Gen != s.hold.Gen
		again := s.lapsed && h.On && left > 0
		if changed || again {
			s.lapsed = false
		}
		s.hold, s.until = h, time.Now().Add(left)
		s.mu.Unlock()
		if changed || again {
			poke(s.wake)
		}
		if h.On && (changed || again) {
			poke(k.wake)
		}
	}
}

// refresh puts on again what is missing, now.
func (k *keeper) refresh() { poke(k.wake) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// desired lists what may be on now.
func (k *keeper) desired() (want []vip.Address) {
	for _, s := range k.slots {
		s.mu.Lock()
		if s.hold.On && time.Now().Before(s.until) {
			want = append(want, s.addr)
		}
		s.mu.Unlock()
	}
	return want
}

// run puts on and renews until ctx ends.
func (k *keeper) run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	for _, s := range k.slots {
		group.Go(func() { k.withdraw(ctx, s) })
	}
	gens := make([]ownership.Hold, len(k.slots))
	taken := make([]uint64, len(k.slots)) // generations for which take was called
	renew := time.NewTicker(k.lifetime / 6)
	defer renew.Stop()
	for {
		for i, s := range k.slots {
			s.mu.Lock()
			gens[i] = s.hold
			s.mu.Unlock()
			if h := gens[i]; h.On && taken[i] != h.Gen {
				taken[i] = h.Gen
				k.take(h)
			}
		}
		held, err := k.kernel.Set(k.desired)
		if err != nil {
			k.log.Error("could not put every address on", "error", err)
		}
		for i, s := range k.slots {
			k.observed(s, gens[i], held)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-k.wake:
		case <-renew.C:
		}
	}
}

// observed reports one address that was put on, if that is still what is wanted.
func (k *keeper) observed(s *slot, before ownership.Hold, held []vip.Address) {
	if !before.On {
		return // the withdrawer reports
	}
	has := false
	for _, a := range held {
		has = has || (a.Addr == s.addr.Addr && a.Interface == s.addr.Interface)
	}
	s.mu.Lock()
	current := s.hold.Gen == before.Gen
	s.mu.Unlock()
	if !current {
		return
	}
	if has {
		k.onHeld(s.addr.VIP, before.Epoch)
	}
	k.report(ownership.AddressState{VIP: s.addr.VIP, Held: has, Gen: before.Gen})
}

// withdraw takes one address off when it is told to or the right lapses.
func (k *keeper) withdraw(ctx context.Context, s *slot) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var done uint64 // generation that is carried out
	for {
		s.mu.Lock()
		hold, until, wasLapsed := s.hold, s.until, s.lapsed
		lapsed := hold.On && !time.Now().Before(until)
		s.lapsed = lapsed
		s.mu.Unlock()
		switch {
		case !hold.On && hold.Gen != done, lapsed && !wasLapsed:
			if !hold.On {
				k.give(hold)
			}
			k.onGone(s.addr.VIP)
			if err := k.kernel.Withdraw(s.addr.Addr); err != nil {
				k.log.Error("could not take an address off", "vip", s.addr.VIP, "error", err)
				s.mu.Lock()
				s.lapsed = false // so that it is tried again
				s.mu.Unlock()
				timer.Reset(10 * time.Millisecond) // until the kernel obeys, or its lifetime ends
				break
			}
			if !hold.On {
				done = hold.Gen
			}
			k.report(ownership.AddressState{VIP: s.addr.VIP, Held: false, Gen: hold.Gen})
			continue
		case hold.On && !lapsed:
			timer.Reset(time.Until(until))
		default:
			timer.Reset(time.Hour)
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
	}
}
