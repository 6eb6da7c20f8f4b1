package vip

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// real is a host with its own kernel tables.
type real struct {
	t    *testing.T
	host *lab.Host
	port *lab.Port // of eth0
}

func newReal(t *testing.T) *real {
	t.Helper()
	s, err := lab.NewSwitch("sw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, s.Close()) })
	h, err := lab.NewHost("cp-1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, h.Close()) })
	p, err := s.Attach(h, "eth0", prefix("10.77.0.11/24"), prefix("fd77::11/64"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(h, "eth1"); err != nil {
		t.Fatal(err)
	}
	return &real{t, h, p}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func (r *real) open() *Kernel {
	r.t.Helper()
	var k *Kernel
	if err := r.host.Do(func() (err error) {
		k, err = Open(hclog.NewNullLogger(), []Address{vip4, vip6})
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(k.Close)
	return k
}

func (r *real) Add(p netip.Prefix, iface string) error { return r.host.AddAddress(iface, p) }

func (r *real) Del(p netip.Prefix, iface string) error {
	l, err := r.host.Netlink().LinkByName(iface)
	if err != nil {
		return err
	}
	return r.host.Netlink().AddrDel(l, &netlink.Addr{IPNet: &net.IPNet{
		IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}})
}

// String reads the kernel itself and shows every flag, so that it vouches for what the
// fake only says.
func (r *real) String() string {
	var lines []string
	links, err := r.host.Netlink().LinkList()
	check(r.t, err)
	for _, l := range links {
		addrs, err := r.host.Netlink().AddrList(l, netlink.FAMILY_ALL)
		check(r.t, err)
		for _, a := range addrs {
			addr, _ := netip.AddrFromSlice(a.IP)
			if !prefix("10.77.0.100/30").Contains(addr) && !prefix("fd77::100/120").Contains(addr) {
				continue
			}
			line := fmt.Sprintf("ip addr add %v dev %s", a.IPNet, l.Attrs().Name)
			if a.ValidLft != forever {
				line += fmt.Sprintf(" valid_lft %d preferred_lft %d", a.ValidLft, a.PreferedLft)
			}
			if a.Flags&unix.IFA_F_NOPREFIXROUTE != 0 {
				line += " noprefixroute"
			}
			if a.Flags&unix.IFA_F_NODAD != 0 && a.ValidLft != forever {
				line += " nodad"
			}
			if a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
				line += " tentative"
			}
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// until polls for something to become true.
func until(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}

func TestReal(t *testing.T) {
	testTable(t, func(t *testing.T) (world, *Kernel) {
		r := newReal(t)
		return r, r.open()
	})
}

func TestRealLifetime(t *testing.T) {
	r := newReal(t)
	k := r.open()
	both := []Address{lasting(vip4, time.Second), lasting(vip6, time.Second)}
	// Renewed well beyond one lifetime, it is never off.
	start := time.Now()
	for time.Since(start) < 2500*time.Millisecond {
		held, err := k.Set(always(both))
		if err != nil || len(held) != 2 {
			t.Fatalf("held %v, error %v", held, err)
		}
		next := time.Now().Add(300 * time.Millisecond)
		until(t, time.Second, "renewal", func() bool {
			if strings.Count(r.String(), "\n") != 1 {
				t.Fatalf("kernel has %q in between", r)
			}
			return time.Now().After(next)
		})
	}
	renewed := time.Now()
	if _, err := k.Set(always(both)); err != nil {
		t.Fatal(err)
	}
	ended := make(map[string]time.Duration)
	until(t, 3*time.Second, "expiry", func() bool {
		now := r.String()
		for name, a := range map[string]Address{"IPv4": vip4, "IPv6": vip6} {
			if !strings.Contains(now, a.Addr.String()+"/") && ended[name] == 0 {
				ended[name] = time.Since(renewed)
			}
		}
		return len(ended) == 2
	})
	for name, d := range ended {
		t.Logf("%s: ended %v after a renewal for 1s", name, d)
		// The kernel counts in steps of its own and may be early by HZ/50 (IPv4) or
		// HZ/4 (IPv6): ADDRCONF_TIMER_FUZZ in include/net/addrconf.h.
		if d < 700*time.Millisecond || d > 1500*time.Millisecond {
			t.Errorf("%s: ended %v after a renewal for 1s", name, d)
		}
	}
}

// source is the address that the host would speak from.
func (r *real) source(to string) netip.Addr {
	r.t.Helper()
	var got netip.Addr
	if err := r.host.Do(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(to, "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		got = c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	return got
}

func TestRealNeverASource(t *testing.T) {
	r := newReal(t)
	k := r.open()
	l, err := r.host.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, gw := range []string{"10.77.0.1", "fd77::1"} {
		if err := r.host.Netlink().RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	destinations := map[string]string{
		"10.77.0.101": "10.77.0.11", "192.0.2.1": "10.77.0.11",
		"fd77::101": "fd77::11", "2001:db8::1": "fd77::11",
	}
	for to, want := range destinations {
		if got := r.source(to); got.String() != want {
			t.Errorf("to %s: source %v, want %s", to, got, want)
		}
	}
	// An ordinary address in the VIP's place is taken, which shows that the above says something.
	if err := r.Add(prefix("fd77::102/128"), "eth0"); err != nil {
		t.Fatal(err)
	}
	if got := r.source("fd77::103"); got.String() != "fd77::102" {
		t.Errorf("control: source %v", got)
	}
	// As the interface's first address too, when its own comes back after it.
	if err := r.Del(prefix("10.77.0.11/24"), "eth0"); err != nil {
		t.Fatal(err)
	}
	if err := r.Add(prefix("10.77.0.11/24"), "eth0"); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"10.77.0.101", "192.0.2.1"} {
		if got := r.source(to); got.String() != "10.77.0.11" {
			t.Errorf("with the VIP first, to %s: source %v", to, got)
		}
	}
}

func TestRealNoRoute(t *testing.T) {
	r := newReal(t)
	k := r.open()
	if _, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	routes := func(table int) (n int) {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			all, err := r.host.Netlink().RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			if err != nil {
				t.Fatal(err)
			}
			for _, route := range all {
				if route.Dst != nil && (route.Dst.IP.Equal(vip4.Addr.AsSlice()) || route.Dst.IP.Equal(vip6.Addr.AsSlice())) {
					n++
				}
			}
		}
		return n
	}
	// IPv6 makes the local route a moment after the address, from a work queue
	// (net/ipv6/addrconf.c, addrconf_dad_work), also without detection.
	start := time.Now()
	until(t, time.Second, "local routes", func() bool { return routes(unix.RT_TABLE_LOCAL) == 2 })
	t.Logf("both local routes there after %v", time.Since(start))
	if n := routes(unix.RT_TABLE_MAIN); n != 0 {
		t.Errorf("%d routes to the VIPs in the main table", n)
	}
}

// TestRealIsReached checks that what comes for an address is delivered as soon as Set returns,
// which is when the segment is told to send it here.
func TestRealIsReached(t *testing.T) {
	r := newReal(t)
	k := r.open()
	l, err := r.host.Netlink().LinkByName("eth0")
	check(t, err)
	const turns = 300
	reached := map[netip.Addr]int{}
	for range turns {
		both := []Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)}
		if held, err := k.Set(always(both)); err != nil || len(held) != 2 {
			t.Fatalf("held %v, error %v", held, err)
		}
		for _, a := range both {
			from := &netlink.RouteGetOptions{IifIndex: l.Attrs().Index, SrcAddr: neighbour(a.Addr)}
			routes, err := r.host.Netlink().RouteGetWithOptions(a.Addr.AsSlice(), from)
			if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
				reached[a.Addr]++
			}
			check(t, k.Withdraw(a.Addr))
		}
	}
	for _, a := range []Address{vip4, vip6} {
		if reached[a.Addr] < turns {
			t.Errorf("%v was reached %d times of %d", a.Addr, reached[a.Addr], turns)
		}
	}
}

func neighbour(a netip.Addr) net.IP {
	if a.Is4() {
		return net.ParseIP("10.77.0.200")
	}
	return net.ParseIP("fd77::200")
}

func TestRealLimitsOneWithoutLimit(t *testing.T) {
	r := newReal(t)
	k := r.open()
	for _, p := range []string{"10.77.0.100/32", "fd77::100/128"} {
		if err := r.Add(prefix(p), "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.Set(always([]Address{lasting(vip4, 30*time.Second), lasting(vip6, 30*time.Second)})); err != nil {
		t.Fatal(err)
	}
	if got := r.String(); strings.Count(got, " valid_lft 30 preferred_lft 0") != 2 {
		t.Errorf("kernel has\n%s", got)
	}
}

func TestRealWatchIsQuick(t *testing.T) {
	r := newReal(t)
	k := r.open()
	if _, err := k.Set(always([]Address{lasting(vip4, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	changes := k.Watch(t.Context())
	expect(t, changes,
		Change{Appeared, "four", vip4.Addr, "eth0"},
		Change{Kind: CarrierUp, Interface: "eth0"},
		Change{Disappeared, "six", vip6.Addr, ""})
	start := time.Now()
	if err := r.Del(prefix("10.77.0.100/32"), "eth0"); err != nil {
		t.Fatal(err)
	}
	expect(t, changes, Change{Disappeared, "four", vip4.Addr, "eth0"})
	d := time.Since(start)
	t.Logf("a deletion by hand was told after %v", d)
	if d > 100*time.Millisecond {
		t.Errorf("a deletion by hand was told after %v", d)
	}
}

func TestRealInterfaceDown(t *testing.T) {
	r := newReal(t)
	k := r.open()
	both := []Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)}
	if _, err := k.Set(always(both)); err != nil {
		t.Fatal(err)
	}
	changes := k.Watch(t.Context())
	for range 3 {
		<-changes
	}
	if err := r.port.Cut(); err != nil {
		t.Fatal(err)
	}
	expect(t, changes, Change{Kind: CarrierDown, Interface: "eth0"})
	if held, err := k.Set(always(both)); err != nil || len(held) != 2 {
		t.Errorf("without a carrier: held %v, error %v", held, err)
	}
	if err := r.port.Mend(); err != nil {
		t.Fatal(err)
	}
	expect(t, changes, Change{Kind: CarrierUp, Interface: "eth0"})

	l, err := r.host.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	// Set down, the interface loses its IPv6 addresses and keeps those of IPv4.
	if err := r.host.Netlink().LinkSetDown(l); err != nil {
		t.Fatal(err)
	}
	seen := map[Change]bool{<-changes: true, <-changes: true}
	if !seen[Change{Kind: CarrierDown, Interface: "eth0"}] || !seen[Change{Disappeared, "six", vip6.Addr, "eth0"}] {
		t.Errorf("set down: %v", seen)
	}
	held, err := k.Set(always(both))
	t.Logf("set down: held %v, error %v", held, err)
	if err := r.host.Netlink().LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	if held, err := k.Set(always(both)); err != nil || len(held) != 2 {
		t.Errorf("up again: held %v, error %v", held, err)
	}

	// Taken away for good.
	if err := r.host.Netlink().LinkDel(l); err != nil {
		t.Fatal(err)
	}
	if held, err := k.Set(always(both)); !errors.Is(err, ErrNoInterface) || len(held) != 0 {
		t.Errorf("no interface: held %v, error %v", held, err)
	}
	check(t, k.Withdraw(vip4.Addr))
	check(t, k.Withdraw(vip6.Addr))
}

func TestRealNoIPv6(t *testing.T) {
	r := newReal(t)
	k := r.open()
	if err := r.host.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "1"); err != nil {
		t.Fatal(err)
	}
	held, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)}))
	if !errors.Is(err, ErrNoIPv6) || len(held) != 1 {
		t.Errorf("held %v, error %v", held, err)
	}
}

// with runs f on this thread with no capability but these in effect.
func with(t *testing.T, capabilities uint32, f func()) {
	t.Helper()
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before [2]unix.CapUserData
	if err := unix.Capget(header, &before[0]); err != nil {
		t.Fatal(err)
	}
	less := before
	less[0].Effective, less[1].Effective = capabilities, 0
	if err := unix.Capset(header, &less[0]); err != nil {
		t.Fatal(err)
	}
	defer func() { check(t, unix.Capset(header, &before[0])) }()
	f()
}

func TestRealCapabilities(t *testing.T) {
	r := newReal(t)
	// Do keeps the goroutine on its thread, which is what capabilities belong to.
	check(t, r.host.Do(func() error {
		var k *Kernel
		with(t, 1<<unix.CAP_NET_ADMIN, func() {
			var err error
			if k, err = Open(hclog.NewNullLogger(), []Address{vip4, vip6}); err != nil {
				t.Error(err)
				return
			}
			held, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)}))
			if err != nil || len(held) != 2 {
				t.Errorf("held %v, error %v", held, err)
			}
			check(t, k.Withdraw(vip4.Addr))
		})
		if k != nil {
			k.Close()
		}
		return nil
	}))
	check(t, r.host.Do(func() error {
		var k *Kernel
		with(t, 0, func() {
			var err error
			if k, err = Open(hclog.NewNullLogger(), []Address{vip4, vip6}); err != nil {
				t.Error(err)
				return
			}
			held, err := k.Set(always([]Address{lasting(vip4, time.Minute)}))
			if !errors.Is(err, ErrPermission) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
				t.Errorf("held %v, error %v", held, err)
			}
			if err := k.Withdraw(vip6.Addr); !errors.Is(err, ErrPermission) {
				t.Errorf("withdraw: %v", err)
			}
		})
		if k != nil {
			k.Close()
		}
		return nil
	}))
}

func TestRealWithdrawIsQuick(t *testing.T) {
	r := newReal(t)
	k := r.open()
	best := map[string]time.Duration{}
	for range 20 {
		if _, err := k.Set(always([]Address{lasting(vip4, time.Minute), lasting(vip6, time.Minute)})); err != nil {
			t.Fatal(err)
		}
		for _, a := range []Address{vip4, vip6} {
			start := time.Now()
			if err := k.Withdraw(a.Addr); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); best[a.VIP] == 0 || d < best[a.VIP] {
				best[a.VIP] = d
			}
		}
	}
	t.Logf("best withdrawals, read back: %v", best)
	for name, d := range best {
		// The best of many, since a busy machine says nothing about the work itself.
		if d > 5*time.Millisecond {
			t.Errorf("%s: %v", name, d)
		}
	}
}

func TestRealSurvivesLostNotices(t *testing.T) {
	r := newReal(t)
	k := r.open()
	changes := k.Watch(t.Context())
	// Nobody reads yet: far more notices than the socket's buffer holds.
	const flaps = 1000
	for range flaps {
		if _, err := k.Set(always([]Address{lasting(vip4, time.Minute)})); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Set(always(nil)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.Set(always([]Address{lasting(vip6, time.Minute)})); err != nil {
		t.Fatal(err)
	}
	six, appeared, anew := Change{Appeared, "six", vip6.Addr, "eth0"}, 0, false
	for done := false; !done; {
		select {
		case c := <-changes:
			if c == (Change{Appeared, "four", vip4.Addr, "eth0"}) {
				appeared++
			}
			// Told twice without an appearance in between: that is the full state.
			anew = anew || appeared > 0 && c == Change{Disappeared, "four", vip4.Addr, ""}
			done = c == six
		case <-time.After(5 * time.Second):
			t.Fatal("the last change was never told")
		}
	}
	t.Logf("%d of %d appearances told", appeared, flaps)
	if appeared == flaps {
		t.Error("nothing was lost, so this says nothing")
	}
	until(t, 5*time.Second, "full state", func() bool {
		select {
		case c := <-changes:
			anew = anew || c == Change{Disappeared, "four", vip4.Addr, ""}
		default:
		}
		return anew
	})
}
