package agent

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	// linesKept is how many lines of the log may wait for a slow reader; more are dropped,
	// and counted.
	linesKept = 4096
	// flushWithin is how long the end of the agent waits for the last ones.
	flushWithin = time.Second
)

// patientWriter hands what is written to another goroutine. Whoever logs never waits for
// whoever reads the log: a stuck pipe must not hold up a renewal or a withdrawal.
type patientWriter struct {
	lines   chan []byte
	dropped atomic.Uint64
	done    chan struct{}
}

func newPatientWriter(to io.Writer) *patientWriter {
	w := &patientWriter{lines: make(chan []byte, linesKept), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for line := range w.lines {
			if line == nil {
				return
			}
			_, _ = to.Write(line) // there is nobody to tell
			if n := w.dropped.Swap(0); n > 0 {
				fmt.Fprintf(to, "%d lines of the log were dropped: it is read too slowly\n", n)
			}
		}
	}()
	return w
}

// Write implements io.Writer. It never blocks and never fails.
func (w *patientWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- append([]byte(nil), line...):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

// flush writes out what is left, for a bounded time; it is called once, at the end.
func (w *patientWriter) flush() {
	late := time.After(flushWithin)
	select {
	case w.lines <- nil:
	case <-late:
		return
	}
	select {
	case <-w.done:
	case <-late:
	}
}
