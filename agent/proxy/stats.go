package proxy

import (
	"time"

	"github.com/hamesh/hamesh/agent/health"
)

// Stats are counts since the start, except for Connections, Limit and
// Backends[i].Established.
type Stats struct {
	Connections  int    // clients' connections now
	Limit        int    // the most of them; 0: no limit
	Accepted     uint64 // connections of clients
	AcceptErrors uint64 // such as too many open files
	FailedOpen   uint64 // connections relayed to a backend that was not up, for want of a better one
	Unserved     uint64 // connections reset because no backend accepted
	// Ended counts clients' connections by the cause of their end, refused ones too. It
	// has every cause.
	Ended    map[Cause]uint64
	Backends []BackendStats
}

// BackendStats are the counts of one backend.
type BackendStats struct {
	Name        string
	State       health.State
	Established int    // connections now
	Total       uint64 // connections ever relayed
	Failures    uint64 // attempts to connect that failed
	Outrun      uint64 // connections that another backend has answered sooner, and got
	Sent        uint64 // bytes from clients to the backend
	Received    uint64 // bytes from the backend to clients
}

// Stats returns the counts as they are now.
func (p *Proxy) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	stats := Stats{
		Connections:  p.active,
		Limit:        p.cfg.Limits.Connections,
		Accepted:     p.accepted.Load(),
		AcceptErrors: p.acceptErrors.Load(),
		FailedOpen:   p.failedOpen.Load(),
		Unserved:     p.causes[NoBackend].Load(),
		Ended:        map[Cause]uint64{},
	}
	for cause := Cause(1); cause < causes; cause++ {
		stats.Ended[cause] = p.causes[cause].Load()
	}
	for _, b := range p.backends {
		stats.Backends = append(stats.Backends, BackendStats{
			Name:        b.Name,
			State:       b.State(),
			Established: int(b.established.Load()),
			Total:       b.total.Load(),
			Failures:    b.failures.Load(),
			Outrun:      b.outrun.Load(),
			Sent:        b.sent.Load(),
			Received:    b.received.Load(),
		})
	}
	return stats
}

// reached notes that a backend has accepted.
func (p *Proxy) reached(a attempt, now time.Duration) {
	if a.backend.shunned.Load() != 0 {
		a.backend.shunned.Store(0)
	}
	if p.cfg.OnConnect != nil {
		p.cfg.OnConnect(a.backend.Name, now-a.began)
	}
}

// tell tells that an attempt has failed, or that a backend is silent.
func (p *Proxy) tell(b *backend, err error) {
	if p.cfg.OnConnectFailure != nil {
		p.cfg.OnConnectFailure(b.Name, err)
	}
}

// ended counts a session that ends, and logs it.
func (p *Proxy) ended(s *session, cause Cause, now time.Duration) {
	p.causes[cause].Add(1)
	if p.cfg.ConnectionLog == LogAll || p.cfg.ConnectionLog == LogErrors && !cause.inOrder() {
		p.journal.note(s, cause, now)
	}
}
