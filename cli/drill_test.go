package cli

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
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
	// hang: answer nobody; those who asked meanwhile are left without an answer for ever.
	hang atomic.Bool
	asks map[string]int // by the protocol and the client's address
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{conns: map[net.Conn]bool{}, asks: map[string]int{}}
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.asks[r.Proto+" "+r.RemoteAddr]++
		a.mu.Unlock()
		if a.hang.Load() {
			<-r.Context().Done()
		}
		fmt.Fprint(w, "ok")
	}))
	a.EnableHTTP2 = true
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

// asked is how often who has asked.
func (a *apiServer) asked() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.asks)
}

// open is how many connections are open.
func (a *apiServer) open() (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, open := range a.conns {
		if open {
			n++
		}
	}
	return n
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
		if o := p.Ordinary; o.OneShot.Requests == 0 || o.Kept.Requests == 0 || o.failed() > 0 || o.waited() > 0 || o.OneShot.LongestMs <= 0 || o.Kept.LongestMs <= 0 {
			t.Errorf("ordinary clients: %+v", o)
		}
	}
	if s := r.Summary.Ordinary; s.OneShot.Requests <= r.Phases[0].Ordinary.OneShot.Requests || s.Kept.Requests <= r.Phases[0].Ordinary.Kept.Requests || s.FailedOutside+s.Late > 0 {
		t.Errorf("ordinary clients: %+v", s)
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
	if o := r.Summary.Ordinary; o.OneShot.Requests == 0 || o.failed()+o.waited() > 0 || o.Kept.Requests > 0 {
		t.Errorf("ordinary clients: %+v", o)
	}
}

// ordinaryOf runs ordinary clients for a second, then does what is next, and returns what they
// saw, and how long they went on.
func ordinaryOf(t *testing.T, o *ordinary, next func()) (seen ordinaryReport, after time.Duration) {
	t.Helper()
	o.https = true
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		o.run(ctx)
	}()
	time.Sleep(time.Second)
	stop()
	stopped := time.Now()
	next()
	<-ended
	seen = newOrdinaryReport()
	for _, q := range o.done {
		seen.add(q)
	}
	return seen, time.Since(stopped)
}

// A one-shot has a connection of its own, which ends with it; the kept ones have five.
func TestOrdinaryClients(t *testing.T) {
	api := newAPIServer(t)
	seen, _ := ordinaryOf(t, &ordinary{address: api.Listener.Addr().String(), grace: time.Minute, atOnce: ordinaryAtOnce}, func() {})
	once, more := 0, 0
	for who, n := range api.asked() {
		switch {
		case !strings.HasPrefix(who, "HTTP/2.0 "):
			t.Errorf("%s is not HTTP/2", who)
		case n == 1:
			once++
		default:
			more++
		}
	}
	if seen.failed()+seen.waited() > 0 || once == 0 || once != seen.OneShot.Requests || more != ordinaryKept || seen.Kept.Requests < 2*ordinaryKept {
		t.Errorf("%d connections with one request, %d with more: %+v", once, more, seen)
	}
	// The server hears of the last ones a little later.
	for limit := time.Now().Add(5 * time.Second); api.open() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("%d connections are still open", api.open())
		}
	}
}

// What is never answered ends with the grace, and is no failure; what ends within it is
// waited for.
func TestOrdinaryClientsEnd(t *testing.T) {
	const grace = 500 * time.Millisecond
	api := newAPIServer(t)
	api.hang.Store(true)
	seen, after := ordinaryOf(t, &ordinary{address: api.Listener.Addr().String(), grace: grace, atOnce: ordinaryAtOnce}, func() {})
	if after < grace || after > grace+2*time.Second {
		t.Errorf("ended after %v", after)
	}
	if o := seen.OneShot; o.Unfinished == 0 || o.Unfinished != o.Requests || o.Failed > 0 || o.LongestMs < ms(grace) {
		t.Errorf("one-shot: %+v", o)
	}
	if k := seen.Kept; k.Unfinished != ordinaryKept || k.Requests != ordinaryKept || k.Failed > 0 || k.LongestMs < ms(grace) {
		t.Errorf("kept: %+v", k)
	}
	api = newAPIServer(t)
	api.hang.Store(true)
	seen, after = ordinaryOf(t, &ordinary{address: api.Listener.Addr().String(), grace: time.Minute, atOnce: ordinaryAtOnce}, func() {
		time.Sleep(500 * time.Millisecond) // the last one-shot has connected
		api.breakAll()
	})
	if after > 30*time.Second || seen.OneShot.Unfinished+seen.Kept.Unfinished > 0 || seen.Kept.Failures[causeReset] != ordinaryKept {
		t.Errorf("ended after %v: %+v", after, seen)
	}
}

// A server that does not answer is not asked by more and more clients.
func TestOrdinaryClientsAreBounded(t *testing.T) {
	api := newAPIServer(t)
	api.hang.Store(true)
	o := &ordinary{address: api.Listener.Addr().String(), grace: time.Millisecond, atOnce: 2}
	if seen, _ := ordinaryOf(t, o, func() {}); seen.OneShot.Requests != 2 || o.late == 0 {
		t.Errorf("%d left out: %+v", o.late, seen.OneShot)
	}
}

// Whoever is refused tries nothing again, and the next one comes in its time.
func TestOrdinaryClientsRefused(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	seen, _ := ordinaryOf(t, &ordinary{address: closed.Addr().String(), grace: time.Minute, atOnce: ordinaryAtOnce}, func() {})
	for _, test := range []struct {
		name string
		of   ordinaryWaits
		most int
	}{{"one-shot", seen.OneShot, 2 * ordinaryRate}, {"kept", seen.Kept, 2 * ordinaryKept * int(time.Second/ordinaryAgain)}} {
		if w := test.of; w.Requests == 0 || w.Requests > test.most || w.Failures[causeRefused] != w.Requests || w.Unfinished > 0 {
			t.Errorf("%s: %+v", test.name, w)
		}
	}
}

// HTTP/2 has two errors that net/http only puts into words.
func TestCausesOfHTTP2(t *testing.T) {
	unanswered := func(transport *http.Transport, end func(*apiServer)) error {
		api := newAPIServer(t)
		api.hang.Store(true)
		o := &ordinary{address: api.Listener.Addr().String(), https: true}
		got := make(chan error, 1)
		go func() { got <- o.get(t.Context(), transport) }()
		for len(got) == 0 && len(api.asked()) == 0 {
			time.Sleep(time.Millisecond)
		}
		end(api)
		return <-got
	}
	err := unanswered(ordinaryTransport(), func(a *apiServer) {
		go func() { _ = a.Config.Shutdown(t.Context()) }() // says at once that it goes away
		time.Sleep(500 * time.Millisecond)
		a.breakAll()
	})
	if err == nil || cause(err) != causeClosed {
		t.Errorf("who went away: %v", err)
	}

	var deaf atomic.Bool
	silent := ordinaryTransport()
	silent.HTTP2.SendPingTimeout, silent.HTTP2.PingTimeout = 300*time.Millisecond, 300*time.Millisecond
	silent.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := ordinaryDialer.DialContext(ctx, network, address)
		return &deafConn{conn, &deaf}, err
	}
	if err := unanswered(silent, func(*apiServer) { deaf.Store(true) }); err == nil || cause(err) != causeTimedOut {
		t.Errorf("who answered no ping: %v", err)
	}
}

// deafConn loses all that comes once it is deaf.
type deafConn struct {
	net.Conn
	deaf *atomic.Bool
}

func (c *deafConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if err != nil || !c.deaf.Load() {
			return n, err
		}
	}
}

// A request is of the first phase that it met, and what waits too long in a planned move
// fails the drill as what breaks does.
func TestDrillJudgesOrdinaryClients(t *testing.T) {
	at := func(ms int) time.Time { return now.Add(time.Duration(ms) * time.Millisecond) }
	quick := request{begun: at(100), ended: at(105)}
	waited := request{begun: at(-10), ended: at(3500), kept: true} // until long after the second phase has begun
	unfinished := request{begun: at(100), ended: at(9000), unfinished: true}
	failed := request{begun: at(200), ended: at(210), cause: causeReset}
	outside := request{begun: at(-500), ended: at(-490), cause: causeReset}
	for name, test := range map[string]struct {
		kind, on string
		requests []request
		verdict  string
		reason   string
		first    int // requests of the first phase
	}{
		"well":                   {"move", "", []request{quick, quick}, "passed", "no connection failed, no stream broke", 2},
		"waited":                 {"move", "", []request{quick, waited}, "failed", "planned moves made 1 ordinary requests wait more than 2s", 2},
		"unfinished":             {"move", "", []request{unfinished}, "failed", "planned moves made 1 ordinary requests wait more than 2s", 1},
		"failed":                 {"move", "", []request{failed}, "failed", "planned moves failed or broke 1 connections", 1},
		"failed and waited":      {"move", "", []request{failed, waited}, "failed", "planned moves failed or broke 1 connections, and made 1 ordinary requests wait more than 2s", 2},
		"failed outside":         {"move", "", []request{outside}, "passed", "no connection failed, no stream broke", 0},
		"waited in a crash":      {"crash", "", []request{failed, waited, unfinished}, "passed", "every agent came back, and the mesh is healthy", 3},
		"measured on candidates": {"move", "cp-1", []request{failed, waited}, "passed", "measured on cp-1, a candidate, whose own connections do not outlive moves: run it on another machine", 2},
	} {
		r := &drillReport{Kind: test.kind, MeasuredOn: test.on, Phases: []drillPhase{
			{Kind: test.kind, from: at(0), to: at(2000)}, {Kind: "return", from: at(3000), to: at(5000)}}}
		r.countOrdinary(test.requests, 0)
		r.conclude(nil)
		if r.Verdict != test.verdict || r.Reason != test.reason {
			t.Errorf("%s: %s, %s", name, r.Verdict, r.Reason)
		}
		first, second, all := r.Phases[0].Ordinary, r.Phases[1].Ordinary, r.Summary.Ordinary
		if n := first.OneShot.Requests + first.Kept.Requests; n != test.first || second.OneShot.Requests+second.Kept.Requests > 0 {
			t.Errorf("%s: %+v, then %+v", name, first, second)
		}
		if n := all.OneShot.Requests + all.Kept.Requests; n != len(test.requests) || all.FailedOutside != n-test.first {
			t.Errorf("%s: %+v", name, all)
		}
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
	var requests []request
	for at := -2 * time.Second; at < 6*time.Second; at += 20 * time.Millisecond {
		if at%(40*time.Millisecond) == 0 {
			requests = append(requests, request{begun: now.Add(at), ended: now.Add(at + 2*time.Millisecond), kept: true})
		}
		if at%(100*time.Millisecond) == 0 {
			requests = append(requests, request{begun: now.Add(at), ended: now.Add(at + 5*time.Millisecond)})
		}
	}
	if kind == "crash" {
		requests = append(requests,
			request{begun: now.Add(-time.Second), ended: now.Add(-time.Second), cause: causeReset},
			request{begun: now.Add(10 * time.Millisecond), ended: now.Add(3 * time.Second)},
			request{begun: now.Add(20 * time.Millisecond), ended: now.Add(240 * time.Millisecond), kept: true, cause: causeReset},
			request{begun: now.Add(2100 * time.Millisecond), ended: now.Add(9 * time.Second), kept: true, unfinished: true})
	}
	r.countOrdinary(requests, 0)
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
