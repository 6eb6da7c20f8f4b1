package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// hactl runs hactl on a node and fails the test where the exit status is another one, or
// neither of what it prints contains want.
func hactl(t *testing.T, n *lab.Node, status int, want string, args ...string) string {
	t.Helper()
	stdout, stderr, got, err := n.Hactl(args...)
	if err != nil || got != status || !strings.Contains(stdout+stderr, want) {
		t.Fatalf("hactl %v on %s: exit status %d, want %d with %q: %v\n%s%s", args, n.Name, got, status, want, err, stdout, stderr)
	}
	return stdout
}

// everywhere waits until what every running agent says is as it should be.
func everywhere(t *testing.T, m *lab.Mesh, check func(*hameshv1.GetStatusResponse) error) {
	t.Helper()
	if err := lab.Await(20*time.Second, func() error {
		for _, n := range m.Nodes {
			if n.Host() == nil {
				continue
			}
			s, err := n.Status()
			if err != nil {
				return err
			}
			if err := check(s); err != nil {
				return fmt.Errorf("by %s: %w", n.Name, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// backendIs checks a backend's state, and that an order is the reason where it is one's.
func backendIs(name string, want hameshv1.BackendState) func(*hameshv1.GetStatusResponse) error {
	reason := ""
	if want != hameshv1.BackendState_BACKEND_STATE_UP {
		reason = "by an operator's order"
	}
	return func(s *hameshv1.GetStatusResponse) error {
		for _, b := range s.GetBackends() {
			if b.GetName() == name && (b.GetState() != want || b.GetReason() != reason) {
				return fmt.Errorf("backend %s is %v (%s), want %v", name, b.GetState(), b.GetReason(), want)
			}
		}
		return nil
	}
}

// nodeIs checks a node's state.
func nodeIs(name string, want hameshv1.NodeState) func(*hameshv1.GetStatusResponse) error {
	return func(s *hameshv1.GetStatusResponse) error {
		for _, n := range s.GetNodes() {
			if n.GetName() == name && (n.GetState() != want || n.GetEligible() == (want == hameshv1.NodeState_NODE_STATE_DRAINED)) {
				return fmt.Errorf("node %s is %v, eligible %v (%s), want %v", name, n.GetState(), n.GetEligible(), n.GetReason(), want)
			}
		}
		return nil
	}
}

// answered runs a load for a moment and returns how many answers came from each backend.
func answered(t *testing.T, m *lab.Mesh) map[string]int {
	t.Helper()
	run := load(t, m, lab.Load{Rate: 100})
	time.Sleep(1500 * time.Millisecond)
	r := stop(t, run, time.Now().Add(-1500*time.Millisecond))
	unfailing(t, r, 0)
	return r.Backends
}

// allAnswer waits until answers come from every backend: one that has just come back gets
// its clients gradually.
func allAnswer(t *testing.T, m *lab.Mesh) {
	t.Helper()
	if err := lab.Await(20*time.Second, func() error {
		if got := answered(t, m); len(got) != len(m.Nodes) {
			return fmt.Errorf("answers come from %v", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// brokenAtMost is how many of a test's streams may break: none, but what is late under the
// race detector is lost.
func brokenAtMost() int {
	if raceDetector {
		return 5
	}
	return 0
}

// TestBackendOrders walks an API server through an operator's orders.
func TestBackendOrders(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60})
	owner(t, m)
	healthy(t, m)
	const (
		up       = hameshv1.BackendState_BACKEND_STATE_UP
		draining = hameshv1.BackendState_BACKEND_STATE_DRAINING
		disabled = hameshv1.BackendState_BACKEND_STATE_DISABLED
	)

	from := time.Now()
	run := load(t, m, lab.Load{Streams: 30})
	if err := lab.Await(10*time.Second, func() error {
		if r := lab.Summarize(run.Samples(), from, time.Now()); r.Streams < 30 {
			return fmt.Errorf("%d streams", r.Streams)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	hactl(t, m.Nodes[0], 0, "cp-2 of proxy kube-api is draining", "backend", "cp-2", "--state", "draining")
	// The member that was asked has applied it when it answers.
	if s, err := m.Nodes[0].Status(); err != nil || backendIs("cp-2", draining)(s) != nil {
		t.Errorf("at once: %v, %v", err, backendIs("cp-2", draining)(s))
	}
	everywhere(t, m, backendIs("cp-2", draining))
	if got := answered(t, m); got["cp-2"] > 0 || got["cp-1"] == 0 || got["cp-3"] == 0 {
		t.Errorf("while cp-2 drains, answers come from %v", got)
	}
	if r := lab.Summarize(run.Samples(), from, time.Now()); r.Broken > brokenAtMost() {
		t.Errorf("draining broke %d of %d streams: %v", r.Broken, r.Streams, r.Breaks)
	}
	hactl(t, m.Nodes[1], 0, "unchanged", "backend", "cp-2", "--state", "draining", "--proxy", "kube-api")

	t.Run("refusals", func(t *testing.T) {
		hactl(t, m.Nodes[1], 1, "there are: cp-1, cp-2, cp-3", "backend", "cp-9", "--state", "disabled")
		hactl(t, m.Nodes[1], 1, "there are: kube-api", "backend", "cp-2", "--state", "disabled", "--proxy", "x")
		hactl(t, m.Nodes[1], 0, "", "backend", "cp-1", "--state", "disabled")
		hactl(t, m.Nodes[2], 1, "LAST_BACKEND", "backend", "cp-3", "--state", "disabled")
		hactl(t, m.Nodes[2], 0, "", "backend", "cp-1", "--state", "active")
	})

	hactl(t, m.Nodes[2], 0, "", "backend", "cp-2", "--state", "disabled")
	everywhere(t, m, backendIs("cp-2", disabled))
	if err := lab.Await(5*time.Second, func() error {
		for _, n := range m.Nodes {
			s, err := n.Status()
			if err != nil {
				return err
			}
			if c := s.GetBackends()[1].GetConnections(); c > 0 {
				return fmt.Errorf("%s says that %d connections are left", n.Name, c)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	stop(t, run, from)

	t.Run("outlasts every agent", func(t *testing.T) {
		for _, n := range m.Nodes {
			if err := n.KillAgent(); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range m.Nodes {
			if err := n.StartAgent(); err != nil {
				t.Fatal(err)
			}
		}
		owner(t, m)
		everywhere(t, m, backendIs("cp-2", disabled))
		everywhere(t, m, backendIs("cp-1", up))
	})

	t.Run("the store is away", func(t *testing.T) {
		start, err := m.StopStore()
		if err != nil {
			t.Fatal(err)
		}
		everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
			if s.GetStore().GetAvailable() {
				return fmt.Errorf("the store answers")
			}
			return nil
		})
		hactl(t, m.Nodes[0], 1, "STORE_UNAVAILABLE", "backend", "cp-2", "--state", "active")
		hactl(t, m.Nodes[0], 1, "STORE_UNAVAILABLE", "drain", "cp-1")
		everywhere(t, m, backendIs("cp-2", disabled))
		if err := start(); err != nil {
			t.Fatal(err)
		}
		everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
			if !s.GetStore().GetAvailable() {
				return fmt.Errorf("the store does not answer")
			}
			return nil
		})
		owner := owner(t, m)
		for _, n := range m.Nodes {
			tells(t, n, []happened{
				{n.Name, hameshv1.EventKind_EVENT_KIND_STORE_AWAY, "", ""},
				{n.Name, hameshv1.EventKind_EVENT_KIND_STORE_BACK, "", ""},
			})
			tells(t, n, []happened{
				{owner.Name, hameshv1.EventKind_EVENT_KIND_RIGHT_CHANGED, "", "the store does not answer"},
				{owner.Name, hameshv1.EventKind_EVENT_KIND_RIGHT_CHANGED, "", "and the store answers"},
			})
		}
	})

	hactl(t, m.Nodes[0], 0, "cp-2 of proxy kube-api is active", "backend", "cp-2", "--state", "active")
	healthy(t, m)
	everywhere(t, m, backendIs("cp-2", up))
	allAnswer(t, m)
}

// TestDrain drains the owner: its VIP moves, nobody's connection breaks, its API server
// gets no new ones, and all that lasts until it is undrained.
func TestDrain(t *testing.T) {
	m := newMesh(t, lab.Options{Clients: 60})
	first := owner(t, m)
	healthy(t, m)
	const (
		ready   = hameshv1.NodeState_NODE_STATE_READY
		drained = hameshv1.NodeState_NODE_STATE_DRAINED
	)
	streams := 60
	if raceDetector {
		streams = 20
	}
	from := time.Now()
	run := load(t, m, lab.Load{Rate: 50, Streams: streams})
	time.Sleep(1500 * time.Millisecond)
	asked := time.Now()
	hactl(t, first, 0, first.Name+" is drained", "drain", first.Name)
	if err := lab.Await(10*time.Second, func() error {
		if now := m.Recorder.Now(); len(now) != 1 || now[0] == first.Name {
			return fmt.Errorf("the kernels with the address are those of %v", now)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("the VIP has moved %v after the order was given", time.Since(asked).Round(time.Millisecond))
	everywhere(t, m, nodeIs(first.Name, drained))
	everywhere(t, m, backendIs(first.Name, hameshv1.BackendState_BACKEND_STATE_DRAINING))
	second := owner(t, m)
	hactl(t, second, 0, "still there after 3s", "drain", first.Name, "--wait", "--grace", "3s", "--timeout", "12s")
	hactl(t, second, 1, "NODE_NOT_ELIGIBLE", "move-vip", "kube-api", "--to", first.Name)
	hactl(t, second, 1, "there are: cp-1, cp-2, cp-3", "drain", "cp-9")
	if got := answered(t, m); got[first.Name] > 0 || len(got) != 2 {
		t.Errorf("while %s is drained, answers come from %v", first.Name, got)
	}
	r := stop(t, run, from)
	t.Logf("%d streams, %d broken %v, longest silence %v; %d requests, %d failed %v", r.Streams, r.Broken, r.Breaks, r.Silence, r.Requests, r.Failed, r.Errors)
	if r.Streams != streams || r.Broken > brokenAtMost() {
		t.Errorf("%d of %d streams broke: %v", r.Broken, r.Streams, r.Breaks)
	}
	unfailing(t, r, 0)
	never(t, m, from, planned)
	hactl(t, second, 0, "nothing is left: "+first.Name+" may be stopped", "drain", first.Name, "--wait", "--timeout", "30s")

	t.Run("restarts drained", func(t *testing.T) {
		from := time.Now()
		if err := first.StopAgent(); err != nil {
			t.Fatal(err)
		}
		if err := first.StartAgent(); err != nil {
			t.Fatal(err)
		}
		everywhere(t, m, nodeIs(first.Name, drained))
		if h := never(t, m, from, 0); len(h.Spans) != 1 {
			t.Errorf("the holder changed: %+v", h.Spans)
		}
	})

	t.Run("the last candidate stays", func(t *testing.T) {
		var third *lab.Node
		for _, n := range m.Nodes {
			if n != first && n != second {
				third = n
			}
		}
		hactl(t, first, 0, "", "drain", third.Name)
		everywhere(t, m, nodeIs(third.Name, drained))
		hactl(t, first, 1, "LAST_CANDIDATE", "drain", second.Name)
		hactl(t, first, 0, second.Name+" is drained", "drain", second.Name, "--force")
		hactl(t, first, 1, "VIP kube-api (no other node may take it", "drain", second.Name, "--force", "--wait", "--timeout", "5s")
		everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
			if !slices.ContainsFunc(s.GetProblems(), func(p *hameshv1.Problem) bool { return p.GetCode() == "DRAINED_NODE_OWNS" }) {
				return fmt.Errorf("no DRAINED_NODE_OWNS among %v", s.GetProblems())
			}
			return nil
		})
		if got := answered(t, m); len(got) != 3 {
			t.Errorf("with every API server draining, answers come from %v", got)
		}
		if now := m.Recorder.Now(); !slices.Equal(now, []string{second.Name}) {
			t.Errorf("the kernels with the address are those of %v", now)
		}
		hactl(t, first, 0, "", "undrain", third.Name)
		if err := lab.Await(10*time.Second, func() error {
			if now := m.Recorder.Now(); !slices.Equal(now, []string{third.Name}) {
				return fmt.Errorf("the kernels with the address are those of %v, not %s", now, third.Name)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		hactl(t, first, 0, "", "undrain", second.Name)
	})

	hactl(t, first, 0, first.Name+" may take VIPs", "undrain", first.Name)
	hactl(t, first, 0, "unchanged", "undrain", first.Name)
	healthy(t, m)
	everywhere(t, m, nodeIs(first.Name, ready))
	move(t, m, first)
	allAnswer(t, m)
}

// events returns what a node's agent tells of the mesh.
func events(t *testing.T, n *lab.Node) *hameshv1.ListEventsResponse {
	t.Helper()
	var response hameshv1.ListEventsResponse
	if err := protojson.Unmarshal([]byte(hactl(t, n, 0, "", "events", "-o", "json")), &response); err != nil {
		t.Fatal(err)
	}
	return &response
}

// happened is an event that must have been told.
type happened struct {
	node         string
	kind         hameshv1.EventKind
	peer, reason string // reason: a part of it, or of who ordered it
}

// tells waits until a node's agent tells a story, in this order.
func tells(t *testing.T, n *lab.Node, story []happened) {
	t.Helper()
	if err := lab.Await(20*time.Second, func() error {
		response := events(t, n)
		rest := response.GetEvents()
		if !slices.IsSortedFunc(rest, func(a, b *hameshv1.Event) int { return strings.Compare(a.GetId(), b.GetId()) }) {
			return fmt.Errorf("not in the order of the ids")
		}
		for _, h := range story {
			i := slices.IndexFunc(rest, func(e *hameshv1.Event) bool {
				return e.GetNode() == h.node && e.GetKind() == h.kind && e.GetPeer() == h.peer && strings.Contains(e.GetReason()+e.GetBy(), h.reason)
			})
			if i < 0 {
				return fmt.Errorf("%s does not tell, or not in this order, that %v; it tells %v", n.Name, h, response)
			}
			rest = rest[i+1:]
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestEventsTellTheStory checks that any member tells who owned the VIP when and why,
// also of a member that is dead.
func TestEventsTellTheStory(t *testing.T) {
	m := newMesh(t, lab.Options{})
	first := owner(t, m)
	healthy(t, m)
	var second, third *lab.Node
	for _, n := range m.Nodes {
		switch {
		case n == first:
		case second == nil:
			second = n
		default:
			third = n
		}
	}
	move(t, m, second)
	hactl(t, third, 0, "", "drain", first.Name)
	hactl(t, first, 0, "", "undrain", first.Name)
	hactl(t, first, 0, "", "backend", "cp-2", "--state", "draining")
	hactl(t, first, 0, "", "backend", "cp-2", "--state", "active")
	if err := second.DeleteAddress(m.VIP().Addr()); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		tells(t, n, []happened{
			{first.Name, hameshv1.EventKind_EVENT_KIND_AGENT_STARTED, "", ""},
			{first.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, "", "nobody"},
			{second.Name, hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED, second.Name, "uid 0"},
			{second.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, first.Name, "moved by an operator"},
			{third.Name, hameshv1.EventKind_EVENT_KIND_NODE_DRAINED, first.Name, "uid 0"},
			{first.Name, hameshv1.EventKind_EVENT_KIND_NODE_UNDRAINED, first.Name, "uid 0"},
			{first.Name, hameshv1.EventKind_EVENT_KIND_BACKEND_DRAINING, "", "operator"},
			{first.Name, hameshv1.EventKind_EVENT_KIND_BACKEND_ACTIVE, "", "operator"},
			{second.Name, hameshv1.EventKind_EVENT_KIND_ADDRESS_REMOVED, "", ""},
			{second.Name, hameshv1.EventKind_EVENT_KIND_ADDRESS_RESTORED, "", ""},
		})
		tells(t, n, []happened{{first.Name, hameshv1.EventKind_EVENT_KIND_VIP_LOST, second.Name, "moved by an operator"}})
	}

	if err := third.KillAgent(); err != nil {
		t.Fatal(err)
	}
	tells(t, first, []happened{{first.Name, hameshv1.EventKind_EVENT_KIND_MEMBER_WITHDRAWN, third.Name, "guard's word"}})
	if err := third.StartAgent(); err != nil {
		t.Fatal(err)
	}
	tells(t, first, []happened{
		{first.Name, hameshv1.EventKind_EVENT_KIND_MEMBER_DOWN, third.Name, ""},
		{first.Name, hameshv1.EventKind_EVENT_KIND_MEMBER_BACK, third.Name, ""},
	})
	// It has to hear what second knows before that is gone.
	tells(t, third, []happened{{second.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, first.Name, "moved by an operator"}})
	healthy(t, m)

	if err := second.PowerOff(); err != nil {
		t.Fatal(err)
	}
	next := owner(t, m)
	for _, n := range []*lab.Node{first, third} {
		tells(t, n, []happened{
			{second.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, first.Name, "moved by an operator"}, // told by a dead one
			{next.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, second.Name, "took over from " + second.Name},
		})
		tells(t, n, []happened{
			{n.Name, hameshv1.EventKind_EVENT_KIND_MEMBER_DOWN, second.Name, "not heard"},
			{n.Name, hameshv1.EventKind_EVENT_KIND_BACKEND_DOWN, "", ""},
		})
		if missing := events(t, n).GetUnanswered(); !slices.Equal(missing, []string{second.Name}) {
			t.Errorf("%s says that %v do not answer", n.Name, missing)
		}
		hactl(t, n, 0, "newer events may be missing: "+second.Name, "events")
	}
	t.Logf("the whole story:\n%s", hactl(t, first, 0, "", "events"))

	t.Run("the past outlasts the agents", func(t *testing.T) {
		for _, n := range []*lab.Node{first, third} {
			if err := n.KillAgent(); err != nil {
				t.Fatal(err)
			}
		}
		if err := second.PowerOn(); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*lab.Node{first, third} {
			if err := n.StartAgent(); err != nil {
				t.Fatal(err)
			}
		}
		owner(t, m)
		for _, n := range m.Nodes {
			tells(t, n, []happened{
				{first.Name, hameshv1.EventKind_EVENT_KIND_AGENT_STARTED, "", ""},
				{second.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, first.Name, "moved by an operator"},
				{next.Name, hameshv1.EventKind_EVENT_KIND_VIP_GAINED, second.Name, "took over from " + second.Name},
				{first.Name, hameshv1.EventKind_EVENT_KIND_AGENT_STARTED, "", ""},
			})
		}
	})
}
