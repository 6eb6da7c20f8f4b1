//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"golang.org/x/sync/errgroup"
)

// idleness is what silent connections cost a proxy.
type idleness struct {
	without, with float64 // processor, % of one
	before, after footprint
	lost          int
}

// benchIdleness holds silent connections through both proxies at once: what does nothing
// is in nobody's way. A lost connection is a failure.
func benchIdleness(out io.Writer, o benchOptions) error {
	fmt.Fprintf(out, "%d silent connections through each for %s; before that %s without any …\n", o.idle, o.held, o.held/3)
	proxies := rivals[1:]
	results := make([]idleness, len(proxies))
	var all errgroup.Group
	for i, v := range proxies {
		all.Go(func() error {
			return onRig(fmt.Sprintf("idle%d", i), v, o.most, func(r *rig) (err error) {
				results[i], err = (&turn{rig: r, lengths: fullLengths}).idleFor(o)
				return err
			})
		})
	}
	if err := all.Wait(); err != nil {
		return err
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"who", "lost", "processor, % of one", "without them", "memory, MB", "without them", "descriptors", "without them"})
	var errs []error
	for i, v := range proxies {
		r := results[i]
		t.AppendRow(table.Row{
			v.name, r.lost, digits(r.with), digits(r.without), digits(r.after.rss / 1e6), digits(r.before.rss / 1e6),
			r.after.descriptors, r.before.descriptors,
		})
		if r.lost > 0 {
			errs = append(errs, fmt.Errorf("%s lost %d of %d connections", v.name, r.lost, o.idle))
		}
	}
	fmt.Fprintln(out, t.Render())
	return errors.Join(errs...)
}

func (t *turn) idleFor(o benchOptions) (r idleness, err error) {
	g, err := t.generator()
	if err != nil {
		return r, err
	}
	time.Sleep(t.settle)
	if r.without, r.before, err = t.processor(o.held / 3); err != nil {
		return r, err
	}
	if err := t.hold(g, o.idle); err != nil {
		return r, err
	}
	if r.with, r.after, err = t.processor(o.held); err != nil {
		return r, err
	}
	lost, err := g.Hold(0)
	if err != nil {
		return r, err
	}
	s, err := t.server.Served()
	r.lost = max(t.failed+lost, o.idle-int(s.Open)) // at whichever end more are missing
	return r, err
}

// processor is what is between costs for some time, in % of one processor.
func (t *turn) processor(span time.Duration) (percent float64, after footprint, err error) {
	before, err := t.footprint()
	if err != nil {
		return 0, before, err
	}
	time.Sleep(span)
	after, err = t.footprint()
	return 100 * float64(after.cpu-before.cpu) / float64(after.at.Sub(before.at)), after, err
}
