package vip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Kind is what a Change is about.
type Kind int

// The zero Kind is invalid.
const (
	_ Kind = iota
	// Appeared: the interface has the address now.
	Appeared
	// Disappeared: the interface no longer has the address; with no interface named, none has.
	Disappeared
	// CarrierUp: the interface is up and has a carrier.
	CarrierUp
	// CarrierDown: the interface is down, has no carrier, or is not there.
	CarrierDown
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case Appeared:
		return "appeared"
	case Disappeared:
		return "disappeared"
	case CarrierUp:
		return "carrier up"
	case CarrierDown:
		return "carrier down"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// Change is something that became different in the kernel, whoever did it.
type Change struct {
	Kind      Kind
	VIP       string     // empty for a carrier
	Addr      netip.Addr // invalid for a carrier
	Interface string
}

// source is a subscription to the operating system's changes. It tells of renewals and
// of addresses that are not managed too; the watch sorts that out.
type source interface {
	// receive waits for the next changes. An error that wraps errLost means that some
	// were lost; after interrupt it returns an error.
	receive() ([]Change, error)
	interrupt()
	// snapshot forgets the changes that are waiting and returns every address that
	// matches, and the carrier of every interface named.
	snapshot(match func(netip.Addr) bool, interfaces []string) ([]Change, error)
	close()
}

var errLost = errors.New("changes were lost")

// watchRetry is how long a watch that cannot read waits before it looks at the whole
// state again; with a subscription that is beyond repair it becomes this slow a poll.
const watchRetry = time.Second

// Watch tells what changes: a managed address that appears on or disappears from any
// interface, and the carrier of the interfaces that Open was told of. It begins with the
// full state: where every managed address is (or Disappeared without an interface), and
// every carrier. After lost notices, which the kernel reports as ENOBUFS (netlink(7)),
// it tells the full state again. In between it tells differences only: a renewal is none.
//
// The channel is closed when ctx ends, or the Kernel is closed. Watch can be called once,
// else it panics.
func (k *Kernel) Watch(ctx context.Context) <-chan Change {
	if k.watched.Swap(true) {
		panic("vip: Watch called twice")
	}
	w := &watch{k: k, out: make(chan Change, 16), present: make(map[Change]bool), carrier: make(map[string]Kind)}
	for _, s := range k.slots {
		if _, ok := w.carrier[s.Interface]; !ok {
			w.carrier[s.Interface] = 0
			w.interfaces = append(w.interfaces, s.Interface)
		}
	}
	k.watch.Go(func() { w.run(ctx) })
	return w.out
}

type watch struct {
	k          *Kernel
	out        chan Change
	interfaces []string
	present    map[Change]bool // told as Appeared
	carrier    map[string]Kind // of the interfaces of interest, as told
}

func (w *watch) run(ctx context.Context) {
	defer close(w.out)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(w.k.closing, cancel)()
	// A blocked receive knows no context.
	defer context.AfterFunc(ctx, w.k.notices.interrupt)()

	err := w.full(ctx)
	for ctx.Err() == nil {
		if err == nil {
			var changes []Change
			if changes, err = w.k.notices.receive(); err == nil {
				for _, c := range changes {
					w.tell(ctx, c)
				}
				continue
			}
		}
		if ctx.Err() != nil {
			return
		}
		w.k.log.Warn("reading the kernel's addresses anew", "error", err)
		if !errors.Is(err, errLost) {
			select {
			case <-ctx.Done():
			case <-time.After(watchRetry):
			}
		}
		err = w.full(ctx)
	}
}

// full tells the whole state.
func (w *watch) full(ctx context.Context) error {
	state, err := w.k.notices.snapshot(w.k.managed, w.interfaces)
	if err != nil {
		return fmt.Errorf("read the state: %w", err)
	}
	clear(w.present)
	for i := range w.carrier {
		w.carrier[i] = 0
	}
	on := make(map[netip.Addr]bool)
	for _, c := range state {
		on[c.Addr] = true
		w.tell(ctx, c)
	}
	for _, s := range w.k.slots {
		if !on[s.Addr] {
			w.send(ctx, Change{Kind: Disappeared, VIP: s.VIP, Addr: s.Addr})
		}
	}
	return nil
}

// tell passes on what is of interest and not known yet.
func (w *watch) tell(ctx context.Context, c Change) {
	switch c.Kind {
	case Appeared, Disappeared:
		s := w.k.slot(c.Addr)
		if s == nil {
			return
		}
		c.VIP = s.VIP
		key := c
		key.Kind = 0
		if w.present[key] == (c.Kind == Appeared) {
			return
		}
		w.present[key] = c.Kind == Appeared
	default:
		if known, ok := w.carrier[c.Interface]; !ok || known == c.Kind {
			return
		}
		w.carrier[c.Interface] = c.Kind
	}
	w.send(ctx, c)
}

func (w *watch) send(ctx context.Context, c Change) {
	select {
	case w.out <- c:
	case <-ctx.Done():
	}
}
