//go:build linux

package lab

import (
	"testing"
	"time"
)

func TestBetween(t *testing.T) {
	zero := time.Unix(1000, 0)
	at := func(ms int) time.Time { return zero.Add(time.Duration(ms) * time.Millisecond) }
	var spans []Span
	for _, s := range []struct {
		ms      int
		holders []string
	}{
		{0, nil}, {10, nil}, {20, []string{"a"}}, {30, []string{"a"}}, {70, []string{"a"}},
		{80, nil}, {90, []string{"b"}}, {100, []string{"a", "b"}}, {110, []string{"b"}}, {120, []string{"b"}},
	} {
		spans = appendSample(spans, at(s.ms), s.holders)
	}
	const ms = time.Millisecond
	for _, test := range []struct {
		name                   string
		from, to               int
		spans, min, max        int
		none, several, lateAny time.Duration
	}{
		{"all", -100, 200, 6, 0, 2, 20 * ms, 10 * ms, 40 * ms},
		{"one holder, cut on both sides", 25, 60, 1, 1, 1, 0, 0, 40 * ms},
		{"cut in an absence", 5, 15, 1, 0, 0, 10 * ms, 0, 10 * ms},
		{"up to a change", 30, 80, 1, 1, 1, 0, 0, 40 * ms},
		{"from a change", 80, 90, 1, 0, 0, 10 * ms, 0, 10 * ms},
		{"before", -100, -50, 0, 0, 0, 0, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := between(spans, at(test.from), at(test.to))
			var late time.Duration
			for _, s := range h.Spans {
				late = max(late, s.Late)
			}
			if len(h.Spans) != test.spans || h.Min != test.min || h.Max != test.max ||
				h.LongestNone != test.none || h.LongestSeveral != test.several || late != test.lateAny {
				t.Errorf("got %+v", h)
			}
		})
	}
}
