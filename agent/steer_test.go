package agent

import (
	"testing"

	"github.com/hamesh/hamesh/agent/hearsay"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// TestHearsMore checks to whom etcd's leader goes from a member that has lost another one.
func TestHearsMore(t *testing.T) {
	is := func(heard bool, h *hameshv1.Heartbeat) hearsay.Known[*hameshv1.Heartbeat] {
		return hearsay.Known[*hameshv1.Heartbeat]{Heard: heard, Known: true, Word: &hearsay.Word[*hameshv1.Heartbeat]{Says: h}}
	}
	well := &hameshv1.Heartbeat{Ready: true}
	lost := []hearsay.Pair{{A: "cp-1", B: "cp-2", ADeaf: true, BDeaf: true}}
	for name, c := range map[string]struct {
		third *hameshv1.Heartbeat
		down  []hearsay.Pair
		want  string
	}{
		"nobody is lost":           {well, nil, ""},
		"the third hears all":      {well, lost, "cp-3"},
		"it is not ready":          {&hameshv1.Heartbeat{}, lost, ""},
		"its store is away":        {&hameshv1.Heartbeat{Ready: true, StoreAway: true}, lost, ""},
		"it misses one too":        {well, append(lost, hearsay.Pair{A: "cp-3", B: "cp-4", ADeaf: true}), ""},
		"others have lost another": {well, []hearsay.Pair{{A: "cp-2", B: "cp-4", ADeaf: true, BDeaf: true}}, ""},
		"one does not hear it":     {well, []hearsay.Pair{{A: "cp-1", B: "cp-2", BDeaf: true}}, ""},
	} {
		k := known{Down: c.down, Of: map[string]hearsay.Known[*hameshv1.Heartbeat]{
			"cp-1": {Heard: true, Known: true}, "cp-2": is(false, well), "cp-3": is(true, c.third),
		}}
		if got := hearsMore("cp-1", k, func(string) bool { return false }); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if c.want == "" {
			continue
		}
		k.Of["cp-4"] = is(true, well)
		if got := hearsMore("cp-1", k, func(name string) bool { return name == "cp-3" }); got != "cp-4" {
			t.Errorf("%s, and owns a VIP: %q, want cp-4", name, got)
		}
	}
}
