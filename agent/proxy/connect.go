package proxy

import (
	"cmp"
	"errors"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

const (
	// raceAfter is how long a backend may be silent before the next in rank is tried
	// beside it. It is far beyond a healthy connect inside one site, and far below what a
	// client notices.
	raceAfter = 100 * time.Millisecond
	// shunFor is how long a backend that refused a connection, or left one unanswered for
	// raceAfter, is tried after the others: as long as checks take to judge it.
	shunFor = time.Second
)

// Why an attempt to connect has failed, besides the kernel's errors.
var (
	// ErrLoop says that a backend's address is the proxy itself, so that a connection
	// would go round and round.
	ErrLoop = errors.New("the backend's address is this proxy")
	// ErrSilent says that a backend has not answered for a tenth of a second: a connect,
	// which goes on while others are begun beside it, or, though it accepts connections,
	// any client.
	ErrSilent = errors.New("no answer yet")
)

// search is how a session comes to its backend.
type search struct {
	class    int       // of classes: whose backends are tried now
	tried    uint64    // one bit for each backend
	attempts []attempt // under way
}

// attempt is one try to connect.
type attempt struct {
	backend *backend
	fd      int
	side    int
	began   time.Duration
	asked   bool // it is a rival's, and the client's first bytes have been sent
}

// classes are the states of backends that are tried, the best first. One class is tried
// only when all of the one before have failed.
var classes = [...]health.State{health.Up, health.Draining, health.NotReady, health.Unknown, health.Down}

// advance tries the next backend for a session, and ends the session where none is left
// to try or to wait for.
func (l *loop) advance(s *session) {
	for {
		b := l.next(s)
		switch {
		case b != nil:
			s.search.tried |= 1 << b.index
			err := l.try(s, b)
			switch {
			case err != nil && !isShortage(err):
				l.refused(b, err)
			case err != nil && len(s.search.attempts) == 0:
				l.end(s, Failed)
				return
			default:
				l.racing.start(s, l.now)
				return
			}
		case len(s.search.attempts) > 0:
			l.racing.start(s, l.now)
			return
		case s.search.class == len(classes)-1:
			l.end(s, NoBackend)
			return
		default:
			s.search.class++
		}
	}
}

// next returns the backend of the class that the session is to try next; nil: none.
func (l *loop) next(s *session) *backend {
	l.candidates, l.among = l.candidates[:0], l.among[:0]
	for _, b := range l.proxy.backends {
		if s.search.tried&(1<<b.index) == 0 && b.State() == classes[s.search.class] {
			l.candidates = append(l.candidates, affinity.Candidate{
				Backend: b.ranked, Load: int(b.load.Load()), Ramp: b.ramp(l.now, l.proxy.cfg.SlowStart),
				Avoid: b.avoided(l.now),
			})
			l.among = append(l.among, b)
		}
	}
	i := affinity.Choose(s.from.Addr(), l.candidates, l.proxy.cfg.LoadFactor)
	if i < 0 {
		return nil
	}
	return l.among[i]
}

// try begins an attempt, or says why it cannot succeed.
func (l *loop) try(s *session, b *backend) error {
	if b.Address.Port() == l.proxy.port && l.proxy.own.has(b.Address.Addr()) {
		return ErrLoop
	}
	fd, errno := connectTo(&b.target)
	if errno != 0 {
		return errno
	}
	// A stale event of an attempt that has failed must not be taken for another one's.
	side := sideServer + s.tries() - 1
	if err := l.poll.add(fd, watchSocket, s.token(side)); err != nil {
		abort(fd)
		return err
	}
	b.load.Add(1)
	s.search.attempts = append(s.search.attempts, attempt{backend: b, fd: fd, side: side, began: l.now})
	return nil
}

// isShortage reports whether an error is this machine's own, for want of descriptors or
// memory (socket(2), epoll_ctl(2)), and says nothing of a backend.
func isShortage(err error) bool {
	return slices.ContainsFunc([]syscall.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ENOSPC},
		func(e syscall.Errno) bool { return errors.Is(err, e) })
}

// answered takes an event of an attempt.
func (l *loop) answered(s *session, side int, events uint32) {
	i := s.attempt(side)
	if i < 0 {
		return
	}
	a := s.search.attempts[i]
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		s.search.attempts = slices.Delete(s.search.attempts, i, i+1)
		errno := pendingError(a.fd)
		closeSocket(a.fd)
		a.backend.load.Add(-1)
		l.refused(a.backend, errno)
		l.advance(s)
		return
	}
	if events&unix.EPOLLOUT == 0 {
		return
	}
	if state := a.backend.State(); l.proxy.resets(state) && state != classes[s.search.class] {
		// It has come into that state while this attempt was under way.
		l.drop(s, i)
		l.advance(s)
		return
	}
	l.won(s, i, events)
}

// won makes an attempt the session's connection to its backend.
func (l *loop) won(s *session, i int, events uint32) {
	a := s.search.attempts[i]
	l.dropAttempts(s, i)
	l.aging.start(s, l.now)
	if classes[s.search.class] != health.Up {
		l.proxy.failedOpen.Add(1)
	}
	l.proxy.reached(a, l.now)
	s.phase = relaying
	l.join(s, a, events)
	if header := l.greeting(s); len(header) > 0 {
		// A new connection has room for it; if not, it is broken.
		if n, errno := send(s.server.fd, header); n < len(header) {
			s.server.broken = cmp.Or(errno, unix.ENOBUFS)
		}
	} else if !s.client.readable {
		_ = setOption(s.server.fd, ackNow) // fails only if the connection is broken
	}
	l.open(s)
	l.relay(s)
}

// join makes an attempt's connection that of the session.
func (l *loop) join(s *session, a attempt, events uint32) {
	s.backend, s.connected = a.backend, l.now
	s.server = socket{fd: a.fd, side: a.side, writable: true}
	s.server.note(events)
	a.backend.total.Add(1)
	a.backend.established.Add(1)
}

// greeting returns what a backend is told before the client's bytes, in the loop's scratch
// buffer.
func (l *loop) greeting(s *session) []byte {
	if l.proxy.cfg.Greeting != GreetingV2 {
		return l.scratch[:0]
	}
	return appendHeader(l.scratch[:0], s.from, s.localEnd())
}

// drop ends one attempt.
func (l *loop) drop(s *session, i int) {
	abort(s.search.attempts[i].fd)
	s.search.attempts[i].backend.load.Add(-1)
	s.search.attempts = slices.Delete(s.search.attempts, i, i+1)
}

// aged prepares a session that is not a short one for a long life.
func (l *loop) aged(s *session) {
	if err := setOptions(s.server.fd); err != nil {
		l.end(s, Failed)
		return
	}
	l.boundHalfClosed(s)
}

// dropAttempts ends all attempts but one; -1: all.
func (l *loop) dropAttempts(s *session, but int) {
	for i, a := range s.search.attempts {
		if i != but {
			abort(a.fd)
			a.backend.load.Add(-1)
		}
	}
	s.search.attempts = s.search.attempts[:0]
}

// silence goes on with a session that no backend has answered for raceAfter.
func (l *loop) silence(s *session) {
	if s.phase == relaying {
		l.contest(s)
		return
	}
	late := l.now-s.began >= l.proxy.cfg.DialTimeout
	for _, a := range s.search.attempts {
		if late {
			l.refused(a.backend, unix.ETIMEDOUT)
		} else if l.now-a.began < 2*raceAfter {
			l.shun(a.backend, ErrSilent)
		}
	}
	if late {
		l.end(s, NoBackend)
		return
	}
	l.advance(s)
}

// refused notes that an attempt has failed.
func (l *loop) refused(b *backend, err error) {
	b.failures.Add(1)
	l.shun(b, err)
}

// shun makes others come first for a while, and tells why.
func (l *loop) shun(b *backend, err error) {
	b.shunned.Store(int64(l.now + shunFor))
	l.proxy.tell(b, err)
}
