//go:build linux

package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	"github.com/hamesh/hamesh/deploy/lab/load"
)

const (
	benchBulk    = 4      // streams
	benchAskRate = 5000   // requests a second over established connections
	benchOpen    = 5000   // connections under way at once at most, in the open loop
	benchMost    = 10_000 // connections at once at most, where the machine allows so many
)

// lengths are how long the parts of a turn take, and a slice of what is measured side by side.
type lengths struct{ settle, rest, slice, churn, stream, ask time.Duration }

var (
	fullLengths  = lengths{settle: time.Second, rest: 2 * time.Second, slice: 500 * time.Millisecond, churn: 3 * time.Second, stream: 2 * time.Second, ask: time.Second}
	quickLengths = lengths{settle: time.Second, rest: time.Second, slice: 200 * time.Millisecond, churn: time.Second, stream: time.Second, ask: 500 * time.Millisecond}
)

// reading is one measured value.
type reading struct {
	Name  string
	Unit  string
	Over  int `json:",omitempty"` // connections, of what is measured over several numbers of them
	Value float64
}

// sheet is the readings of one turn, in order.
type sheet []reading

func (s *sheet) add(name, unit string, value float64) {
	*s = append(*s, reading{Name: name, Unit: unit, Value: value})
}

func (s *sheet) addOver(connections int, name, unit string, value float64) {
	*s = append(*s, reading{name, unit, connections, value})
}

func (s sheet) find(name string) float64 {
	for _, r := range s {
		if r.Name == name {
			return r.Value
		}
	}
	return 0
}

const (
	strangers  = "meanwhile, all others on the machine"
	topRate    = "connections, one request each"
	latencyP50 = "latency of a new connection, p50"
	latencyP99 = "latency of a new connection, p99"
)

func microseconds(d time.Duration) float64 { return float64(d) / 1e3 }

// growing are the numbers of connections that costs are measured for.
func growing(most int) (all []int) {
	for n := 1; n < most; n *= 10 {
		all = append(all, n)
	}
	return append(all, most)
}

// turn is one rival's turn.
type turn struct {
	*rig
	lengths
	sheet
	rate   float64 // of the open loop, connections a second
	parts  *regexp.Regexp
	direct sheet // what the way without a proxy gave in the same run; nil: this is it
	failed int
}

func onRig(name string, v rival, most int, do func(*rig) error) (err error) {
	r, err := newRig(name, v, most)
	if err != nil {
		return fmt.Errorf("%s: %w", v.name, err)
	}
	defer func() {
		if e := r.close(); err == nil {
			err = e
		}
	}()
	if err := do(r); err != nil {
		return fmt.Errorf("%s: %w", v.name, err)
	}
	return nil
}

func (t *turn) play() error {
	time.Sleep(t.settle)
	for _, p := range []struct {
		name    string
		between bool // it is about what is between
		do      func() error
	}{
		{"rest", true, t.atRest},
		{"idle", true, t.idle},
		{"latency", false, t.openLoop},
		{"streams", false, t.download},
		{"streams", false, t.upload},
		{"growth", false, t.growth},
	} {
		if !t.parts.MatchString(p.name) || !strings.Contains(t.rival.parts, p.name) && t.rival.parts != "" || p.between && t.between == nil {
			continue
		}
		if err := p.do(); err != nil {
			return err
		}
	}
	t.add("failed connections and requests, all in all", "", float64(t.failed))
	return nil
}

// cost does something and returns the processor time that it cost what is between.
func (t *turn) cost(do func() error) (time.Duration, error) {
	if t.between == nil {
		return 0, do()
	}
	before, err := processorsOf(t.between.Process.Pid)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := processorsOf(t.between.Process.Pid)
	return after - before, err
}

// costs adds what one of n things cost; there is nothing to add without a proxy.
func (t *turn) costs(name, unit string, cost time.Duration, n, per float64) {
	if t.between != nil && n > 0 {
		t.add(name, unit, float64(cost)/per/n)
	}
}

func (t *turn) atRest() error {
	before, err := machineTime()
	if err != nil {
		return err
	}
	percent, u, err := t.processor(t.rest)
	if err != nil {
		return err
	}
	after, err := machineTime()
	t.add("at rest: processor", "% of one", percent)
	t.add(strangers, "% of one", max(0, 100*float64(after-before)/float64(t.rest)-percent))
	t.add("at rest: memory (RSS)", "MB", u.rss/1e6)
	return err
}

func (t *turn) idle() error {
	g, err := t.generator()
	if err != nil {
		return err
	}
	zero, err := t.footprint()
	if err != nil {
		return err
	}
	for _, n := range growing(t.most)[len(growing(t.most))-2:] {
		if err := t.hold(g, n); err != nil {
			return err
		}
		u, err := t.footprint()
		if err != nil {
			return err
		}
		per := fmt.Sprintf(" per idle connection, of %d", n)
		t.add("memory (RSS)"+per, "kB", (u.rss-zero.rss)/1e3/float64(n))
		t.add("memory (PSS)"+per, "kB", (u.pss-zero.pss)/1e3/float64(n))
		t.add("descriptors"+per, "", float64(u.descriptors-zero.descriptors)/float64(n))
	}
	lost, err := g.Hold(0)
	t.failed += lost
	return errors.Join(err, g.Close())
}

// hold waits until so many connections have come through.
func (t *turn) hold(g *load.Generator, n int) error {
	lost, err := g.Hold(n)
	if err != nil {
		return err
	}
	t.failed += lost
	err = lab.Await(ready, func() error {
		s, err := t.server.Served()
		if err == nil && s.Open != int64(n) { // more: a check, or a proxy that tries two backends
			err = fmt.Errorf("%d connections have come through, want %d", s.Open, n)
		}
		return err
	})
	time.Sleep(t.settle / 2)
	return err
}

func (t *turn) openLoop() error {
	g, err := t.generator()
	if err != nil {
		return err
	}
	r, err := g.Churn(load.Churn{Rate: t.rate, Most: benchOpen, For: t.churn})
	if err != nil {
		return err
	}
	t.failed += r.Failures()
	p50, p99 := microseconds(r.P50), microseconds(r.P99)
	t.add(latencyP50, "µs", p50)
	t.add(latencyP99, "µs", p99)
	if t.direct != nil {
		t.add("… added to direct, p50", "µs", p50-t.direct.find(latencyP50))
		t.add("… added to direct, p99", "µs", p99-t.direct.find(latencyP99))
	}
	return g.Close()
}

func (t *turn) download() error { return t.bulk("download", load.Download) }
func (t *turn) upload() error   { return t.bulk("upload", load.Upload) }

func (t *turn) bulk(name string, d load.Direction) error {
	g, err := t.generator()
	if err != nil {
		return err
	}
	var r load.Streamed
	cost, err := t.cost(func() error {
		r, err = g.Stream(load.Stream{Direction: d, Connections: benchBulk, For: t.stream})
		return err
	})
	if err != nil {
		return err
	}
	t.add(name, "Gbit/s", float64(r.Bytes)*8/float64(r.Took))
	t.costs("processor time per GB, "+name, "ms", cost, float64(r.Bytes)/1e9, 1e6)
	return g.Close()
}

func (t *turn) growth() error {
	g, err := t.generator()
	if err != nil {
		return err
	}
	for _, n := range growing(t.most) {
		if err := t.hold(g, n); err != nil {
			return err
		}
		var r load.Latency
		cost, err := t.cost(func() error {
			r, err = g.Ask(load.Ask{Rate: benchAskRate, For: t.ask})
			return err
		})
		if err != nil {
			return err
		}
		t.failed += r.Failures()
		t.addOver(n, "latency of a request, p50", "µs", microseconds(r.P50))
		t.addOver(n, "latency of a request, p99", "µs", microseconds(r.P99))
		if t.between != nil {
			t.addOver(n, "processor time per request", "µs", float64(cost)/1e3/float64(max(r.Good, 1)))
		}
	}
	return g.Close()
}
