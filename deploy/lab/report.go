package lab

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Kind is what a Sample is about.
type Kind int

// The zero Kind is invalid.
const (
	_        Kind = iota
	Request       // a new connection and one request over it, from when it was due to its end
	Line          // a line of a stream that arrived
	Broken        // a stream that had been open ended
	Unopened      // an attempt to open a stream failed
	Call          // of an ordinary client: a new connection and one request over it
	Kept          // a request over a connection that is kept for the next one
	Watch         // a stream that is silent after its first line, from its opening to its end
)

// String is the kind's name.
func (k Kind) String() string {
	names := []string{"none", "request", "line", "broken stream", "unopened stream", "call", "kept connection", "watch"}
	if k < 0 || int(k) >= len(names) {
		return fmt.Sprintf("kind %d", int(k))
	}
	return names[k]
}

// Sample is one thing that a client saw.
type Sample struct {
	Kind       Kind
	Source     netip.Addr
	Stream     int `json:",omitempty"`
	Start, End time.Time
	Backend    string `json:",omitempty"` // the API server that answered; empty: none
	Error      string `json:",omitempty"` // why it failed, in a word; empty: it did not

	// Of an ordinary client's alone:
	Port       uint16        `json:",omitempty"` // its own, 0: not known before it is connected
	Connected  time.Time     `json:",omitzero"`  // when its connection was established; zero: never
	Delay      time.Duration `json:",omitempty"` // after which the server answers
	Unfinished bool          `json:",omitempty"` // still under way when the load was stopped, at End
}

// Finished returns the samples of one kind that are not of what was still under way.
func Finished(samples []Sample, kind Kind) []Sample {
	return slices.DeleteFunc(slices.Clone(samples), func(s Sample) bool { return s.Kind != kind || s.Unfinished })
}

// Spread returns how many of the clients that keep a connection each API server has answered
// last. One whose last request failed is with none.
func Spread(samples []Sample) map[string]int {
	last := map[netip.Addr]Sample{}
	for _, s := range Finished(samples, Kept) {
		if s.End.After(last[s.Source].End) {
			last[s.Source] = s
		}
	}
	spread := map[string]int{}
	for _, s := range last {
		if s.Error == "" {
			spread[s.Backend]++
		}
	}
	return spread
}

// Report is what a client saw over some time.
type Report struct {
	Requests int // that were due in this time
	Failed   int
	Errors   map[string]int // failed requests by cause
	Failures Failures
	Backends map[string]int // good requests by who answered

	// Gap is the longest time from one good answer, whoever asked, to the next, or
	// to the end; GapBySource the same for each source address alone. The former cannot be
	// shorter than the time between requests, nor the latter than that of one source.
	Gap         time.Duration
	GapBySource map[netip.Addr]time.Duration
	// BySource says who answered each source address, in order, repetitions left out.
	BySource map[netip.Addr][]string

	P50, P99, Max time.Duration // latency of good requests, handshakes included

	Streams  int            // that had a line
	Broken   int            // breaks of streams
	Breaks   map[string]int // by cause
	Silence  time.Duration  // the longest time from one line of a stream to its next, or to the end
	Unopened int            // failed attempts to open a stream
}

// Failures are failed requests in the order of their ends.
type Failures []Sample

// String says when each began, by whom and why it failed, to set beside agents' logs.
func (f Failures) String() string {
	const most = 40
	var b strings.Builder
	for i, s := range f {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(f)-most)
			break
		}
		fmt.Fprintf(&b, " [%s %v %s]", s.Start.UTC().Format("15:04:05.000"), s.Source, s.Error)
	}
	return b.String()
}

// Summarize reports what samples say about the time from one instant to another. A gap
// or silence that began before is counted whole.
func Summarize(samples []Sample, from, to time.Time) Report {
	r := Report{
		Errors: make(map[string]int), Backends: make(map[string]int), Breaks: make(map[string]int),
		GapBySource: make(map[netip.Addr]time.Duration), BySource: make(map[netip.Addr][]string),
	}
	samples = slices.Clone(samples)
	slices.SortFunc(samples, func(a, b Sample) int { return a.End.Compare(b.End) })

	var all pause
	sources := make(map[netip.Addr]*pause)
	streams := make(map[int]*pause)
	var latencies []time.Duration
	for _, s := range samples {
		within := !s.End.Before(from) && !s.End.After(to)
		switch s.Kind {
		case Request:
			if sources[s.Source] == nil {
				sources[s.Source] = &pause{}
			}
			if s.Error == "" {
				all.mark(s.End, from, to)
				sources[s.Source].mark(s.End, from, to)
			}
			if s.Start.Before(from) || !s.Start.Before(to) {
				continue
			}
			r.Requests++
			if s.Error != "" {
				r.Failed++
				r.Errors[s.Error]++
				r.Failures = append(r.Failures, s)
				continue
			}
			r.Backends[s.Backend]++
			latencies = append(latencies, s.End.Sub(s.Start))
			if seen := r.BySource[s.Source]; len(seen) == 0 || seen[len(seen)-1] != s.Backend {
				r.BySource[s.Source] = append(seen, s.Backend)
			}
		case Line:
			if streams[s.Stream] == nil {
				streams[s.Stream] = &pause{}
			}
			streams[s.Stream].mark(s.End, from, to)
		case Broken:
			if within {
				r.Broken++
				r.Breaks[s.Error]++
			}
		case Unopened:
			if within {
				r.Unopened++
			}
		}
	}
	if len(sources) > 0 {
		r.Gap = all.end(from, to)
	}
	for source, p := range sources {
		r.GapBySource[source] = p.end(from, to)
	}
	r.Streams = len(streams)
	for _, p := range streams {
		r.Silence = max(r.Silence, p.end(from, to))
	}
	if n := len(latencies); n > 0 {
		slices.Sort(latencies)
		r.P50, r.P99, r.Max = latencies[n/2], latencies[n*99/100], latencies[n-1]
	}
	return r
}

// pause finds the longest time between marks.
type pause struct {
	last    time.Time // zero: none yet
	longest time.Duration
}

// mark says that something good happened, in order of time.
func (p *pause) mark(at, from, to time.Time) {
	if at.After(to) {
		return
	}
	if !at.Before(from) {
		p.longest = max(p.longest, at.Sub(p.since(from)))
	}
	p.last = at
}

// end returns the longest pause, the one up to the end included.
func (p *pause) end(from, to time.Time) time.Duration {
	return max(p.longest, to.Sub(p.since(from)))
}

func (p *pause) since(from time.Time) time.Time {
	if p.last.IsZero() {
		return from
	}
	return p.last
}
