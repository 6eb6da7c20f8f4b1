package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

// raceAfter is how long a backend may be silent before the next in rank is tried beside
// it. It is far beyond a healthy connect inside one site, and far below what a client
// notices.
const raceAfter = 100 * time.Millisecond

// ErrLoop says that a backend's address is the proxy itself, so that a connection would
// go round and round.
var ErrLoop = errors.New("the backend's address is this proxy")

// connect finds a backend for a client and connects to it.
func (p *Proxy) connect(client *net.TCPConn) (*link, error) {
	ctx, cancel := context.WithTimeout(p.alive, p.cfg.DialTimeout)
	defer cancel()
	candidates := p.candidates(client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr())
	var errs []error
	for _, state := range []health.State{health.Up, health.Draining, health.Unknown, health.Down} {
		if len(candidates[state]) == 0 || ctx.Err() != nil {
			continue
		}
		server, b, err := p.race(ctx, candidates[state])
		if err == nil {
			return &link{client: client, server: server, backend: b, chosen: state}, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, errors.New("every backend is disabled")
	}
	return nil, errors.Join(errs...)
}

// candidates returns the backends by their states, in the order of the client's affinity.
func (p *Proxy) candidates(client netip.Addr) map[health.State][]*backend {
	byState := map[health.State][]*backend{}
	order := affinity.Rank(client, p.ranked)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range order {
		b := p.backends[i]
		byState[b.state] = append(byState[b.state], b)
	}
	return byState
}

// attempt is how one try to connect ended.
type attempt struct {
	conn    *net.TCPConn
	backend *backend
	err     error
}

// race connects to the first of the backends that accepts: it tries the next one when
// the one before has failed, or has been silent for raceAfter.
func (p *Proxy) race(ctx context.Context, backends []*backend) (*net.TCPConn, *backend, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan attempt)
	silence := time.NewTimer(raceAfter)
	defer silence.Stop()

	var errs []error
	pending := 0
	try := func() {
		b := backends[0]
		backends = backends[1:]
		pending++
		silence.Reset(raceAfter)
		go func() { ended <- p.try(ctx, b) }()
	}
	for try(); pending > 0; {
		select {
		case <-silence.C:
			if len(backends) > 0 {
				try()
			}
		case a := <-ended:
			pending--
			if a.err == nil {
				// The losers' attempts end soon, now that ctx does.
				go discard(ended, pending)
				return a.conn, a.backend, nil
			}
			errs = append(errs, fmt.Errorf("backend %s: %w", a.backend.Name, a.err))
			if len(backends) > 0 && ctx.Err() == nil {
				try()
			}
		}
	}
	return nil, nil, errors.Join(errs...)
}

// discard closes the connections of attempts that were made in vain.
func discard(ended <-chan attempt, pending int) {
	for range pending {
		if a := <-ended; a.err == nil {
			abort(a.conn)
		}
	}
}

// try connects to one backend.
func (p *Proxy) try(ctx context.Context, b *backend) attempt {
	conn, err := p.dial(ctx, b.Address)
	// Cancelled: another backend was quicker, or the proxy closes. Neither says
	// anything about this one.
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		b.failures.Add(1)
		if p.cfg.OnConnectFailure != nil {
			p.cfg.OnConnectFailure(b.Name, err)
		}
	}
	return attempt{conn, b, err}
}

func (p *Proxy) dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	if to.Port() == p.Port() && local(to.Addr()) {
		return nil, ErrLoop
	}
	dialer := net.Dialer{KeepAliveConfig: keepAlive}
	conn, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	server := conn.(*net.TCPConn)
	if err := setUserTimeout(server); err != nil {
		abort(server)
		return nil, err
	}
	return server, nil
}

// local reports whether an address is one of this host's now: a VIP comes and goes.
func local(addr netip.Addr) bool {
	if addr.IsLoopback() || addr.IsUnspecified() {
		return true
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range own {
		if prefix, ok := a.(*net.IPNet); ok && prefix.IP.Equal(addr.AsSlice()) {
			return true
		}
	}
	return false
}
