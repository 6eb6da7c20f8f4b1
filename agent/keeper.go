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
	// announce and silence tell the segment; neither blocks. An announced hold is silenced
	// later, never before.
	announce func(ownership.Hold)
	silence  func(vip string)
	// take and give are called before an address is put on, and before it is taken off
	// because it goes to another member; held each time it was put on or renewed. They
	// return within moments, whatever hangs.
	take, give, held func(ownership.Hold)
	now              func() ownership.Instant
	log              hclog.Logger

	slots []*slot
	wake  chan struct{} // one token: put on or renew now
}

// slot is one VIP.
type slot struct {
	addr vip.Address
	wake chan struct{} // one token: the hold has changed
	mu   sync.Mutex
	hold ownership.Hold
	// lapsed: taken off because the right lapsed; put on again if the machine, which was
	// late, finds that it had been confirmed in time.
	lapsed bool
	closed bool // the agent ends: nothing is put on any more
}

func newKeeper(k kernel, addresses []vip.Address, lifetime time.Duration, log hclog.Logger) *keeper {
	keep := &keeper{kernel: k, lifetime: lifetime, now: now, log: log, wake: make(chan struct{}, 1)}
	for _, a := range addresses {
		a.Lifetime = lifetime
		keep.slots = append(keep.slots, &slot{addr: a, wake: make(chan struct{}, 1)})
	}
	return keep
}

func (k *keeper) String() string { return "address keeper" }

// set takes the desired state, one hold per VIP in the slots' order; a witness gets holds
// too, and has no slots. It never blocks.
func (k *keeper) set(holds []ownership.Hold) {
	for i, s := range k.slots {
		h := holds[i]
		s.mu.Lock()
		changed := h.Gen != s.hold.Gen
		again := s.lapsed && h.On && k.now() < h.Until
		sooner := h.On && h.Until < s.hold.Until
		if changed || again {
			s.lapsed = false
		}
		s.hold = h
		s.mu.Unlock()
		if changed || again || sooner {
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
		if s.hold.On && !s.closed && k.now() < s.hold.Until {
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
	due := func() <-chan time.Time { return time.After(k.now().UntilNext(k.lifetime / 6)) }
	renew := due()
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
		case <-renew:
			renew = due() // begins now: what takes long does not put it off
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
	current := s.hold.Gen == before.Gen && !s.lapsed && !s.closed
	if current && has {
		// Under the lock: whoever takes the address off changes the slot first, and then
		// silences it.
		k.announce(before)
	}
	s.mu.Unlock()
	if !current {
		return
	}
	if has {
		k.held(before)
	}
	k.report(ownership.AddressState{VIP: s.addr.VIP, Held: has, Gen: before.Gen})
}

// withdraw takes one address off when it is told to, the right lapses, or ctx ends.
func (k *keeper) withdraw(ctx context.Context, s *slot) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var done uint64 // generation that is carried out
	for {
		s.mu.Lock()
		hold, wasLapsed := s.hold, s.lapsed
		lapsed := hold.On && k.now() >= hold.Until
		s.lapsed = lapsed
		s.mu.Unlock()
		switch {
		case !hold.On && hold.Gen != done, lapsed && !wasLapsed:
			if !hold.On {
				k.give(hold)
			}
			k.silence(s.addr.VIP)
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
			// A single member's right has no deadline, and Go's timers have a longest time.
			timer.Reset(min(hold.Until.Sub(k.now()), time.Hour))
		default:
			timer.Reset(time.Hour)
		}
		select {
		case <-ctx.Done():
			k.close(s)
			return
		case <-s.wake:
		case <-timer.C:
		}
	}
}

// close takes an address off that is still on when the agent ends: nobody renews its right
// any more, however long the rest of the agent takes to end.
func (k *keeper) close(s *slot) {
	s.mu.Lock()
	s.closed = true
	on := s.hold.On
	s.mu.Unlock()
	if on {
		k.silence(s.addr.VIP)
		if err := k.kernel.Withdraw(s.addr.Addr); err != nil {
			k.log.Error("could not take an address off; a sweep follows", "vip", s.addr.VIP, "error", err)
		}
	}
}
