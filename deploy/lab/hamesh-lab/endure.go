//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func endureCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	duration := flags.Duration("duration", time.Minute, "how long, at most 15m")
	loops := flags.Int("loops", 4, "busy loops on each processor")
	timing := timingFlag(flags)
	err := flags.Parse(args)
	return func() error { return endure(out, *timing, *loops, *duration) }, err
}

// endure keeps every processor busy while clients connect, and says what that cost. A VIP
// that moves is a failure with the default timing, and is only reported with the fast one.
func endure(out io.Writer, timing string, loops int, duration time.Duration) (err error) {
	m, err := lab.NewMesh(lab.Options{Timing: timing})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if _, err := m.WaitOwner(ready); err != nil {
		return err
	}
	if err := m.WaitHealthy(ready); err != nil {
		return err
	}
	from := time.Now()
	run, err := m.Client.Start(lab.Load{Target: m.VIP(), Rate: 20, Timeout: 5 * time.Second})
	if err != nil {
		return err
	}
	if err := m.Burn(loops, duration); err != nil {
		return err
	}
	time.Sleep(duration)
	samples, err := run.Stop()
	if err != nil {
		return err
	}
	to := time.Now()
	r, h := lab.Summarize(samples, from, to), m.Recorder.Between(from, to)
	moved := moves(h)
	fmt.Fprintf(out, "%s timing, %d busy loops a processor, %s: %d moves, %d to %d holders, without one for %s at most; %d of %d requests failed %v, p99 %s\n",
		timing, loops, duration, moved, h.Min, h.Max, h.LongestNone.Round(time.Millisecond), r.Failed, r.Requests, r.Errors, r.P99.Round(time.Millisecond))
	if timing == "default" && moved > 0 {
		return fmt.Errorf("the VIP moved %d times", moved)
	}
	return nil
}
