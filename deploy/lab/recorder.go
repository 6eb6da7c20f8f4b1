//go:build linux

package lab

import (
	"net/netip"
	"slices"
	"sync"
	"time"
)

// sampleEvery is how often the recorder reads the kernels.
const sampleEvery = 10 * time.Millisecond

// Span is a time in which every sample saw the same holders.
type Span struct {
	From, To time.Time // the first sample that saw them; the first that did not, or the last of all
	Holders  []string  // in the mesh's order
	Samples  int
	Late     time.Duration // the longest time from one sample to the next
}

// Recorder reads every 10 ms from each node's kernel whether it has the VIP.
//
// Two holders are reported only where both had it at one instant: kernels are read one
// after the other, so a holder counts if it still has the address once the last one
// has been read. No holder means that at no sample's time any kernel read had it; a VIP
// that moves within one sample, some microseconds, can look so too.
type Recorder struct {
	vip   netip.Addr
	nodes []*Node
	quit  chan struct{}
	done  chan struct{}

	mu    sync.Mutex
	spans []Span
	err   error
}

func record(vip netip.Addr, nodes []*Node) *Recorder {
	r := &Recorder{vip: vip, nodes: nodes, quit: make(chan struct{}), done: make(chan struct{})}
	r.sample() // so that there is a last one from the start
	go r.run()
	return r
}

func (r *Recorder) run() {
	defer close(r.done)
	ticker := time.NewTicker(sampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			r.sample()
		case <-r.quit:
			return
		}
	}
}

// stop ends the recording and returns the first error of reading a kernel.
func (r *Recorder) stop() error {
	close(r.quit)
	<-r.done
	return r.err
}

func (r *Recorder) sample() {
	holders := r.holding(r.nodes)
	if len(holders) > 1 {
		holders = r.holding(holders)
	}
	names := make([]string, len(holders))
	for i, n := range holders {
		names[i] = n.Name
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spans = appendSample(r.spans, time.Now(), names)
}

// holding returns those of the nodes whose kernels have the VIP.
func (r *Recorder) holding(nodes []*Node) []*Node {
	var holders []*Node
	for _, n := range nodes {
		has, err := n.Has(r.vip)
		if err != nil && r.err == nil {
			r.err = err
		}
		if has {
			holders = append(holders, n)
		}
	}
	return holders
}

func appendSample(spans []Span, at time.Time, holders []string) []Span {
	if len(spans) == 0 {
		return append(spans, Span{From: at, To: at, Holders: holders, Samples: 1})
	}
	last := &spans[len(spans)-1]
	last.Late = max(last.Late, at.Sub(last.To))
	last.To = at
	if slices.Equal(last.Holders, holders) {
		last.Samples++
		return spans
	}
	return append(spans, Span{From: at, To: at, Holders: holders, Samples: 1})
}

// Now returns the names of the nodes that had the VIP at the last sample.
func (r *Recorder) Now() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.spans[len(r.spans)-1].Holders
}

// Between returns what was seen from one time to another, cut to them.
func (r *Recorder) Between(from, to time.Time) Holding {
	r.mu.Lock()
	defer r.mu.Unlock()
	return between(r.spans, from, to)
}

// Holding is who held the VIP over some time.
type Holding struct {
	Spans          []Span
	Min, Max       int           // holders at one sample
	LongestNone    time.Duration // the longest time without a holder
	LongestSeveral time.Duration // the longest time with more than one; see Max for whether there was any
}

func between(spans []Span, from, to time.Time) Holding {
	var h Holding
	for i, s := range spans {
		// A span that begins at its end is the newest, of one sample.
		if !s.From.Before(to) || s.To.Before(from) || (s.To.Equal(from) && i < len(spans)-1) {
			continue
		}
		if s.From.Before(from) {
			s.From = from
		}
		if s.To.After(to) {
			s.To = to
		}
		n := len(s.Holders)
		if len(h.Spans) == 0 {
			h.Min = n
		}
		h.Spans = append(h.Spans, s)
		h.Min, h.Max = min(h.Min, n), max(h.Max, n)
		switch length := s.To.Sub(s.From); {
		case n == 0:
			h.LongestNone = max(h.LongestNone, length)
		case n > 1:
			h.LongestSeveral = max(h.LongestSeveral, length)
		}
	}
	return h
}
