package agent

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/config"
)

// logger is the agent's log, with all the logs named below it. Level and format may change
// while it is in use.
type logger struct {
	hclog.InterceptLogger // itself writes nothing
	out                   io.Writer
	sink                  atomic.Pointer[hclog.SinkAdapter]
}

func newLogger(out io.Writer, cfg config.Log) *logger {
	l := &logger{out: out, InterceptLogger: hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "hameshd", Output: io.Discard})}
	l.set(cfg)
	l.RegisterSink(l)
	return l
}

// set changes level and format.
func (l *logger) set(cfg config.Log) {
	sink := hclog.NewSinkAdapter(&hclog.LoggerOptions{Output: l.out, Level: cfg.Level, JSONFormat: cfg.Format == config.JSON})
	l.sink.Store(&sink)
	l.SetLevel(cfg.Level)
}

// Accept implements hclog.SinkAdapter.
func (l *logger) Accept(name string, level hclog.Level, message string, args ...any) {
	(*l.sink.Load()).Accept(name, level, message, args...)
}

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
