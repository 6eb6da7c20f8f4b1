package cli

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// drilled is a mesh whose VIP is this machine's loopback address.
type drilled struct {
	hameshv1.UnimplementedStatusServiceServer
	hameshv1.UnimplementedControlServiceServer
	moved  func() // while the VIP moves; nil: nothing
	broken bool   // the agent that crashes stays away

	mu      sync.Mutex
	status  *hameshv1.GetStatusResponse
	moves   []string
	crashes []string
}

func newDrilled(port int) *drilled {
	s := healthy()
	s.Vips[0].Address = "127.0.0.1"
	s.Proxies = []*hameshv1.Proxy{{Name: "kube-api", Port: uint32(port)}}
	for i, n := range s.Nodes {
		n.Boot = uint64(i + 1)
	}
	return &drilled{status: s}
}

func (d *drilled) GetStatus(context.Context, *hameshv1.GetStatusRequest) (*hameshv1.GetStatusResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return proto.CloneOf(d.status), nil
}

// own makes somebody else the owner; d.mu is held.
func (d *drilled) own(node string) {
	v := d.status.GetVips()[0]
	v.Owner, v.Holders, v.Epoch = node, []string{node}, v.GetEpoch()+1
}

func (d *drilled) MoveVip(r *hameshv1.MoveVipRequest, stream grpc.ServerStreamingServer[hameshv1.MoveVipResponse]) error {
	if d.moved != nil {
		d.moved()
	}
	d.mu.Lock()
	from := d.status.GetVips()[0].GetOwner()
	d.own(r.GetTo())
	epoch := d.status.GetVips()[0].GetEpoch()
	d.moves = append(d.moves, from+">"+r.GetTo())
	d.mu.Unlock()
	for _, phase := range []hameshv1.MovePhase{hameshv1.MovePhase_MOVE_PHASE_ACCEPTED, hameshv1.MovePhase_MOVE_PHASE_HELD} {
		if err := stream.Send(&hameshv1.MoveVipResponse{Phase: phase, Vip: r.GetVip(), From: from, To: r.GetTo(), Changed: true,
			Elapsed: durationpb.New(44 * time.Millisecond), Epoch: epoch}); err != nil {
			return err
		}
	}
	return nil
}

func (d *drilled) CrashAgent(_ context.Context, r *hameshv1.CrashAgentRequest) (*hameshv1.CrashAgentResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !r.GetConfirm() {
		return nil, refusal(codes.InvalidArgument, "CRASH_UNCONFIRMED", "a crash is ordered only with confirm set")
	}
	d.crashes = append(d.crashes, r.GetNode())
	d.own(next(d.status, r.GetNode()))
	if !d.broken {
		time.AfterFunc(300*time.Millisecond, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			findNode(d.status, r.GetNode()).Boot += 10
		})
	}
	return &hameshv1.CrashAgentResponse{Changed: true}, nil
}

func (d *drilled) serve(t *testing.T) (endpoint string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	hameshv1.RegisterStatusServiceServer(s, d)
	hameshv1.RegisterControlServiceServer(s, d)
	go func() { _ = s.Serve(listener) }()
	t.Cleanup(s.Stop)
	return listener.Addr().String()
}

// apiServer is what is behind the VIP.
type apiServer struct {
	*httptest.Server
	mu    sync.Mutex
	conns map[net.Conn]bool
	// refuse: reset whoever connects.
	refuse atomic.Bool
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{conns: map[net.Conn]bool{}}
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }))
	a.Config.ErrorLog = log.New(io.Discard, "", 0)
	a.Config.ConnState = func(c net.Conn, state http.ConnState) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if state == http.StateNew && a.refuse.Load() {
			reset(c)
			return
		}
		a.conns[c] = state != http.StateClosed
	}
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

func reset(c net.Conn) {
	if secured, ok := c.(*tls.Conn); ok {
		c = secured.NetConn()
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}

// breakAll resets every connection.
func (a *apiServer) breakAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c, open := range a.conns {
		if open {
			reset(c)
		}
	}
}

func (a *apiServer) port() int { return a.Listener.Addr().(*net.TCPAddr).Port }

func drillOf(t *testing.T, d *drilled, exit int, args ...string) drillReport {
	t.Helper()
	status, out, errs := hactl(t.Context(), append([]string{"drill", "kube-api", "--endpoint", d.serve(t), "--pause", "500ms", "-o", "json"}, args...)...)
	if status != exit {
		t.Fatalf("exit %d, want %d: %s\n%s", status, exit, errs, out)
	}
	var r drillReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	return r
}

func TestDrillMoves(t *testing.T) {
	api := newAPIServer(t)
	d := newDrilled(api.port())
	r := drillOf(t, d, exitDone, "--count", "3")
	if moves := strings.Join(d.moves, " "); moves != "cp-1>cp-2 cp-2>cp-1 cp-1>cp-2 cp-2>cp-1" {
		t.Errorf("moves: %s", moves)
	}
	if len(r.Phases) != 4 || r.Phases[3].Kind != "return" || r.Summary.Repetitions != 3 || r.Verdict != "passed" || r.Speaks != "https" {
		t.Errorf("%+v", r)
	}
	for _, p := range r.Phases {
		// A busy machine makes fewer, and waits longer.
		if p.Connections < 5 || p.Failed > 0 || p.Broken > 0 || p.Streams != 10 || p.MoveMs == nil || *p.MoveMs != 44 || p.GapMs <= 0 || p.GapMs > 900 {
			t.Errorf("%+v", p)
		}
		if p.SilenceMs < 150 {
			t.Errorf("streams that speak every 200 ms heard something after %v", p.SilenceMs)
		}
	}
	if q := r.Summary.MoveMs; q == nil || q.Min != 44 || q.Max != 44 || r.Summary.GapMs == nil || r.Summary.HealthyMs != nil {
		t.Errorf("%+v", r.Summary)
	}
}

// A move that breaks what it must not break fails the drill, and so does one that refuses
// new connections for a while; the gap is as long as that.
func TestDrillFails(t *testing.T) {
	api := newAPIServer(t)
	d := newDrilled(api.port())
	d.moved = api.breakAll
	if r := drillOf(t, d, exitFailed); r.Phases[0].Broken != drillStreams || r.Phases[0].Breaks[causeReset] != drillStreams || r.Verdict != "failed" {
		t.Errorf("%+v", r.Phases[0])
	}
	d = newDrilled(api.port())
	d.moved = func() {
		api.refuse.Store(true)
		time.Sleep(400 * time.Millisecond)
		api.refuse.Store(false)
	}
	p := drillOf(t, d, exitFailed).Phases[0]
	if p.Failed == 0 || p.Failures[causeReset] != p.Failed || p.GapMs < 350 || p.Broken != 0 {
		t.Errorf("%+v", p)
	}
}

// What speaks no TLS is connected to, and its streams are idle.
func TestDrillOfPlainTCP(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				// Ends what begins a handshake; who only waits is left alone.
				_, _ = c.Read(make([]byte, 1))
			}()
		}
	}()
	r := drillOf(t, newDrilled(listener.Addr().(*net.TCPAddr).Port), exitDone)
	if p := r.Phases[0]; r.Speaks != "tcp" || p.Connections < 5 || p.Failed > 0 || p.Broken > 0 || p.Streams != 10 {
		t.Errorf("%+v", r)
	}
}

func TestDrillCrashes(t *testing.T) {
	api := newAPIServer(t)
	d := newDrilled(api.port())
	r := drillOf(t, d, exitDone, "--crash", "--yes", "--count", "2")
	if crashes, moves := strings.Join(d.crashes, " "), strings.Join(d.moves, " "); crashes != "cp-1 cp-2" || moves != "" {
		t.Errorf("crashes: %s; moves: %s", crashes, moves)
	}
	for i, to := range []string{"cp-2", "cp-1"} {
		if p := r.Phases[i]; p.Kind != "crash" || p.To != to || p.HealthyMs == nil || *p.HealthyMs < 300 || p.MoveMs != nil {
			t.Errorf("%+v", p)
		}
	}
	d = newDrilled(api.port())
	d.broken = true
	r = drillOf(t, d, exitFailed, "--crash", "--yes", "--within", "500ms")
	if r.Verdict != "failed" || !strings.Contains(r.Reason, "the agent of cp-1 has not come back") || len(r.Phases) != 1 {
		t.Errorf("%+v", r)
	}
}

// TestDrillRefuses is what a drill does not begin with.
func TestDrillRefuses(t *testing.T) {
	api := newAPIServer(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deaf := closed.Addr().(*net.TCPAddr).Port
	closed.Close()
	for _, test := range []struct {
		name   string
		change func(*hameshv1.GetStatusResponse)
		args   []string
		exit   int
	}{
		{"degraded", func(s *hameshv1.GetStatusResponse) {
			proto.Merge(s, &hameshv1.GetStatusResponse{State: degraded().GetState(), Problems: degraded().GetProblems()})
		}, nil, exitFailed},
		{"unknown", func(s *hameshv1.GetStatusResponse) { s.Vips[0].Name = "ingress" }, nil, exitFailed},
		{"alone", func(s *hameshv1.GetStatusResponse) { s.Nodes[1].Eligible = false }, nil, exitFailed},
		{"no-port", func(s *hameshv1.GetStatusResponse) { s.Proxies = nil }, nil, exitFailed},
		{"deaf", func(s *hameshv1.GetStatusResponse) { s.Proxies[0].Port = uint32(deaf) }, nil, exitFailed},
		{"unconfirmed", nil, []string{"--crash"}, exitUsage},
		{"no-vip", nil, nil, exitUsage},
		{"count", nil, []string{"--count", "0"}, exitUsage},
		{"rate", nil, []string{"--rate", "201"}, exitUsage},
		{"pause", nil, []string{"--pause", "1ms"}, exitUsage},
		{"within", nil, []string{"--within", "-1s"}, exitUsage},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDrilled(api.port())
			if test.change != nil {
				test.change(d.status)
			}
			args := append([]string{"drill", "kube-api", "--endpoint", d.serve(t)}, test.args...)
			if test.name == "no-vip" {
				args = args[:1]
			}
			exit, out, errs := hactl(t.Context(), args...)
			if exit != test.exit || out != "" || len(d.moves)+len(d.crashes) > 0 {
				t.Errorf("exit %d, want %d; moves %v, crashes %v; said %q", exit, test.exit, d.moves, d.crashes, out)
			}
			golden(t, "drill-refuses-"+test.name, strings.ReplaceAll(errs, fmt.Sprint(deaf), "PORT"))
		})
	}
}

// What is asked for on a terminal and not confirmed is not done; /dev/null counts as a
// terminal on which nobody answers.
func TestDrillAsks(t *testing.T) {
	in, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var said strings.Builder
	for crash, want := range map[bool]string{true: "not confirmed; nothing was touched", false: ""} {
		d := &drill{command: &command{in: in, err: &said}, vip: "kube-api", count: 3, crash: crash}
		got := ""
		if err := d.confirm("cp-1"); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if want := "Crash the agent that owns kube-api (now cp-1), 3 times? Connections through it break. [y/N] "; said.String() != want {
		t.Errorf("asked %q, want %q", said.String(), want)
	}
}

func TestDrillInterrupted(t *testing.T) {
	api := newAPIServer(t)
	d := newDrilled(api.port())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.moved = func() { time.AfterFunc(200*time.Millisecond, cancel) }
	exit, out, errs := hactl(ctx, "drill", "kube-api", "--endpoint", d.serve(t), "--count", "5", "--pause", "500ms", "-o", "json")
	var r drillReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if exit != exitFailed || len(r.Phases) != 1 || r.Verdict != "failed" || !strings.Contains(errs, "interrupted") {
		t.Errorf("exit %d: %s\n%+v", exit, errs, r)
	}
}

// fixedDrill is the report of a drill at a fixed time.
func fixedDrill(kind string) *drillReport {
	r := &drillReport{Mesh: "prod", VIP: "kube-api", Address: "10.77.0.100:16443", Kind: kind, Speaks: "https", StartedAt: now, Rate: 100}
	for i, p := range []drillPhase{{Kind: kind, From: "cp-1", To: "cp-2"}, {Kind: kind, From: "cp-2", To: "cp-3"}, {Kind: "return", From: "cp-3", To: "cp-1"}} {
		p.Epoch, p.Streams, p.Breaks, p.SilenceMs = int64(13+i), drillStreams, map[string]int{}, 203.5
		p.from = now.Add(time.Duration(i) * 2 * time.Second)
		p.to = p.from.Add(2 * time.Second)
		took := 21.5 + float64(i)
		if p.Kind == "crash" {
			healthy := 1840.25 + took
			p.HealthyMs, p.Broken, p.Breaks = &healthy, drillStreams, map[string]int{causeReset: 7, causeTimedOut: 3}
		} else {
			p.MoveMs = &took
		}
		r.Phases = append(r.Phases, p)
	}
	var knocks []knock
	for at := time.Duration(0); at < 6*time.Second; at += 10 * time.Millisecond {
		k := knock{begun: now.Add(at), ended: now.Add(at + 3*time.Millisecond)}
		if kind == "crash" && at%(2*time.Second) < 230*time.Millisecond && at < 4*time.Second {
			k.cause, k.ended = causeRefused, k.begun.Add(time.Millisecond)
		}
		knocks = append(knocks, k)
	}
	if kind == "crash" { // and once before anything
		knocks = append(knocks, knock{begun: now.Add(-time.Second), ended: now.Add(-time.Second), cause: causeReset})
	}
	r.count(knocks)
	r.conclude(nil)
	return r
}

func TestDrillReport(t *testing.T) {
	for _, kind := range []string{"move", "crash"} {
		for _, output := range outputs {
			var out strings.Builder
			c := &command{out: &out, output: output}
			if done, err := c.plain(fixedDrill(kind)); err != nil {
				t.Fatal(err)
			} else if !done {
				out.WriteString(view{now: now, wide: output == "wide"}.drill(fixedDrill(kind)))
			}
			golden(t, "drill-"+kind+"-"+output, out.String())
		}
	}
}

func TestQuantiles(t *testing.T) {
	if q := quantilesOf(nil); q != nil {
		t.Errorf("of nothing: %+v", q)
	}
	if q := quantilesOf([]float64{7}); *q != (quantiles{7, 7, 7, 7}) {
		t.Errorf("of one: %+v", q)
	}
	var twenty []float64
	for i := range 20 {
		twenty = append(twenty, float64(20-i))
	}
	if q := quantilesOf(twenty); *q != (quantiles{1, 10, 19, 20}) {
		t.Errorf("of twenty: %+v", q)
	}
}

func TestCauses(t *testing.T) {
	for want, err := range map[string]error{
		causeRefused:     &net.OpError{Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)},
		causeReset:       &net.OpError{Err: os.NewSyscallError("read", syscall.ECONNRESET)},
		causeClosed:      fmt.Errorf("answer: %w", io.ErrUnexpectedEOF),
		causeTimedOut:    &net.OpError{Err: os.ErrDeadlineExceeded},
		causeUnreachable: &net.OpError{Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)},
		causeOther:       tls.AlertError(40),
	} {
		if got := cause(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}
