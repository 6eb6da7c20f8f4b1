package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// OnDown is what becomes of the established connections of a backend that goes down.
type OnDown int

// The zero OnDown is invalid.
const (
	_ OnDown = iota
	// OnDownClose resets them at once, so that clients reconnect at once.
	OnDownClose
	// OnDownDrain leaves them until they end by themselves, for Config.DrainTimeout at most.
	OnDownDrain
)

// ConnectionLog is which sessions are logged when they end.
type ConnectionLog int

// The zero ConnectionLog counts as LogOff.
const (
	_ ConnectionLog = iota
	// LogOff: none. The counts by cause tell what goes on, and an API server has an audit log.
	LogOff
	// LogErrors: those that did not end in good order.
	LogErrors
	// LogAll: every one.
	LogAll
)

// Limits bound what clients may take up.
type Limits struct {
	Connections int // of all clients at a time; 0: no limit
	PerClient   int // of one client address at a time; 0: no limit
}

// Config says what a Proxy does.
type Config struct {
	Name     string
	Port     uint16    // 0: any free port
	Backends []Backend // 64 at most
	OnDown   OnDown
	// DrainTimeout bounds how long connections are left to a backend that drains; 0: for ever.
	DrainTimeout time.Duration
	// DialTimeout bounds the whole search for a backend that accepts, for one client.
	// 0: 3 seconds, so that a SYN is repeated once (RFC 6298 section 2: after 1 s).
	DialTimeout time.Duration
	// LoadFactor bounds a backend's connections to so many times its fair share; see
	// [affinity.Choose]. Below 1: no bound.
	LoadFactor float64
	// SlowStart is how long a backend that recovers takes to get all of its clients back;
	// 0: it gets them at once.
	SlowStart     time.Duration
	Limits        Limits
	ConnectionLog ConnectionLog
	Greeting      Greeting
	Log           hclog.Logger // nil: no log
	// OnConnectFailure, if set, is told of each attempt that a backend refused, left
	// unanswered, or has not answered as yet, and of a backend that accepts connections and
	// answers nobody (both ErrSilent). OnConnect is told how long each attempt that
	// succeeded took. Both are called by the goroutines that relay, and must not block.
	OnConnectFailure func(backend string, err error)
	OnConnect        func(backend string, took time.Duration)
}

// Proxy is one listening port and the connections made through it.
type Proxy struct {
	cfg      Config
	log      hclog.Logger
	journal  *journal   // nil: no connection log
	backends []*backend // in the order of the configuration
	retired  []*backend // not in the configuration any more, and yet with sessions
	own      ownAddresses
	watch    *FlowWatch // nil: nobody wants to know of connections
	flows    atomic.Uint64

	accepted, acceptErrors, failedOpen atomic.Uint64
	causes                             [causes]atomic.Uint64
	warned                             atomic.Int64 // when last, since origin

	running sync.WaitGroup // loops
	failed  chan error     // of a loop
	stopped chan struct{}  // closed by Close

	mu       sync.Mutex
	listener int // -1: none
	port     uint16
	loops    []*loop         // from the first Run on
	adopted  []HandedSession // until then
	closed   bool
	active   int           // connections from accept to their end
	idle     chan struct{} // closed while active is 0
	clients  map[netip.Addr]int
}

// loopsOf returns how many loops a proxy has: one of them relays some 100 Gbit/s, or makes
// some 20,000 connections a second, so that four are more than API servers can use.
func loopsOf(processors int) int { return max(1, min(processors, 4)) }

// maxBackends is how many a session can keep in mind.
const maxBackends = 64

// New returns a proxy that does nothing until Listen and Run.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = 3 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	p := &Proxy{cfg: cfg, log: cfg.Log, listener: -1, idle: make(chan struct{}), clients: map[netip.Addr]int{},
		failed: make(chan error, 1), stopped: make(chan struct{})}
	close(p.idle)
	p.openJournal()
	for i, b := range cfg.Backends {
		p.backends = append(p.backends, newBackend(b.normal()))
		p.backends[i].index = i
	}
	return p, nil
}

// Listen binds the port on all addresses, IPv6 and IPv4, or on those of IPv4 where the
// kernel has no IPv6. It binds no single address, because a VIP comes and goes while
// the port stays, and because a hand-over tells unknown flows from known ones by
// whether they match a wildcard listener (nft(8), "socket wildcard").
func (p *Proxy) Listen() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.listener >= 0 {
		return fmt.Errorf("proxy %s is closed, or listens already", p.cfg.Name)
	}
	fd, err := listenOn(p.cfg.Port)
	if err != nil {
		return fmt.Errorf("listening for proxy %s: %w", p.cfg.Name, err)
	}
	p.listener, p.port = fd, localAddr(fd).Port()
	return nil
}

// Port returns the port that Listen bound; 0 before that.
func (p *Proxy) Port() uint16 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.port
}

// Run accepts connections until ctx ends or Close is called; then it returns nil and
// the port is no longer bound, while established connections go on. It fails if Listen
// has not succeeded before, or if the kernel denies it what relaying takes.
func (p *Proxy) Run(ctx context.Context) error {
	p.mu.Lock()
	switch {
	case p.closed:
		p.mu.Unlock()
		return nil
	case p.listener < 0:
		p.mu.Unlock()
		return fmt.Errorf("proxy %s runs before it listens", p.cfg.Name)
	}
	err := p.startLoops()
	loops, listener := p.loops, p.listener
	if p.watch != nil {
		p.markListener(listener, p.watch.Mark)
	}
	if err == nil {
		for i, s := range p.adopted {
			l := loops[i%len(loops)]
			l.post(func() { l.adopt(s) })
		}
		p.adopted = nil
		for _, l := range loops {
			l.post(func() { l.listen(listener) })
		}
	}
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("running proxy %s: %w", p.cfg.Name, err)
	}
	defer p.closeListener()
	defer onAll(loops, (*loop).ignore)
	defer p.own.watch(p.mayLoop)()
	select {
	case <-ctx.Done():
	case <-p.stopped:
	case err = <-p.failed:
		err = fmt.Errorf("running proxy %s: %w", p.cfg.Name, err)
	}
	return err
}

// startLoops makes the loops and starts them, once; p.mu is held.
func (p *Proxy) startLoops() error {
	if p.loops != nil {
		return nil
	}
	for range loopsOf(processors()) {
		l, err := newLoop(p)
		if err != nil {
			for _, l := range p.loops {
				l.poll.close()
			}
			p.loops = nil
			return err
		}
		p.loops = append(p.loops, l)
	}
	addThreads(len(p.loops))
	for _, l := range p.loops {
		p.running.Go(func() {
			defer addThreads(-1)
			if err := l.run(); err != nil {
				select {
				case p.failed <- err:
				default: // one failure is enough
				}
			}
		})
	}
	return nil
}

// mayLoop reports whether a backend would be this proxy, were its address this host's.
func (p *Proxy) mayLoop() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.backends, func(b *backend) bool { return b.Address.Port() == p.port })
}

// started returns the loops; none before Run.
func (p *Proxy) started() []*loop {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.loops
}

// onAll has all loops call a function, and returns when they have.
func onAll(loops []*loop, f func(*loop)) {
	var done sync.WaitGroup
	for _, l := range loops {
		done.Add(1)
		if !l.post(func() { f(l); done.Done() }) {
			done.Done()
		}
	}
	done.Wait()
}

func (p *Proxy) closeListener() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener >= 0 {
		closeSocket(p.listener)
		p.listener = -1
	}
}

// Drain waits until no connection is left, or ctx ends; then it returns the cause. It
// does not stop new connections: that is the end of Run.
func (p *Proxy) Drain(ctx context.Context) error {
	p.mu.Lock()
	idle, active := p.idle, p.active
	p.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("draining %d connections of proxy %s: %w", active, p.cfg.Name, context.Cause(ctx))
	}
}

// Close frees the port, resets all connections that are left, and returns when they
// have ended. It may be called more than once.
func (p *Proxy) Close() {
	p.mu.Lock()
	first := !p.closed
	if first {
		p.closed = true
		close(p.stopped)
	}
	for _, b := range slices.Concat(p.backends, p.retired) {
		p.letLive(b)
	}
	loops := p.loops
	for _, s := range p.adopted {
		s.discard()
	}
	p.adopted = nil
	p.mu.Unlock()
	for _, l := range loops {
		l.post(func() { l.shut(Shutdown) })
	}
	p.running.Wait()
	p.closeListener()
	if first && p.journal != nil {
		p.journal.close()
	}
}

// enter counts a client's connection, or says why it is not wanted.
func (p *Proxy) enter(from netip.AddrPort) Cause {
	p.accepted.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if cause := p.full(from.Addr()); cause != 0 {
		return cause
	}
	p.count(from)
	return 0
}

// Full returns Limit or ClientLimit where a connection of a client would be refused now
// because of Config.Limits; 0: it would not.
func (p *Proxy) Full(client netip.Addr) Cause {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.full(client)
}

func (p *Proxy) full(client netip.Addr) Cause {
	limits := p.cfg.Limits
	if limits.Connections > 0 && p.active >= limits.Connections {
		return Limit
	}
	if limits.PerClient > 0 && p.clients[client] >= limits.PerClient {
		return ClientLimit
	}
	return 0
}

// count counts a connection that leave will discount; p.mu is held.
func (p *Proxy) count(from netip.AddrPort) {
	if p.cfg.Limits.PerClient > 0 {
		p.clients[from.Addr()]++
	}
	if p.active == 0 {
		p.idle = make(chan struct{})
	}
	p.active++
}

func (p *Proxy) leave(from netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.Limits.PerClient > 0 {
		if p.clients[from.Addr()]--; p.clients[from.Addr()] == 0 {
			delete(p.clients, from.Addr())
		}
	}
	p.active--
	if p.active == 0 {
		close(p.idle)
	}
}

// warn logs once a second at most, for what may go wrong thousands of times.
func (p *Proxy) warn(message string, args ...any) {
	now := int64(time.Since(origin))
	last := p.warned.Load()
	if now-last >= int64(time.Second) && p.warned.CompareAndSwap(last, now) {
		p.log.Warn(message, append([]any{"proxy", p.cfg.Name}, args...)...)
	}
}
