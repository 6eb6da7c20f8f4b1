package cli

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// orderly is an agent that takes orders and tells events.
type orderly struct {
	agent
	changed    bool
	pending    bool
	refusal    error
	events     []*hameshv1.Event
	unanswered []string
	leave      func() // called when the events have been told; nil: it stays

	mu      sync.Mutex
	orders  []proto.Message
	watches []*hameshv1.WatchEventsRequest
}

func (o *orderly) take(order interface {
	proto.Message
	GetRequestId() string
}) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, err := uuid.Parse(order.GetRequestId()); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	o.orders = append(o.orders, order)
	return o.refusal
}

func (o *orderly) DrainNode(_ context.Context, r *hameshv1.DrainNodeRequest) (*hameshv1.DrainNodeResponse, error) {
	return &hameshv1.DrainNodeResponse{Changed: o.changed, Pending: o.pending}, o.take(r)
}

func (o *orderly) UndrainNode(_ context.Context, r *hameshv1.UndrainNodeRequest) (*hameshv1.UndrainNodeResponse, error) {
	return &hameshv1.UndrainNodeResponse{Changed: o.changed}, o.take(r)
}

func (o *orderly) SetBackendState(_ context.Context, r *hameshv1.SetBackendStateRequest) (*hameshv1.SetBackendStateResponse, error) {
	return &hameshv1.SetBackendStateResponse{Changed: o.changed, Proxies: []string{"kube-api", "konnectivity"}}, o.take(r)
}

func (o *orderly) ListEvents(context.Context, *hameshv1.ListEventsRequest) (*hameshv1.ListEventsResponse, error) {
	return &hameshv1.ListEventsResponse{Events: o.events, Unanswered: o.unanswered}, o.refusal
}

func (o *orderly) WatchEvents(r *hameshv1.WatchEventsRequest, stream grpc.ServerStreamingServer[hameshv1.WatchEventsResponse]) error {
	o.mu.Lock()
	o.watches = append(o.watches, r)
	o.mu.Unlock()
	for _, e := range o.events {
		if err := stream.Send(&hameshv1.WatchEventsResponse{Event: e}); err != nil {
			return err
		}
	}
	if o.leave != nil {
		go o.leave()
		return nil
	}
	return o.end(stream.Context(), o.refusal)
}

func serveOrderly(t *testing.T, o *orderly) (endpoint string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	hameshv1.RegisterStatusServiceServer(s, o)
	hameshv1.RegisterControlServiceServer(s, o)
	go func() { _ = s.Serve(listener) }()
	t.Cleanup(s.Stop)
	if o.leave != nil {
		o.leave = s.GracefulStop
	}
	return listener.Addr().String()
}

// drains is how the mesh looks while cp-1 is drained.
func drains() []*hameshv1.GetStatusResponse {
	begun := healthy()
	begun.Nodes[0].KeptConnections = 0
	moved := healthy()
	moved.Vips[0].Owner, moved.Vips[0].Holders = "cp-2", []string{"cp-2"}
	moved.Nodes[0].State, moved.Nodes[0].Eligible = hameshv1.NodeState_NODE_STATE_DRAINED, false
	moved.Nodes[0].Reason, moved.Nodes[0].KeptConnections = "drained by an operator (alice)", 12
	moved.Backends[0].State, moved.Backends[0].Reason = hameshv1.BackendState_BACKEND_STATE_DRAINING, "by an operator's order"
	fewer := proto.CloneOf(moved)
	fewer.Nodes[0].KeptConnections, fewer.Backends[0].Connections = 0, 3
	done := proto.CloneOf(fewer)
	done.Backends[0].Connections = 0
	return []*hameshv1.GetStatusResponse{begun, moved, moved, fewer, done}
}

// unheard is a drained node with connections left, where another member is not heard.
func unheard() *hameshv1.GetStatusResponse {
	s := drains()[3]
	s.Nodes[2].State = hameshv1.NodeState_NODE_STATE_DOWN
	return s
}

// stays is a drained node that keeps its VIP.
func stays() *hameshv1.GetStatusResponse {
	s := drains()[1]
	s.Vips[0].Owner, s.Vips[0].Holders = "cp-1", []string{"cp-1"}
	s.Problems = []*hameshv1.Problem{{Code: "DRAINED_NODE_OWNS", Message: "cp-1 is drained, but keeps kube-api: no other candidate may take it"}}
	return s
}

func TestOrders(t *testing.T) {
	all := drains()
	for _, test := range []struct {
		name  string
		agent *orderly
		args  []string
		exit  int
		order proto.Message // with its request_id taken out
	}{
		{"drain", &orderly{changed: true}, []string{"drain", "cp-1"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-unchanged", &orderly{}, []string{"drain", "cp-1"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-pending", &orderly{changed: true, pending: true}, []string{"drain", "cp-1"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-force-json", &orderly{changed: true}, []string{"drain", "cp-1", "--force", "-o", "json"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1", Force: true}},
		{"drain-wait", &orderly{changed: true, agent: agent{states: all, hang: true}}, []string{"drain", "cp-1", "--wait"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-idle", &orderly{agent: agent{states: all[4:], hang: true}}, []string{"drain", "cp-1", "--wait"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-late", &orderly{changed: true, agent: agent{states: all[:1], hang: true}}, []string{"drain", "cp-1", "--wait", "--timeout", "500ms"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-kept", &orderly{changed: true, agent: agent{states: all[:4], hang: true}}, []string{"drain", "cp-1", "--wait", "--grace", "300ms"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-no-grace", &orderly{changed: true, agent: agent{states: all[:2], hang: true}}, []string{"drain", "cp-1", "--wait", "--grace", "0s"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-kept-timeout", &orderly{changed: true, agent: agent{states: all[:2], hang: true}}, []string{"drain", "cp-1", "--wait", "--timeout", "500ms"}, exitDone, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-more", &orderly{changed: true, agent: agent{states: []*hameshv1.GetStatusResponse{all[3], all[1]}, hang: true}}, []string{"drain", "cp-1", "--wait", "--timeout", "500ms"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-wait-unheard", &orderly{changed: true, agent: agent{states: []*hameshv1.GetStatusResponse{unheard()}, hang: true}}, []string{"drain", "cp-1", "--wait", "--grace", "100ms", "--timeout", "500ms"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-bad-grace", &orderly{}, []string{"drain", "cp-1", "--wait", "--grace", "-1s"}, exitUsage, nil},
		{"drain-wait-stays", &orderly{changed: true, agent: agent{states: []*hameshv1.GetStatusResponse{stays()}, hang: true}},
			[]string{"drain", "cp-1", "--wait", "--force", "--timeout", "500ms"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1", Force: true}},
		{"drain-wait-refused", &orderly{changed: true, agent: agent{err: refusal(codes.PermissionDenied, "ROLE_INSUFFICIENT", "the caller's role does not allow this call")}},
			[]string{"drain", "cp-1", "--wait"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"drain-last", &orderly{refusal: refusal(codes.FailedPrecondition, "LAST_CANDIDATE", "drain cp-1: no other candidate may take the node's VIPs now")},
			[]string{"drain", "cp-1"}, exitFailed, &hameshv1.DrainNodeRequest{Node: "cp-1"}},
		{"undrain", &orderly{changed: true}, []string{"undrain", "cp-1"}, exitDone, &hameshv1.UndrainNodeRequest{Node: "cp-1"}},
		{"undrain-unchanged", &orderly{}, []string{"undrain", "cp-1"}, exitDone, &hameshv1.UndrainNodeRequest{Node: "cp-1"}},
		{"backend", &orderly{changed: true}, []string{"backend", "cp-2", "--state", "draining"}, exitDone,
			&hameshv1.SetBackendStateRequest{Backend: "cp-2", State: hameshv1.BackendOrder_BACKEND_ORDER_DRAINING}},
		{"backend-yaml", &orderly{changed: true}, []string{"backend", "cp-2", "--state", "disabled", "--proxy", "kube-api", "--force", "-o", "yaml"}, exitDone,
			&hameshv1.SetBackendStateRequest{Backend: "cp-2", Proxy: "kube-api", Force: true, State: hameshv1.BackendOrder_BACKEND_ORDER_DISABLED}},
		{"backend-unchanged", &orderly{}, []string{"backend", "cp-2", "--state", "active"}, exitDone,
			&hameshv1.SetBackendStateRequest{Backend: "cp-2", State: hameshv1.BackendOrder_BACKEND_ORDER_ACTIVE}},
		{"backend-unknown", &orderly{refusal: refusal(codes.NotFound, "BACKEND_UNKNOWN", `"cp-9": no such backend is configured; there are: cp-1, cp-2, cp-3`)},
			[]string{"backend", "cp-9", "--state", "active"}, exitFailed, &hameshv1.SetBackendStateRequest{Backend: "cp-9", State: hameshv1.BackendOrder_BACKEND_ORDER_ACTIVE}},
		{"backend-no-state", &orderly{}, []string{"backend", "cp-2"}, exitUsage, nil},
		{"backend-bad-state", &orderly{}, []string{"backend", "cp-2", "--state", "off"}, exitUsage, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			exit, out, errs := hactl(t.Context(), append(test.args, "--endpoint", serveOrderly(t, test.agent))...)
			if exit != test.exit || (errs == "") != (test.exit == exitDone) {
				t.Errorf("exit %d, want %d; stderr %q", exit, test.exit, errs)
			}
			golden(t, "order-"+test.name, out+errs)
			if test.order == nil {
				return
			}
			if len(test.agent.orders) != 1 {
				t.Fatalf("ordered %v", test.agent.orders)
			}
			got := test.agent.orders[0].ProtoReflect()
			got.Clear(got.Descriptor().Fields().ByName("request_id"))
			if !proto.Equal(got.Interface(), test.order) {
				t.Errorf("ordered %v, want %v", got, test.order)
			}
		})
	}
}

// Whoever waits for a drain may leave: the order stays.
func TestDrainInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out := &until{marks: []string{"left: VIP kube-api"}, done: cancel}
	var errs bytes.Buffer
	c := &command{in: strings.NewReader(""), out: out, err: &errs, now: func() time.Time { return now }}
	endpoint := serveOrderly(t, &orderly{changed: true, agent: agent{states: drains()[:1], hang: true}})
	if exit := c.run(ctx, []string{"drain", "cp-1", "--wait", "--endpoint", endpoint}); exit != exitFailed {
		t.Errorf("exit %d", exit)
	}
	golden(t, "order-drain-interrupted", out.text.String()+errs.String())
}

// A member that goes away while a drain is awaited is replaced by the next endpoint.
func TestDrainGoesOnElsewhere(t *testing.T) {
	leaving := &goer{}
	leaving.changed, leaving.states = true, drains()[:1]
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	leaving.stop = s.Stop
	hameshv1.RegisterStatusServiceServer(s, leaving)
	hameshv1.RegisterControlServiceServer(s, leaving)
	go func() { _ = s.Serve(listener) }()
	t.Cleanup(s.Stop)
	staying := &orderly{agent: agent{states: drains()[1:], hang: true}}
	exit, out, errs := hactl(t.Context(), "drain", "cp-1", "--wait", "--endpoint", listener.Addr().String(), "--endpoint", serveOrderly(t, staying))
	if exit != exitDone || errs != "" || !strings.Contains(out, "nothing is left") || len(staying.orders) > 0 {
		t.Errorf("exit %d, orders %v:\n%s%s", exit, staying.orders, out, errs)
	}
}

// Whoever does not hear of everybody does not know what is left.
func TestWhatIsLeft(t *testing.T) {
	const suspect, down = hameshv1.NodeState_NODE_STATE_SUSPECT, hameshv1.NodeState_NODE_STATE_DOWN
	for name, test := range map[string]struct {
		change func(*hameshv1.GetStatusResponse)
		want   string
	}{
		"nothing": {func(*hameshv1.GetStatusResponse) {}, ""},
		"an agent that has just started": {func(s *hameshv1.GetStatusResponse) {
			s.Vips[0].Owner, s.Vips[0].Holders = "", nil
			s.Nodes[0].State, s.Nodes[1].State, s.Nodes[2].State = down, suspect, down
			s.ReportedBy = "cp-2"
		}, "not heard: cp-1, cp-2, cp-3"},
		"the node is not heard": {func(s *hameshv1.GetStatusResponse) { s.Nodes[0].State = down }, "not heard: cp-1"},
		"another is not heard":  {func(s *hameshv1.GetStatusResponse) { s.Nodes[2].State = down }, "not heard: cp-3"},
		"one that is, and some that are left": {func(s *hameshv1.GetStatusResponse) { s.Nodes[1].State, s.Nodes[0].KeptConnections = suspect, 4 },
			"left: 4 connections through it; not heard: cp-2"},
		"no VIPs": {func(s *hameshv1.GetStatusResponse) { s.Vips = nil }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := proto.CloneOf(drains()[4])
			test.change(s)
			if got := whatIsLeft(s, "cp-1"); got.String() != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// goer stops in the middle of a watch.
type goer struct {
	orderly
	stop func()
}

func (g *goer) WatchStatus(r *hameshv1.WatchStatusRequest, stream grpc.ServerStreamingServer[hameshv1.WatchStatusResponse]) error {
	err := g.agent.WatchStatus(r, stream)
	g.stop()
	return err
}

// story is some events, each with its time in its id.
func story() []*hameshv1.Event {
	var all []*hameshv1.Event
	for i, e := range []*hameshv1.Event{
		{Node: "cp-1", Kind: hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED, Vip: "kube-api", Peer: "cp-2", By: "alice", Message: "a move of kube-api to cp-2 is asked for"},
		{Node: "cp-2", Kind: hameshv1.EventKind_EVENT_KIND_VIP_GAINED, Vip: "kube-api", Peer: "cp-1", Epoch: 12, Right: hameshv1.Right_RIGHT_CONFIRMED.Enum(),
			Message: "cp-2 owns kube-api", Reason: "moved by an operator"},
		{Node: "cp-1", Kind: hameshv1.EventKind_EVENT_KIND_BACKEND_DOWN, Proxy: "kube-api", Backend: "cp-3", Message: "API server cp-3 is down", Reason: "/readyz answered 500"},
		{Node: "cp-1", Kind: hameshv1.EventKind_EVENT_KIND_NODE_DRAINED, Peer: "cp-3", By: "alice", Message: "cp-3 gives up its VIPs and takes none", Reason: "an operator's order"},
		{Node: "cp-3", Kind: hameshv1.EventKind_EVENT_KIND_AGENT_STOPPING, Message: "the agent of cp-3 was told to stop"},
	} {
		at := now.Add(time.Duration(i-9) * time.Minute)
		e.Id, e.Time = fmt.Sprintf("%016x-%s", at.UnixNano(), e.Node), timestamppb.New(at)
		all = append(all, e)
	}
	return all
}

func TestEvents(t *testing.T) {
	for _, output := range outputs {
		t.Run(output, func(t *testing.T) {
			endpoint := serveOrderly(t, &orderly{events: story(), unanswered: []string{"cp-3"}})
			exit, out, errs := hactl(t.Context(), "events", "--since", "1h", "--endpoint", endpoint, "-o", output)
			if exit != exitDone || errs != "" {
				t.Errorf("exit %d: %s", exit, errs)
			}
			golden(t, "events-"+output, out)
		})
		t.Run("follow/"+output, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			out := &until{marks: []string{"to stop"}, done: cancel}
			if output == "table" {
				out.marks = []string{"agent-stopping"}
			}
			c := &command{in: strings.NewReader(""), out: out, err: out, now: func() time.Time { return now }}
			if exit := c.run(ctx, []string{"events", "-f", "--endpoint", serveOrderly(t, &orderly{events: story(), agent: agent{hang: true}}), "-o", output}); exit != exitDone {
				t.Errorf("exit %d", exit)
			}
			golden(t, "events-follow-"+output, out.text.String())
		})
	}
	if _, out, _ := hactl(t.Context(), "events", "--endpoint", serveOrderly(t, &orderly{})); out != "no events\n" {
		t.Errorf("of none: %q", out)
	}
	if exit, _, errs := hactl(t.Context(), "events", "--since", "-1h"); exit != exitUsage {
		t.Errorf("exit %d: %s", exit, errs)
	}
	for _, args := range [][]string{{"events"}, {"events", "-f"}} {
		refusing := &orderly{refusal: refusal(codes.Unauthenticated, "UNIDENTIFIED", "the certificate names no role in this mesh")}
		if exit, _, errs := hactl(t.Context(), append(args, "--endpoint", serveOrderly(t, refusing))...); exit != exitFailed || !strings.Contains(errs, "UNIDENTIFIED") {
			t.Errorf("%v: exit %d: %s", args, exit, errs)
		}
		if exit, _, errs := hactl(t.Context(), append(args, "--endpoint", "unix:///nonexistent/s")...); exit != exitUnreachable {
			t.Errorf("%v: exit %d: %s", args, exit, errs)
		}
	}
}

// A member that goes away is replaced by the next endpoint, which is told what was seen.
func TestEventsGoOnElsewhere(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	all := story()
	leaving := &orderly{events: all[:3], leave: func() {}}
	first := serveOrderly(t, leaving)
	staying := &orderly{events: all[3:], agent: agent{hang: true}}
	out := &until{marks: []string{"move-requested", "agent-stopping"}, done: cancel}
	c := &command{in: strings.NewReader(""), out: out, err: out, now: func() time.Time { return now }}
	if exit := c.run(ctx, []string{"events", "-f", "--endpoint", first + "," + serveOrderly(t, staying)}); exit != exitDone {
		t.Errorf("exit %d", exit)
	}
	golden(t, "events-follow-table", out.text.String())
	want := []string{all[2].GetId(), all[1].GetId()} // the newest of each node, cp-1 and cp-2
	if len(staying.watches) != 1 || strings.Join(staying.watches[0].GetAfter(), " ") != want[1]+" "+want[0] {
		t.Errorf("resumed with %v, want %v", staying.watches, want)
	}
}
