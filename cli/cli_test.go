package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jedib0t/go-pretty/v6/text"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var now = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

func healthy() *hameshv1.GetStatusResponse {
	node := func(name, address string, role hameshv1.Role) *hameshv1.Node {
		return &hameshv1.Node{Name: name, Address: address, Role: role, Eligible: role == hameshv1.Role_ROLE_CANDIDATE,
			State: hameshv1.NodeState_NODE_STATE_READY, Version: "v0.1.0"}
	}
	backend := func(name, address string, connections uint32) *hameshv1.Backend {
		return &hameshv1.Backend{Name: name, Proxy: "kube-api", Node: name, Address: address, Connections: connections,
			State: hameshv1.BackendState_BACKEND_STATE_UP, SeenUpBy: []string{"cp-1", "cp-2", "cp-3"}}
	}
	return &hameshv1.GetStatusResponse{
		Mesh: "prod", ReportedBy: "cp-1", State: hameshv1.State_STATE_HEALTHY,
		Vips: []*hameshv1.Vip{{
			Name: "kube-api", Address: "10.77.0.100", Owner: "cp-1", Epoch: 12, Holders: []string{"cp-1"},
			Right: hameshv1.Right_RIGHT_CONFIRMED.Enum(), Since: timestamppb.New(now.Add(-76 * time.Hour)),
			Transitions: 2, Reason: "moved by an operator",
		}},
		Nodes: []*hameshv1.Node{
			node("cp-1", "10.77.0.11", hameshv1.Role_ROLE_CANDIDATE),
			node("cp-2", "10.77.0.12", hameshv1.Role_ROLE_CANDIDATE),
			node("cp-3", "10.77.0.13", hameshv1.Role_ROLE_WITNESS),
		},
		Backends: []*hameshv1.Backend{
			backend("cp-1", "10.77.0.11:6443", 41),
			backend("cp-2", "10.77.0.12:6443", 39),
			backend("cp-3", "10.77.0.13:6443", 0),
		},
		Store: &hameshv1.Store{Kind: "embedded", Available: true, Leader: "cp-2", Members: []string{"cp-1", "cp-2", "cp-3"}},
	}
}

func degraded() *hameshv1.GetStatusResponse {
	s := healthy()
	s.State = hameshv1.State_STATE_DEGRADED
	s.Nodes[1].State, s.Nodes[1].Eligible = hameshv1.NodeState_NODE_STATE_SUSPECT, false
	s.Nodes[1].Reason = "API server not ready: /readyz answered 500"
	s.Backends[1].State, s.Backends[1].Connections = hameshv1.BackendState_BACKEND_STATE_DOWN, 0
	s.Backends[1].Reason, s.Backends[1].SeenUpBy, s.Backends[1].NotReady = "/readyz answered 500", nil, true
	link := func(from, to string, heard time.Duration, lost bool) *hameshv1.Link {
		return &hameshv1.Link{From: from, To: to, Heard: durationpb.New(heard), Lost: lost}
	}
	s.Links = []*hameshv1.Link{
		link("cp-2", "cp-1", 75*time.Second, true), link("cp-3", "cp-1", 43*time.Millisecond, false),
		{From: "cp-1", To: "cp-2", Lost: true}, link("cp-3", "cp-2", 80*time.Millisecond, false),
		link("cp-1", "cp-3", 94*time.Millisecond, false),
	}
	s.Links[4].Unconnected = true
	s.Nodes[1].UnheardBy = []string{"cp-1"}
	s.Problems = []*hameshv1.Problem{{
		Code: "BACKEND_DOWN", Message: "API server cp-2 (10.77.0.12:6443) is not ready: /readyz answered 500",
		Fix: "look into the API server's log on cp-2",
	}}
	return s
}

func down() *hameshv1.GetStatusResponse {
	return &hameshv1.GetStatusResponse{
		Mesh: "prod", ReportedBy: "cp-3", State: hameshv1.State_STATE_DOWN,
		Vips:  []*hameshv1.Vip{{Name: "kube-api", Address: "10.77.0.100", Epoch: 12}},
		Nodes: []*hameshv1.Node{{Name: "cp-3", Address: "10.77.0.13", Role: hameshv1.Role_ROLE_CANDIDATE, State: hameshv1.NodeState_NODE_STATE_READY}},
		Store: &hameshv1.Store{Kind: "embedded", Members: []string{"cp-1", "cp-2", "cp-3"}},
		Problems: []*hameshv1.Problem{
			{Code: "VIP_NOT_HELD", Message: "nobody holds kube-api (10.77.0.100)", Fix: "bring a second member back: two of three decide"},
			{Code: "STORE_UNAVAILABLE", Message: "the store does not answer cp-3", Fix: "bring a second etcd member back"},
		},
	}
}

func ipv6() *hameshv1.GetStatusResponse {
	s := healthy()
	s.Vips[0].Address = "fd77::100"
	s.Vips[0].Right = hameshv1.Right_RIGHT_FAILSAFE.Enum()
	s.Vips[0].Since = timestamppb.New(now.Add(-42 * time.Second))
	for i, node := range s.Nodes {
		node.Address = "fd77::" + string(rune('1'+i))
		s.Backends[i].Address = "[" + node.Address + "]:6443"
	}
	return s
}

// agent answers with what the test puts in.
type agent struct {
	hameshv1.UnimplementedStatusServiceServer
	hameshv1.UnimplementedControlServiceServer
	states  []*hameshv1.GetStatusResponse
	err     error
	phases  []*hameshv1.MoveVipResponse
	moveErr error
	hang    bool // after all has been sent
	asked   *hameshv1.MoveVipRequest
}

func (a *agent) end(ctx context.Context, err error) error {
	if a.hang {
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	return err
}

func (a *agent) GetStatus(ctx context.Context, _ *hameshv1.GetStatusRequest) (*hameshv1.GetStatusResponse, error) {
	if len(a.states) == 0 {
		return nil, a.end(ctx, a.err)
	}
	return a.states[0], nil
}

func (a *agent) WatchStatus(_ *hameshv1.WatchStatusRequest, stream grpc.ServerStreamingServer[hameshv1.WatchStatusResponse]) error {
	for _, s := range a.states {
		if err := stream.Send(&hameshv1.WatchStatusResponse{Status: s}); err != nil {
			return err
		}
	}
	return a.end(stream.Context(), a.err)
}

func (a *agent) MoveVip(request *hameshv1.MoveVipRequest, stream grpc.ServerStreamingServer[hameshv1.MoveVipResponse]) error {
	a.asked = request
	for _, phase := range a.phases {
		if err := stream.Send(phase); err != nil {
			return err
		}
	}
	return a.end(stream.Context(), a.moveErr)
}

// serve returns the endpoint at which a answers.
func serve(t *testing.T, a *agent) string {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	hameshv1.RegisterStatusServiceServer(s, a)
	hameshv1.RegisterControlServiceServer(s, a)
	go func() { _ = s.Serve(listener) }()
	t.Cleanup(s.Stop)
	return "unix://" + listener.Addr().String()
}

func refusal(code codes.Code, reason, message string) error {
	st, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: "hamesh.io", Reason: reason})
	if err != nil {
		panic(err)
	}
	return st.Err()
}

// hactl runs one command as Run does, at a fixed time.
func hactl(ctx context.Context, args ...string) (exit int, stdout, stderr string) {
	var out, errs bytes.Buffer
	c := &command{in: strings.NewReader(""), out: &out, err: &errs, now: func() time.Time { return now }}
	exit = c.run(ctx, args)
	return exit, out.String(), errs.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites):\n%s", file, diff)
	}
}

func TestStatus(t *testing.T) {
	for _, test := range []struct {
		name  string
		state *hameshv1.GetStatusResponse
		exit  int
	}{
		{"healthy", healthy(), exitDone},
		{"degraded", degraded(), exitDegraded},
		{"down", down(), exitDegraded},
		{"ipv6", ipv6(), exitDone},
	} {
		endpoint := serve(t, &agent{states: []*hameshv1.GetStatusResponse{test.state}})
		for _, output := range outputs {
			t.Run(test.name+"/"+output, func(t *testing.T) {
				exit, out, errs := hactl(t.Context(), "status", "--endpoint", endpoint, "-o", output)
				if exit != test.exit || errs != "" {
					t.Errorf("exit %d, want %d; stderr %q", exit, test.exit, errs)
				}
				if strings.Contains(out, "\x1b") {
					t.Error("escape sequences where there is no terminal")
				}
				golden(t, "status-"+test.name+"-"+output, out)
			})
		}
	}
}

func TestColour(t *testing.T) {
	text.EnableColors()
	status := degraded()
	status.Backends[2].State = hameshv1.BackendState_BACKEND_STATE_DOWN
	out := (view{now: now, colour: true}).status(status)
	if !strings.Contains(out, text.FgRed.Sprint("DOWN")) || !strings.Contains(out, text.FgYellow.Sprint("NOT_READY")) {
		t.Errorf("no colour:\n%s", out)
	}
}

func TestWatch(t *testing.T) {
	states := []*hameshv1.GetStatusResponse{healthy(), degraded()}
	for _, output := range outputs {
		t.Run(output, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			// Leaves as a user does, once both states have been seen.
			out := &until{marks: []string{"HEALTHY", "DEGRADED"}, done: cancel}
			c := &command{in: strings.NewReader(""), out: out, err: out, now: func() time.Time { return now }}
			exit := c.run(ctx, []string{"status", "--watch", "--endpoint", serve(t, &agent{states: states, hang: true}), "-o", output})
			if exit != exitDegraded {
				t.Errorf("exit %d, want %d", exit, exitDegraded)
			}
			if output == "json" {
				lines := strings.Split(strings.TrimSpace(out.text.String()), "\n")
				if len(lines) != 2 || !json.Valid([]byte(lines[0])) || !json.Valid([]byte(lines[1])) {
					t.Errorf("not one object a line:\n%s", out.text.String())
				}
			}
			golden(t, "watch-"+output, out.text.String())
		})
	}
}

// until calls done when all marks have been written.
type until struct {
	text  strings.Builder
	marks []string
	done  func()
}

func (u *until) Write(p []byte) (int, error) {
	u.text.Write(p)
	for _, mark := range u.marks {
		if !strings.Contains(u.text.String(), mark) {
			return len(p), nil
		}
	}
	u.done()
	return len(p), nil
}

// A member that goes away in the middle of a watch is replaced by the next endpoint.
func TestWatchGoesOnElsewhere(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	first := grpc.NewServer()
	leaving := &leaver{agent: agent{states: []*hameshv1.GetStatusResponse{down()}}, stop: first.GracefulStop}
	hameshv1.RegisterStatusServiceServer(first, leaving)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = first.Serve(listener) }()
	t.Cleanup(first.Stop)
	second := serve(t, &agent{states: []*hameshv1.GetStatusResponse{healthy()}, hang: true})
	out := &until{marks: []string{"DOWN", "HEALTHY"}, done: cancel}
	c := &command{in: strings.NewReader(""), out: out, err: out, now: time.Now}
	t.Setenv("HACTL_ENDPOINT", listener.Addr().String()+", "+second)
	if exit := c.run(ctx, []string{"status", "-w"}); exit != exitDone {
		t.Errorf("exit %d:\n%s", exit, out.text.String())
	}
}

// leaver is an agent that stops in the middle of a watch.
type leaver struct {
	agent
	stop func()
}

func (l *leaver) WatchStatus(request *hameshv1.WatchStatusRequest, stream grpc.ServerStreamingServer[hameshv1.WatchStatusResponse]) error {
	err := l.agent.WatchStatus(request, stream)
	go l.stop()
	return err
}

func phases(changed bool) []*hameshv1.MoveVipResponse {
	phase := func(phase hameshv1.MovePhase, elapsed time.Duration, epoch int64) *hameshv1.MoveVipResponse {
		return &hameshv1.MoveVipResponse{Phase: phase, Vip: "kube-api", From: "cp-1", To: "cp-2",
			Elapsed: durationpb.New(elapsed), Changed: changed, Epoch: epoch}
	}
	if !changed {
		return []*hameshv1.MoveVipResponse{phase(hameshv1.MovePhase_MOVE_PHASE_HELD, 0, 12)}
	}
	return []*hameshv1.MoveVipResponse{
		phase(hameshv1.MovePhase_MOVE_PHASE_ACCEPTED, 0, 0),
		phase(hameshv1.MovePhase_MOVE_PHASE_READY, 1234*time.Microsecond, 0),
		phase(hameshv1.MovePhase_MOVE_PHASE_RECORDED, 18*time.Millisecond, 13),
		phase(hameshv1.MovePhase_MOVE_PHASE_RELEASED, 21*time.Millisecond, 13),
		phase(hameshv1.MovePhase_MOVE_PHASE_HELD, 44*time.Millisecond, 13),
	}
}

func TestMove(t *testing.T) {
	for _, test := range []struct {
		name  string
		agent agent
		args  []string
	}{
		{"wait", agent{phases: phases(true), hang: true}, []string{"--to", "cp-2", "--wait"}},
		{"wait-json", agent{phases: phases(true), hang: true}, []string{"--to", "cp-2", "--wait", "-o", "json"}},
		{"wait-yaml", agent{phases: phases(true), hang: true}, []string{"--to", "cp-2", "--wait", "-o", "yaml"}},
		{"accepted", agent{phases: phases(true), hang: true}, nil},
		{"unchanged", agent{phases: phases(false), hang: true}, []string{"--to", "cp-2", "--wait"}},
		{"unchanged-json", agent{phases: phases(false), hang: true}, []string{"--to", "cp-2", "-o", "json"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			exit, out, errs := hactl(t.Context(), append([]string{"move-vip", "kube-api", "--endpoint", serve(t, &test.agent)}, test.args...)...)
			if exit != exitDone || errs != "" {
				t.Errorf("exit %d, stderr %q", exit, errs)
			}
			golden(t, "move-"+test.name, out)
			asked := test.agent.asked
			if _, err := uuid.Parse(asked.GetRequestId()); err != nil || asked.GetVip() != "kube-api" {
				t.Errorf("asked %v: %v", asked, err)
			}
		})
	}
}

// TestErrors is every exit status but 0 and 3, with what is said on standard error.
func TestErrors(t *testing.T) {
	silent := silentEndpoint(t)
	missing := "unix:///nonexistent/hameshd.sock"
	dir := t.TempDir()
	for _, test := range []struct {
		name  string
		agent *agent // nil: args name the endpoint, or there is none
		args  []string
		exit  int
	}{
		{"no-endpoint", nil, []string{"status", "--endpoint", missing}, exitUnreachable},
		{"no-endpoint-watch", nil, []string{"status", "-w", "--endpoint", missing}, exitUnreachable},
		{"no-endpoint-move", nil, []string{"move-vip", "kube-api", "--endpoint", missing}, exitUnreachable},
		{"silent", nil, []string{"status", "--endpoint", silent, "--timeout", "100ms"}, exitUnreachable},
		{"timeout", &agent{hang: true}, []string{"status", "--timeout", "300ms"}, exitFailed},
		{"timeout-move", &agent{hang: true, phases: phases(true)[:1]}, []string{"move-vip", "kube-api", "--wait", "--timeout", "300ms"}, exitFailed},
		{"ended-early", &agent{phases: phases(true)[:1]}, []string{"move-vip", "kube-api", "--wait"}, exitFailed},
		{"unknown-vip", &agent{moveErr: refusal(codes.NotFound, "VIP_UNKNOWN", `moving "x": no such VIP is configured`)}, []string{"move-vip", "x"}, exitFailed},
		{"viewer", &agent{moveErr: refusal(codes.PermissionDenied, "ROLE_INSUFFICIENT", "the caller's role does not allow this call")}, []string{"move-vip", "x"}, exitFailed},
		{"new-reason", &agent{moveErr: refusal(codes.Aborted, "SOMETHING_NEW", "two\nlines")}, []string{"move-vip", "x"}, exitFailed},
		{"no-reason", &agent{err: status.Error(codes.Internal, "internal error")}, []string{"status"}, exitFailed},
		{"old-agent", &agent{err: status.Error(codes.Unimplemented, "unknown method GetStatus")}, []string{"status"}, exitFailed},
		{"gone-agent", &agent{err: status.Error(codes.Unavailable, "error reading from server: EOF")}, []string{"status"}, exitFailed},
		{"watch-refused", &agent{err: refusal(codes.Unauthenticated, "UNIDENTIFIED", "the certificate names no role in this mesh")}, []string{"status", "--watch"}, exitFailed},
		{"tls-files", nil, []string{"status", "--ca", "/none", "--cert", "/none", "--key", "/none"}, exitFailed},
		{"unknown-command", nil, []string{"stats"}, exitUsage},
		{"unknown-flag", nil, []string{"status", "--frobnicate"}, exitUsage},
		{"unknown-output", nil, []string{"status", "-o", "xml"}, exitUsage},
		{"bad-endpoint", nil, []string{"status", "--endpoint", "cp-1"}, exitUsage},
		{"relative-socket", nil, []string{"status", "--endpoint", "unix://run/s"}, exitUsage},
		{"bad-timeout", nil, []string{"status", "--timeout", "0s"}, exitUsage},
		{"half-tls", nil, []string{"status", "--ca", "/none"}, exitUsage},
		{"surplus", nil, []string{"status", "cp-1"}, exitUsage},
		{"no-vip", nil, []string{"move-vip"}, exitUsage},
		{"pki", nil, []string{"pki"}, exitUsage},
		{"pki-unknown", nil, []string{"pki", "renew"}, exitUsage},
		{"pki-init-flags", nil, []string{"pki", "init"}, exitUsage},
		{"pki-role", nil, []string{"pki", "issue", "--dir", dir, "--name", "x", "--role", "admin"}, exitUsage},
		{"pki-address", nil, []string{"pki", "issue", "--dir", dir, "--name", "x", "--role", "agent", "--address", "cp-1"}, exitUsage},
		{"pki-no-address", nil, []string{"pki", "issue", "--dir", dir, "--name", "x", "--role", "agent"}, exitUsage},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.agent != nil {
				t.Setenv("HACTL_ENDPOINT", serve(t, test.agent))
			}
			exit, _, errs := hactl(t.Context(), test.args...)
			if exit != test.exit {
				t.Errorf("exit %d, want %d", exit, test.exit)
			}
			if strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "; ") {
				t.Errorf("not one line with what to do next: %q", errs)
			}
			golden(t, "error-"+test.name, strings.ReplaceAll(errs, silent, "SILENT"))
		})
	}
}

// silentEndpoint takes connections and never says a word, like an agent that is stopped.
func silentEndpoint(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener.Addr().String()
}

func TestEndpointsInTurn(t *testing.T) {
	second := serve(t, &agent{states: []*hameshv1.GetStatusResponse{healthy()}})
	third := serve(t, &agent{states: []*hameshv1.GetStatusResponse{down()}})
	for name, test := range map[string]struct {
		env  string
		args []string
	}{
		"flags":            {"", []string{"--endpoint", "unix:///nonexistent/s", "--endpoint", second, "--endpoint", third}},
		"one flag":         {"", []string{"--endpoint", "unix:///nonexistent/s," + second}},
		"environment":      {"unix:///nonexistent/s," + second + "," + third, nil},
		"flag beats it":    {third, []string{"--endpoint", second}},
		"silent one first": {silentEndpoint(t) + "," + second, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("HACTL_ENDPOINT", test.env)
			if exit, _, errs := hactl(t.Context(), append(test.args, "status")...); exit != exitDone {
				t.Errorf("exit %d: %s", exit, errs)
			}
		})
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if exit, _, errs := hactl(ctx, "status", "--endpoint", "unix:///nonexistent/s"); exit != exitFailed || !strings.Contains(errs, "interrupted") {
		t.Errorf("exit %d: %s", exit, errs)
	}
}

func TestPKI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	for _, test := range []struct {
		args []string
		exit int
		want string // on either stream
	}{
		{[]string{"issue", "--dir", dir, "--name", "cp-1", "--role", "agent", "--address", "10.77.0.11"}, exitFailed, "hactl pki init"},
		{[]string{"init", "--dir", dir, "--mesh", "prod"}, exitDone, filepath.Join(dir, "ca.key")},
		{[]string{"init", "--dir", dir, "--mesh", "prod"}, exitFailed, "exists already"},
		{[]string{"issue", "--dir", dir, "--name", "cp-1", "--role", "agent", "--address", "10.77.0.11", "--address", "fd77::11"}, exitDone, filepath.Join(dir, "cp-1.crt")},
		{[]string{"issue", "--dir", dir, "--name", "cp-1", "--role", "agent", "--address", "10.77.0.11"}, exitFailed, "--force renews"},
		{[]string{"issue", "--dir", dir, "--name", "cp-1", "--role", "agent", "--address", "10.77.0.11", "--force"}, exitDone, filepath.Join(dir, "cp-1.key")},
		{[]string{"issue", "--dir", dir, "--name", "alice", "--role", "operator", "--validity", "720h"}, exitDone, filepath.Join(dir, "alice.crt")},
	} {
		exit, out, errs := hactl(t.Context(), append([]string{"pki"}, test.args...)...)
		if exit != test.exit || !strings.Contains(out+errs, test.want) {
			t.Errorf("%v: exit %d, want %d with %q:\n%s%s", test.args, exit, test.exit, test.want, out, errs)
		}
	}
}

func TestVersionAndCompletion(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"completion", "bash"}, {"--help"}, {"status", "--help"}} {
		var out, errs bytes.Buffer
		if exit := Run(t.Context(), args, strings.NewReader(""), &out, &errs); exit != exitDone || out.Len() == 0 || errs.Len() != 0 {
			t.Errorf("%v: exit %d, stdout %d bytes, stderr %q", args, exit, out.Len(), errs.String())
		}
	}
}
