//go:build linux

package load

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// Generator makes connections, from one host.
type Generator struct{ worker *worker }

// Ends say between what a load is.
type Ends struct {
	Targets []netip.AddrPort // of IPv4, used in turn
	From    netip.Addr       // the first source address, of IPv4
	Sources int              // how many there are from that one on, used in turn
}

// StartGenerator starts a generator, which does nothing yet. It ends with Close, or with
// the lab.
func StartGenerator(h *lab.Host, e Ends) (*Generator, error) {
	if len(e.Targets) == 0 || !e.From.Is4() || e.Sources < 1 {
		return nil, fmt.Errorf("start a generator: %+v: want targets, and sources of IPv4", e)
	}
	w, err := startWorker(h, roleGenerator, e)
	if err != nil {
		return nil, err
	}
	return &Generator{w}, nil
}

// Close ends the generator, with every connection of it.
func (g *Generator) Close() error { return g.worker.close() }

// Churn is short connections: connect, one request, its answer, close.
type Churn struct {
	// Rate is how many are due a second, at random instants that are the same for each
	// load of that rate (a Poisson process). 0: each is due when one before it has ended.
	Rate float64
	// Most is how many are under way at once. One that is due when there are as many has to wait,
	// and that counts as its own time.
	Most int
	For  time.Duration // how long new ones become due
}

// Churned is what came of short connections.
type Churned struct {
	Latency
	Rate float64 // good ones a second, while new ones became due
}

// Latency is how long answers took, counted from when the request (of short connections:
// the connection) was due.
type Latency struct {
	Good          int
	Failed        map[string]int // by cause; without an answer 3 s after the last was due: "no answer"
	P50, P99, Max time.Duration  // of the good ones; zero if there is none
}

// Failures is how many failed.
func (l Latency) Failures() int {
	sum := 0
	for _, n := range l.Failed {
		sum += n
	}
	return sum
}

// Churn makes short connections.
func (g *Generator) Churn(c Churn) (r Churned, err error) {
	err = g.worker.do(order{Churn: &c}, &r, c.For)
	return r, err
}

// Hold opens silent connections until there are so many, each from the next address, and
// returns how many of those that were held have been lost since the last call. Those that
// are lost are not held any more.
func (g *Generator) Hold(connections int) (lost int, err error) {
	err = g.worker.do(order{Hold: &connections}, &lost, 0)
	return lost, err
}

// Ask is requests over the connections that are held, each over the next one.
type Ask struct {
	Rate float64 // how many are due a second, as of Churn
	For  time.Duration
}

// Ask makes requests. It is an error if no connection is held.
func (g *Generator) Ask(a Ask) (r Latency, err error) {
	err = g.worker.do(order{Ask: &a}, &r, a.For)
	return r, err
}

// Direction is where the bytes of a stream go.
type Direction int

// The zero Direction is invalid.
const (
	_ Direction = iota
	Download
	Upload
)

// Stream is connections that carry as much as they can.
type Stream struct {
	Direction   Direction
	Connections int
	For         time.Duration
}

// Streamed is what they carried, as the generator's own kernel took or gave it.
type Streamed struct {
	Bytes int64
	Took  time.Duration
}

// Stream makes streams.
func (g *Generator) Stream(s Stream) (r Streamed, err error) {
	err = g.worker.do(order{Stream: &s}, &r, s.For)
	return r, err
}

// order is one of them.
type order struct {
	Churn  *Churn  `json:",omitempty"`
	Hold   *int    `json:",omitempty"`
	Ask    *Ask    `json:",omitempty"`
	Stream *Stream `json:",omitempty"`
}
