//go:build linux

package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func plan(s setting, seed uint64, groups int) (all []group) {
	for p := newPlanner(s, seed); len(all) < groups; {
		all = append(all, p.next())
	}
	return all
}

func (g group) String() string {
	text := fmt.Sprint(g.vacant, g.quiet)
	for _, f := range g.faults {
		text += fmt.Sprint("; ", f.name, f.nodes, f.at, f.length)
	}
	return text
}

func TestPlanIsTheSeeds(t *testing.T) {
	s := setting{nodes: 3, ttl: 3 * time.Second}
	one, again, other := fmt.Sprint(plan(s, 1, 50)), fmt.Sprint(plan(s, 1, 50)), fmt.Sprint(plan(s, 2, 50))
	if one != again {
		t.Error("the same seed planned other faults")
	}
	if one == other {
		t.Error("another seed planned the same faults")
	}
}

func TestPlanLeavesAMajority(t *testing.T) {
	for _, s := range []setting{{nodes: 1}, {nodes: 2}, {nodes: 3}, {nodes: 3, external: true}, {nodes: 5}, {nodes: 5, external: true}} {
		seen := make(map[string]bool)
		for i, g := range plan(s, 7, 2000) {
			if len(g.faults) == 0 {
				t.Fatalf("%+v: group %d has no fault", s, i)
			}
			lost, parts, away := make(map[int]bool), []string(nil), false
			for _, f := range g.faults {
				seen[f.name] = true
				if f.length < f.least || f.length >= f.most {
					t.Errorf("%+v: %s lasts %s", s, f.name, f.length)
				}
				if f.costs {
					lost[slices.Max(f.nodes)] = true
				}
				parts = append(parts, f.parts(f.nodes)...)
				away = away || f.store != anyStore
				if f.store == embeddedAway && s.external || f.store == externalAway && !s.external {
					t.Errorf("%+v: %s", s, f.name)
				}
			}
			if !g.vacant && (len(lost) > s.spare() || len(lost) > 0 && away) {
				t.Errorf("%+v: group %d may leave no majority, and no store, but is not meant to: %v", s, i, g)
			}
			slices.Sort(parts)
			if n := len(parts); n != len(slices.Compact(parts)) && !g.vacant {
				t.Errorf("%+v: two faults of group %d take hold of the same: %v", s, i, g)
			}
		}
		for _, k := range kinds {
			if wanted := k.nodes <= s.nodes && k.store == anyStore; wanted && !seen[k.name] {
				t.Errorf("%+v: %s never happens", s, k.name)
			}
		}
	}
}

// TestPlanOfALongRun checks that every group strikes twice, on the same nodes, but those
// that cut one owner for long and then the next.
func TestPlanOfALongRun(t *testing.T) {
	s := setting{nodes: 3, ttl: 3 * time.Second, long: true}
	groups := plan(s, 3, 200)
	if one, again := fmt.Sprint(groups), fmt.Sprint(plan(s, 3, 200)); one != again {
		t.Error("the same seed planned other faults")
	}
	turns := 0
	for i := 0; i < len(groups); i += 2 {
		first, second := groups[i], groups[i+1]
		if !first.hurry || second.hurry || first.again || first.quiet {
			t.Fatalf("groups %d and %d do not belong together: %+v, %+v", i, i+1, first, second)
		}
		if second.again {
			if !slices.EqualFunc(first.faults, second.faults, func(a, b fault) bool {
				return a.kind == b.kind && a.at == b.at && a.length == b.length && slices.Equal(a.nodes, b.nodes)
			}) {
				t.Errorf("group %d is not the one before again: %v, %v", i+1, first, second)
			}
			continue
		}
		turns++
		if f := first.faults[0]; len(first.faults) != 1 || !f.cable || f.length < 10*time.Second || f.length >= 90*time.Second {
			t.Errorf("group %d: %v", i, first)
		}
		if f := second.faults[0]; len(second.faults) != 1 || !f.cable || f.nodes[0] != 0 || f.length >= f.most {
			t.Errorf("group %d: %v", i+1, second)
		}
	}
	if turns < 10 || turns > 30 {
		t.Errorf("%d times of 100 one owner is cut after the other", turns)
	}
	for i, g := range plan(setting{nodes: 3, ttl: 3 * time.Second}, 3, 200) {
		if g.hurry || g.again {
			t.Errorf("group %d of a short run: %+v", i, g)
		}
	}
}

// TestPatience checks how long an ordinary client may wait in a storm.
func TestPatience(t *testing.T) {
	start := time.Now()
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == "agent frozen" })
	j := slices.IndexFunc(kinds, func(k kind) bool { return k.name == "API server sick" })
	holder := func(time.Time) string { return "a" }
	call := func(begun, ended float64, backend, failure string) lab.Sample {
		return lab.Sample{Kind: lab.Call, Start: at(begun), Connected: at(begun), End: at(ended), Backend: backend, Error: failure}
	}
	for _, test := range []struct {
		name     string
		kind     *kind
		on       string
		vacant   bool
		sample   lab.Sample
		breaches int
	}{
		{name: "answered in time", kind: &kinds[i], on: "b", sample: call(10, 12, "c", "")},
		{name: "its server's node, for as long", kind: &kinds[i], on: "b", sample: call(10, 15.9, "b", "")},
		{name: "its server's node, for longer", kind: &kinds[i], on: "b", sample: call(10, 16.1, "b", ""), breaches: 1},
		{name: "the holder's node", kind: &kinds[i], on: "a", sample: call(10, 15.9, "c", "reset")},
		{name: "another node", kind: &kinds[i], on: "b", sample: call(10, 12.1, "c", ""), breaches: 1},
		{name: "a fault that takes no node", kind: &kinds[j], on: "a", sample: call(10, 12.1, "a", ""), breaches: 1},
		{name: "begun in the fault, for longer than its delay", kind: &kinds[i], on: "a", sample: func() lab.Sample {
			s := call(13.9, 18, "c", "")
			s.Delay = time.Second
			return s
		}()},
		{name: "no majority yet", kind: &kinds[i], on: "b", vacant: true, sample: call(15, 18, "c", "")},
		{name: "no majority", kind: &kinds[i], on: "b", vacant: true, sample: call(10, 20.9, "c", "")},
		{name: "another time", kind: &kinds[i], on: "b", sample: call(20, 22.1, "b", ""), breaches: 1},
		{name: "an error outside", kind: &kinds[i], on: "b", sample: call(20, 20.1, "b", "reset"), breaches: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &storm{
				setting: setting{nodes: 3, ttl: 3 * time.Second}, start: start,
				groups: []group{{vacant: test.vacant}}, ends: []time.Time{at(14)},
				faults: []struck{{fault: fault{kind: test.kind}, began: at(10), ended: at(14), names: []string{test.on}}},
			}
			var a account
			s.weigh(&a, []lab.Sample{test.sample}, holder)
			if len(a.breaches) != test.breaches {
				t.Errorf("%d breaches, want %d: %q", len(a.breaches), test.breaches, a.breaches)
			}
		})
	}
}

// TestJudgement checks what a storm calls a breach.
func TestJudgement(t *testing.T) {
	start := time.Now()
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	kindNamed := func(name string) *kind {
		i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
		return &kinds[i]
	}
	span := func(from, to float64, holders ...string) lab.Span {
		return lab.Span{From: at(from), To: at(to), Holders: holders}
	}
	for _, test := range []struct {
		name     string
		fault    string
		vacant   bool
		spans    []lab.Span
		lost     []float64
		breaches int
	}{
		{name: "all well", fault: "isolated", spans: []lab.Span{span(0, 12, "a"), span(12, 13, []string{}...), span(13, 30, "b")}},
		{name: "lost in the window", fault: "isolated", lost: []float64{10.1, 16.9}},
		{name: "lost outside", fault: "isolated", lost: []float64{9.9, 17.1}, breaches: 2},
		{name: "too long without", fault: "isolated", spans: []lab.Span{span(10, 12.2)}, breaches: 1},
		{name: "without, as meant", fault: "isolated", vacant: true, spans: []lab.Span{span(10, 13.9)}},
		{name: "without outside", fault: "isolated", spans: []lab.Span{span(1, 1.1)}, breaches: 1},
		{name: "a store outage moves nothing", fault: "store cut apart", spans: []lab.Span{span(11, 11.1)}, breaches: 1},
		{name: "two for a moment", fault: "isolated", spans: []lab.Span{span(10.5, 10.54, "a", "b")}},
		{name: "two for longer", fault: "agent killed", spans: []lab.Span{span(10.5, 10.6, "a", "b")}, breaches: 1},
		{name: "two while frozen", fault: "agent frozen", spans: []lab.Span{span(10.5, 12.4, "a", "b")}},
		{name: "two long after a freeze", fault: "agent frozen", spans: []lab.Span{span(10.5, 13, "a", "b")}, breaches: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &storm{
				setting: setting{nodes: 3, ttl: 3 * time.Second}, start: start,
				groups: []group{{vacant: test.vacant}}, ends: []time.Time{at(12)},
				faults: []struck{{fault: fault{kind: kindNamed(test.fault)}, began: at(10), ended: at(12)}},
			}
			var samples []lab.Sample
			for _, l := range test.lost {
				samples = append(samples, lab.Sample{Kind: lab.Request, Start: at(l), End: at(l), Error: "reset"})
			}
			a := s.settle(samples, lab.Holding{Spans: test.spans}, nil)
			if len(a.breaches) != test.breaches {
				t.Errorf("%d breaches, want %d: %q", len(a.breaches), test.breaches, a.breaches)
			}
		})
	}
}
