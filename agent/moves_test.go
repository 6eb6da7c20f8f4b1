package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/hearsay"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/parts"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// An order that names nothing there is leaves no trace, however long its names are.
func TestMovesOfNothing(t *testing.T) {
	m := newMoves(&Agent{cfg: &config.Config{
		VIPs: []config.VIP{{Name: "api", Address: flowVIP}}, Members: []config.Member{{Name: "cp-1"}},
	}})
	long := strings.Repeat("x", 3<<20)
	for name, test := range map[string]struct {
		request *hameshv1.MoveVipRequest
		want    error
	}{
		"VIP":        {&hameshv1.MoveVipRequest{Vip: long, RequestId: "1"}, server.ErrVIPUnknown},
		"no VIP":     {&hameshv1.MoveVipRequest{}, server.ErrVIPUnknown},
		"member":     {&hameshv1.MoveVipRequest{Vip: "api", To: long, RequestId: "2"}, server.ErrNodeUnknown},
		"request_id": {&hameshv1.MoveVipRequest{Vip: "api", To: "cp-1", RequestId: long}, server.ErrRequestID},
	} {
		t.Run(name, func(t *testing.T) {
			err := m.MoveVip(t.Context(), test.request, func(*hameshv1.MoveVipResponse) error { return nil })
			if !errors.Is(err, test.want) || len(err.Error()) > 300 || len(m.byID) > 0 {
				t.Errorf("%.300v, want %v; %d remembered", err, test.want, len(m.byID))
			}
		})
	}
}

// Only an agent passes orders on.
func TestPassedOn(t *testing.T) {
	if len(visited(metadata.NewIncomingContext(t.Context(), metadata.Pairs(passedOn, "cp-2")))) > 0 {
		t.Error("believed of a caller that is no agent")
	}
}

// The event of an order whose answer was lost is told when the order turns out to be kept,
// and that of any order once.
func TestLateEventsOfOrders(t *testing.T) {
	a := &Agent{events: openTestEvents(t, t.TempDir())}
	o := newOrders(a)
	o.untold["r1"] = &hameshv1.Event{Message: "drained"}
	o.untold["r2"] = &hameshv1.Event{Message: "refused"}
	kept := func(request string) bool { return request == "r1" }
	o.tellKept(kept)
	o.tellKept(kept)
	o.tell("r1")
	o.forget("r2")
	o.tell("r2")
	if got := messages(a.events.of["cp-1"]); len(got) != 1 || got[0] != "drained" {
		t.Errorf("told: %v", got)
	}
}

// heartbeatOf is what a member says of one VIP.
func heartbeatOf(member string, boot uint64, held bool, right hameshv1.Right, record *hameshv1.Record) *hameshv1.Heartbeat {
	return &hameshv1.Heartbeat{Member: member, Boot: boot, Vips: []*hameshv1.VipReport{{Name: "api", Held: held, Right: right, Record: record}}}
}

// TestTogether checks that what others say of a VIP is added to what a member knows itself,
// and that the newest record is believed.
func TestTogether(t *testing.T) {
	older := ownership.Record{VIP: "api", Owner: "cp-1", OwnerBoot: 1, Epoch: 5, Revision: 5}
	newer := &hameshv1.Record{Owner: "cp-2", OwnerBoot: 7, Epoch: 8, Revision: 8, Request: "r"}
	for name, c := range map[string]struct {
		own    ownership.VIPView
		others []*hameshv1.Heartbeat
		owner  string
		holds  []string
		right  ownership.Right
	}{
		"nobody else": {ownership.VIPView{Name: "api", Record: older, Holders: []string{"cp-1"}, Right: ownership.Confirmed}, nil,
			"cp-1", []string{"cp-1"}, ownership.Confirmed},
		"the owner, known through others": {ownership.VIPView{Name: "api", Record: older},
			[]*hameshv1.Heartbeat{heartbeatOf("cp-1", 1, true, hameshv1.Right_RIGHT_FAILSAFE, &hameshv1.Record{Owner: "cp-1", OwnerBoot: 1, Epoch: 5, Revision: 5})},
			"cp-1", []string{"cp-1"}, ownership.Failsafe},
		"a newer record": {ownership.VIPView{Name: "api", Record: older, Holders: []string{"cp-1"}, Right: ownership.Confirmed},
			[]*hameshv1.Heartbeat{heartbeatOf("cp-3", 3, false, hameshv1.Right_RIGHT_UNSPECIFIED, newer)},
			"cp-2", []string{"cp-1"}, ownership.NoRight},
		"a newer record, and its owner": {ownership.VIPView{Name: "api", Record: older},
			[]*hameshv1.Heartbeat{heartbeatOf("cp-2", 7, true, hameshv1.Right_RIGHT_CONFIRMED, newer)},
			"cp-2", []string{"cp-2"}, ownership.Confirmed},
		"the owner's former boot": {ownership.VIPView{Name: "api", Record: older},
			[]*hameshv1.Heartbeat{heartbeatOf("cp-2", 6, false, hameshv1.Right_RIGHT_CONFIRMED, newer)},
			"cp-2", nil, ownership.NoRight},
	} {
		got := together(c.own, c.others)
		if got.Record.Owner != c.owner || !slices.Equal(got.Holders, c.holds) || got.Right != c.right {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestToldOnce: an order that is asked for again on another way is reported once.
func TestToldOnce(t *testing.T) {
	m := newMoves(&Agent{})
	o := &order{changed: make(chan struct{})}
	for _, phase := range []hameshv1.MovePhase{1, 2, 1, 2, 3, 5, 4} {
		m.tell(o, &hameshv1.MoveVipResponse{Phase: phase})
	}
	var told []hameshv1.MovePhase
	for _, said := range o.told {
		told = append(told, said.GetPhase())
	}
	if !slices.Equal(told, []hameshv1.MovePhase{1, 2, 3, 5}) {
		t.Errorf("told %v", told)
	}
}

// TestOpinions checks what is said of an API server that some see up and some do not.
func TestOpinions(t *testing.T) {
	b := config.Backend{Name: "cp-2", Node: "cp-2", Address: netip.MustParseAddrPort("10.77.0.12:6443")}
	o := opinions{up: []string{"cp-3"}, down: []string{"cp-1", "cp-2"}, reasons: map[string]string{"cp-1": "no answer in time"}}
	if got, want := o.String(b), "API server cp-2 (10.77.0.12:6443) is up for cp-3, and down for cp-1 (no answer in time), cp-2 (no reason told)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := o.fix(b), "see the API server's log on cp-2; see the network between cp-1 and 10.77.0.12:6443, firewalls on the nodes included: cp-3 can reach it"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var l lasting
	start := time.Unix(0, 0)
	for i, c := range []struct {
		so   bool
		want time.Duration
	}{{true, 0}, {true, time.Second}, {false, 0}, {true, 0}, {true, time.Second}} {
		if got := l.look("x", c.so, start.Add(time.Duration(i)*time.Second)); got != c.want {
			t.Errorf("after %d looks it has lasted %v, want %v", i+1, got, c.want)
		}
	}
}

// TestExtra checks that what is told of others is bounded, and a part of a configuration told
// where another one is different.
func TestExtra(t *testing.T) {
	own := &parts.Parts{Texts: []string{"m", strings.Repeat("v", textBytes), "p", "t", "s", "a"}, Digests: []byte("mmmmvvvvpppptttxssssaaaa")}
	say := func(version, digests string) hearsay.Word[*hameshv1.Heartbeat] {
		return hearsay.Word[*hameshv1.Heartbeat]{Says: &hameshv1.Heartbeat{Version: version, ConfigDigests: []byte(digests)}}
	}
	got := differing(own, []hearsay.Word[*hameshv1.Heartbeat]{say(Version, "mmmmVVVVpppptttTssssaaaa"), say("other", "MMMMvvvvpppptttxssssaaaa"), say(Version, "short")})
	if len(got) != 2 || got[0].GetPart() != 1 || len(got[0].GetText()) != textBytes || got[1].GetPart() != 3 || got[1].GetText() != nil {
		t.Errorf("%v", got)
	}
	h := &hameshv1.Heartbeat{Member: "cp-2", Boot: 7, Sequence: 8, Macs: [][]byte{{1}}, Hearsay: []*hameshv1.Hearsay{{AgeMs: 1}}, Hears: []*hameshv1.Hearing{{Member: "cp-1"}}}
	if s := stripped(h); s.GetBoot() != 7 || s.GetSequence() != 8 || len(s.GetHearsay()) > 0 || len(s.GetHears()) != 1 {
		t.Errorf("%v", s)
	}
}

// TestHearsCost: at rest heartbeats grow by twenty bytes at most for each other member.
func TestHearsCost(t *testing.T) {
	c := &config.Config{Node: config.Node{Name: "cp-1"}, Timing: config.Timing{Heartbeat: 100 * time.Millisecond, SuspectAfter: 400 * time.Millisecond}}
	for _, m := range []string{"cp-1", "cp-2", "cp-3", "cp-4", "cp-5"} {
		c.Members = append(c.Members, config.Member{Name: m})
	}
	w := newWords(&Agent{cfg: c})
	for _, m := range c.Members[1:] {
		w.hear(&hameshv1.Heartbeat{Member: m.Name, Boot: 1, Sequence: 1})
	}
	h := &hameshv1.Heartbeat{}
	w.tell(h)
	if n := proto.Size(h); len(h.GetHears()) != 4 || n > 4*20 {
		t.Errorf("%d bytes for %d others: %v", n, len(h.GetHears()), h)
	}
}
