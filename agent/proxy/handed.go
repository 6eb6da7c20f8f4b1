package proxy

import (
	"bytes"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Handed is a whole proxy at rest: what another one takes to go on with its port and its
// connections. Whoever has it owns the descriptors in it.
type Handed struct {
	Listener int // descriptor of the listening socket; -1: it was closed before
	Sessions []HandedSession
}

// HandedSession is one client's connection and the one to its backend.
type HandedSession struct {
	Client, Server int    // descriptors; Server is -1 where no backend had accepted yet
	Backend        string // its name; empty where none had accepted yet
	From           netip.AddrPort
	Age, Connect   time.Duration // since it was accepted; from there until a backend accepted
	EndedBy        Cause         // whose direction ended first; 0: none has
	Up, Down       HandedHalf    // towards the server, towards the client
}

// HandedHalf is one direction of a session.
type HandedHalf struct {
	Pending []byte // was read and not yet written, up to a pipe's megabyte
	Ended   bool   // the source has sent its FIN
	Passed  bool   // which has been passed on
	Moved   uint64 // bytes
}

// Freeze ends the proxy, like Close, without ending any connection: it returns them, with
// the port still bound, for another proxy to Adopt, in this process or another one. Clients
// that connect meanwhile wait in the kernel's queue.
func (p *Proxy) Freeze() Handed {
	p.mu.Lock()
	handed := Handed{Listener: p.listener, Sessions: p.adopted}
	if p.listener >= 0 {
		p.markListener(p.listener, 0) // whoever goes on with it may know of no mark
	}
	p.listener, p.adopted = -1, nil
	p.mu.Unlock()
	for _, l := range p.started() {
		// One loop after the other: they share what they append to.
		onAll([]*loop{l}, func(l *loop) {
			l.ignore()
			for _, s := range l.sessions {
				switch {
				case s.phase == unused:
				case s.client.broken != 0:
					l.end(s, causeOf(s.client.broken, causesOfClient))
				case s.server.broken != 0:
					l.end(s, causeOf(s.server.broken, causesOfServer))
				default:
					handed.Sessions = append(handed.Sessions, l.freeze(s))
				}
			}
		})
	}
	p.Close()
	return handed
}

// freeze takes a session out of the loop, descriptors and all.
func (l *loop) freeze(s *session) HandedSession {
	h := HandedSession{
		Client: s.client.fd, Server: -1, From: s.from, Age: l.now - s.began, EndedBy: s.endedBy,
		Up: s.up.freeze(), Down: s.down.freeze(),
	}
	l.poll.remove(s.client.fd)
	if s.held {
		l.unmark(s)
	}
	s.flow = 0 // it has not gone
	if s.phase == relaying {
		h.Server, h.Backend, h.Connect = s.server.fd, s.backend.Name, s.connected-s.began
		l.poll.remove(s.server.fd)
	}
	l.forget(s)
	return h
}

// freeze copies what is in the half's pipe, which does not go to another process.
func (h *half) freeze() HandedHalf {
	pending := bytes.Clone(h.pending)
	if h.pipe != nil {
		pending = make([]byte, h.pipe.n)
		n, err := readPipe(h.pipe.r, pending)
		if err != nil || n != len(pending) {
			// A pipe has what was put into it; if not, nothing can be trusted.
			panic(fmt.Sprintf("read %d of %d bytes from a pipe: %v", n, len(pending), err))
		}
		h.pipe.n = 0
	}
	return HandedHalf{Pending: pending, Ended: h.ended, Passed: h.passed, Moved: h.moved}
}

func readPipe(fd int, buf []byte) (int, error) {
	read := 0
	for read < len(buf) {
		n, err := unix.Read(fd, buf[read:])
		if err == unix.EINTR {
			continue
		}
		if n <= 0 {
			return read, err
		}
		read += n
	}
	return read, nil
}

// Adopt takes what another proxy was when it was frozen, in the place of Listen, and owns
// its descriptors from then on. Connections to a backend that this proxy does not have are
// reset. The proxy goes on with the others when it runs.
func (p *Proxy) Adopt(handed Handed) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.listener >= 0 || p.loops != nil {
		return fmt.Errorf("proxy %s is closed, or listens already", p.cfg.Name)
	}
	p.listener, p.port = handed.Listener, localAddr(handed.Listener).Port()
	p.adopted = handed.Sessions
	return nil
}

// discard resets the connections of a session that nobody goes on with.
func (h HandedSession) discard() {
	abort(h.Client)
	if h.Server >= 0 {
		abort(h.Server)
	}
}

// adopt goes on with a session.
func (l *loop) adopt(h HandedSession) {
	l.proxy.mu.Lock()
	l.proxy.count(h.From)
	l.proxy.mu.Unlock()
	s := l.take(h.Client, h.From)
	// Accepted by a process that does not take marks off, it may have one from its listener.
	_ = setOption(s.client.fd, option{unix.SOL_SOCKET, unix.SO_MARK, 0}) // it may have none to take off
	l.enlist(s, false)
	s.began = l.now - h.Age
	s.phase = connecting
	if h.Server >= 0 {
		b := l.proxy.backend(h.Backend)
		if b == nil {
			abort(h.Server)
			l.end(s, BackendDisabled)
			return
		}
		s.phase, s.backend, s.connected = relaying, b, s.began+h.Connect
		s.server = socket{fd: h.Server, side: sideServer, writable: true}
		b.load.Add(1)
		b.established.Add(1)
	}
	s.up, s.down, s.endedBy = h.Up.half(), h.Down.half(), h.EndedBy
	if s.phase == relaying {
		l.aging.start(s, l.now) // it may not have come so far where it was
	}
	err := l.poll.add(s.client.fd, watchSocket, s.token(sideClient))
	if err == nil && s.phase == relaying {
		err = l.poll.add(s.server.fd, watchSocket, s.token(sideServer))
	}
	switch {
	case err != nil:
		l.end(s, Failed)
	case s.phase == connecting:
		l.advance(s)
	}
}

func (h HandedHalf) half() half {
	return half{pending: h.Pending, ended: h.Ended, passed: h.Passed, moved: h.Moved}
}
