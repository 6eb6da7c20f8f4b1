//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/hamesh/hamesh/deploy/lab/load"
)

type benchOptions struct {
	runs  int
	quick bool
	parts *regexp.Regexp
	file  string
	idle  int
	held  time.Duration
	most  int // connections through a proxy at once
}

func benchCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	var o benchOptions
	flags.IntVar(&o.runs, "runs", 5, "how often each thing is measured; medians are shown")
	flags.BoolVar(&o.quick, "quick", false, "one short run, for a first look")
	only := flags.String("only", "", "measure only the parts that this regular expression matches: rest, idle, connections, latency, streams, growth")
	flags.StringVar(&o.file, "out", "", "write the tables to this file, as Markdown, and every value to one beside it, as JSON")
	flags.IntVar(&o.idle, "idle", 0, "hold so many silent connections instead, and count the lost ones")
	flags.DurationVar(&o.held, "for", time.Minute, "with -idle: how long")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	var err error
	if o.parts, err = regexp.Compile(*only); err != nil {
		return nil, fmt.Errorf("bench: -only: %w", err)
	}
	return func() error { return bench(out, o) }, nil
}

func bench(out io.Writer, o benchOptions) error {
	if o.runs < 1 || o.idle < 0 || o.held <= 0 {
		return fmt.Errorf("bench: -runs %d -idle %d -for %s: out of range", o.runs, o.idle, o.held)
	}
	if _, err := exec.LookPath("haproxy"); err != nil {
		return fmt.Errorf("%w: hamesh is measured beside it: apt-get install haproxy", err)
	}
	if err := limitConnections(out, &o); err != nil {
		return err
	}
	if o.idle > 0 {
		return benchIdleness(out, o)
	}
	return benchAll(out, o)
}

// limitConnections makes do with as many connections as this machine lets one process have.
func limitConnections(out io.Writer, o *benchOptions) error {
	// A connection takes two descriptors of a proxy, and hamesh leaves some hundreds to
	// what else it does. Where more are allowed, one that takes more is to be seen, not to fail.
	const each, others = 2, 1000
	wanted := max(o.idle, benchMost)
	allowed, err := load.Descriptors(8 * uint64(wanted))
	if err != nil {
		return err
	}
	o.most = wanted
	if possible := (int(allowed) - others) / each / 100 * 100; possible < wanted {
		o.most = possible
		fmt.Fprintf(out, "a process may open no more than %d files here: %d connections instead of %d (ulimit -Hn 100000 before helps)\n", allowed, possible, wanted)
	}
	o.idle = min(o.idle, o.most)
	return nil
}

// benchAll plays every rival's turn, run for run, so that whatever else the machine does
// meets all of them.
func benchAll(out io.Writer, o benchOptions) error {
	l, runs := fullLengths, o.runs
	if o.quick {
		l, runs = quickLengths, 1
	}
	top, _, err := sideBySide(l, o.most, rivals[1:2])
	if err != nil {
		return err
	}
	half := top[0].find(topRate) / 2
	b := &benchmark{Began: time.Now(), Most: o.most, Rate: float64(int(half/100) * 100)}
	fmt.Fprintf(out, "HAProxy: %.0f connections a second; latencies are taken at %.0f\n", 2*half, b.Rate)
	for i := range runs {
		sheets, failed := make([]sheet, len(rivals)), make([]int, len(rivals))
		if o.parts.MatchString("connections") {
			if err := b.connections(l, o.most, sheets, failed); err != nil {
				return err
			}
		}
		var without sheet
		for k, v := range rivals {
			t := turn{lengths: l, rate: b.Rate, parts: o.parts, direct: without, sheet: sheets[k], failed: failed[k]}
			began := time.Now()
			err := onRig("bench", v, o.most, func(r *rig) error {
				t.rig = r
				return t.play()
			})
			if err != nil {
				return err
			}
			if v.name == direct {
				without = t.sheet
			}
			b.Turns = append(b.Turns, played{Run: i + 1, Rival: v.name, Readings: t.sheet})
			fmt.Fprintf(out, "run %d, %s: %.0f connections a second, p99 %.0f µs (%s)\n",
				i+1, v.name, t.find(topRate), t.find(latencyP99), time.Since(began).Round(time.Second))
		}
	}
	b.Took = time.Since(b.Began)
	fmt.Fprintf(out, "\n%s\n", b.text())
	if o.file == "" {
		return nil
	}
	return errors.Join(b.writeMarkdown(o.file), b.writeJSON(strings.TrimSuffix(o.file, ".md")+".json"))
}

// connections measures, side by side, those rivals that are measured by connections at all.
func (b *benchmark) connections(l lengths, most int, sheets []sheet, failed []int) error {
	var of []rival
	var places []int
	for i, v := range rivals {
		if v.parts == "" {
			of, places = append(of, v), append(places, i)
		}
	}
	s, f, err := sideBySide(l, most, of)
	if err != nil {
		return err
	}
	for k, i := range places {
		sheets[i], failed[i] = s[k], f[k]
	}
	return nil
}
