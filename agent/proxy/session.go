package proxy

import (
	"math/bits"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// phase is how far a session is. The zero phase is that of an unused one.
type phase uint8

const (
	unused phase = iota
	// connecting: no backend has accepted yet.
	connecting
	// relaying: there are two connections.
	relaying
)

// session is a client's connection and the one to its backend. It belongs to one loop,
// which uses it again when it has ended.
type session struct {
	index      int32
	generation uint32 // of the use; events for an earlier one are stale
	phase      phase
	queued     bool // in loop.again
	held       bool // others have not been told of it yet, so the client gets nothing
	backend    *backend
	client     socket
	server     socket
	up, down   half   // towards the server, towards the client
	flow       uint64 // as which others are told of it; 0: they are not

	from      netip.AddrPort // the client
	local     netip.AddrPort // where the client connected to; zero until asked for
	began     time.Duration  // when it was accepted
	connected time.Duration  // when the backend accepted
	endedBy   Cause          // whose direction ended first, once one has

	search  search
	opening opening
	timer   timer
}

// socket is one end of a session. The flags are what the kernel said last, which it says
// only once (epoll(7), edge-triggered).
type socket struct {
	fd       int
	side     int
	readable bool
	writable bool
	// eager: a short read does not prove that nothing is left, since the end of the
	// stream, an error or urgent data has been announced already.
	eager  bool
	broken syscall.Errno
}

// half is one direction of a session.
type half struct {
	pending []byte   // has been read and not yet been written
	pipe    *pipe    // holds what has been spliced, while there is some
	bulky   bool     // so much comes that splicing pays
	ended   bool     // the source has sent its FIN
	passed  bool     // and it has been passed on
	moved   uint64   // bytes written
	opening *opening // keeps what comes, until the other side has answered
}

// clean reports whether all that has been read has been written.
func (h *half) clean() bool { return len(h.pending) == 0 && h.pipe == nil }

// sides of a session, as they stand in tokens: the client's, and from sideServer on the
// attempts to connect to a backend, one of which is the server's at last.
const (
	sideClient = iota
	sideServer
)

func (s *session) token(side int) token {
	return token{high: s.index, low: int32(s.generation<<8 | uint32(side))}
}

// note takes an event of a socket.
func (k *socket) note(events uint32) {
	const last = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	if events&(unix.EPOLLIN|unix.EPOLLPRI|last) != 0 {
		k.readable = true
	}
	if events&(unix.EPOLLPRI|last) != 0 {
		k.eager = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		k.writable = true
	}
	if events&unix.EPOLLERR != 0 && k.broken == 0 {
		k.broken = pendingError(k.fd)
	}
}

// take returns a session for a new client, or one that is handed over.
func (l *loop) take(client int, from netip.AddrPort) *session {
	var s *session
	if n := len(l.free); n > 0 {
		s = l.sessions[l.free[n-1]]
		l.free = l.free[:n-1]
	} else {
		s = &session{index: int32(len(l.sessions))}
		l.sessions = append(l.sessions, s)
	}
	s.client = socket{fd: client, writable: true}
	s.from, s.began = from, l.now
	return s
}

// end closes a session in good order, or, for any other cause than that, by resetting
// both connections, so that neither side waits for an answer.
func (l *loop) end(s *session, cause Cause) {
	shut := abort
	if cause.inOrder() {
		shut = closeSocket
	}
	l.proxy.ended(s, cause, l.now)
	shut(s.client.fd)
	if s.phase == relaying {
		shut(s.server.fd)
	}
	l.forget(s)
}

// forget frees all that a session has, its two connections aside.
func (l *loop) forget(s *session) {
	l.dropAttempts(s, -1)
	if s.flow != 0 {
		l.note(s, false)
	}
	if s.phase == relaying {
		s.backend.load.Add(-1)
		s.backend.established.Add(-1)
	}
	for _, h := range []*half{&s.up, &s.down} {
		if h.pipe != nil {
			l.pipes.give(h.pipe)
		}
	}
	s.timer.stop()
	l.openings.takeBack(&s.opening)
	l.proxy.leave(s.from)
	*s = session{
		index: s.index, generation: s.generation + 1, queued: s.queued,
		search: search{attempts: s.search.attempts[:0]},
	}
	l.free = append(l.free, s.index)
}

// resetAll ends all sessions that concern a backend, nil: any one.
func (l *loop) resetAll(b *backend, cause Cause) {
	for _, s := range l.sessions {
		if s.phase == relaying && (b == nil || s.backend == b) || s.phase == connecting && b == nil {
			l.end(s, cause)
		}
	}
}

// localEnd returns where the client connected to.
func (s *session) localEnd() netip.AddrPort {
	if !s.local.IsValid() {
		s.local = localAddr(s.client.fd)
	}
	return s.local
}

// attempt returns the index of the attempt with a side; -1: it is over.
func (s *session) attempt(side int) int {
	return slices.IndexFunc(s.search.attempts, func(a attempt) bool { return a.side == side })
}

// tries returns how many backends have been tried.
func (s *session) tries() int { return bits.OnesCount64(s.search.tried) }
