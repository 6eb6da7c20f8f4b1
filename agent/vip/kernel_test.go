package vip

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
)

var (
	vip4 = Address{VIP: "four", Addr: netip.MustParseAddr("10.77.0.100"), Interface: "eth0"}
	vip6 = Address{VIP: "six", Addr: netip.MustParseAddr("fd77::100"), Interface: "eth0"}

	addresses = cmp.Options{cmpopts.EquateComparable(netip.Addr{}), cmpopts.IgnoreFields(Address{}, "Lifetime")}
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// lasting is the address with a lifetime.
func lasting(a Address, d time.Duration) Address {
	a.Lifetime = d
	return a
}

func on(a Address, iface string) Address {
	a.Interface = iface
	return a
}

// world is an operating system with the interfaces lo, eth0 and eth1 and without any
// managed address: the fake, or a real kernel.
type world interface {
	Add(netip.Prefix, string) error
	Del(netip.Prefix, string) error
	// String is the addresses under 10.77.0.100/30 and fd77::100/120, as Fake's is.
	String() string
}

const (
	put4 = "ip addr add 10.77.0.100/32 dev eth0 valid_lft 30 preferred_lft 0 noprefixroute"
	put6 = "ip addr add fd77::100/128 dev eth0 valid_lft 30 preferred_lft 0 noprefixroute nodad"
)

// The table runs against the fake here, and against a real kernel in kernel_linux_test.go.
var steps = []struct {
	name    string
	byHand  map[string]string // prefix → interface, before
	desired []Address
	twice   bool
	want    string
	held    []Address
	err     error
	after   string // nothing desired then
}{
	{name: "nothing"},
	{name: "put on", desired: []Address{lasting(vip4, 30*time.Second), lasting(vip6, 30*time.Second)},
		want: put4 + "\n" + put6, held: []Address{vip4, vip6}},
	{name: "again", desired: []Address{lasting(vip4, 30*time.Second), lasting(vip6, 30*time.Second)}, twice: true,
		want: put4 + "\n" + put6, held: []Address{vip4, vip6}},
	{name: "cut to whole seconds", desired: []Address{lasting(vip4, 30*time.Second+999*time.Millisecond)},
		want: put4, held: []Address{vip4}},
	{name: "not desired", byHand: map[string]string{"10.77.0.100/32": "eth0", "fd77::100/128": "eth0"}},
	{name: "wrong interface", byHand: map[string]string{"10.77.0.100/32": "eth1", "fd77::100/128": "lo"},
		desired: []Address{lasting(vip4, 30*time.Second), lasting(vip6, 30*time.Second)},
		want:    put4 + "\n" + put6, held: []Address{vip4, vip6}},
	{name: "wrong prefix length", byHand: map[string]string{"10.77.0.100/24": "eth0", "fd77::100/64": "eth0"},
		desired: []Address{lasting(vip4, 30*time.Second), lasting(vip6, 30*time.Second)},
		want:    put4 + "\n" + put6, held: []Address{vip4, vip6}},
	{name: "strangers stay", byHand: map[string]string{"10.77.0.101/32": "eth0", "10.77.0.100/32": "eth1"},
		want: "ip addr add 10.77.0.101/32 dev eth0", after: "ip addr add 10.77.0.101/32 dev eth0"},
	{name: "not managed", desired: []Address{{VIP: "x", Addr: netip.MustParseAddr("10.77.0.102"), Interface: "eth0", Lifetime: time.Second}, lasting(vip4, 30*time.Second)},
		want: put4, held: []Address{vip4}, err: ErrNotManaged},
	{name: "no such interface", desired: []Address{lasting(on(vip4, "eth7"), 30*time.Second), lasting(vip6, 30*time.Second)},
		want: put6, held: []Address{vip6}, err: ErrNoInterface},
}

func testTable(t *testing.T, open func(t *testing.T) (world, *Kernel)) {
	for _, test := range steps {
		t.Run(test.name, func(t *testing.T) {
			w, k := open(t)
			for p, iface := range test.byHand {
				if err := w.Add(prefix(p), iface); err != nil {
					t.Fatal(err)
				}
			}
			held, err := k.Set(always(test.desired))
			if test.twice && err == nil {
				held, err = k.Set(always(test.desired))
			}
			if !errors.Is(err, test.err) {
				t.Errorf("error %v, want %v", err, test.err)
			}
			if got := w.String(); got != test.want {
				t.Errorf("kernel has\n%s\nwant\n%s", got, test.want)
			}
			slices.SortFunc(held, func(a, b Address) int { return strings.Compare(a.VIP, b.VIP) })
			if diff := cmp.Diff(test.held, held, addresses); diff != "" {
				t.Errorf("held (-want +got):\n%s", diff)
			}
			if held, err := k.Set(always(nil)); err != nil || len(held) > 0 {
				t.Errorf("nothing desired: held %v, error %v", held, err)
			}
			if got := w.String(); got != test.after {
				t.Errorf("nothing desired: kernel has\n%s", got)
			}
		})
	}
	t.Run("withdraw", func(t *testing.T) {
		w, k := open(t)
		if _, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, 30*time.Second)})); err != nil {
			t.Fatal(err)
		}
		if err := w.Add(prefix("10.77.0.100/32"), "eth1"); err != nil {
			t.Fatal(err)
		}
		if err := k.Withdraw(vip4.Addr); err != nil {
			t.Error(err)
		}
		if got := w.String(); got != put6 {
			t.Errorf("kernel has\n%s", got)
		}
		if err := k.Withdraw(vip4.Addr); err != nil {
			t.Errorf("again: %v", err)
		}
		if err := k.Withdraw(netip.MustParseAddr("10.77.0.101")); !errors.Is(err, ErrNotManaged) {
			t.Errorf("a stranger: %v", err)
		}
	})
	t.Run("sweep", func(t *testing.T) {
		w, k := open(t)
		for p, iface := range map[string]string{"10.77.0.100/32": "lo", "fd77::100/128": "eth1", "10.77.0.101/32": "eth0"} {
			if err := w.Add(prefix(p), iface); err != nil {
				t.Fatal(err)
			}
		}
		removed, err := k.Sweep()
		if err != nil {
			t.Error(err)
		}
		slices.SortFunc(removed, func(a, b Address) int { return strings.Compare(a.VIP, b.VIP) })
		if diff := cmp.Diff([]Address{on(vip4, "lo"), on(vip6, "eth1")}, removed, addresses); diff != "" {
			t.Errorf("removed (-want +got):\n%s", diff)
		}
		if got := w.String(); got != "ip addr add 10.77.0.101/32 dev eth0" {
			t.Errorf("kernel has\n%s", got)
		}
		if removed, err := k.Sweep(); err != nil || len(removed) > 0 {
			t.Errorf("again: removed %v, error %v", removed, err)
		}
	})
	t.Run("watch", func(t *testing.T) {
		w, k := open(t)
		if err := w.Add(prefix("10.77.0.100/32"), "eth1"); err != nil {
			t.Fatal(err)
		}
		changes := k.Watch(t.Context())
		expect(t, changes,
			Change{Appeared, "four", vip4.Addr, "eth1"},
			Change{Kind: CarrierUp, Interface: "eth0"},
			Change{Disappeared, "six", vip6.Addr, ""})
		if _, err := k.Set(always([]Address{lasting(vip4, time.Minute)})); err != nil {
			t.Fatal(err)
		}
		expect(t, changes,
			Change{Appeared, "four", vip4.Addr, "eth0"},
			Change{Disappeared, "four", vip4.Addr, "eth1"})
		// A renewal and a stranger's address are not told.
		if _, err := k.Set(always([]Address{lasting(vip4, time.Minute)})); err != nil {
			t.Fatal(err)
		}
		if err := w.Add(prefix("10.77.0.101/32"), "eth0"); err != nil {
			t.Fatal(err)
		}
		if err := w.Del(prefix("10.77.0.100/32"), "eth0"); err != nil {
			t.Fatal(err)
		}
		expect(t, changes, Change{Disappeared, "four", vip4.Addr, "eth0"})
	})
}

// expect receives these changes, in this order, within a second each.
func expect(t *testing.T, changes <-chan Change, want ...Change) {
	t.Helper()
	for _, w := range want {
		select {
		case got, ok := <-changes:
			if !ok || got != w {
				t.Fatalf("change %v (open %t), want %v", got, ok, w)
			}
		case <-time.After(time.Second):
			t.Fatalf("no change, want %v", w)
		}
	}
}

func openFake(t *testing.T) (*Fake, *Kernel) {
	f := NewFake("lo", "eth0", "eth1")
	k, err := f.Open(hclog.NewNullLogger(), []Address{vip4, vip6})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return f, k
}

func TestFake(t *testing.T) {
	testTable(t, func(t *testing.T) (world, *Kernel) { return openFake(t) })
}

func TestOpenRefuses(t *testing.T) {
	for name, managed := range map[string][]Address{
		"invalid": {{VIP: "a"}},
		"zone":    {{VIP: "a", Addr: netip.MustParseAddr("fe80::1%eth0")}},
		"mapped":  {{VIP: "a", Addr: netip.MustParseAddr("::ffff:10.77.0.100")}},
		"twice":   {vip4, vip4},
	} {
		if _, err := NewFake("eth0").Open(hclog.NewNullLogger(), managed); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestSetOrder(t *testing.T) {
	f, k := openFake(t)
	if _, err := k.Set(always([]Address{lasting(vip4, 3*time.Second)})); err != nil {
		t.Fatal(err)
	}
	f.Commands()
	if _, err := k.Set(always([]Address{lasting(vip6, 3*time.Second)})); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"ip addr del 10.77.0.100/32 dev eth0",
		"ip addr replace fd77::100/128 dev eth0 valid_lft 3 preferred_lft 0 noprefixroute nodad",
	}
	if diff := cmp.Diff(want, f.Commands()); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
	// Where nothing is to be done, nothing is.
	if _, err := k.Set(always([]Address{lasting(vip6, 3*time.Second)})); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want[1:], f.Commands()); diff != "" {
		t.Errorf("renewal (-want +got):\n%s", diff)
	}
}

func TestSetTellsTheTruthWhenRefused(t *testing.T) {
	refused := errors.New("refused")
	f, k := openFake(t)
	if _, err := k.Set(always([]Address{lasting(vip4, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	f.Refuse("ip addr del 10.77.0.100", refused)
	f.Refuse("ip addr replace fd77::100", refused)
	held, err := k.Set(always([]Address{lasting(vip6, time.Minute)}))
	if !errors.Is(err, refused) || !errors.Is(err, ErrRemains) {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff([]Address{vip4}, held, addresses); diff != "" {
		t.Errorf("held (-want +got):\n%s", diff)
	}
	if err := k.Withdraw(vip4.Addr); !errors.Is(err, refused) {
		t.Errorf("withdraw: %v", err)
	}
	f.Refuse("ip addr del 10.77.0.100", nil)
	f.Refuse("ip addr show", refused)
	if err := k.Withdraw(vip4.Addr); !errors.Is(err, refused) {
		t.Errorf("withdraw without reading back: %v", err)
	}
	if f.String() != "" {
		t.Errorf("a table that cannot be read kept the address on: %s", f)
	}
	if held, err := k.Set(always(nil)); !errors.Is(err, refused) || held != nil {
		t.Errorf("held %v, error %v", held, err)
	}
}

func TestLifetimeTooShort(t *testing.T) {
	f, k := openFake(t)
	held, err := k.Set(always([]Address{lasting(vip4, 999*time.Millisecond)}))
	if err == nil || len(held) > 0 || f.String() != "" {
		t.Errorf("held %v, error %v, kernel %s", held, err, f)
	}
}

// gate holds up put for one address.
type gate struct {
	system
	addr    netip.Addr
	waiting chan struct{}
	open    chan struct{}
}

func (g *gate) put(p place) error {
	if p.addr == g.addr {
		close(g.waiting)
		<-g.open
	}
	return g.system.put(p)
}

func TestWithdrawPassesSetBy(t *testing.T) {
	f, k := openFake(t)
	if _, err := k.Set(always([]Address{lasting(vip6, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	g := &gate{f, vip4.Addr, make(chan struct{}), make(chan struct{})}
	k.set = g
	type result struct {
		held []Address
		err  error
	}
	set := make(chan result)
	go func() {
		held, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)}))
		set <- result{held, err}
	}()
	<-g.waiting
	// Another address does not wait for the one that is held up.
	if err := k.Withdraw(vip6.Addr); err != nil {
		t.Error(err)
	}
	// This one waits for that one change, and has the last word.
	withdrawn := make(chan error)
	go func() { withdrawn <- k.Withdraw(vip4.Addr) }()
	for k.slot(vip4.Addr).withdrawn.Load() == 0 {
		runtime.Gosched()
	}
	close(g.open)
	if err := <-withdrawn; err != nil {
		t.Error(err)
	}
	if r := <-set; r.err != nil || len(r.held) > 0 {
		t.Errorf("set: %+v", r)
	}
	if f.String() != "" {
		t.Errorf("kernel has %s", f)
	}
}

func TestWithdrawnMeanwhileIsNotPutOn(t *testing.T) {
	f, k := openFake(t)
	s := k.slot(vip4.Addr)
	turn := s.withdrawn.Load()
	if err := k.Withdraw(vip4.Addr); err != nil {
		t.Fatal(err)
	}
	if err := s.putOn(k.set, lasting(vip4, time.Minute), turn); err != nil || f.String() != "" {
		t.Errorf("error %v, kernel has %s", err, f)
	}
}

func TestWatchStartsAnewAfterLoss(t *testing.T) {
	f, k := openFake(t)
	ctx, cancel := context.WithCancel(t.Context())
	changes := k.Watch(ctx)
	gone4, gone6 := Change{Disappeared, "four", vip4.Addr, ""}, Change{Disappeared, "six", vip6.Addr, ""}
	expect(t, changes, Change{Kind: CarrierUp, Interface: "eth0"}, gone4, gone6)
	f.SetCarrier("eth1", CarrierDown) // not of interest
	f.SetCarrier("eth0", CarrierDown)
	f.SetCarrier("eth0", CarrierDown)
	f.SetCarrier("eth0", CarrierUp)
	expect(t, changes, Change{Kind: CarrierDown, Interface: "eth0"}, Change{Kind: CarrierUp, Interface: "eth0"})
	f.Lose()
	expect(t, changes, Change{Kind: CarrierUp, Interface: "eth0"}, gone4, gone6)
	cancel()
	if c, ok := <-changes; ok {
		t.Errorf("change %v after the end", c)
	}
}

func TestFakeLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, k := openFake(t)
		for range 3 {
			if _, err := k.Set(always([]Address{lasting(vip4, 2*time.Second)})); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2*time.Second - 1)
			if f.String() == "" {
				t.Fatal("ended early")
			}
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if f.String() != "" {
			t.Error("did not end")
		}
	})
}

// always desires the same addresses.
func always(addresses []Address) func() []Address {
	return func() []Address { return addresses }
}
