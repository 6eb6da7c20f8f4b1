package proxy

import "time"

// timers are sessions that wait for the same time each, and so the one that began first
// is due first.
type timers struct {
	after time.Duration
	first *timer
	last  *timer
}

// timer is a session's place among timers. It is in one of them at most.
type timer struct {
	session        *session
	of             *timers // nil: it is not set
	due            time.Duration
	earlier, later *timer
}

// start sets a session's timer, anew where it is set already.
func (q *timers) start(s *session, now time.Duration) {
	s.timer.stop()
	t := &s.timer
	*t = timer{session: s, of: q, due: now + q.after, earlier: q.last}
	if q.last != nil {
		q.last.later = t
	} else {
		q.first = t
	}
	q.last = t
}

func (t *timer) stop() {
	q := t.of
	if q == nil {
		return
	}
	if t.earlier != nil {
		t.earlier.later = t.later
	} else {
		q.first = t.later
	}
	if t.later != nil {
		t.later.earlier = t.earlier
	} else {
		q.last = t.earlier
	}
	*t = timer{}
}

// next returns a session that is due and stops its timer; nil: there is none.
func (q *timers) next(now time.Duration) *session {
	t := q.first
	if t == nil || t.due > now {
		return nil
	}
	s := t.session
	t.stop()
	return s
}
