package agent

import (
	"net/netip"
	"testing"

	"github.com/hamesh/hamesh/agent/config"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func TestForwardTarget(t *testing.T) {
	address := netip.MustParseAddr
	a := &Agent{board: newBoard(), cfg: &config.Config{
		Members: []config.Member{{Name: "cp-1", Address: address("10.77.0.11")}, {Name: "cp-2", Address: address("10.77.0.12")}},
		VIPs:    []config.VIP{{Name: "v4", Address: address("10.77.0.100")}, {Name: "v6", Address: address("fd77::100")}},
	}}
	for _, c := range []struct {
		name, vip, member string
		told              netip.Addr
		want              netip.Addr
	}{
		{"of the members' version", "v4", "cp-2", netip.Addr{}, address("10.77.0.12")},
		{"of the members' version, whatever is told", "v4", "cp-2", address("10.77.0.99"), address("10.77.0.12")},
		{"of the other version", "v6", "cp-2", address("fd77::12"), address("fd77::12")},
		{"nothing told", "v6", "cp-2", netip.Addr{}, netip.Addr{}},
		{"nonsense told", "v6", "cp-2", address("10.77.0.12"), netip.Addr{}},
		{"nobody", "v4", "", netip.Addr{}, netip.Addr{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a.board.peers["cp-2"] = &hameshv1.Heartbeat{Vips: []*hameshv1.VipReport{{Name: c.vip, ForwardAddress: c.told.AsSlice()}}}
			if got := a.forwardTarget(c.vip, c.member); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}
