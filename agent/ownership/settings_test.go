package ownership

import (
	"testing"
	"time"
)

// TestSettings changes preferences and priority of members that run.
func TestSettings(t *testing.T) {
	w := newWorld(1, 3, false, defaultTiming)
	w.keep = true
	holder := func() *node {
		t.Helper()
		n := w.holder()
		if n == nil || w.failed != "" {
			t.Fatalf("nobody holds, or worse: %s\n%s", w.failed, w.conversation())
		}
		return n
	}
	w.startAll()
	w.run(2 * time.Second)
	first := holder()
	wanted := w.nodes[(first.id+1)%3]

	tell := func(priorities map[string]int, preempt bool, preferred ...string) {
		for _, n := range w.nodes {
			n.deliver(Settings{Priority: priorities[n.name], VIPs: []VIP{
				{Name: "api", Preferred: preferred, Preempt: preempt}, {Name: "unknown", Preempt: true},
			}})
		}
	}
	tell(nil, false, wanted.name)
	w.run(60 * time.Second)
	if holder() != first {
		t.Errorf("moved to %s without preempt", holder().name)
	}
	tell(nil, true, wanted.name)
	w.run(w.now + wellFor*defaultTiming.LeaseTTL*11/10)
	if holder() != wanted {
		t.Fatalf("%s holds, %s is preferred\n%s", holder().name, wanted.name, w.conversation())
	}
	// Another one is preferred now, and has to be well for as long as the first one had.
	tell(nil, true, first.name)
	w.run(w.now + wellFor*defaultTiming.LeaseTTL*9/10)
	if holder() != wanted {
		t.Errorf("moved to %s before its time", holder().name)
	}
	w.run(w.now + wellFor*defaultTiming.LeaseTTL*2/10)
	if holder() != first {
		t.Fatalf("%s holds, %s is preferred\n%s", holder().name, first.name, w.conversation())
	}

	// Without preferences the higher priority decides: by name it would be another one.
	heir := w.nodes[max((first.id+1)%3, (first.id+2)%3)]
	tell(map[string]int{heir.name: 200}, false)
	w.run(w.now + time.Second)
	first.powerCut()
	w.run(w.now + 2*time.Second)
	if holder() != heir {
		t.Errorf("%s holds, %s has the highest priority\n%s", holder().name, heir.name, w.conversation())
	}
}
