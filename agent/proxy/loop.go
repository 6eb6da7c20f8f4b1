package proxy

import (
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

const (
	// acceptBatch is how many clients are accepted in a row. More would be served one after
	// the other here while another loop has nothing to do.
	acceptBatch = 8
	// againMost is how many bulky sessions have their turn in a row before new events do.
	againMost = 64
	// acceptPause is how long accepting rests at first where it has failed for want of
	// descriptors or memory; twice as long each time after, up to acceptPauseMost.
	acceptPause     = 5 * time.Millisecond
	acceptPauseMost = time.Second
	// agedAfter is how long a session lasts that is not a short one.
	agedAfter = time.Second
	// halfClosedFor bounds a session one direction of which has ended. A peer that has
	// ended its own direction may well want an answer, but no API server takes an hour
	// for one, and a peer that has forgotten the connection is one that keep-alive does
	// not find.
	halfClosedFor = time.Hour
)

// origin is that of the loops' time.
var origin = time.Now()

// loop relays a share of a proxy's sessions, all in one goroutine.
//
// Two goroutines for each session, by Go's net package and with pooled buffers, are simpler.
// Measured beside it on two processors, shared with client and servers, they took 15.9 kB
// of memory for an idle session instead of 1.2, 135 µs of processor time for a short
// connection instead of 67, and 0.7 to 1.0 s for a gigabyte instead of 0.36 to 0.50.
type loop struct {
	proxy *Proxy
	poll  *poll
	now   time.Duration // since origin, at the beginning of the turn
	share int           // of the turn, of each direction of a session, in bytes

	sessions []*session // by index, the unused ones too
	free     []int32    // indices of unused ones
	again    []*session // have more to do in the next turn

	racing, aging, halfClosed timers
	openings                  openings
	flows                     flowAccount
	pipes                     pipes
	scratch                   [scratchSize]byte
	candidates                []affinity.Candidate // of one choice, to save garbage
	among                     []*backend

	listener int           // -1: this loop accepts nothing
	watched  bool          // listener is
	pause    time.Duration // the last one, while accepting fails
	resumeAt time.Duration // when to accept again, while not watched

	mu      sync.Mutex
	mail    []func() // for the loop's goroutine to call
	closing bool     // takes no more mail, and ends
}

var listenToken = token{high: -2}

func newLoop(p *Proxy) (*loop, error) {
	poll, err := newPoll()
	if err != nil {
		return nil, err
	}
	return &loop{
		proxy: p, poll: poll, listener: -1, now: time.Since(origin),
		racing: timers{after: raceAfter}, aging: timers{after: agedAfter}, halfClosed: timers{after: halfClosedFor},
	}, nil
}

// post has the loop's goroutine call a function, soon. It reports whether that will be:
// not when the loop has ended.
func (l *loop) post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		return false
	}
	l.mail = append(l.mail, f)
	if len(l.mail) == 1 {
		l.poll.wake()
	}
	return true
}

// run goes round until it is shut.
func (l *loop) run() error {
	defer l.poll.close()
	defer l.pipes.close()
	for {
		events, err := l.poll.wait(l.idle())
		if err != nil {
			l.shut(Failed)
			l.readMail()
			return fmt.Errorf("waiting for connections' events: %w", err)
		}
		l.now = time.Since(origin)
		l.share = min(max(turnSize/(len(events)+min(len(l.again), againMost)+1), shareLeast), shareMost)
		for i := range events {
			l.dispatch(token{events[i].Fd, events[i].Pad}, events[i].Events)
		}
		l.expire()
		l.catchUp()
		if l.readMail() {
			return nil
		}
	}
}

// idle returns for how long there is nothing to do without an event; negative: for ever.
func (l *loop) idle() time.Duration {
	if len(l.again) > 0 {
		return 0
	}
	at := time.Duration(-1)
	earlier := func(due time.Duration) {
		if at < 0 || due < at {
			at = due
		}
	}
	for _, q := range []*timers{&l.racing, &l.aging, &l.halfClosed} {
		if t := q.first; t != nil {
			earlier(t.due)
		}
	}
	if l.listener >= 0 && !l.watched {
		earlier(l.resumeAt)
	}
	if len(l.flows.held) > 0 {
		earlier(l.flows.held[0].until)
	}
	if at < 0 {
		return at
	}
	return max(at-time.Since(origin), 0)
}

func (l *loop) dispatch(t token, events uint32) {
	switch t {
	case wakeToken:
		return // the mail is read in each turn
	case listenToken:
		l.accept()
		return
	}
	s := l.sessions[t.high]
	side := int(t.low & 0xff)
	if t.low>>8 != s.token(0).low>>8 {
		return
	}
	switch {
	case s.phase == relaying && side == sideClient:
		s.client.note(events)
		l.relay(s)
	case s.phase == relaying && side == s.server.side:
		s.server.note(events)
		l.relay(s)
	case s.phase == relaying:
		l.tend(s, side, events)
	case s.phase == connecting && side == sideClient:
		s.client.note(events)
		if s.client.broken != 0 {
			l.end(s, causeOf(s.client.broken, causesOfClient))
		}
	case s.phase == connecting:
		l.answered(s, side, events)
	}
}

// resume gives a session a turn when the others have had theirs.
func (l *loop) resume(s *session) {
	if !s.queued {
		s.queued = true
		l.again = append(l.again, s)
	}
}

// catchUp goes on with sessions that had more to do, as many as one turn may be long for.
func (l *loop) catchUp() {
	turn := min(len(l.again), againMost)
	for _, s := range l.again[:turn] {
		s.queued = false
		if s.phase == relaying {
			l.relay(s) // which may put it at the end of the queue
		}
	}
	l.again = slices.Delete(l.again, 0, turn)
}

// expire does what is due.
func (l *loop) expire() {
	for s := l.racing.next(l.now); s != nil; s = l.racing.next(l.now) {
		l.silence(s)
	}
	for s := l.aging.next(l.now); s != nil; s = l.aging.next(l.now) {
		l.aged(s)
	}
	for s := l.halfClosed.next(l.now); s != nil; s = l.halfClosed.next(l.now) {
		l.end(s, HalfClosedTimeout)
	}
	if l.listener >= 0 && !l.watched && l.now >= l.resumeAt {
		l.watchListener()
	}
	if len(l.flows.held) > 0 && l.now >= l.flows.held[0].until {
		l.letGo(0)
	}
}

// readMail calls what others have posted, and reports whether the loop is to end.
func (l *loop) readMail() bool {
	for {
		l.mu.Lock()
		mail, closing := l.mail, l.closing
		l.mail = nil
		l.mu.Unlock()
		if len(mail) == 0 {
			return closing
		}
		for _, f := range mail {
			f()
		}
	}
}

// shut ends all sessions, and the loop.
func (l *loop) shut(cause Cause) {
	l.ignore()
	l.resetAll(nil, cause)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closing = true
}

// listen makes the loop accept from a socket that it shares with the other loops.
func (l *loop) listen(fd int) {
	l.listener = fd
	l.watchListener()
}

func (l *loop) watchListener() {
	// Level-triggered, so that what one batch leaves is seen again.
	err := l.poll.add(l.listener, unix.EPOLLIN|unix.EPOLLEXCLUSIVE, listenToken)
	if l.watched = err == nil; !l.watched {
		l.rest(err)
	}
}

// ignore ends accepting.
func (l *loop) ignore() {
	if l.watched {
		l.poll.remove(l.listener)
	}
	l.listener, l.watched = -1, false
}

// rest stops accepting for a while: the clients wait in the kernel's queue until others'
// connections have ended.
func (l *loop) rest(err error) {
	if l.watched {
		l.poll.remove(l.listener)
		l.watched = false
	}
	l.pause = min(max(2*l.pause, acceptPause), acceptPauseMost)
	l.resumeAt = l.now + l.pause
	l.proxy.acceptErrors.Add(1)
	l.proxy.warn("accepting a connection failed", "error", err, "pause", l.pause)
}

// notAccepted are errors of connections that were lost while they waited (accept(2)).
var notAccepted = []syscall.Errno{
	unix.EINTR, unix.ECONNABORTED, unix.ENETDOWN, unix.EPROTO, unix.ENOPROTOOPT, unix.EHOSTDOWN,
	unix.ENONET, unix.EHOSTUNREACH, unix.EOPNOTSUPP, unix.ENETUNREACH, unix.EPERM,
}

func (l *loop) accept() {
	for range acceptBatch {
		if l.listener < 0 {
			return
		}
		fd, from, errno := accept(l.listener)
		switch {
		case errno == unix.EAGAIN:
			return
		case slices.Contains(notAccepted, errno):
			continue
		case errno != 0:
			l.rest(errno)
			return
		}
		l.pause = 0
		if refused := l.proxy.enter(from); refused != 0 {
			l.proxy.causes[refused].Add(1)
			l.proxy.warn("refusing clients", "cause", refused.String(), "client", from.Addr())
			abort(fd)
			continue
		}
		s := l.take(fd, from)
		l.enlist(s, true)
		if err := l.poll.add(fd, watchSocket, s.token(sideClient)); err != nil {
			l.end(s, Failed)
			continue
		}
		s.phase = connecting
		l.advance(s)
	}
}
