package lab_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestJudge(t *testing.T) {
	zero := time.Unix(1000, 0)
	const never = -1
	at := func(seconds float64) time.Time {
		if seconds == never {
			return time.Time{}
		}
		return zero.Add(time.Duration(seconds * float64(time.Second)))
	}
	// Node a holds the VIP and is lost at 10, b from then on, and is lost at 20.
	faults := []lab.Fault{{At: at(10), Until: at(12), Node: "a"}, {At: at(20), Until: at(22), Node: "b"}}
	holder := func(t time.Time) string {
		if t.Before(at(10)) {
			return "a"
		}
		return "b"
	}
	sample := func(kind lab.Kind, start, connected, end float64, backend, failure string) lab.Sample {
		s := lab.Sample{Kind: kind, Source: netip.MustParseAddr("10.77.1.1"), Start: at(start), Connected: at(connected), End: at(end), Backend: backend}
		if kind != lab.Watch {
			s.Delay = time.Second
		}
		if s.Unfinished = failure == "unfinished"; !s.Unfinished {
			s.Error = failure
		}
		return s
	}
	for _, test := range []struct {
		name        string
		sample      lab.Sample
		waited      float64
		known       float64 // never: its connection was not lost
		age         float64
		unfinished  bool
		unexplained bool
	}{
		{name: "answered in time", sample: sample(lab.Call, 1, 1, 2, "c", ""), known: never},
		{name: "answered late", sample: sample(lab.Call, 9, 9, 13, "c", ""), waited: 3, known: never, age: 1},
		{name: "reset after the fault", sample: sample(lab.Call, 9.5, 9.5, 10.5, "", "reset"), waited: 0.5, known: 0.5, age: 0.5},
		{name: "overdue before the fault", sample: sample(lab.Call, 5, 5, 10.5, "", "reset"), waited: 4.5, known: 0.5, age: 5},
		{name: "dialled into the fault", sample: sample(lab.Call, 9.5, never, 10.5, "", "refused"), waited: 0.5, known: never},
		{name: "connected within the fault", sample: sample(lab.Call, 9.5, 11, 13, "", "reset"), waited: 3, known: never},
		{name: "begun after the fault", sample: sample(lab.Call, 11, 11.5, 14, "", "reset"), waited: 3, known: never},
		{name: "begun on a lost connection", sample: sample(lab.Kept, 10.2, 5, 10.7, "c", "reset"), waited: 0.5, known: 0.7, age: 5},
		{name: "its server was lost", sample: sample(lab.Kept, 19, 15, 20.4, "b", "closed"), waited: 0.4, known: 0.4, age: 5},
		{name: "lost with the first of two faults", sample: sample(lab.Watch, 5, 5, 21, "c", "reset"), waited: 11, known: 11, age: 5},
		{name: "lost with the second", sample: sample(lab.Watch, 13, 13, 21, "c", "reset"), waited: 1, known: 1, age: 7},
		{name: "a silent watch", sample: sample(lab.Watch, 13, 13, 19, "c", "unfinished"), known: never},
		{name: "a silent watch on a lost connection", sample: sample(lab.Watch, 5, 5, 19, "c", "unfinished"), waited: 9, known: 9, age: 5, unfinished: true},
		{name: "a watch that nobody answers", sample: sample(lab.Watch, 13, 13, 19, "", "unfinished"), waited: 6, known: never, unfinished: true},
		{name: "not yet due", sample: sample(lab.Call, 15, 15, 15.5, "", "unfinished"), known: never},
		{name: "overdue", sample: sample(lab.Call, 15, 15, 18, "", "unfinished"), waited: 2, known: never, unfinished: true},
		{name: "not yet connected", sample: sample(lab.Call, 15, never, 15.5, "", "unfinished"), waited: 0.5, known: never, unfinished: true},
		{name: "not yet due, but lost", sample: sample(lab.Call, 9.8, 9.8, 10.2, "", "unfinished"), waited: 0.2, known: 0.2, age: 0.2, unfinished: true},
		{name: "an error before any fault", sample: sample(lab.Call, 5, 5, 5.5, "", "reset"), waited: 0.5, known: never, unexplained: true},
		{name: "a watch broken before any fault", sample: sample(lab.Watch, 1, 1, 5.5, "c", "reset"), known: never, unexplained: true},
		{name: "an error long after a fault", sample: sample(lab.Call, 18, 18, 18.5, "", "reset"), waited: 0.5, known: never, unexplained: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			// A request of another sort of client is not looked at.
			w := lab.Judge([]lab.Sample{test.sample, {Kind: lab.Request, Start: at(0), End: at(9), Error: "reset"}}, faults, holder, 0)
			seconds := func(f float64) time.Duration { return time.Duration(f * float64(time.Second)).Round(time.Millisecond) }
			if got := w.Longest.Round(time.Millisecond); w.Number != 1 || got != seconds(test.waited) {
				t.Errorf("%d waited %s, want one and %s", w.Number, got, seconds(test.waited))
			}
			connected, known := 1, seconds(test.known)
			if test.known == never {
				connected, known = 0, 0
			}
			if w.Connected != connected || w.Known.Round(time.Millisecond) != known {
				t.Errorf("%d were connected and knew after %s, want %d and %s", w.Connected, w.Known, connected, known)
			}
			if (w.Unfinished == 1) != test.unfinished || (len(w.Unexplained) == 1) != test.unexplained {
				t.Errorf("unfinished %d, unexplained %d, want %t, %t", w.Unfinished, len(w.Unexplained), test.unfinished, test.unexplained)
			}
			if failed := test.sample.Error != ""; (w.Failed == 1) != failed || w.Errors[test.sample.Error] != w.Failed {
				t.Errorf("failed %d %v", w.Failed, w.Errors)
			}
			if above := len(w.Above) == 1; above != (test.waited > 0) {
				t.Errorf("above the limit: %v", w.Above)
			} else if above {
				if got := w.Above[0].Age.Round(time.Millisecond); got != seconds(test.age) {
					t.Errorf("age %s, want %s", got, seconds(test.age))
				}
				if text := w.Above[0].String(); !strings.Contains(text, "10.77.1.1") || strings.Contains(text, "UNFINISHED") != test.unfinished {
					t.Errorf("text %q", text)
				}
			}
		})
	}
}
