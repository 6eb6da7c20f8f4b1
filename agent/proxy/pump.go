package proxy

import (
	"bytes"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// scratchSize is what is read at once while a stream is not bulky: two full TLS
	// records. A read that fills it makes the stream bulky.
	scratchSize = 32 << 10
	// bulkyLeast is what a splice must bring for the stream to remain bulky. Below that
	// copying is cheaper.
	bulkyLeast = 16 << 10
	// turnSize is how many bytes a loop moves in one turn, more or less: some milliseconds.
	// The sessions that have something to do share it, each direction of one of them getting
	// from shareLeast to shareMost.
	turnSize   = 8 << 20
	shareLeast = 64 << 10
	shareMost  = 1 << 20
)

// relay moves what can be moved in both directions, and ends the session when nothing
// more is to come.
func (l *loop) relay(s *session) {
	hungry := false
	// What a broken connection has left to read is passed on before the other one is
	// reset; nothing can be written to it.
	if s.server.broken == 0 {
		hungry = l.pump(&s.up, &s.client, &s.server, &s.backend.sent)
	}
	if s.client.broken == 0 && !s.held {
		hungry = l.pump(&s.down, &s.server, &s.client, &s.backend.received) || hungry
	}
	if s.up.opening != nil {
		l.mind(s)
	}
	if s.endedBy == 0 && s.up.ended {
		s.endedBy = ClientClosed
	}
	if s.endedBy == 0 && s.down.ended {
		s.endedBy = ServerClosed
	}
	switch {
	case hungry:
		l.passEnds(s)
		l.resume(s)
	case s.client.broken != 0:
		l.end(s, causeOf(s.client.broken, causesOfClient))
	case s.server.broken != 0:
		l.end(s, causeOf(s.server.broken, causesOfServer))
	case s.up.ended && s.up.clean() && s.down.ended && s.down.clean():
		l.end(s, s.endedBy)
	default:
		l.passEnds(s)
	}
}

func (l *loop) passEnds(s *session) {
	l.passEnd(s, &s.up, &s.server)
	l.passEnd(s, &s.down, &s.client)
}

// passEnd passes the end of one direction on, when all that came before it has been.
func (l *loop) passEnd(s *session, h *half, sink *socket) {
	if !h.ended || h.passed || !h.clean() || sink.broken != 0 {
		return
	}
	h.passed = true
	if s.timer.of != &l.aging { // else that comes first
		l.boundHalfClosed(s)
	}
	if errno := endOutput(sink.fd); errno != 0 {
		sink.broken = errno // the connection has been reset; its event is on the way
	}
}

// boundHalfClosed bounds how long a session stays of which one direction has ended.
func (l *loop) boundHalfClosed(s *session) {
	if s.up.passed || s.down.passed {
		l.halfClosed.start(s, l.now)
	}
}

// pump moves bytes of one direction until there are none, or they cannot be written; then
// it returns false. It returns true when it has used up its share of the turn. Whichever connection
// has an error gets it noted.
func (l *loop) pump(h *half, source, sink *socket, count *atomic.Uint64) bool {
	left := l.share
	for sink.writable && sink.broken == 0 {
		if !h.clean() {
			n := l.flush(h, sink)
			h.moved += uint64(n)
			count.Add(uint64(n))
			continue
		}
		if left <= 0 {
			return true
		}
		if !source.readable || h.ended {
			return false
		}
		n := l.fill(h, source)
		if n == 0 {
			return false
		}
		if h.opening != nil {
			l.keep(h.opening, h.pending)
		}
		if h.pipe == nil {
			written := l.flush(h, sink)
			h.moved += uint64(written)
			count.Add(uint64(written))
			h.pending = bytes.Clone(h.pending) // off the scratch buffer
		}
		left -= n
	}
	return false
}

// fill reads once, by splicing or into the loop's scratch buffer, and returns how much.
func (l *loop) fill(h *half, source *socket) (n int) {
	var errno syscall.Errno
	if h.bulky {
		h.pipe = l.pipes.borrow()
	}
	if h.pipe != nil {
		// Since the pipe is empty, EAGAIN can only be the socket's. A short splice proves
		// nothing: a pipe is full when its slots are.
		n, errno = splice(source.fd, h.pipe.w, min(h.pipe.size, l.share))
		h.pipe.n, h.bulky = n, n >= bulkyLeast
		if n == 0 {
			l.pipes.give(h.pipe)
			h.pipe = nil
		}
	}
	// At the mark of urgent data a splice says the same as at the end (net/ipv4/tcp.c,
	// tcp_read_sock): only a read tells which it is.
	if h.pipe == nil && (n == 0 && errno == 0 || source.eager && errno == unix.EAGAIN) {
		for {
			n, errno = receive(source.fd, l.scratch[:])
			// There a read says EAGAIN also while a signal is on its way to the thread
			// (tcp_recvmsg_locked), as Go's own are, and the kernel announces nothing anew.
			if errno != unix.EAGAIN || !source.eager || !hasInput(source.fd) {
				break
			}
		}
		h.bulky = n == len(l.scratch)
		if n > 0 {
			h.pending = l.scratch[:n]
			source.readable = h.bulky || source.eager
		}
	}
	switch {
	case n > 0:
	case errno == unix.EAGAIN:
		source.readable = false
	case errno != 0:
		source.broken = errno
	case source.broken == 0:
		h.ended = true
	}
	return n
}

// flush writes once what was read, and returns how much that was.
func (l *loop) flush(h *half, sink *socket) (n int) {
	var errno syscall.Errno
	if h.pipe != nil {
		n, errno = splice(h.pipe.r, sink.fd, h.pipe.n)
		if h.pipe.n -= n; h.pipe.n == 0 {
			l.pipes.give(h.pipe)
			h.pipe = nil
		}
	} else {
		n, errno = send(sink.fd, h.pending)
		if h.pending = h.pending[n:]; len(h.pending) == 0 {
			h.pending = nil
		} else {
			sink.writable = false
		}
	}
	switch errno {
	case 0:
	case unix.EAGAIN:
		sink.writable = false
	default:
		sink.broken = errno
	}
	return n
}

// splice moves bytes between a socket and a pipe. It does not wait, and does not announce
// more to come (SPLICE_F_MORE), for which the kernel would hold back the last segment. Go's
// scheduler is not told even though a megabyte takes a while: it would give the processor
// away and look after us every 20 µs, which costs more than a tenth.
func splice(from, to, most int) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(most), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}
