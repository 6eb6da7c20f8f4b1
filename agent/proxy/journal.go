package proxy

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The connection log is written by a goroutine of its own, so that a slow log holds up
// nobody, and not more than journalRate lines a second, so that a flood does not fill a
// disk; what is left out is counted in the next line.
const (
	journalRate   = 200
	journalBuffer = journalRate
)

// journal is the connection log of one proxy.
type journal struct {
	proxy string
	log   hclog.Logger
	lines chan []any
	lost  atomic.Uint64
	done  chan struct{}
	end   sync.Once
}

func newJournal(proxy string, log hclog.Logger) *journal {
	j := &journal{proxy: proxy, log: log, lines: make(chan []any, journalBuffer), done: make(chan struct{})}
	go j.write()
	return j
}

// note takes a line, or counts it where too many are waiting.
func (j *journal) note(s *session, cause Cause, now time.Duration) {
	if len(j.lines) == cap(j.lines) {
		j.lost.Add(1)
		return
	}
	line := []any{
		"proxy", j.proxy, "client", s.from, "local", s.localEnd(), "cause", cause.String(),
		"sent", s.up.moved, "received", s.down.moved,
		"duration", (now - s.began).Round(time.Microsecond), "tries", s.tries(),
	}
	if s.backend != nil {
		line = append(line, "backend", s.backend.Name, "connect", (s.connected - s.began).Round(time.Microsecond))
	}
	select {
	case j.lines <- line:
	default:
		j.lost.Add(1)
	}
}

func (j *journal) write() {
	defer close(j.done)
	rate := time.NewTicker(time.Second / journalRate)
	defer rate.Stop()
	for line := range j.lines {
		if n := j.lost.Swap(0); n > 0 {
			line = append(line, "unlogged", n)
		}
		j.log.Info("connection ended", line...)
		<-rate.C
	}
}

// close returns when all lines have been written. No note may follow.
func (j *journal) close() {
	j.end.Do(func() { close(j.lines) })
	<-j.done
}
