package agent

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/hamesh/hamesh/agent/proxy"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

var (
	flowVIP  = netip.MustParseAddr("10.77.0.100")
	flowVIP6 = netip.MustParseAddr("fd77::100")
)

// testFlows are those of a member.
func testFlows(self string) (f *flows, dead map[string]bool) {
	dead = map[string]bool{}
	f = newFlows(self, 7, map[string]netip.Addr{"v4": flowVIP, "v6": flowVIP6}, []uint16{16443}, hclog.NewNullLogger())
	f.keeps = func(string) bool { return false }
	f.serves = func(member, _ string) bool { return !dead[member] }
	return f, dead
}

var lastFlow uint64

// see has a member's connections be those of these clients, and no others.
func see(f *flows, now ...netip.AddrPort) {
	var all []proxy.Flow
	for vip, addr := range f.vips {
		before := f.mine[through{vip, 16443}]
		for _, c := range now {
			if _, known := before[c]; !known && c.Addr().Is4() == addr.Is4() {
				lastFlow++
				all = append(all, proxy.Flow{Client: c, Local: addr, Open: true, ID: lastFlow})
			}
		}
		for c, id := range before {
			if !slices.Contains(now, c) {
				all = append(all, proxy.Flow{Client: c, Local: addr, ID: id})
			}
		}
	}
	f.changed(16443, all, nil)
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
	link := from.subscribe()
	defer from.unsubscribe(link)
	carry(from, link, to)
}

// carry brings what one member has not been told yet.
func carry(from *flows, link *flowLink, to *flows) (bytes int) {
	all, told := from.untold(link)
	for _, m := range all {
		bytes += proto.Size(m)
		to.hear(from.self, m)
	}
	for _, t := range told {
		t()
	}
	return bytes
}

func TestClientsOfTheDeadAreTold(t *testing.T) {
	owner, _ := testFlows("cp-1")
	taker, dead := testFlows("cp-2")
	see(owner, hosts("10.77.0.50:4000", "10.77.0.51:4001", "[fd77::50]:4002")...)
	link := owner.subscribe()
	carry(owner, link, taker)
	see(owner, hosts("10.77.0.51:4001", "[fd77::50]:4002", "10.77.0.52:4003")...)
	carry(owner, link, taker)

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
	owner, _ := testFlows("cp-1")
	taker, _ := testFlows("cp-2")
	see(owner, hosts("10.77.0.50:4000")...)
	tell(owner, taker)
	taker.took("v4", 1)
	next, _ := testFlows("cp-1")
	next.boot++
	see(next, hosts("10.77.0.50:4444")...)
	tell(next, taker)
	if got, want := told(taker)["cp-1 v4"], hosts("10.77.0.50:4000"); !slices.Equal(got, want) {
		t.Errorf("told are %v, want %v", got, want)
	}
	tell(owner, taker) // late
	if got := told(taker); len(got) > 0 {
		t.Errorf("told are %v", got)
	}
}

// A connection is let go when every member that is linked has been told, or has gone.
func TestFlowsAreToldToEveryLink(t *testing.T) {
	f, _ := testFlows("cp-1")
	let := 0
	come := func(port uint16) {
		f.changed(16443, []proxy.Flow{{Client: netip.AddrPortFrom(netip.MustParseAddr("10.77.0.50"), port), Local: flowVIP, Open: true}}, func() { let++ })
	}
	come(1)
	if let != 1 {
		t.Error("without anybody to tell, a connection is held back")
	}
	one, other := f.subscribe(), f.subscribe()
	to, _ := testFlows("cp-2")
	come(2)
	carry(f, one, to)
	if let != 1 {
		t.Error("let go before everybody was told")
	}
	carry(f, other, to)
	if let != 2 {
		t.Error("held back though everybody was told")
	}
	come(3)
	carry(f, one, to)
	f.unsubscribe(other)
	if let != 3 {
		t.Error("held back for a member that has gone")
	}
	if got := len(to.theirs["cp-1"].flows[through{"v4", 16443}]); got != 3 {
		t.Errorf("the other knows %d clients, want 3", got)
	}
}

// Whatever comes and goes, in whatever order it is told of, the others know what is so in the
// end: a client's next connection may be told of before the end of the one before.
func TestFlowsTellTheEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f, _ := testFlows("cp-1")
		to, _ := testFlows("cp-2")
		link := f.subscribe()
		open := map[netip.AddrPort]proxy.Flow{}
		var late []proxy.Flow
		for i := range rapid.IntRange(1, 60).Draw(t, "changes") {
			c := netip.AddrPortFrom(netip.MustParseAddr("10.77.0.50"), rapid.Uint16Range(1, 4).Draw(t, "port"))
			next, connected := open[c]
			if connected {
				delete(open, c)
				next.Open = false
			} else {
				next = proxy.Flow{Client: c, Local: flowVIP, Open: true, ID: uint64(i + 1)}
				open[c] = next
			}
			if !next.Open && rapid.Bool().Draw(t, "late") {
				late = append(late, next)
				continue
			}
			f.changed(16443, append([]proxy.Flow{next}, late...), nil)
			late = nil
			if rapid.IntRange(0, 3).Draw(t, "told") == 0 {
				carry(f, link, to)
			}
		}
		f.changed(16443, late, nil)
		carry(f, link, to)
		var want, got []netip.AddrPort
		want = slices.SortedFunc(maps.Keys(open), netip.AddrPort.Compare)
		got = slices.SortedFunc(maps.Keys(to.theirs["cp-1"].flows[through{"v4", 16443}]), netip.AddrPort.Compare)
		if !slices.Equal(want, got) {
			t.Fatalf("connected are %v, the other knows of %v", want, got)
		}
	})
}

// A connection that comes and goes costs little to tell: 50 of them a second stay far below
// 20 kB/s to two members, headers and all.
func TestFlowsAreSmall(t *testing.T) {
	f, _ := testFlows("cp-1")
	to, _ := testFlows("cp-2")
	link := f.subscribe()
	carry(f, link, to)
	see(f, hosts("10.77.0.50:4000")...)
	carry(f, link, to)
	see(f, hosts("10.77.0.50:4001")...)
	if n := carry(f, link, to); n > 50 {
		t.Errorf("%d bytes for one that came and one that went", n)
	}
}

func TestFlowsOfStrangersAreNone(t *testing.T) {
	taker, dead := testFlows("cp-2")
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
	f, _ := testFlows("cp-2")
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
		owner, _ := testFlows("cp-1")
		taker, dead := testFlows("cp-2")
		see(owner, hosts("10.77.0.50:4000", "[fd77::50]:4002")...)
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
	f, _ := testFlows("cp-2")
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

// Clients of connections that ended while the VIP was off are told when it is back, here or
// elsewhere, and not forgotten by the others before.
func TestClientsLostMeanwhileAreTold(t *testing.T) {
	owner, _ := testFlows("cp-1")
	other, dead := testFlows("cp-2")
	link := owner.subscribe()
	client := hosts("10.77.0.50:4000", "10.77.0.51:4001", "10.77.0.52:4002")
	end := func(c netip.AddrPort, at time.Time) {
		id := owner.mine[through{"v4", 16443}][c]
		owner.changed(16443, []proxy.Flow{{Client: c, Local: flowVIP, At: at, ID: id}}, nil)
	}
	owner.took("v4", 1)
	see(owner, client...)
	carry(owner, link, other)
	end(client[0], time.Now()) // its client gets a reset
	owner.gave("v4")
	off := time.Now()
	end(client[1], off)
	carry(owner, link, other)

	dead["cp-1"] = true // or rather, it has lost the VIP
	other.took("v4", 2)
	if got, want := told(other)["cp-1 v4"], client[1:]; !slices.Equal(got, want) {
		t.Errorf("elsewhere told are %v, want %v", got, want)
	}
	owner.took("v4", 3)
	end(client[2], off) // heard of late
	n := owner.bereaved()
	if len(n) != 1 || len(n[0].clients) != 2 {
		t.Fatalf("when it is back, to be told are %v", n)
	}
	sent := 0
	owner.tell = func(_ context.Context, _ netip.AddrPort, all []netip.AddrPort) error {
		sent = len(all)
		return nil
	}
	owner.notify(t.Context(), n[0])
	carry(owner, link, other)
	if left := other.theirs["cp-1"].flows[through{"v4", 16443}]; sent != 2 || len(left) != 0 {
		t.Errorf("told %d, want 2; the other still knows of %v", sent, left)
	}
	if got := told(owner); len(got) > 0 {
		t.Errorf("told again are %v", got)
	}
}

// So are those that are lost long after others were.
func TestClientsAreLostAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _ := testFlows("cp-1")
		for i := range 3 {
			f.took("v4", uint64(i+1))
			time.Sleep(2 * flowsBereaved)
			client := netip.AddrPortFrom(netip.MustParseAddr("10.77.0.50"), uint16(4000+i))
			see(f, client)
			f.gave("v4")
			w := through{"v4", 16443}
			f.changed(16443, []proxy.Flow{{Client: client, Local: flowVIP, At: time.Now(), ID: f.mine[w][client]}}, nil)
			f.bereaved()
			time.Sleep(time.Second)
			f.took("v4", uint64(i+10))
			all := f.bereaved()
			if len(all) != 1 || !slices.Equal(all[0].clients, []netip.AddrPort{client}) {
				t.Fatalf("time %d: to be told are %v", i+1, all)
			}
			f.tell = func(context.Context, netip.AddrPort, []netip.AddrPort) error { return nil }
			f.notify(t.Context(), all[0])
		}
	})
}
