package proxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

// OnDown is what becomes of the established connections of a backend that goes down.
type OnDown int

// The zero OnDown is invalid.
const (
	_ OnDown = iota
	// OnDownClose resets them at once, so that clients reconnect at once.
	OnDownClose
	// OnDownDrain leaves them until they end by themselves.
	OnDownDrain
)

// Backend is one server to which connections are relayed.
type Backend struct {
	Name    string
	Address netip.AddrPort
	Weight  int // share of the clients among the backends; 0 counts as 1
}

// Config says what a Proxy does.
type Config struct {
	Name     string
	Port     uint16 // 0: any free port
	Backends []Backend
	OnDown   OnDown
	// DialTimeout bounds the whole search for a backend that accepts, for one client.
	// 0: 3 seconds, so that a SYN is repeated once (RFC 6298 section 2: after 1 s).
	DialTimeout time.Duration
	Log         hclog.Logger // nil: no log
	// OnConnectFailure, if set, is told of each attempt that a backend refused or left
	// unanswered. It is called by the connections' own goroutines, several at a time,
	// and must not block.
	OnConnectFailure func(backend string, err error)
}

// Proxy is one listening port and the connections made through it.
type Proxy struct {
	cfg      Config
	log      hclog.Logger
	backends []*backend // in the order of the configuration
	ranked   []affinity.Backend

	accepted, acceptErrors, failedOpen, unserved atomic.Uint64

	// alive ends with Close, and with it the search for backends.
	alive context.Context
	end   context.CancelFunc

	mu       sync.Mutex
	listener *net.TCPListener
	closed   bool
	active   int           // connections from accept to their end
	idle     chan struct{} // closed while active is 0
}

// backend is a Backend and what goes on with it.
type backend struct {
	Backend
	sent, received, total, failures atomic.Uint64

	// Guarded by Proxy.mu.
	state health.State
	links map[*link]struct{}
}

// link is a client's connection and the one to its backend.
type link struct {
	client, server *net.TCPConn
	backend        *backend
	chosen         health.State // the backend's, when it was chosen
}

// reset ends both connections with an RST, so that neither side waits for an answer.
func (l *link) reset() {
	abort(l.client)
	abort(l.server)
}

// reset resets links, all at once: closing a connection waits for those who use it.
func reset(links []*link) {
	var group sync.WaitGroup
	for _, l := range links {
		group.Go(l.reset)
	}
	group.Wait()
}

// Stats are counts since the start, except for Backends[i].Established.
type Stats struct {
	Accepted     uint64 // connections of clients
	AcceptErrors uint64 // such as too many open files
	FailedOpen   uint64 // connections relayed to a backend that was not up, for want of a better one
	Unserved     uint64 // connections reset because no backend accepted
	Backends     []BackendStats
}

// BackendStats are the counts of one backend.
type BackendStats struct {
	Name        string
	State       health.State
	Established int    // connections now
	Total       uint64 // connections ever relayed
	Failures    uint64 // attempts to connect that failed
	Sent        uint64 // bytes from clients to the backend
	Received    uint64 // bytes from the backend to clients
}

// New returns a proxy that does nothing until Listen and Run.
func New(cfg Config) (*Proxy, error) {
	if cfg.OnDown != OnDownClose && cfg.OnDown != OnDownDrain {
		return nil, fmt.Errorf("unknown OnDown %d", cfg.OnDown)
	}
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = 3 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	p := &Proxy{cfg: cfg, log: cfg.Log, idle: make(chan struct{})}
	p.alive, p.end = context.WithCancel(context.Background())
	close(p.idle)
	for _, b := range cfg.Backends {
		if !b.Address.IsValid() {
			return nil, fmt.Errorf("backend %s has no valid address", b.Name)
		}
		b.Address = netip.AddrPortFrom(b.Address.Addr().Unmap(), b.Address.Port())
		p.backends = append(p.backends, &backend{Backend: b, links: map[*link]struct{}{}})
		p.ranked = append(p.ranked, affinity.Backend{Key: b.Address.String(), Weight: max(b.Weight, 1)})
	}
	return p, nil
}

// Listen binds the port on all addresses, IPv6 and IPv4, or on those of IPv4 where the
// kernel has no IPv6. It binds no single address, because a VIP comes and goes while
// the port stays, and because a hand-over tells unknown flows from known ones by
// whether they match a wildcard listener (nft(8), "socket wildcard").
func (p *Proxy) Listen() error {
	cfg := net.ListenConfig{KeepAliveConfig: keepAlive}
	// Multipath TCP is Go's default for listeners, but its sockets are not found as
	// TCP ones by those who look flows up in the kernel.
	cfg.SetMultipathTCP(false)
	listener, err := cfg.Listen(p.alive, "tcp", fmt.Sprintf(":%d", p.cfg.Port))
	if err != nil {
		return fmt.Errorf("listening for proxy %s: %w", p.cfg.Name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.listener != nil {
		listener.Close()
		return fmt.Errorf("proxy %s is closed, or listens already", p.cfg.Name)
	}
	p.listener = listener.(*net.TCPListener)
	return nil
}

// Port returns the port that Listen bound; 0 before that.
func (p *Proxy) Port() uint16 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener == nil {
		return 0
	}
	return p.listener.Addr().(*net.TCPAddr).AddrPort().Port()
}

// Run accepts connections until ctx ends or Close is called; then it returns nil and
// the port is no longer bound, while established connections go on. It fails only
// if Listen has not succeeded before.
func (p *Proxy) Run(ctx context.Context) error {
	p.mu.Lock()
	listener := p.listener
	p.mu.Unlock()
	if listener == nil {
		return fmt.Errorf("proxy %s runs before it listens", p.cfg.Name)
	}
	defer listener.Close()
	defer context.AfterFunc(ctx, func() { listener.Close() })()

	var pause time.Duration
	for {
		client, err := listener.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			// Out of descriptors or memory, mostly: the connections that wait stay in
			// the kernel's queue until others have ended.
			p.acceptErrors.Add(1)
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			p.log.Warn("accepting a connection failed", "proxy", p.cfg.Name, "error", err, "pause", pause)
			select {
			case <-ctx.Done():
			case <-p.alive.Done():
			case <-time.After(pause):
			}
			continue
		}
		pause = 0
		p.accepted.Add(1)
		if !p.enter() {
			abort(client)
			continue
		}
		go p.serve(client)
	}
}

// SetBackends says what state each backend is in; a backend that is not named keeps
// its state, and is Unknown before it was first named. Saying the same again does nothing.
//
// New connections go to backends that are Up. Where none is Up or none of those accepts,
// they go to Draining ones, then Unknown, then Down ones: an attempt is better than a
// refusal. Disabled backends get none.
//
// Connections to a backend that becomes Disabled are reset before SetBackends returns;
// those to one that becomes Down are too, with OnDownClose.
func (p *Proxy) SetBackends(states map[string]health.State) {
	var ended []*link
	p.mu.Lock()
	for _, b := range p.backends {
		state, named := states[b.Name]
		if !named || state == b.state {
			continue
		}
		b.state = state
		if p.resets(state) && len(b.links) > 0 {
			p.log.Info("resetting connections", "proxy", p.cfg.Name, "backend", b.Name, "state", state, "connections", len(b.links))
			ended = slices.AppendSeq(ended, maps.Keys(b.links))
		}
	}
	p.mu.Unlock()
	reset(ended)
}

// resets reports whether connections end when their backend comes into a state.
func (p *Proxy) resets(state health.State) bool {
	return state == health.Disabled || state == health.Down && p.cfg.OnDown == OnDownClose
}

// Stats returns the counts as they are now.
func (p *Proxy) Stats() Stats {
	stats := Stats{
		Accepted:     p.accepted.Load(),
		AcceptErrors: p.acceptErrors.Load(),
		FailedOpen:   p.failedOpen.Load(),
		Unserved:     p.unserved.Load(),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.backends {
		stats.Backends = append(stats.Backends, BackendStats{
			Name:        b.Name,
			State:       b.state,
			Established: len(b.links),
			Total:       b.total.Load(),
			Failures:    b.failures.Load(),
			Sent:        b.sent.Load(),
			Received:    b.received.Load(),
		})
	}
	return stats
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
	p.end()
	var ended []*link
	p.mu.Lock()
	p.closed = true
	if p.listener != nil {
		p.listener.Close()
	}
	for _, b := range p.backends {
		ended = slices.AppendSeq(ended, maps.Keys(b.links))
	}
	idle := p.idle
	p.mu.Unlock()
	reset(ended)
	<-idle
}

// serve takes one client from accept to the end.
func (p *Proxy) serve(client *net.TCPConn) {
	defer p.leave()
	if err := setUserTimeout(client); err != nil {
		abort(client)
		return
	}
	l, err := p.connect(client)
	if err != nil {
		p.unserved.Add(1)
		p.log.Debug("no backend for a client", "proxy", p.cfg.Name, "client", client.RemoteAddr(), "error", err)
		abort(client)
		return
	}
	if !p.attach(l) {
		l.reset()
		return
	}
	defer p.detach(l)
	l.backend.total.Add(1)
	if l.chosen != health.Up {
		p.failedOpen.Add(1)
	}
	relay(l.client, l.server, &l.backend.sent, &l.backend.received)
}

func (p *Proxy) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	if p.active == 0 {
		p.idle = make(chan struct{})
	}
	p.active++
	return true
}

func (p *Proxy) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.active--
	if p.active == 0 {
		close(p.idle)
	}
}

// attach makes the link known to those who reset links. It refuses where they came by
// while the link was being made.
func (p *Proxy) attach(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := l.backend.state
	if p.closed || state != l.chosen && p.resets(state) {
		return false
	}
	l.backend.links[l] = struct{}{}
	return true
}

func (p *Proxy) detach(l *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(l.backend.links, l)
}

// abort closes a connection with an RST and drops what was not sent (socket(7),
// SO_LINGER with a time of zero).
func abort(conn *net.TCPConn) {
	conn.SetLinger(0) // it fails only if the connection is closed already
	conn.Close()
}
