package proxy

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// holdMost is how long a new connection waits at most for others to be told of it. It is far
// below what a client notices, and below the 200 ms after which its kernel sends again what
// was not acknowledged (RFC 6298; TCP_RTO_MIN in include/net/tcp.h).
const holdMost = 20 * time.Millisecond

// Flow says that a client's connection has come or has gone.
type Flow struct {
	Client netip.AddrPort
	Local  netip.Addr // where it connected to
	Open   bool       // else it has gone
	At     time.Time  // when it came or went
	// ID tells it from an earlier connection of the same client: what is told of two of them
	// may come in any order.
	ID uint64
}

// FlowWatch says who wants to know of which connections.
//
// A connection that has come is held back until whoever takes the flows has told others of
// it, for 20 ms at most: the client gets no byte of its server, and, where Mark is set and
// the kernel has a rule for it, not even an acknowledgement of its own bytes. So either
// others have been told of a connection, or its client's kernel sends again, and learns from
// whoever has the address then that the connection is gone. Two gaps are left: what was told
// may still be in this machine when that dies, some tens of microseconds, and where others
// do not take it for 20 ms, the client is served all the same.
type FlowWatch struct {
	// Local says whether the connections to a local address are wanted.
	Local func(netip.Addr) bool
	// News is called when a connection has come. It must not block.
	News func()
	// Mark is what sockets of connections that are held back bear (socket(7), SO_MARK);
	// 0: none. Setting it takes CAP_NET_ADMIN, and as of Linux 5.17 CAP_NET_RAW will do.
	Mark uint32
}

// WatchFlows has the proxy keep an account of connections, for TakeFlows. It is called before
// Run.
func (p *Proxy) WatchFlows(w FlowWatch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watch = &w
}

// TakeFlows returns which connections have come and gone since it was called last, and what
// to call when others have been told of those that have come; nil: none have. It must not be
// called twice at a time.
func (p *Proxy) TakeFlows() (all []Flow, told func()) {
	type turn struct {
		loop *loop
		n    uint64
	}
	var opened []turn
	for _, l := range p.started() {
		l.flows.mu.Lock()
		news, opens, n := l.flows.news, l.flows.opens, l.flows.taken+1
		l.flows.news, l.flows.opens, l.flows.taken = nil, false, n
		l.flows.mu.Unlock()
		all = append(all, news...)
		if opens {
			opened = append(opened, turn{l, n})
		}
	}
	if len(opened) == 0 {
		return all, nil
	}
	return all, func() {
		for _, o := range opened {
			o.loop.post(func() { o.loop.letGo(o.n) })
		}
	}
}

// flowAccount is what a loop writes down for TakeFlows.
type flowAccount struct {
	mu    sync.Mutex
	news  []Flow
	opens bool   // there is one in news that has come
	taken uint64 // how often news was taken

	held []heldSession // in the order of their coming; the loop's own
}

// heldSession is a session that is held back.
type heldSession struct {
	index      int32
	generation uint32
	turn       uint64 // of TakeFlows, that takes it
	until      time.Duration
}

// enlist takes a session into the account, if its connection is one that others want to know
// of, and holds a new one back until they do. A client on this machine that came from the
// same address is left out: whoever has the address next could not reach it.
func (l *loop) enlist(s *session, isNew bool) {
	w := l.proxy.watch
	if w == nil {
		return
	}
	local := s.localEnd().Addr()
	if s.from.Addr() == local || !w.Local(local) {
		l.unmark(s)
		return
	}
	s.flow, s.held = l.proxy.flows.Add(1), isNew
	turn, first := l.note(s, true)
	if isNew {
		l.flows.held = append(l.flows.held, heldSession{s.index, s.generation, turn, l.now + holdMost})
	}
	if first {
		w.News()
	}
}

// note writes down that a session has come or gone, and returns the turn of TakeFlows that
// takes it and whether it is the first of that turn that has come.
func (l *loop) note(s *session, open bool) (turn uint64, first bool) {
	l.flows.mu.Lock()
	defer l.flows.mu.Unlock()
	l.flows.news = append(l.flows.news, Flow{Client: s.from, Local: s.localEnd().Addr(), Open: open, At: origin.Add(l.now), ID: s.flow})
	first = open && !l.flows.opens
	l.flows.opens = l.flows.opens || open
	return l.flows.taken + 1, first
}

// letGo ends the holding back of sessions that others know of, up to a turn, and of those
// that have waited for long enough.
func (l *loop) letGo(turn uint64) {
	n := 0
	for _, h := range l.flows.held {
		if h.turn > turn && l.now < h.until {
			break
		}
		n++
		if s := l.sessions[h.index]; s.generation == h.generation && s.held {
			l.unmark(s)
			s.held = false
			if s.phase == relaying {
				l.relay(s)
			}
		}
	}
	l.flows.held = l.flows.held[n:]
}

// unmark has the kernel acknowledge again what the client sends.
func (l *loop) unmark(s *session) {
	if w := l.proxy.watch; w != nil && w.Mark != 0 {
		_ = setOption(s.client.fd, option{unix.SOL_SOCKET, unix.SO_MARK, 0}) // a listener could bear it, so this works
	}
}

// markListener has the sockets that a listener accepts bear the mark from their first packet
// on, or no mark any more.
func (p *Proxy) markListener(fd int, mark uint32) {
	if p.watch == nil || p.watch.Mark == 0 {
		return
	}
	if errno := setOption(fd, option{unix.SOL_SOCKET, unix.SO_MARK, int(mark)}); errno != 0 {
		p.log.Warn("could not mark the listener: new connections are acknowledged before the other members know of them", "proxy", p.cfg.Name, "error", errno)
	}
}
