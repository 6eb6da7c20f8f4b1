//go:build linux

package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/hamesh/hamesh/deploy/lab/load"
)

const (
	benchSlots  = 64 // connections under way at once, in the closed loop
	benchSlices = 6  // of one run, for each rival
)

// lane is a rival's rig, and what it has done in its slices.
type lane struct {
	*turn
	generator *load.Generator
	good      int
	took      time.Duration
	cost      time.Duration
}

// sideBySide measures how many connections a second rivals can do, in short slices by turns,
// on rigs that are there all the time: what else the machine does changes within seconds,
// and would meet one of them in turns of their own. The sheets are in the rivals' order.
func sideBySide(l lengths, most int, of []rival) (sheets []sheet, failed []int, err error) {
	var lanes []*lane
	defer func() {
		for _, l := range lanes {
			err = errors.Join(err, l.close())
		}
	}()
	for i, v := range of {
		r, err := newRig(fmt.Sprintf("bench%d", i), v, most)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", v.name, err)
		}
		lanes = append(lanes, &lane{turn: &turn{rig: r, lengths: l}})
		if lanes[i].generator, err = r.generator(); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", v.name, err)
		}
	}
	time.Sleep(l.settle)
	for slice := range 1 + benchSlices {
		for i := range lanes {
			lane := lanes[(i+slice)%len(lanes)] // nobody comes after the same one always
			if err := lane.churn(slice > 0); err != nil {
				return nil, nil, fmt.Errorf("%s: %w", lane.rival.name, err)
			}
		}
	}
	for _, l := range lanes {
		l.add(topRate, "/s", float64(l.good)/l.took.Seconds())
		l.costs("processor time per connection", "µs", l.cost, float64(l.good), 1e3)
		sheets, failed = append(sheets, l.sheet), append(failed, l.failed)
	}
	return sheets, failed, nil
}

// churn plays one slice, which counts or is for warming up.
func (l *lane) churn(counts bool) error {
	var r load.Churned
	cost, err := l.turn.cost(func() (err error) {
		r, err = l.generator.Churn(load.Churn{Most: benchSlots, For: l.slice})
		return err
	})
	if err != nil {
		return err
	}
	l.failed += r.Failures()
	if counts && r.Rate > 0 {
		l.good += r.Good
		l.took += time.Duration(float64(r.Good) / r.Rate * float64(time.Second))
		l.cost += cost
	}
	return nil
}
