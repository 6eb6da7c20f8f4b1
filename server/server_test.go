package server_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpccredentials "google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/hamesh/hamesh/agent/credentials"
	"github.com/hamesh/hamesh/cli/pki"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// agent is what a server needs of an agent.
type agent struct {
	mu      sync.Mutex
	status  *hameshv1.GetStatusResponse
	changed chan struct{}
	move    func(ctx context.Context, send func(*hameshv1.MoveVipResponse) error) error
	heard   []string
	events  []*hameshv1.Event
	told    chan struct{}
}

func newAgent() *agent {
	return &agent{
		status:  &hameshv1.GetStatusResponse{Mesh: "prod", ReportedBy: "cp-1"},
		changed: make(chan struct{}),
		told:    make(chan struct{}),
		move: func(_ context.Context, send func(*hameshv1.MoveVipResponse) error) error {
			return send(&hameshv1.MoveVipResponse{Phase: hameshv1.MovePhase_MOVE_PHASE_HELD})
		},
	}
}

func (a *agent) Status() *hameshv1.GetStatusResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

func (a *agent) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

func (a *agent) set(mesh string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status = &hameshv1.GetStatusResponse{Mesh: mesh}
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *agent) MoveVip(ctx context.Context, _ *hameshv1.MoveVipRequest, send func(*hameshv1.MoveVipResponse) error) error {
	return a.move(ctx, send)
}

// Events selects as an agent does.
func (a *agent) Events(wanted server.EventSelection) (found []*hameshv1.Event, unanswered []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events {
		after, seen := wanted.After[e.GetNode()]
		if (seen && e.GetId() > after) || (!seen && e.GetId() >= server.EventID(wanted.Since, "")) {
			found = append(found, e)
		}
	}
	return found, []string{"cp-3"}
}

func (a *agent) EventsChanged() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.told
}

// tell adds an event of a node, that many seconds after 1970.
func (a *agent) tell(node string, at int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.events = append(a.events, &hameshv1.Event{Id: server.EventID(time.Unix(at, 0), node), Node: node})
	close(a.told)
	a.told = make(chan struct{})
}

func (a *agent) DrainNode(ctx context.Context, r *hameshv1.DrainNodeRequest) (*hameshv1.DrainNodeResponse, error) {
	a.note(ctx, "drain "+r.GetNode())
	return &hameshv1.DrainNodeResponse{Changed: true}, nil
}

func (a *agent) UndrainNode(ctx context.Context, r *hameshv1.UndrainNodeRequest) (*hameshv1.UndrainNodeResponse, error) {
	a.note(ctx, "undrain "+r.GetNode())
	return &hameshv1.UndrainNodeResponse{Changed: true}, nil
}

func (a *agent) SetBackendState(ctx context.Context, r *hameshv1.SetBackendStateRequest) (*hameshv1.SetBackendStateResponse, error) {
	a.note(ctx, fmt.Sprintf("%s %s", r.GetBackend(), r.GetState()))
	return &hameshv1.SetBackendStateResponse{Changed: true, Proxies: []string{"kube-api"}}, nil
}

func (a *agent) note(ctx context.Context, what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = append(a.heard, what+" by "+server.Caller(ctx))
}

func (a *agent) Heartbeat(_ context.Context, from string, heartbeat *hameshv1.Heartbeat) (*hameshv1.ExchangeResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = append(a.heard, from)
	return &hameshv1.ExchangeResponse{AckBoot: heartbeat.GetBoot(), AckSequence: heartbeat.GetSequence()}, nil
}

func (a *agent) Recall(member string) []*hameshv1.ShareFlowsRequest {
	return []*hameshv1.ShareFlowsRequest{{Member: member, Vip: "kube-api"}}
}

func (a *agent) Flows(from string, change *hameshv1.ShareFlowsRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = append(a.heard, fmt.Sprintf("%s: port %d", from, change.GetPort()))
}

func (a *agent) Withdrawn(_ context.Context, from string, word *hameshv1.WithdrawnRequest) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = append(a.heard, fmt.Sprintf("%s: %d %s", from, word.GetBoot(), word.GetVips()))
	return nil
}

// authority is a CA of a mesh in a directory.
type authority struct {
	t   *testing.T
	dir string
}

func newAuthority(t *testing.T, mesh string) authority {
	t.Helper()
	dir := t.TempDir()
	if _, err := pki.Init(dir, mesh); err != nil {
		t.Fatal(err)
	}
	return authority{t, dir}
}

func (a authority) issue(name string, role pki.Role) *credentials.Credentials {
	a.t.Helper()
	request := pki.Request{Name: name, Role: role}
	if role == pki.RoleAgent {
		request.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	}
	files, err := pki.Issue(a.dir, request)
	if err != nil {
		a.t.Fatal(err)
	}
	own, err := credentials.Open(filepath.Join(a.dir, "ca.crt"), files.Cert, files.Key)
	if err != nil {
		a.t.Fatal(err)
	}
	return own
}

// running is a server that serves on TCP and on a socket.
type running struct {
	tcp, socket string
	stop        context.CancelFunc
	done        chan error
}

func serve(t *testing.T, a *agent, options server.Options) *running {
	t.Helper()
	options.Mesh, options.Node, options.Members = "prod", "cp-1", []string{"cp-1", "cp-2", "cp-3"}
	options.Log = hclog.NewNullLogger()
	s, err := server.New(options, a, a, a, a)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "run", "hameshd.sock")
	socket, err := server.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{tcp: tcp.Addr().String(), socket: "unix://" + path, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- s.Serve(ctx, tcp, socket) }()
	t.Cleanup(func() {
		stop()
		select {
		case err := <-r.done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve did not end")
		}
	})
	return r
}

func dial(t *testing.T, target string, transport grpccredentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(transport), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// outcome is a call's code and reason in one word.
func outcome(err error) string {
	st := status.Convert(err)
	if st.Code() == codes.OK {
		return "ok"
	}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == server.ErrorDomain {
			return st.Code().String() + " " + info.GetReason()
		}
	}
	return st.Code().String()
}

var calls = map[string]func(context.Context, *grpc.ClientConn) error{
	"status": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := hameshv1.NewStatusServiceClient(conn).GetStatus(ctx, &hameshv1.GetStatusRequest{})
		return err
	},
	"health": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
		return err
	},
	"reflection": func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			return err
		}
		_ = stream.Send(&reflectionv1.ServerReflectionRequest{
			MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
		_, err = stream.Recv()
		return err
	},
	"move": func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := hameshv1.NewControlServiceClient(conn).MoveVip(ctx, &hameshv1.MoveVipRequest{Vip: "kube-api"})
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	},
	"events": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := hameshv1.NewStatusServiceClient(conn).ListEvents(ctx, &hameshv1.ListEventsRequest{})
		return err
	},
	"drain": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := hameshv1.NewControlServiceClient(conn).DrainNode(ctx, &hameshv1.DrainNodeRequest{Node: "cp-1"})
		return err
	},
	"undrain": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := hameshv1.NewControlServiceClient(conn).UndrainNode(ctx, &hameshv1.UndrainNodeRequest{Node: "cp-1"})
		return err
	},
	"backend": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := hameshv1.NewControlServiceClient(conn).SetBackendState(ctx, &hameshv1.SetBackendStateRequest{
			Backend: "cp-1", State: hameshv1.BackendOrder_BACKEND_ORDER_DISABLED})
		return err
	},
	"exchange": func(ctx context.Context, conn *grpc.ClientConn) error { return exchange(ctx, conn, "cp-2") },
}

// exchange sends one heartbeat as each of members.
func exchange(ctx context.Context, conn *grpc.ClientConn, members ...string) error {
	stream, err := hameshv1.NewMeshServiceClient(conn).Exchange(ctx)
	if err != nil {
		return err
	}
	for i, member := range members {
		// An error of Send is told by Recv.
		_ = stream.Send(&hameshv1.ExchangeRequest{Heartbeat: &hameshv1.Heartbeat{Member: member, Boot: 7, Sequence: uint64(i)}})
		ack, err := stream.Recv()
		if err != nil {
			return err
		}
		if ack.GetAckBoot() != 7 || ack.GetAckSequence() != uint64(i) {
			return fmt.Errorf("ack of another heartbeat: %v", ack)
		}
	}
	return nil
}

func TestWhoMayCallWhat(t *testing.T) {
	prod, lab := newAuthority(t, "prod"), newAuthority(t, "lab")
	secure := serve(t, newAgent(), server.Options{TLS: prod.issue("cp-1", pki.RoleAgent).Server()})
	open := serve(t, newAgent(), server.Options{Insecure: true})

	const (
		ok   = "ok"
		role = "PermissionDenied ROLE_INSUFFICIENT"
		peer = "PermissionDenied NOT_A_PEER"
		gone = "Unavailable" // the handshake failed
	)
	type expected struct{ status, health, reflection, move, exchange string }
	for name, test := range map[string]struct {
		conn *grpc.ClientConn
		want expected
	}{
		"viewer":   {dial(t, secure.tcp, prod.issue("grafana", pki.RoleViewer).Client("cp-1")), expected{ok, ok, ok, role, role}},
		"operator": {dial(t, secure.tcp, prod.issue("alice", pki.RoleOperator).Client("cp-1")), expected{ok, ok, ok, ok, role}},
		"peer":     {dial(t, secure.tcp, prod.issue("cp-2", pki.RoleAgent).Client("cp-1")), expected{ok, ok, ok, ok, ok}},
		"itself": {dial(t, secure.tcp, mustOpen(t, prod, "cp-1").Client("cp-1")),
			expected{ok, ok, ok, ok, peer}},
		"stranger":      {dial(t, secure.tcp, prod.issue("cp-9", pki.RoleAgent).Client("cp-1")), expected{ok, ok, ok, ok, peer}},
		"another mesh":  {dial(t, secure.tcp, lab.issue("cp-2", pki.RoleAgent).Client("cp-1")), expected{gone, gone, gone, gone, gone}},
		"plain text":    {dial(t, secure.tcp, insecure.NewCredentials()), expected{gone, gone, gone, gone, gone}},
		"wrong server":  {dial(t, secure.tcp, prod.issue("cp-3", pki.RoleAgent).Client("cp-4")), expected{gone, gone, gone, gone, gone}},
		"socket":        {dial(t, secure.socket, insecure.NewCredentials()), expected{ok, ok, ok, ok, role}},
		"insecure":      {dial(t, open.tcp, insecure.NewCredentials()), expected{ok, ok, ok, ok, ok}},
		"insecure unix": {dial(t, open.socket, insecure.NewCredentials()), expected{ok, ok, ok, ok, role}},
	} {
		t.Run(name, func(t *testing.T) {
			for call, want := range map[string]string{
				"status": test.want.status, "health": test.want.health, "reflection": test.want.reflection,
				"move": test.want.move, "exchange": test.want.exchange,
				"events": test.want.status, "drain": test.want.move, "undrain": test.want.move, "backend": test.want.move,
			} {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				if err := calls[call](ctx, test.conn); outcome(err) != want {
					t.Errorf("%s: %v, want %s", call, err, want)
				}
				cancel()
			}
		})
	}
}

func mustOpen(t *testing.T, a authority, name string) *credentials.Credentials {
	t.Helper()
	file := func(name string) string { return filepath.Join(a.dir, name) }
	own, err := credentials.Open(file("ca.crt"), file(name+".crt"), file(name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return own
}

// One CA for several meshes is a mistake that the URI still catches.
// Who is no agent cannot pass for another member.
func TestByAgent(t *testing.T) {
	ca, a := newAuthority(t, "prod"), newAgent()
	var byAgent bool
	a.move = func(ctx context.Context, send func(*hameshv1.MoveVipResponse) error) error {
		byAgent = server.ByAgent(ctx)
		return send(&hameshv1.MoveVipResponse{})
	}
	secure := serve(t, a, server.Options{TLS: ca.issue("cp-1", pki.RoleAgent).Server()})
	open := serve(t, a, server.Options{Insecure: true})
	for name, test := range map[string]struct {
		conn *grpc.ClientConn
		want bool
	}{
		"agent":    {dial(t, secure.tcp, ca.issue("cp-2", pki.RoleAgent).Client("cp-1")), true},
		"operator": {dial(t, secure.tcp, ca.issue("alice", pki.RoleOperator).Client("cp-1")), false},
		"socket":   {dial(t, secure.socket, insecure.NewCredentials()), false},
		"anybody":  {dial(t, open.tcp, insecure.NewCredentials()), true},
	} {
		t.Run(name, func(t *testing.T) {
			byAgent = !test.want
			if err := calls["move"](t.Context(), test.conn); err != nil || byAgent != test.want {
				t.Errorf("%v, %v", byAgent, err)
			}
		})
	}
}

func TestCertificateOfAnotherMesh(t *testing.T) {
	lab := newAuthority(t, "lab")
	s := serve(t, newAgent(), server.Options{TLS: lab.issue("cp-1", pki.RoleAgent).Server()})
	conn := dial(t, s.tcp, lab.issue("cp-2", pki.RoleAgent).Client("cp-1"))
	for call, do := range calls {
		if err := do(t.Context(), conn); outcome(err) != "Unauthenticated UNIDENTIFIED" {
			t.Errorf("%s: %v", call, err)
		}
	}
}

func TestExchangeSpeaksForItsSenderOnly(t *testing.T) {
	ca := newAuthority(t, "prod")
	secure := serve(t, newAgent(), server.Options{TLS: ca.issue("cp-1", pki.RoleAgent).Server()})
	open := serve(t, newAgent(), server.Options{Insecure: true})
	peer := dial(t, secure.tcp, ca.issue("cp-2", pki.RoleAgent).Client("cp-1"))
	anybody := dial(t, open.tcp, insecure.NewCredentials())
	for name, test := range map[string]struct {
		conn    *grpc.ClientConn
		members []string
		want    string
	}{
		"own name":                {peer, []string{"cp-2", "cp-2", "cp-2"}, "ok"},
		"another's":               {peer, []string{"cp-3"}, "PermissionDenied MEMBER_MISMATCH"},
		"another's later":         {peer, []string{"cp-2", "cp-3"}, "PermissionDenied MEMBER_MISMATCH"},
		"the callee's":            {peer, []string{"cp-1"}, "PermissionDenied MEMBER_MISMATCH"},
		"none":                    {peer, []string{""}, "PermissionDenied MEMBER_MISMATCH"},
		"believed":                {anybody, []string{"cp-3", "cp-3"}, "ok"},
		"believed, then changed":  {anybody, []string{"cp-3", "cp-2"}, "PermissionDenied MEMBER_MISMATCH"},
		"stranger not believed":   {anybody, []string{"cp-9"}, "PermissionDenied NOT_A_PEER"},
		"the callee not believed": {anybody, []string{"cp-1"}, "PermissionDenied NOT_A_PEER"},
		"nobody not believed":     {anybody, []string{""}, "PermissionDenied NOT_A_PEER"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := exchange(t.Context(), test.conn, test.members...); outcome(err) != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
	stream, err := hameshv1.NewMeshServiceClient(peer).Exchange(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&hameshv1.ExchangeRequest{})
	if _, err := stream.Recv(); outcome(err) != "InvalidArgument HEARTBEAT_MISSING" {
		t.Errorf("empty request: %v", err)
	}
}

func TestWordsSpeakForTheirSenderOnly(t *testing.T) {
	ca, a := newAuthority(t, "prod"), newAgent()
	secure := serve(t, a, server.Options{TLS: ca.issue("cp-1", pki.RoleAgent).Server()})
	open := serve(t, a, server.Options{Insecure: true})
	peer := dial(t, secure.tcp, ca.issue("cp-2", pki.RoleAgent).Client("cp-1"))
	anybody := dial(t, open.tcp, insecure.NewCredentials())
	const refused, stranger = "PermissionDenied MEMBER_MISMATCH", "PermissionDenied NOT_A_PEER"
	for name, test := range map[string]struct {
		conn   *grpc.ClientConn
		member string
		want   string
	}{
		"own name":                {peer, "cp-2", "ok"},
		"another's":               {peer, "cp-3", refused},
		"none":                    {peer, "", refused},
		"believed":                {anybody, "cp-3", "ok"},
		"stranger not believed":   {anybody, "cp-9", stranger},
		"the callee not believed": {anybody, "cp-1", stranger},
		"nobody not believed":     {anybody, "", stranger},
		"itself":                  {dial(t, secure.tcp, mustOpen(t, ca, "cp-1").Client("cp-1")), "cp-1", stranger},
		"operator": {dial(t, secure.tcp, ca.issue("alice", pki.RoleOperator).Client("cp-1")), "cp-2",
			"PermissionDenied ROLE_INSUFFICIENT"},
		"socket": {dial(t, secure.socket, insecure.NewCredentials()), "cp-2", "PermissionDenied ROLE_INSUFFICIENT"},
	} {
		t.Run(name, func(t *testing.T) {
			a.heard = nil
			_, err := hameshv1.NewMeshServiceClient(test.conn).Withdrawn(t.Context(),
				&hameshv1.WithdrawnRequest{Member: test.member, Boot: 7, Vips: []string{"kube-api"}})
			if outcome(err) != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
			var heard []string
			if test.want == "ok" {
				heard = []string{test.member + ": 7 [kube-api]", test.member + ": port 16443"}
			}
			stream, err := hameshv1.NewMeshServiceClient(test.conn).ShareFlows(t.Context())
			if err == nil {
				_ = stream.Send(&hameshv1.ShareFlowsRequest{Member: test.member, Vip: "kube-api", Port: 16443})
				_, err = stream.CloseAndRecv()
			}
			if outcome(err) != test.want {
				t.Errorf("flows: got %v, want %s", err, test.want)
			}
			if !slices.Equal(a.heard, heard) {
				t.Errorf("the agent heard %q, want %q", a.heard, heard)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	a := newAgent()
	s := serve(t, a, server.Options{Insecure: true})
	conn := dial(t, s.tcp, insecure.NewCredentials())
	for want, answer := range map[string]error{
		"NotFound VIP_UNKNOWN":                  server.ErrVIPUnknown,
		"NotFound NODE_UNKNOWN":                 server.ErrNodeUnknown,
		"FailedPrecondition NODE_NOT_ELIGIBLE":  server.ErrNodeNotEligible,
		"FailedPrecondition NO_OTHER_CANDIDATE": server.ErrNoOtherCandidate,
		"FailedPrecondition NO_OWNER":           server.ErrNoOwner,
		"Aborted MOVE_IN_PROGRESS":              server.ErrMoveInProgress,
		"Aborted MOVE_FAILED":                   server.ErrMoveFailed,
		"Unavailable OWNER_UNREACHABLE":         server.ErrOwnerUnreachable,
		"Unavailable STORE_UNAVAILABLE":         server.ErrStoreUnavailable,
		"NotFound PROXY_UNKNOWN":                server.ErrProxyUnknown,
		"NotFound BACKEND_UNKNOWN":              server.ErrBackendUnknown,
		"FailedPrecondition LAST_BACKEND":       server.ErrLastBackend,
		"FailedPrecondition LAST_CANDIDATE":     server.ErrLastCandidate,
		"InvalidArgument STATE_INVALID":         server.ErrStateInvalid,
		"InvalidArgument REQUEST_ID_INVALID":    server.ErrRequestID,
		"Unknown":                               fmt.Errorf("something else"),
		"DeadlineExceeded":                      context.DeadlineExceeded,
	} {
		t.Run(want, func(t *testing.T) {
			a.move = func(context.Context, func(*hameshv1.MoveVipResponse) error) error {
				return fmt.Errorf("moving kube-api: %w", answer)
			}
			err := calls["move"](t.Context(), conn)
			if outcome(err) != want {
				t.Fatalf("got %v, want %s", err, want)
			}
			// As when a member passes on what the owner said.
			a.move = func(context.Context, func(*hameshv1.MoveVipResponse) error) error {
				return fmt.Errorf("passing on: %w", err)
			}
			if err := calls["move"](t.Context(), conn); outcome(err) != want {
				t.Errorf("passed on: %v, want %s", err, want)
			}
		})
	}
	a.move = func(context.Context, func(*hameshv1.MoveVipResponse) error) error { panic("a bug") }
	if err := calls["move"](t.Context(), conn); outcome(err) != "Internal INTERNAL" {
		t.Errorf("panic: %v", err)
	}
}

func TestWatchStatus(t *testing.T) {
	a := newAgent()
	s := serve(t, a, server.Options{Insecure: true})
	watch, err := hameshv1.NewStatusServiceClient(dial(t, s.tcp, insecure.NewCredentials())).
		WatchStatus(t.Context(), &hameshv1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func() string {
		t.Helper()
		change, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return change.GetStatus().GetMesh()
	}
	if got := next(); got != "prod" {
		t.Fatalf("first %q", got)
	}
	start := time.Now()
	for i := range 1000 {
		a.set(fmt.Sprint(i))
	}
	messages := 1
	for next() != "999" {
		messages++
	}
	if most := int(time.Since(start)/(50*time.Millisecond)) + 1; messages > most {
		t.Errorf("%d messages in %s", messages, time.Since(start))
	}
	s.stop()
	if _, err := watch.Recv(); outcome(err) != "Unavailable STOPPING" {
		t.Errorf("at the end: %v", err)
	}
}

func TestStopEndsHeartbeats(t *testing.T) {
	s := serve(t, newAgent(), server.Options{Insecure: true})
	conn := dial(t, s.tcp, insecure.NewCredentials())
	stream, err := hameshv1.NewMeshServiceClient(conn).Exchange(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	beat := func() error {
		_ = stream.Send(&hameshv1.ExchangeRequest{Heartbeat: &hameshv1.Heartbeat{Member: "cp-2"}})
		_, err := stream.Recv()
		return err
	}
	if err := beat(); err != nil {
		t.Fatal(err)
	}
	s.stop()
	deadline := time.Now().Add(5 * time.Second)
	for err = beat(); err == nil && time.Now().Before(deadline); err = beat() {
	}
	if outcome(err) != "Unavailable STOPPING" {
		t.Errorf("after stop: %v", err)
	}
}

// A peer of which no connection opens or closes must not hold up the agent's end either.
func TestStopEndsFlows(t *testing.T) {
	a := newAgent()
	s := serve(t, a, server.Options{Insecure: true})
	stream, err := hameshv1.NewMeshServiceClient(dial(t, s.tcp, insecure.NewCredentials())).ShareFlows(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&hameshv1.ShareFlowsRequest{Member: "cp-2"}); err != nil {
		t.Fatal(err)
	}
	heard := func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.heard) > 0
	}
	for deadline := time.Now().Add(10 * time.Second); !heard(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the agent has heard nothing")
		}
	}
	s.stop()
	if err := stream.RecvMsg(&hameshv1.ShareFlowsResponse{}); outcome(err) != "Unavailable STOPPING" {
		t.Errorf("silent stream: %v", err)
	}
}

// A peer that has fallen silent must not hold up the agent's end.
func TestStopIsBounded(t *testing.T) {
	s := serve(t, newAgent(), server.Options{Insecure: true})
	conn := dial(t, s.tcp, insecure.NewCredentials())
	stream, err := hameshv1.NewMeshServiceClient(conn).Exchange(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&hameshv1.ExchangeRequest{Heartbeat: &hameshv1.Heartbeat{Member: "cp-2"}})
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if _, err := stream.Recv(); outcome(err) != "Unavailable" {
		t.Errorf("silent stream: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	a := newAgent()
	if _, err := server.New(server.Options{}, a, a, a, a); err == nil {
		t.Error("neither TLS nor insecure was taken")
	}
	if _, err := server.New(server.Options{TLS: insecure.NewCredentials(), Insecure: true}, a, a, a, a); err == nil {
		t.Error("both TLS and insecure were taken")
	}
}

func TestListenSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "hameshd.sock")
	first, err := server.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o660, filepath.Dir(path): 0o750} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %o", name, info.Mode(), err, want)
		}
	}
	if second, err := server.ListenSocket(path); err == nil {
		_ = second.Close()
		t.Error("a socket that answers was taken over")
	}
	// What an agent that was killed leaves behind.
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = first.Close()
	third, err := server.ListenSocket(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	_ = third.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if fourth, err := server.ListenSocket(path); err == nil {
		_ = fourth.Close()
		t.Error("a file that is no socket was replaced")
	}
}
