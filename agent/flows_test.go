package agent

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/hashicorp/go-hclog"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

var (
	flowVIP  = netip.MustParseAddr("10.77.0.100")
	flowVIP6 = netip.MustParseAddr("fd77::100")
)

// testFlows are those of a member that sees what it is told to see.
func testFlows(self string) (f *flows, has *[]netip.AddrPort, dead map[string]bool) {
	has, dead = new([]netip.AddrPort), map[string]bool{}
	f = newFlows(self, 7, map[string]netip.Addr{"v4": flowVIP, "v6": flowVIP6}, []uint16{16443}, hclog.NewNullLogger())
	f.list = func(_ uint16, local netip.Addr) (all []netip.AddrPort) {
		for _, c := range *has {
			if c.Addr().Is4() == local.Is4() {
				all = append(all, c)
			}
		}
		return all
	}
	f.silent = func(member string) bool { return dead[member] }
	return f, has, dead
}

func hosts(addrs ...string) (all []netip.AddrPort) {
	for _, a := range addrs {
		all = append(all, netip.MustParseAddrPort(a))
	}
	return all
}

// told is whom a member would tell, of which dead member.
func told(f *flows) map[string][]netip.AddrPort {
	all := map[string][]netip.AddrPort{}
	for _, n := range f.bereaved() {
		all[n.member+" "+n.vip] = slices.SortedFunc(slices.Values(n.clients), netip.AddrPort.Compare)
	}
	return all
}

// tell brings everything of one member's to another, as a stream would.
func tell(from, to *flows) {
	all, changes := from.subscribe()
	from.unsubscribe(changes)
	for _, m := range all {
		to.hear(from.self, m)
	}
}

func TestClientsOfTheDeadAreTold(t *testing.T) {
	owner, has, _ := testFlows("cp-1")
	taker, _, dead := testFlows("cp-2")
	*has = hosts("10.77.0.50:4000", "10.77.0.51:4001", "[fd77::50]:4002")
	owner.look()
	_, changes := owner.subscribe()
	tell(owner, taker)
	*has = hosts("10.77.0.51:4001", "[fd77::50]:4002", "10.77.0.52:4003")
	owner.look()
	for len(changes) > 0 {
		taker.hear("cp-1", <-changes)
	}

	taker.took("v4", 1)
	if got := told(taker); len(got) > 0 {
		t.Errorf("nobody is dead, and told are %v", got)
	}
	dead["cp-1"] = true
	if got, want := told(taker)["cp-1 v4"], hosts("10.77.0.51:4001", "10.77.0.52:4003"); !slices.Equal(got, want) {
		t.Errorf("told are %v, want %v", got, want)
	}
	if got := told(taker); len(got) > 0 {
		t.Errorf("told again are %v", got)
	}
	taker.took("v6", 2)
	if got, want := told(taker)["cp-1 v6"], hosts("[fd77::50]:4002"); !slices.Equal(got, want) {
		t.Errorf("told are %v, want %v", got, want)
	}
	// It was cut off, and comes back with what it has now.
	tell(owner, taker)
	taker.took("v4", 3)
	if got := told(taker)["cp-1 v4"]; len(got) != 2 {
		t.Errorf("when it dies again, told are %v", got)
	}
}

// A member that was killed and is back at once was never silent; its connections are dead.
func TestClientsOfAnEarlierBootAreTold(t *testing.T) {
	owner, has, _ := testFlows("cp-1")
	taker, _, _ := testFlows("cp-2")
	*has = hosts("10.77.0.50:4000")
	owner.look()
	tell(owner, taker)
	taker.took("v4", 1)
	next, has, _ := testFlows("cp-1")
	next.boot++
	*has = hosts("10.77.0.50:4444")
	next.look()
	tell(next, taker)
	if got, want := told(taker)["cp-1 v4"], hosts("10.77.0.50:4000"); !slices.Equal(got, want) {
		t.Errorf("told are %v, want %v", got, want)
	}
	tell(owner, taker) // late
	if got := told(taker); len(got) > 0 {
		t.Errorf("told are %v", got)
	}
}

// Who cannot follow is told all anew.
func TestFlowsBehind(t *testing.T) {
	owner, has, _ := testFlows("cp-1")
	_, changes := owner.subscribe()
	for i := range flowsBehind + 2 {
		*has = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("10.77.0.50"), uint16(4000+i))}
		owner.look()
	}
	n := 0
	for range changes {
		n++
	}
	if n != flowsBehind {
		t.Errorf("%d messages before the end, want %d", n, flowsBehind)
	}
}

func TestFlowsOfStrangersAreNone(t *testing.T) {
	taker, _, dead := testFlows("cp-2")
	dead["cp-1"] = true
	taker.took("v4", 1)
	one := []byte{10, 77, 0, 50, 0x10, 0}
	for _, m := range []*hameshv1.ShareFlowsRequest{
		{Vip: "another", Port: 16443, Opened: one},
		{Vip: "v4", Port: 22, Opened: one},
		{Vip: "v4", Port: 1<<16 + 22, Opened: one},
		{Vip: "v4", Port: 16443, Opened: one[:5], Closed: one},
	} {
		taker.hear("cp-1", m)
	}
	if got := told(taker); len(got) > 0 {
		t.Errorf("told are %v", got)
	}
}

func TestNotifyStopsWhenTheVIPGoes(t *testing.T) {
	f, _, _ := testFlows("cp-2")
	sent := 0
	f.tell = func(context.Context, netip.AddrPort, []netip.AddrPort) error {
		sent++
		f.gave("v4")
		return nil
	}
	f.took("v4", 1)
	f.notify(t.Context(), news{through: through{"v4", 16443}, member: "cp-1", gen: 1, clients: hosts("10.77.0.50:4000")})
	if sent != 1 {
		t.Errorf("sent %d times, want once", sent)
	}
}
