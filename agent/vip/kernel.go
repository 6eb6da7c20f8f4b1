package vip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Errors of this package; use errors.Is.
var (
	// ErrNotManaged is returned for an address that Open was not told of.
	ErrNotManaged = errors.New("not a managed address")
	// ErrNoInterface is returned where the interface does not exist.
	ErrNoInterface = errors.New("no such interface")
	// ErrPermission is returned where the kernel refuses for want of a capability.
	ErrPermission = errors.New("not permitted, CAP_NET_ADMIN is needed")
	// ErrNoIPv6 is returned for an IPv6 address on an interface that has none.
	ErrNoIPv6 = errors.New("IPv6 is switched off there (sysctl disable_ipv6)")
	// ErrRemains is returned where an address is still on although it was taken off.
	ErrRemains = errors.New("address is still on")
)

// Address is a VIP on an interface.
type Address struct {
	VIP       string     // the VIP's name
	Addr      netip.Addr // IPv4 or IPv6, without a zone
	Interface string
	// Lifetime is after what time the kernel takes the address off by itself, if it is
	// not renewed by then: at least one second, cut to whole seconds, which is what
	// rtnetlink counts in (struct ifa_cacheinfo). In a result it is what is left; zero
	// means without limit. Open ignores it.
	Lifetime time.Duration
}

// place is one address on one interface, as the operating system has it.
type place struct {
	addr  netip.Addr
	bits  int
	index int    // of the interface
	iface string // its name
	valid time.Duration
}

// system is one connection to the operating system's address table.
type system interface {
	// index finds an interface. It wraps ErrNoInterface.
	index(iface string) (int, error)
	// list returns where the addresses that match are, on any interface.
	list(match func(netip.Addr) bool) ([]place, error)
	// put adds the address or renews its lifetime.
	put(place) error
	// reached says whether what comes for the address on its interface is delivered here.
	reached(place) bool
	// remove takes the address off; one that is not there is no error.
	remove(place) error
	close()
}

// slot is one managed address.
type slot struct {
	Address

	withdrawn atomic.Uint64 // number of Withdraw calls so far

	mu    sync.Mutex // held for one change of the address table, never longer
	index int        // interface it was put on last, or belongs on; 0: not known
	on    bool       // put on, and not taken off since
}

// Kernel is the operating system's address table as far as the managed addresses go.
// Its methods may be called at the same time.
type Kernel struct {
	log     hclog.Logger
	slots   []*slot
	set     system
	off     system // deletes for Withdraw, which so never queues behind Set,
	back    system // reads back for Withdraw: nor behind another address's reading
	notices source

	closing context.Context // ends with Close
	close   context.CancelFunc
	watch   sync.WaitGroup
	watched atomic.Bool

	mu sync.Mutex // one Set or Sweep at a time
}

func newKernel(log hclog.Logger, managed []Address, set, off, back system, notices source) (*Kernel, error) {
	k := &Kernel{log: log, set: set, off: off, back: back, notices: notices}
	k.closing, k.close = context.WithCancel(context.Background())
	for _, a := range managed {
		if !a.Addr.IsValid() || a.Addr.Zone() != "" || a.Addr.Is4In6() {
			return nil, fmt.Errorf("vip %s: %v is not a plain IPv4 or IPv6 address", a.VIP, a.Addr)
		}
		if k.slot(a.Addr) != nil {
			return nil, fmt.Errorf("vip %s: %v is named twice", a.VIP, a.Addr)
		}
		s := &slot{Address: a}
		// An interface may appear later; Set says so if it is missing then.
		if i, err := set.index(a.Interface); err == nil {
			s.index = i
		}
		k.slots = append(k.slots, s)
	}
	return k, nil
}

func (k *Kernel) slot(addr netip.Addr) *slot {
	for _, s := range k.slots {
		if s.Addr == addr {
			return s
		}
	}
	return nil
}

func (k *Kernel) managed(addr netip.Addr) bool { return k.slot(addr) != nil }

// Close ends the watch and lets go of the connections to the kernel; no other method may
// be running or be called after it. The addresses stay as they are, each until its
// lifetime ends.
func (k *Kernel) Close() {
	k.close()
	k.watch.Wait()
	k.set.close()
	k.off.close()
	k.back.close()
	k.notices.close()
}

// rounds is how often a step is repeated until the kernel shows what was asked for.
const rounds = 3

// reachedWithin bounds the wait for an address to be reached.
const reachedWithin = 100 * time.Millisecond

// Set makes the desired addresses the only managed ones that the kernel has, on any
// interface: those not desired are taken off first, then the desired are put on or
// renewed. Each has a full-length prefix, and a preferred lifetime of zero.
//
// It returns what the kernel has of the managed addresses afterwards, read back from it,
// also where an error says that not everything could be done. Only where it could not be
// read back is nothing returned. An address that is withdrawn while Set runs stays
// withdrawn, and is left out of the result: its Withdraw tells.
//
// The desired addresses are asked for when the turn has begun: whoever makes one not
// desired, and then withdraws it, can be sure that Set does not put it on again.
//
// An IPv6 address is of use a moment after it is on: Linux routes to it from a work queue
// (net/ipv6/addrconf.c, addrconf_dad_work), on a busy machine tens of milliseconds later, and
// drops what comes before. Set returns when that is done, so that who is told of the address
// then is served; after 100 ms it returns in any case.
//
// Every call is a change to the kernel, which tells everybody who listens to rtnetlink:
// renewing some three times in a lifetime is enough.
func (k *Kernel) Set(desired func() []Address) (held []Address, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()

	var errs []error
	want := make(map[*slot]Address)
	turns := make(map[*slot]uint64)
	for _, s := range k.slots {
		turns[s] = s.withdrawn.Load()
	}
	for _, a := range desired() {
		s := k.slot(a.Addr)
		switch {
		case s == nil:
			errs = append(errs, fmt.Errorf("put on %v: %w", a.Addr, ErrNotManaged))
		case a.Lifetime < time.Second:
			errs = append(errs, fmt.Errorf("put on %v: lifetime %v is below one second", a.Addr, a.Lifetime))
		default:
			want[s] = a
		}
	}

	for _, s := range k.slots {
		if _, ok := want[s]; !ok {
			errs = append(errs, s.takeOff(k.set))
		}
	}

	failed := make(map[*slot]error) // of the last attempt
	right := func(p place) bool {
		a, ok := want[k.slot(p.addr)]
		return ok && p.iface == a.Interface && p.bits == p.addr.BitLen()
	}
	var found []place
	for round := range rounds {
		for s, a := range want {
			if round == 0 || !slices.ContainsFunc(found, func(p place) bool { return p.addr == s.Addr && right(p) }) {
				failed[s] = s.putOn(k.set, a, turns[s])
			}
		}
		if found, err = k.set.list(k.managed); err != nil {
			errs = append(errs, fmt.Errorf("read addresses back: %w", err))
			break
		}
		strays := slices.DeleteFunc(slices.Clone(found), right)
		if len(strays) == 0 {
			break
		}
		if round == rounds-1 {
			errs = append(errs, remains(strays))
			break
		}
		for _, p := range strays {
			k.log.Info("taking off a stray address", "vip", k.slot(p.addr).VIP, "address", p.addr, "interface", p.iface)
			errs = append(errs, k.set.remove(p))
		}
	}
	for _, s := range k.slots {
		errs = append(errs, failed[s])
	}
	limit := time.Now().Add(reachedWithin)
	for _, p := range found {
		s := k.slot(p.addr)
		current := func() bool { return s.withdrawn.Load() == turns[s] }
		for right(p) && current() && !k.set.reached(p) && time.Now().Before(limit) {
			time.Sleep(100 * time.Microsecond)
		}
		if current() {
			held = append(held, s.at(p))
		}
	}
	return held, errors.Join(errs...)
}

// Withdraw takes the address off, whatever interface it is on, and reads back that it is
// gone: nil says that the kernel does not have it. It deletes before it asks anything,
// and waits for no other call but the one change that Set may be making to this very
// address. The deletion takes some tens of microseconds; reading back takes two more for
// each address that the node has.
//
// It returns an error that wraps ErrNotManaged, ErrPermission or ErrRemains.
func (k *Kernel) Withdraw(addr netip.Addr) error {
	s := k.slot(addr)
	if s == nil {
		return fmt.Errorf("withdraw %v: %w", addr, ErrNotManaged)
	}
	// Counted first, so that a Set that has not got to this address yet passes it over.
	s.withdrawn.Add(1)
	s.mu.Lock()
	quick := k.off.remove(place{addr: addr, bits: addr.BitLen(), index: s.index, iface: s.Interface})
	s.on = s.on && quick != nil
	s.mu.Unlock()
	if _, err := k.clear(k.off, k.back, func(a netip.Addr) bool { return a == addr }); err != nil {
		return fmt.Errorf("withdraw %v: %w", addr, errors.Join(quick, err))
	}
	return nil
}

// Sweep takes every managed address off every interface, the loopback one included, and
// returns what it took off. It is for a start: an address that an earlier run has left.
// An error wraps ErrPermission or ErrRemains.
func (k *Kernel) Sweep() ([]Address, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	places, err := k.clear(k.set, k.set, k.managed)
	var removed []Address
	for _, p := range places {
		a := k.slot(p.addr).at(p)
		k.log.Info("swept an address that an earlier run has left", "vip", a.VIP, "address", a.Addr, "interface", a.Interface)
		removed = append(removed, a)
	}
	if err != nil {
		return removed, fmt.Errorf("sweep: %w", err)
	}
	return removed, nil
}

// clear takes off what matches until the kernel shows none.
func (k *Kernel) clear(off, back system, match func(netip.Addr) bool) (removed []place, err error) {
	for round := 0; ; round++ {
		found, err := back.list(match)
		switch {
		case err != nil:
			return removed, fmt.Errorf("read addresses back: %w", err)
		case len(found) == 0:
			return removed, nil
		case round == rounds:
			return removed, remains(found)
		}
		for _, p := range found {
			if err := off.remove(p); err != nil {
				return removed, err
			}
			removed = append(removed, p)
		}
	}
}

func remains(places []place) error {
	var errs []error
	for _, p := range places {
		errs = append(errs, fmt.Errorf("%v/%d on %s: %w", p.addr, p.bits, p.iface, ErrRemains))
	}
	return errors.Join(errs...)
}

// putOn puts the address on, unless it was withdrawn since the turn began.
func (s *slot) putOn(sys system, a Address, turn uint64) error {
	index, err := sys.index(a.Interface)
	if err != nil {
		return fmt.Errorf("put %v on %s: %w", a.Addr, a.Interface, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.withdrawn.Load() != turn {
		return nil
	}
	p := place{a.Addr, a.Addr.BitLen(), index, a.Interface, a.Lifetime.Truncate(time.Second)}
	if err := sys.put(p); err != nil {
		return fmt.Errorf("put %v on %s: %w", a.Addr, a.Interface, err)
	}
	s.index, s.on = index, true
	return nil
}

// takeOff takes the address off the interface it was put on last, if it was.
func (s *slot) takeOff(sys system) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on {
		return nil
	}
	if err := sys.remove(place{addr: s.Addr, bits: s.Addr.BitLen(), index: s.index, iface: s.Interface}); err != nil {
		return err
	}
	s.on = false
	return nil
}

func (s *slot) at(p place) Address {
	return Address{VIP: s.VIP, Addr: p.addr, Interface: p.iface, Lifetime: p.valid}
}
