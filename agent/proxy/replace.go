package proxy

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"sync"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

// Replace puts another configuration into force while the proxy runs; Name, Port,
// DialTimeout and Log stay as they are. It fails, and changes nothing, where New would
// fail, and must not be called twice at a time.
//
// A backend with the name and address of one that was there goes on with its state, its
// connections and its counts. Any other one is Unknown until SetBackends. One that is there
// no more gets no new connections; those that it has are reset at once with OnDownClose,
// else after Config.DrainTimeout, unless it has come back by then.
func (p *Proxy) Replace(cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	port := p.Port()
	if slices.ContainsFunc(cfg.Backends, func(b Backend) bool { return b.Address.Port() == port }) {
		p.own.refresh() // the kernel may take its time, so not while the loops wait
	}
	p.whileStill(func() {
		p.cfg.OnDown, p.cfg.DrainTimeout = cfg.OnDown, cfg.DrainTimeout
		p.cfg.LoadFactor, p.cfg.SlowStart = cfg.LoadFactor, cfg.SlowStart
		p.cfg.ConnectionLog, p.cfg.Greeting = cfg.ConnectionLog, cfg.Greeting
		p.cfg.OnConnectFailure, p.cfg.OnConnect = cfg.OnConnectFailure, cfg.OnConnect
		p.setLimits(cfg.Limits)
		p.openJournal()
		p.replaceBackends(cfg.Backends)
	})
	return nil
}

// check returns why a proxy could not work with the configuration.
func (cfg *Config) check() error {
	if cfg.OnDown != OnDownClose && cfg.OnDown != OnDownDrain {
		return fmt.Errorf("unknown OnDown %d", cfg.OnDown)
	}
	if len(cfg.Backends) > maxBackends {
		return fmt.Errorf("%d backends, more than %d", len(cfg.Backends), maxBackends)
	}
	for _, b := range cfg.Backends {
		if !b.Address.IsValid() {
			return fmt.Errorf("backend %s has no valid address", b.Name)
		}
	}
	return nil
}

// whileStill calls f with p.mu held while all loops wait, so that what they read for each
// connection needs no lock.
func (p *Proxy) whileStill(f func()) {
	p.mu.Lock()
	loops := p.loops
	if loops == nil { // and none starts before f is done
		defer p.mu.Unlock()
		f()
		return
	}
	p.mu.Unlock() // a loop that needs it would not come to wait
	var still sync.WaitGroup
	done := make(chan struct{})
	for _, l := range loops {
		still.Add(1)
		if !l.post(func() { still.Done(); <-done }) {
			still.Done()
		}
	}
	still.Wait()
	defer close(done)
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// setLimits changes the limits. The connections of each client are counted only where
// they are limited. Called while still.
func (p *Proxy) setLimits(limits Limits) {
	was := p.cfg.Limits
	p.cfg.Limits = limits
	if (was.PerClient > 0) == (limits.PerClient > 0) {
		return
	}
	clear(p.clients)
	if limits.PerClient == 0 {
		return
	}
	for _, l := range p.loops {
		for _, s := range l.sessions {
			if s.phase != unused {
				p.clients[s.from.Addr()]++
			}
		}
	}
}

// openJournal makes the connection log where there is none and one is wanted.
func (p *Proxy) openJournal() {
	wanted := p.cfg.ConnectionLog == LogErrors || p.cfg.ConnectionLog == LogAll
	if wanted && p.journal == nil && !p.closed {
		p.journal = newJournal(p.cfg.Name, p.log)
	}
}

// replaceBackends keeps the backends that are known, makes the new ones, and retires the
// rest. Called while still.
func (p *Proxy) replaceBackends(wanted []Backend) {
	before, known := p.backends, slices.Concat(p.backends, p.retired)
	p.backends, p.retired = nil, nil
	taken := uint64(0) // indices
	for _, w := range wanted {
		w = w.normal()
		i := slices.IndexFunc(known, func(b *backend) bool { return b.Name == w.Name && b.Address == w.Address })
		if i < 0 {
			p.backends = append(p.backends, newBackend(w))
			continue
		}
		b := known[i]
		b.Weight, b.ranked.Weight = w.Weight, max(w.Weight, 1)
		p.backends = append(p.backends, b)
		if !slices.Contains(before, b) {
			p.letLive(b)
			b.state.Store(int32(health.Unknown))
			b.index = -1
			continue
		}
		taken |= 1 << b.index
	}
	for _, b := range p.backends {
		if b.index < 0 {
			b.index = bits.TrailingZeros64(^taken)
			taken |= 1 << b.index
		}
	}
	for _, b := range known {
		if slices.Contains(p.backends, b) || b.load.Load() == 0 {
			continue
		}
		p.retired = append(p.retired, b)
		if slices.Contains(before, b) {
			p.retire(b)
		}
	}
}

// retire ends the connections of a backend that is there no more, or lets them end.
func (p *Proxy) retire(b *backend) {
	p.letLive(b)
	if p.cfg.OnDown == OnDownClose {
		b.state.Store(int32(health.Disabled)) // ends attempts under way
		p.reset(b, BackendRemoved, p.loops)
		return
	}
	b.state.Store(int32(health.Draining))
	if p.cfg.DrainTimeout > 0 {
		p.endLater(b, p.cfg.DrainTimeout, DrainTimeout)
	}
}

// newBackend returns a backend that is Unknown, and has no index.
func newBackend(b Backend) *backend {
	return &backend{
		Backend: b, index: -1, target: newTarget(b.Address),
		ranked: affinity.Backend{Key: b.Address.String(), Weight: max(b.Weight, 1)},
	}
}

// normal writes an IPv4 address as such.
func (b Backend) normal() Backend {
	b.Address = netip.AddrPortFrom(b.Address.Addr().Unmap(), b.Address.Port())
	return b
}
