package health

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const fresh = 2 * time.Second

func newView() *View {
	return NewView(Config{
		Self: "cp-1",
		Backends: []Backend{
			{Name: "a", Node: "cp-1"}, {Name: "b", Node: "cp-2"}, {Name: "x"},
		},
		Fresh: fresh,
	})
}

func up(took time.Duration) Result { return Result{OK: true, Took: took, State: Up} }

func down(reason string) Result { return Result{Reason: reason, State: Down} }

func refuses() Result { return Result{Reason: "connection refused", State: Down, Refuses: true} }

func notReady(reason string) Result { return Result{Reason: reason, State: NotReady} }

func TestView(t *testing.T) {
	const s = time.Second
	tests := []struct {
		name string
		do   func(*View)
		at   time.Duration
		want string // of backend b, whose node is cp-2: state, reason, seen up by
	}{
		{"nothing known", func(*View) {}, s, "down: not checked yet []"},
		{"own check up", func(v *View) { v.Observe(s, "b", up(0)) }, s, "up:  [cp-1]"},
		{"own check down", func(v *View) { v.Observe(s, "b", down("HTTP 503")) }, s, "down: HTTP 503 []"},
		{"own check failing, still up", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Observe(2*s, "b", Result{Reason: "HTTP 503", State: Up})
		}, 2 * s, "up:  [cp-1]"},
		{"own check failing, not known yet", func(v *View) {
			v.Observe(s, "b", Result{Reason: "HTTP 503"})
		}, s, "down: HTTP 503 []"},
		{"its node up, own not known", func(v *View) {
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Up}})
		}, s, "up:  [cp-2]"},
		{"its node up, own down", func(v *View) {
			v.Observe(s, "b", down("timeout after 400ms"))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Up}})
		}, s, "down: timeout after 400ms [cp-2]"},
		{"its node down, own up", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "HTTP 503"}})
		}, s, "down: HTTP 503 (seen by cp-2) [cp-1]"},
		{"its node down, long ago", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "HTTP 503"}})
		}, s + fresh + 1, "up:  [cp-1]"},
		{"its node takes it back", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "HTTP 503"}})
			v.Hear(s, "cp-2", nil)
		}, s, "up:  [cp-1]"},
		{"another member's word counts for nothing", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-3", []Report{{Backend: "b", State: Down, Reason: "timeout after 400ms"}})
			v.Hear(s, "cp-4", []Report{{Backend: "b", State: Up}})
		}, s, "up:  [cp-1 cp-4]"},
		{"dead node", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": s + 1})
		}, 2 * s, "down: node cp-2 is down [cp-1]"},
		{"dead node, check begun before its last word", func(v *View) {
			v.Observe(2*s, "b", up(s))
			v.SetDead(map[string]time.Duration{"cp-2": s + 1})
		}, 2 * s, "down: node cp-2 is down [cp-1]"},
		{"silent agent, node proven alive", func(v *View) {
			v.Observe(2*s, "b", up(time.Millisecond))
			v.SetDead(map[string]time.Duration{"cp-2": s})
		}, 2 * s, "up:  [cp-1]"},
		{"silent agent, node proven alive otherwise", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Prove(2*s+1, "cp-2")
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
		}, 9 * s, "up:  [cp-1]"},
		{"the same, later", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
			v.Prove(3*s, "cp-2")
		}, 9 * s, "up:  [cp-1]"},
		{"dead node, proven alive before its last word", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Prove(2*s, "cp-2")
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
		}, 3 * s, "down: node cp-2 is down [cp-1]"},
		{"dead node, another one proven alive", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Prove(3*s, "cp-3")
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
		}, 3 * s, "down: node cp-2 is down [cp-1]"},
		{"node proven alive, one failed check", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
			v.Observe(3*s, "b", Result{Reason: "timeout after 400ms", State: Up})
			v.Prove(3*s-s/4, "cp-2")
		}, 3*s + s/4, "up:  [cp-1]"},
		{"node proven alive, its API server down", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
			v.Prove(3*s, "cp-2")
			v.Observe(3*s, "b", down("HTTP 503"))
		}, 3 * s, "down: HTTP 503 []"},
		{"node proven alive, then it dies too", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
			v.Prove(3*s, "cp-2")
			v.Observe(3*s, "b", Result{Reason: "timeout after 400ms", State: Up})
		}, 3*s + renewed + 1, "down: node cp-2 is down [cp-1]"},
		{"its node said that it is down, and fell silent", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "HTTP 503"}})
			v.SetDead(map[string]time.Duration{"cp-2": s})
		}, s + fresh + 1, "down: node cp-2 is down [cp-1]"},
		{"it began to recover, and its node fell silent", func(v *View) {
			v.Observe(s, "b", Result{OK: true, State: Down})
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
		}, 3 * s, "down: node cp-2 is down []"},
		{"silent agent, then the node dies too", func(v *View) {
			v.Observe(2*s, "b", up(time.Millisecond))
			v.SetDead(map[string]time.Duration{"cp-2": s})
			v.Observe(3*s, "b", Result{Reason: "timeout after 400ms", State: Up})
		}, 3 * s, "down: node cp-2 is down [cp-1]"},
		{"the node is back", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
			v.SetDead(nil)
		}, 3 * s, "up:  [cp-1]"},
		{"own check not ready", func(v *View) { v.Observe(s, "b", notReady("HTTP 500")) }, s, "not ready: HTTP 500 []"},
		{"own check not ready, its node up", func(v *View) {
			v.Observe(s, "b", notReady("HTTP 500"))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Up}})
		}, s, "not ready: HTTP 500 [cp-2]"},
		{"its node says not ready, own up", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: NotReady, Reason: "HTTP 500"}})
		}, s, "not ready: HTTP 500 (seen by cp-2) [cp-1]"},
		{"the same, long ago", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: NotReady, Reason: "HTTP 500"}})
		}, s + fresh + 1, "up:  [cp-1]"},
		{"another member's not ready counts for nothing", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-3", []Report{{Backend: "b", State: NotReady, Reason: "HTTP 500"}})
		}, s, "up:  [cp-1]"},
		{"not ready, and down by its node's word", func(v *View) {
			v.Observe(s, "b", notReady("HTTP 500"))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "timeout after 400ms"}})
		}, s, "down: timeout after 400ms (seen by cp-2) []"},
		{"silent agent, its API server not ready", func(v *View) {
			v.Observe(s, "b", notReady("HTTP 500"))
			v.SetDead(map[string]time.Duration{"cp-2": 2 * s})
		}, 3 * s, "down: node cp-2 is down []"},
		{"not ready, though to be drained", func(v *View) {
			v.Observe(s, "b", notReady("HTTP 500"))
			v.SetOrder("b", Drain)
		}, s, "not ready: HTTP 500 []"},
		{"refuses", func(v *View) {
			v.Observe(s, "b", refuses())
		}, s, "down: connection refused []"},
		{"refuses, by its node's word too", func(v *View) {
			v.Observe(s, "b", refuses())
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "connection refused", Refuses: true}})
		}, s, "down: connection refused []"},
		{"refuses, by its node's word alone", func(v *View) {
			v.Observe(s, "b", up(0))
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "connection refused", Refuses: true}})
		}, s, "down: connection refused (seen by cp-2) [cp-1]"},
		{"one refusal, its node hears nothing", func(v *View) {
			v.Observe(s, "b", refuses())
			v.Hear(s, "cp-2", []Report{{Backend: "b", State: Down, Reason: "timeout after 400ms"}})
		}, s, "down: connection refused []"},
		{"draining", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetOrder("b", Drain)
		}, s, "draining: by an operator's order [cp-1]"},
		{"down, though to be drained", func(v *View) {
			v.Observe(s, "b", down("HTTP 503"))
			v.SetOrder("b", Drain)
		}, s, "down: HTTP 503 []"},
		{"disabled, though up", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetOrder("b", Disable)
		}, s, "disabled: by an operator's order [cp-1]"},
		{"serving again", func(v *View) {
			v.Observe(s, "b", up(0))
			v.SetOrder("b", Disable)
			v.SetOrder("b", Serve)
		}, s, "up:  [cp-1]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newView()
			tt.do(v)
			s := v.Backends(tt.at)[1]
			if got := fmt.Sprintf("%v: %s %v", s.State, s.Reason, s.SeenUpBy); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if unheard := strings.HasPrefix(tt.name, "dead node"); s.Unheard != unheard {
				t.Errorf("down for its node's silence alone: %v, want %v", s.Unheard, unheard)
			}
			if refuses := strings.HasPrefix(tt.name, "refuses"); s.Refuses != refuses {
				t.Errorf("its machine answers for it: %v, want %v", s.Refuses, refuses)
			}
		})
	}
}

// A member never disbelieves its own checks for what is said in its name, nor for a
// list of the dead that has it.
func TestViewOfOwnNode(t *testing.T) {
	v := newView()
	v.Observe(time.Second, "a", up(0))
	v.Hear(time.Second, "cp-1", []Report{{Backend: "a", State: Down, Reason: "HTTP 503"}})
	v.SetDead(map[string]time.Duration{"cp-1": 2 * time.Second})
	if s := v.Backends(time.Second)[0]; s.State != Up || strings.Join(s.SeenUpBy, " ") != "cp-1" {
		t.Errorf("got %+v, want up, seen by cp-1", s)
	}
}

func TestViewOwn(t *testing.T) {
	v := newView()
	if own := v.Own(); len(own) != 0 {
		t.Errorf("before the first check: %v", own)
	}
	v.Observe(0, "b", down("HTTP 503"))
	v.Observe(0, "a", Result{Reason: "HTTP 500", State: Up})
	v.Observe(0, "x", Result{Reason: "HTTP 500"})
	want := "[{a up  false} {b down HTTP 503 false}]"
	if got := fmt.Sprint(v.Own()); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	v.Observe(0, "a", notReady("HTTP 500"))
	v.Observe(0, "b", refuses())
	want = "[{a not ready HTTP 500 false} {b down connection refused true}]"
	if got := fmt.Sprint(v.Own()); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestViewSetBackends(t *testing.T) {
	v := newView()
	for _, name := range []string{"a", "b", "x"} {
		v.Observe(time.Second, name, up(0))
	}
	v.SetOrder("b", Disable)
	moved := Backend{Name: "a", Address: netip.MustParseAddrPort("10.77.0.11:6444"), Node: "cp-1"}
	v.SetBackends([]Backend{moved, {Name: "x", Node: "cp-3"}, {Name: "new"}})
	view := func() (all []string) {
		for _, s := range v.Backends(time.Second) {
			all = append(all, fmt.Sprintf("%s %v", s.Backend, s.State))
		}
		return all
	}
	if got, want := strings.Join(view(), ", "), "a down, x up, new down"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	v.SetBackends([]Backend{moved, {Name: "b", Node: "cp-2"}})
	v.Observe(time.Second, "b", up(0))
	if got, want := strings.Join(view(), ", "), "a down, b up"; got != want {
		t.Errorf("got %s, want %s: what was ordered of a backend that was gone is void", got, want)
	}
}
