package agent

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/hamesh/hamesh/agent/config"
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
