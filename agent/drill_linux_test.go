package agent_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hamesh/hamesh/deploy/lab"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func endpoint(n *lab.Node) string {
	return "unix://" + filepath.Join(filepath.Dir(n.LogFile()), "hameshd.sock")
}

// drilled is what the tests want to know of hactl drill's report.
type drilled struct {
	Speaks  string
	Verdict string
	Phases  []struct {
		Kind, From, To      string
		MoveMs, HealthyMs   *float64
		GapMs, SilenceMs    float64
		Connections, Failed int
		Failures, Breaks    map[string]int
		Streams, Broken     int
		Ordinary            drilledOrdinary
	}
	Summary struct{ Ordinary drilledOrdinary }
}

// drilledOrdinary is what ordinary clients saw.
type drilledOrdinary struct {
	OneShot, Kept struct {
		Requests, Failed   int
		Failures           map[string]int
		LongestMs          float64
		Waited, Unfinished int
	}
}

// drill runs hactl drill on the client, with every node's agent as an endpoint.
func drill(t *testing.T, m *lab.Mesh, args ...string) (r drilled, exit int, stderr string) {
	t.Helper()
	var endpoints []string
	for _, n := range m.Nodes {
		endpoints = append(endpoints, endpoint(n))
	}
	rate := "100"
	if raceDetector {
		rate = "20" // each TLS handshake is ten times as dear
	}
	cmd := lab.Command("hactl", append([]string{"drill", "kube-api", "-o", "json", "--rate", rate}, args...)...)
	cmd.Env = append(cmd.Env, "HACTL_ENDPOINT="+strings.Join(endpoints, ","))
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := m.Client.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	_ = cmd.Wait() // the exit status says it
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatalf("%v:\n%s", err, &out)
		}
	}
	for _, p := range r.Phases {
		t.Logf("%s from %s to %s: gap %v ms, failed %d of %d %v, broken %d of %d %v, silence %v ms", p.Kind, p.From, p.To, p.GapMs, p.Failed, p.Connections, p.Failures, p.Broken, p.Streams, p.Breaks, p.SilenceMs)
		t.Logf("ordinary clients: %+v", p.Ordinary)
	}
	return r, cmd.ProcessState.ExitCode(), complaint.String()
}

// TestDrill checks that a drill of planned moves measures no failure, and comes back.
func TestDrill(t *testing.T) {
	m := newMesh(t, lab.Options{})
	home := owner(t, m)
	healthy(t, m)
	from := time.Now()
	r, exit, stderr := drill(t, m, "--count", "2")
	if r.Speaks != "https" || len(r.Phases) != 3 {
		t.Fatalf("exit %d: %s\n%+v", exit, stderr, r)
	}
	wrong := 0
	for _, p := range r.Phases {
		o := p.Ordinary
		wrong += p.Failed + p.Broken + o.OneShot.Failed + o.OneShot.Waited + o.Kept.Failed + o.Kept.Waited
		if o.OneShot.Requests < 5 || o.Kept.Requests < 5 {
			t.Errorf("ordinary clients: %+v", o)
		}
		if p.Connections < 10 || p.Streams != 10 || p.MoveMs == nil || *p.MoveMs <= 0 || p.GapMs > 1000 {
			t.Errorf("%+v", p)
		}
	}
	if wrong > brokenAtMost() || (exit == 0) != (wrong == 0) || (r.Verdict == "passed") != (wrong == 0) {
		t.Errorf("exit %d, %s, with %d failed or broken: %s", exit, r.Verdict, wrong, stderr)
	}
	if o := r.Summary.Ordinary; o.OneShot.Unfinished+o.Kept.Unfinished > 0 {
		t.Errorf("still unfinished: %+v", o)
	}
	if now := owner(t, m); now != home {
		t.Errorf("the VIP is on %s, and was on %s", now.Name, home.Name)
	}
	never(t, m, from, 10*planned) // how fast a move is, other tests say
	if _, exit, stderr := drill(t, m, "--port", "1"); exit != 1 || !strings.Contains(stderr, "nothing was touched") {
		t.Errorf("of a port that nobody listens on: exit %d: %s", exit, stderr)
	}
}

// boots are those of all agents, as the last one knows them.
func boots(t *testing.T, m *lab.Mesh) (all []uint64) {
	s, err := m.Nodes[2].Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.GetNodes() {
		all = append(all, n.GetBoot())
	}
	return all
}

// TestDrillCrash crashes two owners, with a service manager that starts agents anew.
func TestDrillCrash(t *testing.T) {
	m := newMesh(t, lab.Options{})
	home := owner(t, m)
	healthy(t, m)
	var manager sync.WaitGroup
	quit := make(chan struct{})
	defer manager.Wait()
	defer close(quit)
	manager.Go(func() {
		for {
			select {
			case <-quit:
				return
			case <-time.After(100 * time.Millisecond):
			}
			for _, n := range m.Nodes {
				if err := n.StartAgent(); err != nil { // one that runs stays
					t.Error(err)
				}
			}
		}
	})
	from := time.Now()
	r, exit, stderr := drill(t, m, "--crash", "--yes", "--count", "2")
	if (exit != 0 && !raceDetector) || len(r.Phases) < 2 {
		t.Fatalf("exit %d: %s\n%+v", exit, stderr, r)
	}
	for _, p := range r.Phases[:2] {
		if p.Kind != "crash" || p.From == p.To || p.HealthyMs == nil || p.GapMs <= 0 || p.GapMs > 2000 {
			t.Errorf("%+v", p)
		}
	}
	if o := r.Summary.Ordinary; o.OneShot.Waited+o.Kept.Waited > 0 && !raceDetector {
		t.Errorf("ordinary clients waited more than 2 s: %+v", o)
	}
	if now := owner(t, m); now != home {
		t.Errorf("the VIP is on %s, and was on %s", now.Name, home.Name)
	}
	never(t, m, from, leaseTTL)

	// Asked for again, by any member, it is not done again.
	conn, err := grpc.NewClient(endpoint(m.Nodes[2]), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	control := hameshv1.NewControlServiceClient(conn)
	order := &hameshv1.CrashAgentRequest{RequestId: uuid.NewString(), Node: "cp-1", Confirm: true}
	boot := func() uint64 { return boots(t, m)[0] }
	was := boot()
	if answer, err := control.CrashAgent(t.Context(), order); err != nil || !answer.GetChanged() {
		t.Fatalf("%v, %v", answer, err)
	}
	if err := lab.Await(20*time.Second, func() error {
		if boot() == was {
			return errors.New("the agent of cp-1 has not been started anew")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	healthy(t, m)
	was = boot()
	if answer, err := control.CrashAgent(t.Context(), order); err != nil || answer.GetChanged() {
		t.Errorf("a repeated order: %v, %v", answer, err)
	}
	time.Sleep(time.Second) // a crash and a start take half as long
	if again := boot(); again != was {
		t.Errorf("the agent was started anew by a repeated order: boot %d, then %d", was, again)
	}

	// Two at once would take the majority.
	var pair sync.WaitGroup
	var crashed atomic.Int32
	before, asked := boots(t, m), time.Now()
	for _, node := range []string{"cp-1", "cp-2"} {
		pair.Go(func() {
			answer, err := control.CrashAgent(t.Context(), &hameshv1.CrashAgentRequest{Node: node, Confirm: true})
			switch {
			case answer.GetChanged():
				crashed.Add(1)
			case status.Code(err) != codes.FailedPrecondition:
				t.Errorf("crashing %s: %v", node, err)
			}
		})
	}
	pair.Wait()
	// Where the second one was so late that the first agent was back, it may.
	if n := crashed.Load(); n == 0 || (n > 1 && time.Since(asked) < 100*time.Millisecond) {
		t.Errorf("%d of two agents crash after %v", n, time.Since(asked))
	}
	if err := lab.Await(20*time.Second, func() error {
		if now := boots(t, m); slices.Equal(now, before) {
			return fmt.Errorf("no agent has been started anew: %v", now)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	healthy(t, m)

	for name, test := range map[string]struct {
		order *hameshv1.CrashAgentRequest
		want  codes.Code
	}{
		"unconfirmed": {&hameshv1.CrashAgentRequest{Node: "cp-1"}, codes.InvalidArgument},
		"unknown":     {&hameshv1.CrashAgentRequest{Node: "cp-9", Confirm: true}, codes.NotFound},
		"too long":    {&hameshv1.CrashAgentRequest{Node: "cp-1", Confirm: true, RequestId: strings.Repeat("x", 129)}, codes.InvalidArgument},
	} {
		if _, err := control.CrashAgent(t.Context(), test.order); status.Code(err) != test.want {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if err := m.Nodes[1].API.Sick(); err != nil {
		t.Fatal(err)
	}
	everywhere(t, m, func(s *hameshv1.GetStatusResponse) error {
		if s.GetState() != hameshv1.State_STATE_DEGRADED {
			return errors.New("a sick API server has not been noticed")
		}
		return nil
	})
	if _, err := control.CrashAgent(t.Context(), &hameshv1.CrashAgentRequest{Node: "cp-1", Confirm: true}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("of a mesh that is not healthy: %v", err)
	}
	if _, exit, stderr := drill(t, m); exit != 1 || !strings.Contains(stderr, "not healthy") {
		t.Errorf("a drill of a mesh that is not healthy: exit %d: %s", exit, stderr)
	}
}
