package proxy

import (
	"cmp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
)

// The kernel of a server that hangs goes on accepting connections. So a session that has
// come to a backend is in its opening until that has sent something. What a client of an
// API server sends first is a TLS ClientHello, which may be sent to another server as well:
// it has no effect other than the answer. It is kept, and where the backend leaves it
// unanswered for raceAfter, and has sent nothing to any other client meanwhile, it is sent to
// a rival, the next Up backend in rank, too. The first to send a byte has the client, and the
// other one is reset. A backend that serves others meanwhile is busy, and has more time.
//
// Nothing is sent twice but a whole ClientHello without early data after which the client
// has sent nothing. Whatever else comes from the client ends the opening, and stays with
// the backend that was chosen at first.
const (
	// rivalsMost is how many rivals a session has, one after the other, each for raceAfter,
	// but the last one for as long as it takes.
	rivalsMost = 2
	// busyLooks is for how many times raceAfter a backend is given that serves others meanwhile.
	busyLooks = 4
	// rivalPrice is how many openings in time pay for one rival, and rivalCredit how many a
	// loop may owe. Where all servers are so overloaded that none answers in time, racing
	// them would double their load for ever; so it ends by itself.
	rivalPrice  = 8
	rivalCredit = 512 * rivalPrice
	// keptMost bounds the copies that a loop keeps at a time, and so the memory that
	// clients can make it take, to 16 MiB. Copies beyond are not kept.
	keptMost = 1024
	// copySize is the capacity that a copy begins with, and copiesSpare how many unused
	// ones a loop keeps.
	copySize    = 2 << 10
	copiesSpare = 64
	// muteFor is how long a backend that answers nobody is tried after the others: a little
	// longer than checks take to find that out, 1.15 s by default.
	muteFor = 1500 * time.Millisecond
)

// opening is a session up to the first byte of its server.
type opening struct {
	kept   []byte // all that the client has sent
	flight flight // what that is
	since  time.Duration
	heard  uint64 // what all clients had received of the backend when the last of kept was passed on
	looks  int    // for which the backend was only busy
	rivals int    // as yet
}

// openings are what a loop has for all of them.
type openings struct {
	spare [][]byte
	kept  int // copies in use
	owed  int // of rivalCredit
}

// open begins a session's opening. Without another backend there is nothing to keep a
// copy for; nor is there where none is up, since being sure of one more is not worth a
// server that was found unfit.
func (l *loop) open(s *session) {
	if classes[s.search.class] == health.Up && len(l.proxy.backends) > 1 {
		s.up.opening = &s.opening
	}
}

// keep takes what comes from the client.
func (l *loop) keep(o *opening, piece []byte) {
	if o.flight == other {
		return
	}
	if o.kept == nil {
		o.kept = l.openings.lend()
	}
	if o.kept == nil || len(o.kept)+len(piece) > helloMost {
		o.flight = other
		return
	}
	o.kept = append(o.kept, piece...)
	o.flight, o.since = judge(o.kept), l.now
}

// mind ends a session's opening, or sees to it that it does not last.
func (l *loop) mind(s *session) {
	o := s.up.opening
	answered := s.down.moved > 0 || !s.down.clean()
	switch {
	case answered, s.down.ended, s.server.broken != 0, s.up.ended, o.flight == other:
		if answered && o.flight == whole && o.rivals == 0 {
			l.openings.owed = max(l.openings.owed-1, 0)
		}
		l.settle(s)
	case o.since == l.now && (s.timer.of != &l.racing || o.flight == whole):
		// The timer is not set anew for each piece, or a client could have its copy kept
		// by sending one byte at a time.
		o.heard = s.backend.received.Load()
		l.racing.start(s, l.now)
	}
}

// settle ends a session's opening: its server is the one that it has.
func (l *loop) settle(s *session) {
	l.dropAttempts(s, -1)
	l.aging.start(s, l.now)
	l.openings.takeBack(&s.opening)
	s.up.opening = nil
}

// contest goes on with a session whose server, or last rival, has been silent for raceAfter.
func (l *loop) contest(s *session) {
	o := s.up.opening
	if heard := s.backend.received.Load(); heard != o.heard && o.looks < busyLooks {
		// It serves others, so it is busy: asking a second server at once would make all of
		// them busier. Or it has hung just now.
		o.heard = heard
		o.looks++
		l.racing.start(s, l.now)
		return
	}
	for o.flight == whole && o.rivals < rivalsMost && l.openings.owed+rivalPrice <= rivalCredit {
		b := l.next(s)
		if b == nil || b.avoided(l.now) {
			break
		}
		s.search.tried |= 1 << b.index
		if err := l.try(s, b); isShortage(err) {
			break
		} else if err != nil {
			l.refused(b, err)
			continue
		}
		if len(s.search.attempts) > 1 {
			l.drop(s, 0)
		}
		o.rivals++
		l.openings.owed += rivalPrice
		l.racing.start(s, l.now)
		return
	}
	if len(s.search.attempts) == 0 {
		l.settle(s)
	}
}

// tend takes an event of a rival.
func (l *loop) tend(s *session, side int, events uint32) {
	i := s.attempt(side)
	if i < 0 {
		return
	}
	a := &s.search.attempts[i]
	var lost error
	switch {
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		lost = cmp.Or(pendingError(a.fd), unix.ECONNRESET)
	case !a.asked && events&unix.EPOLLOUT != 0:
		a.asked = true
		l.proxy.reached(*a, l.now)
		question := append(l.greeting(s), s.opening.kept...)
		// A new connection has room for it.
		if n, errno := send(a.fd, question); n < len(question) {
			lost = cmp.Or(errno, unix.ENOBUFS)
		}
	}
	if lost == nil && events&(unix.EPOLLIN|unix.EPOLLRDHUP) != 0 {
		n, errno := peek(a.fd)
		switch {
		case n > 0 && a.asked && a.backend.State() == health.Up:
			l.outrun(s, i, events)
			return
		case errno != unix.EAGAIN:
			lost = cmp.Or(errno, unix.ECONNRESET) // ended, gone down, or not speaking TLS
		}
	}
	if lost != nil {
		b := a.backend
		l.drop(s, i)
		l.refused(b, lost)
		l.contest(s)
	}
}

// outrun gives a session to a rival that has answered first.
func (l *loop) outrun(s *session, i int, events uint32) {
	a, silent := s.search.attempts[i], s.backend
	silent.outrun.Add(1)
	// One that is slow with one client, as a busy one is, serves others meanwhile. One
	// that hangs does not.
	if silent.received.Load() == s.opening.heard {
		l.mute(silent)
	}
	abort(s.server.fd)
	silent.load.Add(-1)
	silent.established.Add(-1)

	sent := uint64(len(s.opening.kept))
	s.search.attempts = slices.Delete(s.search.attempts, i, i+1)
	l.settle(s)
	s.up = half{moved: sent}
	a.backend.sent.Add(sent)
	l.join(s, a, events)
	l.relay(s)
}

// mute makes others come before a backend that accepts connections and answers nobody.
func (l *loop) mute(b *backend) {
	b.muted.Store(int64(l.now + muteFor))
	l.proxy.warn("a backend accepts connections and leaves clients unanswered", "backend", b.Name)
	l.proxy.tell(b, ErrSilent)
}

// lend returns an empty copy; nil: there are too many.
func (o *openings) lend() []byte {
	if o.kept == keptMost {
		return nil
	}
	o.kept++
	n := len(o.spare)
	if n == 0 {
		return make([]byte, 0, copySize)
	}
	lent := o.spare[n-1]
	o.spare = o.spare[:n-1]
	return lent
}

// takeBack takes the copy of an opening back.
func (o *openings) takeBack(from *opening) {
	if from.kept != nil {
		o.kept--
		if len(o.spare) < copiesSpare {
			o.spare = append(o.spare, from.kept[:0])
		}
	}
	*from = opening{}
}
