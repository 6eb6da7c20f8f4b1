package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/proxy"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// trustWithin is how long an agent that goes on in another one's place takes a member for
// alive that it has not heard itself: the links are there, so it is heard in milliseconds.
const trustWithin = 2 * time.Second

// Inheritance is what an agent leaves to the one that goes on in its place: in another process
// after an upgrade, in the same one where that failed. A VIP is never part of it.
type Inheritance struct {
	provenance
	lock    *os.File // the node's, locked
	ports   []int    // descriptors of the agent's own, as duplicate returns them
	refused error    // why this is not another process; nil: it is
	given   bool     // another process has it, dead or alive

	live *liveState // nil: the predecessor goes on with it until claim
	// claim waits until the predecessor has given its live state away, and rests.
	claim func(context.Context) (*liveState, error)
	// lost ends when the predecessor does not give it away.
	lost context.Context
	// installed tells the predecessor that its live state is in use.
	installed func() error
}

// provenance says whose inheritance it is.
type provenance struct {
	Node, DataDir, Version string
	Proxies                map[string]uint16 // name → port
	// What an agent that goes on in another one's place has from that one, not from its
	// configuration. Agents before did not tell it.
	VIPs   map[string]string // name → address and interface
	Listen []string          // for gRPC, on the socket, for metrics
	// Flows is the boot id under which the others know the connections: that of the first
	// agent of the line, since the connections do not end with an agent.
	Flows uint64
}

// ports are what listens, beside the proxies.
type ports struct{ api, socket, metrics net.Listener }

// liveState is what only one agent can have in its hands.
type liveState struct {
	relays map[string]*relay // by proxy
	drains drains
}

// relay is what goes on of one proxy.
type relay struct {
	handed proxy.Handed
	own    []health.Report // what its own checks say
}

// drains are what goes on of the VIPs that moved away.
type drains struct {
	VIPs map[string]drain
	Next map[string]string // as board.next
}

// drain is one VIP's.
type drain struct {
	Kept     bool
	Age      time.Duration // since when it is kept
	Count    int64
	Forwards string     // member to which packets of unknown connections go; empty: none
	Target   netip.Addr // that member's: it has told it to the agent before
	Owner    string
}

// portCount is how many descriptors ports have.
const portCount = 3

// listen binds the ports, or takes those of the inheritance.
func (a *Agent) listen() (err error) {
	if a.inheritance == nil {
		a.ports, err = openPorts(a.cfg)
		return err
	}
	for i, l := range []*net.Listener{&a.ports.api, &a.ports.socket, &a.ports.metrics} {
		f := os.NewFile(uintptr(a.inheritance.ports[i]), "inherited")
		*l, err = net.FileListener(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("listen where the agent before did: %w", err)
		}
	}
	if socket, ok := a.ports.socket.(*net.UnixListener); ok {
		socket.SetUnlinkOnClose(true)
	}
	return nil
}

// duplicate returns descriptors of their own of the ports, which may be closed then.
func (p ports) duplicate() (fds []int, err error) {
	for _, l := range []net.Listener{p.api, p.socket, p.metrics} {
		raw, err := l.(syscall.Conn).SyscallConn()
		if err != nil {
			return nil, err
		}
		fd, duplicated := -1, error(nil)
		err = raw.Control(func(own uintptr) { fd, duplicated = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
		if err = errors.Join(err, duplicated); err != nil {
			return nil, fmt.Errorf("duplicate the listener on %s: %w", l.Addr(), err)
		}
		fds = append(fds, fd)
	}
	// The socket's file stays with whoever has a duplicate.
	p.socket.(*net.UnixListener).SetUnlinkOnClose(false)
	return fds, nil
}

// openPorts binds the ports. To every address: also to those that the node gets only later.
func openPorts(cfg *config.Config) (p ports, err error) {
	if p.socket, err = server.ListenSocket(cfg.API.Socket); err != nil {
		return p, err
	}
	if p.api, err = net.Listen("tcp", fmt.Sprintf(":%d", cfg.API.Port)); err != nil {
		p.socket.Close()
		return p, fmt.Errorf("serve gRPC: %w", err)
	}
	if p.metrics, err = net.Listen("tcp", cfg.Metrics.Listen.String()); err != nil {
		p.socket.Close()
		p.api.Close()
		return p, fmt.Errorf("serve metrics: %w", err)
	}
	return p, nil
}

// takeLock takes the node's lock, or that of the inheritance.
func (a *Agent) takeLock() (err error) {
	if a.inheritance != nil {
		a.lock = a.inheritance.lock
	} else if a.lock, err = lockNode(a.cfg.DataDir); err != nil {
		return err
	}
	a.closers = append(a.closers, func() {
		if a.lock != nil {
			a.lock.Close()
		}
	})
	return nil
}

// provenanceOf is what an inheritance says of a configuration.
func provenanceOf(cfg *config.Config) provenance {
	w := provenance{Node: cfg.Node.Name, DataDir: cfg.DataDir, Version: Version, Proxies: map[string]uint16{}, VIPs: map[string]string{}}
	for _, p := range cfg.Proxies {
		w.Proxies[p.Name] = p.Port
	}
	for _, v := range cfg.VIPs {
		w.VIPs[v.Name] = v.Address.String() + " on " + v.Interface
	}
	w.Listen = []string{fmt.Sprint("port ", cfg.API.Port), cfg.API.Socket, cfg.Metrics.Listen.String()}
	return w
}

// fits says whether an agent of that configuration can go on with the inheritance.
func (w provenance) fits(cfg *config.Config) error {
	now := provenanceOf(cfg)
	switch {
	case now.Node != w.Node || now.DataDir != w.DataDir:
		return fmt.Errorf("the configuration is that of %s in %s now, and was %s in %s; a restart changes that", now.Node, now.DataDir, w.Node, w.DataDir)
	case !maps.Equal(now.Proxies, w.Proxies):
		return fmt.Errorf("the configuration has the proxies %v now, and had %v; a restart changes that", now.Proxies, w.Proxies)
	case w.VIPs != nil && !maps.Equal(now.VIPs, w.VIPs):
		return fmt.Errorf("the configuration has the VIPs %v now, and had %v; a restart changes that", now.VIPs, w.VIPs)
	case w.Listen != nil && !slices.Equal(now.Listen, w.Listen):
		return fmt.Errorf("the configuration lets the agent listen on %q now, and did on %q; a restart changes that", now.Listen, w.Listen)
	}
	return nil
}

// freeze stops the proxies and returns what they were.
func (a *Agent) freeze() map[string]*relay {
	a.handing.endHoldBack() // whoever goes on sets it up anew
	relays := map[string]*relay{}
	for _, s := range a.services {
		s.mu.Lock()
		own := s.view.Own()
		s.mu.Unlock()
		relays[s.cfg.Name] = &relay{handed: s.proxy.Freeze(), own: own}
	}
	return relays
}

// rest ends all that acts on the node or speaks for it, the server's answers aside, and
// returns what goes on of the VIPs that moved away.
func (a *Agent) rest() drains {
	a.stopActing()
	a.actors.Wait()
	d := drains{VIPs: map[string]drain{}}
	a.handing.each(func(vip string, v *handed) {
		d.VIPs[vip] = drain{
			Kept: !v.keptSince.IsZero(), Age: time.Since(v.keptSince), Count: v.told.Load(),
			Forwards: v.from, Target: v.target, Owner: v.owner,
		}
	})
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	d.Next = maps.Clone(a.board.next)
	return d
}

// succeed takes the inheritance over, at once or, where the predecessor still works, when this
// agent has all that it needs to go on without a pause.
func (a *Agent) succeed() error {
	e := a.inheritance
	if e == nil || e.live != nil {
		a.link()
	}
	if e == nil {
		return nil
	}
	if e.live == nil {
		if err := a.claim(); err != nil {
			return fmt.Errorf("take over from the agent that runs: %w", err)
		}
	}
	a.owns = true
	a.loop.machine = ownership.New(a.ownershipConfig(a.boot), now()) // one that has missed nothing
	a.board.mu.Lock()
	maps.Copy(a.board.next, e.live.drains.Next)
	a.board.mu.Unlock()
	for vip, d := range e.live.drains.VIPs {
		a.handing.resume(vip, d)
	}
	for _, s := range a.services {
		if err := s.inherit(e.live.relays[s.cfg.Name]); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) claim() (err error) {
	defer context.AfterFunc(a.inheritance.lost, func() { a.cancel(context.Cause(a.inheritance.lost)) })()
	if err = a.becomeAble(); err == nil {
		a.inheritance.live, err = a.inheritance.claim(a.ctx)
	}
	return err
}

// becomeAble waits until the store has answered, and the links to all members that can be
// reached are there.
func (a *Agent) becomeAble() error {
	for !a.store.Status().Available {
		if err := a.pause(lookAgain); err != nil {
			return fmt.Errorf("wait for the store: %w", err)
		}
	}
	a.link()
	linked := func() bool {
		for _, l := range a.links {
			if l.Lost() > 0 {
				return false
			}
		}
		return true
	}
	for deadline := time.Now().Add(linkWithin); !linked() && time.Now().Before(deadline); {
		if err := a.pause(lookAgain); err != nil {
			return err
		}
	}
	return nil
}

// pause returns after a while, or with the reason for which the agent ends.
func (a *Agent) pause(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-a.ctx.Done():
		return context.Cause(a.ctx)
	}
}

// tellBegun tells how this agent has begun, its predecessor too.
func (a *Agent) tellBegun() {
	e, name := a.inheritance, a.cfg.Node.Name
	switch {
	case e == nil:
		a.events.record(&hameshv1.Event{
			Kind: hameshv1.EventKind_EVENT_KIND_AGENT_STARTED, Message: "the agent of " + name + " has started, version " + Version,
		})
	case e.refused != nil:
		a.refuseUpgrade(e.refused)
	default:
		a.events.record(&hameshv1.Event{
			Kind: hameshv1.EventKind_EVENT_KIND_UPGRADE_DONE, Message: "the agent of " + name + " goes on as version " + Version + ", was " + e.Version,
		})
	}
	if e != nil && e.installed != nil {
		if err := e.installed(); err != nil {
			a.log.Warn("could not tell the agent before that this one has taken over", "error", err)
		}
	}
}

// cease keeps the live state that this agent could not pass on to another process.
func (a *Agent) cease(left *Inheritance) {
	if left.given {
		return
	}
	if left.live == nil {
		left.live = &liveState{relays: a.freeze()}
	}
	if left.live.drains.VIPs == nil {
		left.live.drains = a.rest()
	}
}

// depart ends an agent whose live state goes on in another one here, and returns it.
func (a *Agent) depart(left *Inheritance, err error) (*Inheritance, error) {
	a.owns = false
	err = errors.Join(err, a.store.Close())
	switch {
	case err != nil:
		return nil, err
	case left.given:
		return nil, fmt.Errorf("connections were lost with the new process: %w", left.refused)
	}
	a.lock = nil        // the inheritance's
	if a.guard != nil { // the next agent here posts its own; this one would sweep behind a later successor's back
		a.guard.Stop()
		a.guard = nil
	}
	return left, nil
}
