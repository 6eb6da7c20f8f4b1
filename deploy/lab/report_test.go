package lab_test

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestSummarize(t *testing.T) {
	zero := time.Unix(1000, 0)
	at := func(ms int) time.Time { return zero.Add(time.Duration(ms) * time.Millisecond) }
	one, two := netip.MustParseAddr("10.77.1.1"), netip.MustParseAddr("10.77.1.2")
	ok := func(source netip.Addr, start, end int, backend string) lab.Sample {
		return lab.Sample{Kind: lab.Request, Source: source, Start: at(start), End: at(end), Backend: backend}
	}
	line := func(ms int) lab.Sample { return lab.Sample{Kind: lab.Line, Start: at(ms), End: at(ms)} }

	got := lab.Summarize([]lab.Sample{
		ok(one, -60, -50, "a"),
		ok(two, 10, 20, "b"),
		ok(one, 0, 100, "a"),
		{Kind: lab.Request, Source: two, Start: at(120), End: at(200), Error: "reset"},
		ok(one, 290, 300, "b"),
		ok(one, 990, 1010, "b"), // answered after the end
		line(-100), line(150), line(160),
		{Kind: lab.Broken, Start: at(0), End: at(161), Error: "closed"},
		{Kind: lab.Unopened, Start: at(161), End: at(162), Error: "refused"},
	}, at(0), at(500))

	const ms = time.Millisecond
	want := lab.Report{
		Requests: 4, Failed: 1,
		Errors: map[string]int{"reset": 1}, Backends: map[string]int{"a": 1, "b": 2},
		Failures:    lab.Failures{{Kind: lab.Request, Source: two, Start: at(120), End: at(200), Error: "reset"}},
		Gap:         200 * ms,
		GapBySource: map[netip.Addr]time.Duration{one: 200 * ms, two: 480 * ms},
		BySource:    map[netip.Addr][]string{one: {"a", "b"}, two: {"b"}},
		P50:         10 * ms, P99: 100 * ms, Max: 100 * ms,
		Streams: 1, Broken: 1, Breaks: map[string]int{"closed": 1}, Silence: 340 * ms, Unopened: 1,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}
