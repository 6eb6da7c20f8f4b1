package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

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

// A VIP that goes before the clients were told once has them told when it is back; those
// of a member that died long ago are left alone.
func TestClientsAreToldOnceAndInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		owner, has, _ := testFlows("cp-1")
		taker, _, dead := testFlows("cp-2")
		*has = hosts("10.77.0.50:4000", "[fd77::50]:4002")
		owner.look()
		tell(owner, taker)
		sent := map[netip.AddrPort]int{}
		refused := errors.New("refused")
		taker.tell = func(_ context.Context, vip netip.AddrPort, _ []netip.AddrPort) error {
			sent[vip]++
			return refused
		}
		notify := func() {
			for _, n := range taker.bereaved() {
				taker.notify(t.Context(), n)
			}
		}
		v4, v6 := netip.AddrPortFrom(flowVIP, 16443), netip.AddrPortFrom(flowVIP6, 16443)
		dead["cp-1"] = true
		notify() // which notices the death
		taker.took("v4", 1)
		all := taker.bereaved()
		taker.gave("v4")
		for _, n := range all {
			taker.notify(t.Context(), n)
		}
		if len(sent) > 0 {
			t.Errorf("told without the VIP: %v", sent)
		}
		taker.took("v4", 2)
		notify() // and nobody could be told
		refused = nil
		notify()
		notify()
		if want := 2 * len(tellAt); sent[v4] != want {
			t.Errorf("told %d times, want %d", sent[v4], want)
		}
		time.Sleep(flowsBereaved)
		taker.took("v6", 1)
		notify()
		if sent[v6] > 0 {
			t.Error("told of a death that is too long ago")
		}
		// It comes back, and dies again.
		dead["cp-1"] = false
		tell(owner, taker)
		dead["cp-1"] = true
		notify()
		if sent[v6] != len(tellAt) {
			t.Errorf("told %d times of the second death", sent[v6])
		}
	})
}

// Whoever takes an address off does not wait for those who pack, compare or copy.
func TestFlowsDoNotHoldUpTheKeeper(t *testing.T) {
	f, _, _ := testFlows("cp-2")
	f.mu.Lock()
	defer f.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.took("v4", 1)
		f.gave("v4")
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("taking an address off waits for what is known of clients")
	}
}
