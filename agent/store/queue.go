package store

import (
	"sync"

	"github.com/hamesh/hamesh/agent/ownership"
)

// queue holds events until they are read. It never makes a writer wait: a new snapshot
// replaces an unread one, everything else is kept.
type queue struct {
	out  chan ownership.Event
	wake chan struct{}
	done chan struct{}
	end  sync.Once

	mu      sync.Mutex
	waiting []*ownership.Event // pointers, to know an event again
}

func newQueue() *queue {
	q := &queue{
		out:  make(chan ownership.Event),
		wake: make(chan struct{}, 1),
		done: make(chan struct{}),
	}
	go q.pump()
	return q
}

func (q *queue) push(ev ownership.Event) {
	q.mu.Lock()
	if _, ok := ev.(ownership.StoreSnapshot); ok {
		for i, w := range q.waiting {
			if _, ok := (*w).(ownership.StoreSnapshot); ok {
				q.waiting = append(q.waiting[:i], q.waiting[i+1:]...)
				break
			}
		}
	}
	q.waiting = append(q.waiting, &ev)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queue) pump() {
	for {
		var out chan ownership.Event
		var first *ownership.Event
		var ev ownership.Event
		q.mu.Lock()
		if len(q.waiting) > 0 {
			out, first = q.out, q.waiting[0]
			ev = *first
		}
		q.mu.Unlock()
		select {
		case out <- ev:
			q.mu.Lock()
			if len(q.waiting) > 0 && q.waiting[0] == first {
				q.waiting = q.waiting[1:]
			}
			q.mu.Unlock()
		case <-q.wake:
		case <-q.done:
			return
		}
	}
}

func (q *queue) close() { q.end.Do(func() { close(q.done) }) }
