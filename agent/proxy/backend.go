package proxy

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

// Backend is one server to which connections are relayed.
type Backend struct {
	Name    string
	Address netip.AddrPort
	Weight  int // share of the clients among the backends; 0 counts as 1
}

// backend is a Backend and what goes on with it, for all loops.
type backend struct {
	Backend
	index  int
	ranked affinity.Backend
	target target

	state       atomic.Int32 // health.State
	load        atomic.Int64 // sessions that are with it, or trying it
	established atomic.Int64
	// Times since origin, in nanoseconds. It is tried after others until shunned, and
	// gets its clients back one by one from rising on; 0: it has them all.
	shunned, rising atomic.Int64
	// As shunned, for another reason: that it accepts connections proves nothing.
	muted atomic.Int64

	sent, received, total, failures, outrun atomic.Uint64

	// Guarded by Proxy.mu.
	ending *time.Timer // ends its sessions; nil: not running
	wasUp  bool        // so that coming up now is a recovery
}

// backend returns the backend of a name; nil: there is none.
func (p *Proxy) backend(name string) *backend {
	for _, b := range p.backends {
		if b.Name == name {
			return b
		}
	}
	return nil
}

// State returns the state as of the last SetBackends.
func (b *backend) State() health.State { return health.State(b.state.Load()) }

// avoided reports whether others are tried before it.
func (b *backend) avoided(now time.Duration) bool {
	return time.Duration(max(b.shunned.Load(), b.muted.Load())) > now
}

// ramp returns which share of its clients a backend gets as yet.
func (b *backend) ramp(now, slowStart time.Duration) float64 {
	since := time.Duration(b.rising.Load())
	if since == 0 || slowStart <= 0 || b.State() != health.Up {
		return 1
	}
	if now >= since+slowStart {
		b.rising.CompareAndSwap(int64(since), 0)
		return 1
	}
	return float64(now-since) / float64(slowStart)
}

// SetBackends says what state each backend is in; a backend that is not named keeps
// its state, and is Unknown before it was first named. Saying the same again does nothing.
// It waits for nothing.
//
// New connections go to backends that are Up. Where none is Up or none of those accepts,
// they go to Draining ones, then NotReady, then Unknown, then Down ones: an attempt is better
// than a refusal. Disabled backends get none. A backend that was Up before, then NotReady, Down
// or Disabled, and becomes Up beside others gets its clients back over Config.SlowStart, unless
// it is named as warm: it was well while it was Down, and is where it was before.
//
// Connections to a backend that becomes Disabled are reset at once; those to one that
// becomes Down are gather later, with OnDownClose, if another one is Up or Draining then. If
// none is, their clients would only come back to servers that are in trouble already: they
// keep what they have until reprieve after the next one is. Connections to one that
// becomes Draining or NotReady, or Down with OnDownDrain, are reset Config.DrainTimeout after
// the first of these; but those to a NotReady one only while another one is Up or Draining,
// else so long after the next one is.
func (p *Proxy) SetBackends(states map[string]health.State, warm ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	up, refuge := p.countUp(), p.refuge()
	for _, b := range p.backends {
		state, named := states[b.Name]
		was := b.State()
		if !named || state == was {
			continue
		}
		if !p.drains(was) || !p.drains(state) {
			p.letLive(b)
		}
		if state == health.Up {
			b.shunned.Store(0)
			b.muted.Store(0)
			switch {
			case slices.Contains(warm, b.Name):
			case up > 0 && b.wasUp && (was == health.NotReady || was == health.Down || was == health.Disabled):
				b.rising.Store(int64(time.Since(origin)))
			default:
				b.rising.Store(0)
			}
			b.wasUp = true
		}
		b.state.Store(int32(state))
		switch {
		case state == health.Disabled:
			p.reset(b, BackendDisabled, p.loops)
		case state == health.Down && p.cfg.OnDown == OnDownClose:
			p.endLater(b, gather, BackendDown)
		case p.drains(state) && b.ending == nil && p.cfg.DrainTimeout > 0:
			p.endLater(b, p.cfg.DrainTimeout, DrainTimeout)
		}
	}
	if refuge || !p.refuge() {
		return
	}
	for _, b := range p.backends { // those that clients came to when all were in trouble, too
		switch {
		case b.State() == health.Down && p.cfg.OnDown == OnDownClose:
			p.letLive(b)
			p.endLater(b, reprieve, BackendDown)
		case b.State() == health.NotReady && b.ending == nil && p.cfg.DrainTimeout > 0:
			p.endLater(b, p.cfg.DrainTimeout, DrainTimeout)
		}
	}
}

// drains reports whether connections may go on, for some time, while their backend is in a
// state in which it gets no new ones.
func (p *Proxy) drains(state health.State) bool {
	return state == health.Draining || state == health.NotReady || state == health.Down && p.cfg.OnDown == OnDownDrain
}

// gather is how long the news that one backend is Down waits for the same of others: all
// checks of an agent take place together, but end one after the other.
const gather = 20 * time.Millisecond

// reprieve is how long backends that were Down together have, after the first of them has
// recovered, to do so too: longer than it takes checks to see them all.
const reprieve = 2 * time.Second

// endLater resets a backend's connections after some time; those of one that is Down or
// NotReady only if their clients have somewhere to go then. p.mu is held.
func (p *Proxy) endLater(b *backend, after time.Duration, cause Cause) {
	if p.closed {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(after, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if b.ending != timer { // it was stopped just now
			return
		}
		b.ending = nil
		if p.refuge() || (cause != BackendDown && b.State() != health.NotReady) {
			p.reset(b, cause, p.loops)
		}
	})
	b.ending = timer
}

// letLive lets a backend's connections live; p.mu is held.
func (p *Proxy) letLive(b *backend) {
	if b.ending != nil {
		b.ending.Stop()
		b.ending = nil
	}
}

// refuge reports whether a backend is well, and so may have the clients of others.
func (p *Proxy) refuge() bool {
	return slices.ContainsFunc(p.backends, func(b *backend) bool {
		return b.State() == health.Up || b.State() == health.Draining
	})
}

// countUp returns how many backends are Up.
func (p *Proxy) countUp() (n int) {
	for _, b := range p.backends {
		if b.State() == health.Up {
			n++
		}
	}
	return n
}

// resets reports whether connections end when their backend comes into a state.
func (p *Proxy) resets(state health.State) bool {
	return state == health.Disabled || state == health.Down && p.cfg.OnDown == OnDownClose
}

// reset resets all sessions of a backend, soon.
func (p *Proxy) reset(b *backend, cause Cause, loops []*loop) {
	if n := b.established.Load(); n > 0 {
		p.log.Info("resetting connections", "proxy", p.cfg.Name, "backend", b.Name, "cause", cause.String(), "connections", n)
	}
	for _, l := range loops {
		l.post(func() { l.resetAll(b, cause) })
	}
}
