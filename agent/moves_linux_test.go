package agent_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

// silent is how long a stream that speaks every 100 ms may be silent while its VIP moves.
var silent = 300 * time.Millisecond

func init() {
	if raceDetector {
		silent = time.Second
	}
}

// moveUnderLoad moves a VIP three times in ten seconds, to each node once and so back home,
// while clients hold streams and connect anew, and checks that none is the worse for it.
func moveUnderLoad(t *testing.T, m *lab.Mesh, vip netip.AddrPort, sources []netip.Addr, holders *lab.Recorder, move func(to *lab.Node)) {
	t.Helper()
	const streams = 60
	run := load(t, m, lab.Load{Target: vip, From: sources, Rate: 100, Streams: streams})
	awaitStreams(t, run, time.Now(), streams)
	first := slices.IndexFunc(m.Nodes, func(n *lab.Node) bool { return slices.Equal(holders.Now(), []string{n.Name}) })
	from := time.Now()
	for i := range 3 {
		time.Sleep(time.Until(from.Add(time.Duration(i)*3*time.Second + 500*time.Millisecond)))
		move(m.Nodes[(first+1+i)%len(m.Nodes)])
	}
	time.Sleep(time.Until(from.Add(10 * time.Second)))
	to := time.Now()
	samples, err := run.Stop()
	if err != nil {
		t.Fatal(err)
	}
	r := lab.Summarize(samples, from, to)
	t.Logf("%d streams, %d broken %v, longest silence %v; %d requests, %d failed %v, slowest %v",
		r.Streams, r.Broken, r.Breaks, r.Silence, r.Requests, r.Failed, r.Errors, r.Max)
	if r.Streams != streams || r.Broken > brokenAtMost() {
		t.Errorf("%d of %d streams broke: %v", r.Broken, r.Streams, r.Breaks)
	}
	if r.Silence > silent {
		t.Errorf("a stream was silent for %v, more than %v", r.Silence, silent)
	}
	unfailing(t, r, 0)
	h := holders.Between(from, to)
	if h.Max > 1 || h.LongestNone > granted(planned, h) {
		t.Errorf("%d nodes had the address at once; none for %v, more than %v: %+v", h.Max, h.LongestNone, planned, h.Spans)
	}
}

// awaitStreams waits until every stream of a load has had a line.
func awaitStreams(t *testing.T, run *lab.Run, from time.Time, streams int) {
	t.Helper()
	if err := lab.Await(20*time.Second, func() error {
		if r := lab.Summarize(run.Samples(), from, time.Now()); r.Streams < streams {
			return fmt.Errorf("%d of %d streams speak", r.Streams, streams)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
