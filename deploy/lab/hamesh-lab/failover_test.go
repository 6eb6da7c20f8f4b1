//go:build linux

package main

import (
	"net/netip"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestMiddle(t *testing.T) {
	trials := []trial{{worst: 3}, {worst: 1}, {worst: 2}}
	if got := middle(trials, func(t trial) time.Duration { return t.worst }); got != 2 {
		t.Errorf("median %d, want 2", got)
	}
}

func TestServedAgain(t *testing.T) {
	struck := time.Now()
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	ask := func(source netip.Addr, after time.Duration, failure string) lab.Sample {
		return lab.Sample{Kind: lab.Request, Source: source, Start: struck.Add(after), Error: failure}
	}
	for _, test := range []struct {
		name    string
		samples []lab.Sample
		served  bool
	}{
		{"both", []lab.Sample{ask(a, 1, ""), ask(b, 1, "")}, true},
		{"one only before", []lab.Sample{ask(a, 1, ""), ask(b, -1, "")}, false},
		{"one in vain", []lab.Sample{ask(a, 1, ""), ask(b, 1, "reset")}, false},
	} {
		if err := servedAgain(test.samples, []netip.Addr{a, b}, struck, scenarios[0]); (err == nil) != test.served {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// TestCommands checks that wrong usage is told apart.
func TestCommands(t *testing.T) {
	for _, args := range [][]string{nil, {"dance"}, {"chaos", "-timing", "slow"}, {"failover", "-timing", "fast,slow"}, {"demo", "-no"}} {
		if status := run(args, t.Output(), t.Output()); status != 2 {
			t.Errorf("%q: exit status %d, want 2", args, status)
		}
	}
	if status := run([]string{"chaos", "-list"}, t.Output(), t.Output()); status != 0 {
		t.Errorf("chaos -list: exit status %d", status)
	}
}
