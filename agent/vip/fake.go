package vip

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Fake is an operating system in memory, for tests: what was done to it, and what it has,
// are the ip(8) commands that a person would type. Its methods may be called at the same
// time; lifetimes run by the time package's clock, so it works inside synctest.
type Fake struct {
	mu       sync.Mutex
	links    []string        // index-1 → name
	down     map[string]bool // by name
	places   []place
	expiry   map[place]*time.Timer // by place without lifetime
	commands []string
	refuse   map[string]error // by start of the command
	changes  []Change
	lost     bool
	closed   bool
	changed  sync.Cond
}

// NewFake makes an operating system that has these interfaces, all with a carrier.
func NewFake(interfaces ...string) *Fake {
	f := &Fake{
		links: interfaces, down: make(map[string]bool),
		expiry: make(map[place]*time.Timer), refuse: make(map[string]error),
	}
	f.changed.L = &f.mu
	return f
}

// Open is what the package's Open is for the real kernel.
func (f *Fake) Open(log hclog.Logger, managed []Address) (*Kernel, error) {
	return newKernel(log, managed, f, f, f, fakeSource{f})
}

// Refuse makes every command that starts so fail; with nil it works again. Reading the
// addresses is the command "ip addr show".
func (f *Fake) Refuse(command string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse[command] = err
}

// Add puts an address on an interface by hand, without a limit.
func (f *Fake) Add(prefix netip.Prefix, iface string) error {
	i, err := f.index(iface)
	if err != nil {
		return err
	}
	return f.put(place{prefix.Addr(), prefix.Bits(), i, iface, 0})
}

// Del takes an address off an interface by hand.
func (f *Fake) Del(prefix netip.Prefix, iface string) error {
	i, err := f.index(iface)
	if err != nil {
		return err
	}
	return f.remove(place{prefix.Addr(), prefix.Bits(), i, iface, 0})
}

// SetCarrier gives an interface a carrier or takes it.
func (f *Fake) SetCarrier(iface string, kind Kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down[iface] = kind == CarrierDown
	f.tell(Change{Kind: kind, Interface: iface})
}

// Lose makes the watch miss what it has not been told yet, as a full socket buffer does.
func (f *Fake) Lose() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes, f.lost = nil, true
	f.changed.Broadcast()
}

// Commands returns what was done to the fake since it was last asked, in order.
func (f *Fake) Commands() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.commands
	f.commands = nil
	return c
}

// String is the commands that would make the present state, sorted.
func (f *Fake) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for _, p := range f.places {
		lines = append(lines, "ip addr add "+p.String())
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// String is the address as ip(8) would be told it.
func (p place) String() string {
	s := fmt.Sprintf("%v/%d dev %s", p.addr, p.bits, p.iface)
	if p.valid == 0 {
		return s
	}
	s += fmt.Sprintf(" valid_lft %d preferred_lft 0 noprefixroute", p.valid/time.Second)
	if p.addr.Is6() {
		s += " nodad"
	}
	return s
}

func (p place) key() place {
	p.valid = 0
	return p
}

func (f *Fake) run(command string) error {
	for start, err := range f.refuse {
		if err != nil && strings.HasPrefix(command, start) {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	return nil
}

func (f *Fake) index(iface string) (int, error) {
	i := slices.Index(f.links, iface)
	if i < 0 {
		return 0, fmt.Errorf("%s: %w", iface, ErrNoInterface)
	}
	return i + 1, nil
}

func (f *Fake) list(match func(netip.Addr) bool) ([]place, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.run("ip addr show"); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(f.places), func(p place) bool { return !match(p.addr) }), nil
}

func (f *Fake) put(p place) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	command := "ip addr replace " + p.String()
	if err := f.run(command); err != nil {
		return err
	}
	f.commands = append(f.commands, command)
	f.drop(p)
	f.places = append(f.places, p)
	if p.valid > 0 {
		var t *time.Timer
		t = time.AfterFunc(p.valid, func() { f.expire(p, &t) })
		f.expiry[p.key()] = t
	}
	f.tell(Change{Kind: Appeared, Addr: p.addr, Interface: p.iface})
	return nil
}

func (f *Fake) reached(place) bool { return true }

func (f *Fake) remove(p place) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	command := "ip addr del " + p.key().String()
	if err := f.run(command); err != nil {
		return err
	}
	f.commands = append(f.commands, command)
	if f.drop(p) {
		f.tell(Change{Kind: Disappeared, Addr: p.addr, Interface: p.iface})
	}
	return nil
}

// expire ends a lifetime, unless a renewal was quicker than its timer.
func (f *Fake) expire(p place, t **time.Timer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.expiry[p.key()] == *t && f.drop(p) {
		f.tell(Change{Kind: Disappeared, Addr: p.addr, Interface: p.iface})
	}
}

// drop forgets a place and reports whether it was there.
func (f *Fake) drop(p place) bool {
	if t := f.expiry[p.key()]; t != nil {
		t.Stop()
		delete(f.expiry, p.key())
	}
	n := len(f.places)
	f.places = slices.DeleteFunc(f.places, func(q place) bool { return q.key() == p.key() })
	return len(f.places) < n
}

func (f *Fake) close() {}

func (f *Fake) tell(c Change) {
	f.changes = append(f.changes, c)
	f.changed.Broadcast()
}

type fakeSource struct{ f *Fake }

func (s fakeSource) receive() ([]Change, error) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	for len(s.f.changes) == 0 && !s.f.lost && !s.f.closed {
		s.f.changed.Wait()
	}
	switch {
	case s.f.closed:
		return nil, os.ErrClosed
	case s.f.lost:
		s.f.lost = false
		return nil, errLost
	}
	c := s.f.changes
	s.f.changes = nil
	return c, nil
}

func (s fakeSource) snapshot(match func(netip.Addr) bool, interfaces []string) ([]Change, error) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.changes, s.f.lost = nil, false
	var state []Change
	for _, p := range s.f.places {
		if match(p.addr) {
			state = append(state, Change{Kind: Appeared, Addr: p.addr, Interface: p.iface})
		}
	}
	for _, i := range interfaces {
		kind := CarrierUp
		if s.f.down[i] || !slices.Contains(s.f.links, i) {
			kind = CarrierDown
		}
		state = append(state, Change{Kind: kind, Interface: i})
	}
	return state, nil
}

func (s fakeSource) close() {}

func (s fakeSource) interrupt() {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.closed = true
	s.f.changed.Broadcast()
}
