package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/vip"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

func openTestEvents(t *testing.T, dir string) *events {
	t.Helper()
	e, err := newEvents(dir, "cp-1", []string{"cp-1", "cp-2", "cp-3"}, func(member string) bool { return member == "cp-3" }, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func messages(all []*hameshv1.Event) (m []string) {
	for _, e := range all {
		m = append(m, e.GetMessage())
	}
	return m
}

// TestEventsAreKept checks that a member's own events outlast it, in a file that is
// bounded, and that ids grow whatever happens.
func TestEventsAreKept(t *testing.T) {
	dir := t.TempDir()
	live := func(e *events, n int) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- e.run(ctx) }()
		for i := range n {
			e.record(&hameshv1.Event{Message: fmt.Sprint(i)})
			for len(e.unwritten) > eventsWaiting/2 { // a disk slower than this loop
				time.Sleep(time.Millisecond)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	e := openTestEvents(t, dir)
	live(e, 3)
	e = openTestEvents(t, dir)
	if got := messages(e.of["cp-1"]); !slices.Equal(got, []string{"0", "1", "2"}) {
		t.Fatalf("after a restart: %v", got)
	}
	live(e, 2*eventsKept)
	if n := len(e.of["cp-1"]); n != eventsKept {
		t.Errorf("%d events are remembered", n)
	}
	b, err := os.ReadFile(e.file)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n > eventsKept || n < eventsKept/2 {
		t.Errorf("%d events are in the file", n)
	}
	// The power is cut in the middle of a line.
	if err := os.WriteFile(e.file, append(b, `{"id":"18`...), 0o600); err != nil {
		t.Fatal(err)
	}
	before := e.of["cp-1"]
	e = openTestEvents(t, dir)
	after := e.of["cp-1"]
	if n := len(after); n < eventsKept/2 || !proto.Equal(after[n-1], before[len(before)-1]) {
		t.Errorf("after a restart: %d events, the last is %v", n, after[n-1])
	}
	e.last = e.last.Add(time.Hour) // the wall clock goes back
	e.record(&hameshv1.Event{})
	e.record(&hameshv1.Event{})
	all, unanswered := e.Events(server.EventSelection{})
	if !slices.IsSortedFunc(all, func(a, b *hameshv1.Event) int {
		if a.GetId() >= b.GetId() {
			return 1
		}
		return -1
	}) {
		t.Error("ids do not grow")
	}
	if !slices.Equal(unanswered, []string{"cp-2", "cp-3"}) {
		t.Errorf("unanswered: %v", unanswered)
	}
	e.setFollowed("cp-2", true)
	e.setFollowed("cp-3", true) // but it is silent
	if _, unanswered = e.Events(server.EventSelection{}); !slices.Equal(unanswered, []string{"cp-3"}) {
		t.Errorf("unanswered: %v", unanswered)
	}
	if _, unanswered = e.Events(server.EventSelection{OwnOnly: true}); unanswered != nil {
		t.Errorf("of its own: unanswered %v", unanswered)
	}
}

// TestEventsAreShort checks that no text of an event is longer than members can keep and
// tell, and that a line which is, of another version, costs no other event.
func TestEventsAreShort(t *testing.T) {
	dir := t.TempDir()
	e := openTestEvents(t, dir)
	long := &hameshv1.Event{Vip: strings.Repeat("v", eventText), Message: strings.Repeat("ü", 1<<20), Reason: "x" + strings.Repeat("ü", 1<<20), Peer: "cp-2", By: "\xff"}
	e.record(long)
	e.record(&hameshv1.Event{Message: "the next"})
	first := e.of["cp-1"][0]
	for name, got := range map[string]int{"vip": len(first.GetVip()), "message": len(first.GetMessage()), "reason": len(first.GetReason()) + 1} {
		if got != eventText {
			t.Errorf("%s has %d bytes, want %d", name, got, eventText)
		}
	}
	if _, err := proto.Marshal(first); err != nil || first.GetPeer() != "cp-2" || first.GetBy() != "" {
		t.Errorf("%v, %v", first, err)
	}
	var file []byte
	for i, event := range e.of["cp-1"] {
		if i == 0 {
			event = proto.CloneOf(event)
			event.Message = strings.Repeat("m", 1<<20)
		}
		line, err := protojson.Marshal(event)
		if err != nil {
			t.Fatal(err)
		}
		file = append(append(file, line...), '\n')
	}
	if err := os.WriteFile(e.file, file, 0o600); err != nil {
		t.Fatal(err)
	}
	e = openTestEvents(t, dir)
	if got := messages(e.of["cp-1"]); !slices.Equal(got, []string{strings.Repeat("m", eventText), "the next"}) {
		t.Errorf("after a restart: %.100q", got)
	}
}

// More events at once than may wait are written all the same.
func TestEventsOfASlowDisk(t *testing.T) {
	dir := t.TempDir()
	e := openTestEvents(t, dir)
	for i := range eventsWaiting + 50 {
		e.record(&hameshv1.Event{Message: fmt.Sprint(i)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.run(ctx); err != nil {
		t.Fatal(err)
	}
	if got, want := messages(openTestEvents(t, dir).of["cp-1"]), messages(e.of["cp-1"]); !slices.Equal(got, want) {
		t.Errorf("after a restart: %d of %d events", len(got), len(want))
	}
}

// recorder is a teller that keeps what it tells.
func recordingTeller() (*teller, func() []string) {
	var all []string
	t := newTeller("cp-1", func(e *hameshv1.Event) {
		text := strings.TrimPrefix(e.GetKind().String(), "EVENT_KIND_")
		for _, part := range []string{e.GetPeer(), e.GetReason()} {
			if part != "" {
				text += ", " + part
			}
		}
		all = append(all, text)
	})
	return t, func() []string {
		told := all
		all = nil
		return told
	}
}

func TestTellsOwnership(t *testing.T) {
	teller, told := recordingTeller()
	b := newBoard()
	change := func(owner string, epoch int64, right ownership.Right, text string) {
		c := ownership.Change{VIP: "api", Owner: owner, Epoch: epoch, Right: right, Text: text}
		was, known := b.noteChange(c, time.Now())
		teller.owned(was, known, c)
	}
	const none, confirmed, reasserted, failsafe = ownership.NoRight, ownership.Confirmed, ownership.Reasserted, ownership.Failsafe
	for _, step := range []struct {
		name  string
		owner string
		epoch int64
		right ownership.Right
		text  string
		want  []string
	}{
		{"who owned it all along", "cp-2", 5, none, "took over from nobody", nil},
		{"taken", "cp-1", 7, reasserted, "took over from cp-2", []string{"VIP_GAINED, cp-2, took over from cp-2"}},
		{"for the first moment", "cp-1", 7, reasserted, "right reasserted", nil},
		{"as everybody expects", "cp-1", 7, confirmed, "right confirmed", nil},
		{"no store", "cp-1", 7, failsafe, "right failsafe", []string{"RIGHT_CHANGED, " + rightReasons[failsafe]}},
		{"the store is back", "cp-1", 7, confirmed, "right confirmed", []string{"RIGHT_CHANGED, " + rightReasons[confirmed]}},
		{"cut off", "cp-1", 7, none, "right none", []string{"RIGHT_CHANGED, " + rightReasons[none]}},
		{"and back", "cp-1", 7, confirmed, "right confirmed", []string{"RIGHT_CHANGED, " + rightReasons[confirmed]}},
		{"a stranger", "cp-1", 7, confirmed, "refused: 02:00:00:00:00:01 has the address already", []string{"ADDRESS_CONFLICT"}},
		{"moved", "cp-3", 9, none, "moved by an operator", []string{"VIP_LOST, cp-3, moved by an operator"}},
		{"which ends the right", "cp-3", 9, none, "right none", nil},
		{"others among themselves", "cp-2", 11, none, "cp-3 shuts down", nil},
		{"given back", "cp-1", 13, none, "cp-1 is preferred", []string{"VIP_GAINED, cp-2, cp-1 is preferred"}},
		{"restarted", "cp-1", 15, confirmed, "owner restarted", []string{"VIP_GAINED, owner restarted"}},
		{"released", "", 15, none, "cp-1 shut down", []string{"VIP_LOST, cp-1 shut down"}},
	} {
		change(step.owner, step.epoch, step.right, step.text)
		if diff := cmp.Diff(step.want, told()); diff != "" {
			t.Errorf("%s: %s", step.name, diff)
		}
	}
}

// The right by the store with which every take-over begins is told where it stays.
func TestTellsARightThatStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		teller, told := recordingTeller()
		gain := func(epoch int64) {
			teller.owned(tenure{owner: "cp-2"}, true, ownership.Change{VIP: "api", Owner: "cp-1", Epoch: epoch, Text: "taken"})
			teller.owned(tenure{owner: "cp-1", epoch: epoch}, true, ownership.Change{VIP: "api", Owner: "cp-1", Epoch: epoch, Right: ownership.Reasserted, Text: "right reasserted"})
			told()
			time.Sleep(beginning / 2)
			teller.stayed()
		}
		gain(5)
		teller.owned(tenure{owner: "cp-1", epoch: 5}, true, ownership.Change{VIP: "api", Owner: "cp-1", Epoch: 5, Right: ownership.Confirmed, Text: "right confirmed"})
		time.Sleep(beginning)
		teller.stayed()
		if got := told(); len(got) > 0 {
			t.Errorf("of one that was confirmed: %v", got)
		}
		gain(7)
		teller.owned(tenure{owner: "cp-1", epoch: 7}, true, ownership.Change{VIP: "api", Owner: "cp-3", Epoch: 8, Text: "moved"})
		told()
		time.Sleep(beginning)
		teller.stayed()
		if got := told(); len(got) > 0 {
			t.Errorf("of one that was lost: %v", got)
		}
		gain(9)
		if got := told(); len(got) > 0 {
			t.Errorf("at once: %v", got)
		}
		time.Sleep(beginning / 2)
		teller.stayed()
		teller.stayed()
		if diff := cmp.Diff([]string{"RIGHT_CHANGED, " + rightReasons[ownership.Reasserted]}, told()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestTellsWordsAndAddresses(t *testing.T) {
	teller, told := recordingTeller()
	for _, boot := range []uint64{5, 5, 4, 6} {
		teller.withdrawn("cp-2", boot)
	}
	for _, kind := range []vip.Kind{vip.Appeared, vip.Disappeared, vip.Disappeared, vip.Appeared, vip.Appeared} {
		teller.address(vip.Change{Kind: kind, VIP: "api", Addr: keeperVIP.Addr, Interface: "eth0"})
	}
	o := &order{request: &hameshv1.MoveVipRequest{Vip: "api", To: "cp-2"}, by: "alice"}
	teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED, o, "")
	teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_FAILED, o, "why")
	want := []string{
		"MEMBER_WITHDRAWN, cp-2, its guard's word", "MEMBER_WITHDRAWN, cp-2, its guard's word",
		"ADDRESS_REMOVED, not by this agent", "ADDRESS_RESTORED",
		"MOVE_REQUESTED, cp-2", "MOVE_FAILED, cp-2, why",
	}
	if diff := cmp.Diff(want, told()); diff != "" {
		t.Error(diff)
	}
}

func TestTellsDifferences(t *testing.T) {
	const (
		up, down, draining, disabled = hameshv1.BackendState_BACKEND_STATE_UP, hameshv1.BackendState_BACKEND_STATE_DOWN,
			hameshv1.BackendState_BACKEND_STATE_DRAINING, hameshv1.BackendState_BACKEND_STATE_DISABLED
		ready, suspect, gone, drained = hameshv1.NodeState_NODE_STATE_READY, hameshv1.NodeState_NODE_STATE_SUSPECT,
			hameshv1.NodeState_NODE_STATE_DOWN, hameshv1.NodeState_NODE_STATE_DRAINED
	)
	status := func(node hameshv1.NodeState, backend hameshv1.BackendState, store bool) *hameshv1.GetStatusResponse {
		return &hameshv1.GetStatusResponse{
			ReportedBy: "cp-1", Store: &hameshv1.Store{Available: store},
			Nodes:    []*hameshv1.Node{{Name: "cp-1", State: ready}, {Name: "cp-2", State: node, Reason: "why"}},
			Backends: []*hameshv1.Backend{{Name: "cp-2", Proxy: "api", State: backend, Reason: "why"}},
		}
	}
	kinds := func(all []*hameshv1.Event) (words []string) {
		for _, e := range all {
			words = append(words, strings.TrimPrefix(e.GetKind().String(), "EVENT_KIND_"))
		}
		return words
	}
	was := status(gone, down, false)
	if got := kinds(differences(well(was), was)); !slices.Equal(got, []string{"MEMBER_DOWN", "BACKEND_DOWN", "STORE_AWAY"}) {
		t.Errorf("what is not well at the start: %v", got)
	}
	for _, step := range []struct {
		now  *hameshv1.GetStatusResponse
		want []string
	}{
		{status(suspect, down, true), []string{"MEMBER_SUSPECT", "STORE_BACK"}},
		{status(ready, up, true), []string{"MEMBER_BACK", "BACKEND_UP"}},
		{status(drained, draining, true), nil},
		{status(gone, disabled, true), []string{"MEMBER_DOWN"}},
		{status(drained, up, false), []string{"MEMBER_BACK", "STORE_AWAY"}},
		{status(ready, down, false), []string{"BACKEND_DOWN"}},
		{status(ready, disabled, false), nil},
		{status(ready, draining, false), []string{"BACKEND_UP"}},
		{status(ready, disabled, false), nil},
		{status(ready, down, false), []string{"BACKEND_DOWN"}},
		{status(ready, up, false), []string{"BACKEND_UP"}},
	} {
		if got := kinds(differences(was, step.now)); !slices.Equal(got, step.want) {
			t.Errorf("to %v: %v, want %v", step.now, got, step.want)
		}
		was = step.now
	}
}

func TestTellsProblems(t *testing.T) {
	p, start := problems{}, time.Now()
	problem := func(code, message string) *hameshv1.Problem { return &hameshv1.Problem{Code: code, Message: message} }
	look := func(after time.Duration, now ...*hameshv1.Problem) (words []string) {
		for _, e := range p.look("cp-1", now, start.Add(after)) {
			words = append(words, strings.TrimPrefix(e.GetKind().String(), "EVENT_KIND_")+" "+e.GetReason())
		}
		return words
	}
	lasting, brief := problem("VIP_NO_HOLDER", "no node has api"), problem("VIP_CONFLICT", "somebody has it")
	elsewhere := []*hameshv1.Problem{problem("BACKEND_DOWN", "x"), problem("NODE_NOT_ELIGIBLE", "cp-2 may not"), lasting}
	for _, step := range []struct {
		after time.Duration
		now   []*hameshv1.Problem
		want  []string
	}{
		{0, append(elsewhere, brief), nil},
		{problemFor / 2, elsewhere, nil},
		{problemFor, append(elsewhere, brief), []string{"PROBLEM_BEGAN VIP_NO_HOLDER"}},
		{2 * problemFor, append(elsewhere, brief), []string{"ADDRESS_CONFLICT VIP_CONFLICT"}},
		{3 * problemFor, append(elsewhere, brief), nil},
		{4 * problemFor, []*hameshv1.Problem{brief}, []string{"PROBLEM_ENDED VIP_NO_HOLDER"}},
		{5 * problemFor, []*hameshv1.Problem{problem("NODE_NOT_ELIGIBLE", "cp-1 may not")}, []string{"PROBLEM_ENDED VIP_CONFLICT"}},
		{6 * problemFor, []*hameshv1.Problem{problem("NODE_NOT_ELIGIBLE", "cp-1 may not")}, []string{"PROBLEM_BEGAN NODE_NOT_ELIGIBLE"}},
	} {
		if got := look(step.after, step.now...); !slices.Equal(got, step.want) {
			t.Errorf("after %v: %v, want %v", step.after, got, step.want)
		}
	}
}
