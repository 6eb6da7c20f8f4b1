package handover

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/hashicorp/go-hclog"
	"github.com/mdlayher/arp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// both runs a test for each family.
func both(t *testing.T, f func(t *testing.T, a Address)) {
	t.Run("IPv4", func(t *testing.T) { f(t, vip4) })
	t.Run("IPv6", func(t *testing.T) { f(t, vip6) })
}

func TestMove(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		w.a.take(a)
		fin, rst, busy, idle := w.dial(a), w.dial(a), w.dial(a), w.dial(a)
		w.expectServer(fin, w.a)

		stop, done := make(chan struct{}), make(chan error)
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if err := busy.echo(); err != nil {
					done <- err
					return
				}
			}
		}()
		w.move(a, w.a, w.b)
		for range 100 {
			fin.mustEcho()
		}
		close(stop)
		must(t, <-done)
		t.Logf("%d echoes on one connection around and after the move", busy.n)
		w.expectServer(w.dial(a), w.b)
		rst.mustEcho()

		must(t, fin.CloseWrite())
		if _, err := fin.r.ReadByte(); err != io.EOF {
			t.Errorf("after our FIN: %v, want the server's", err)
		}
		if err := <-w.a.ends; err != nil {
			t.Errorf("after a FIN the server has %v", err)
		}
		must(t, rst.SetLinger(0))
		must(t, rst.Close())
		if err := <-w.a.ends; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("after a reset the server has %v", err)
		}

		idle.mustEcho()
		must(t, w.b.Unforward(a.Addr))
		start := time.Now()
		w.expectReset(idle)
		t.Logf("reset %v after the next packet", time.Since(start))
		w.expectServer(w.dial(a), w.b)
	})
}

func TestUpload(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		// Connection tracking does not take up connections under way, and so would drop them.
		must(t, w.b.host.Sysctl("net/netfilter/nf_conntrack_tcp_loose", "0"))
		w.a.take(a)
		c := w.dial(a)
		data := make([]byte, 50<<20)
		_, err := rand.Read(data)
		must(t, err)
		data[0] = 'u'
		want := sha256.Sum256(data)

		r := &paced{r: bytes.NewReader(data), begun: make(chan struct{}), moved: make(chan struct{})}
		sent := make(chan error)
		go func() {
			_, err := io.Copy(struct{ io.Writer }{c}, r)
			sent <- errors.Join(err, c.CloseWrite())
		}()
		<-r.begun
		w.move(a, w.a, w.b)
		t.Logf("%d MB were written when the move was over", (r.r.Size()-r.left.Load())>>20)
		close(r.moved)
		must(t, <-sent)
		got, err := c.r.ReadString('\n')
		must(t, err)
		if got != hex.EncodeToString(want[:])+"\n" {
			t.Errorf("server has a digest of %q", got)
		}
		w.expectServer(w.dial(a), w.b)
	})
}

// paced tells when a fifth of it has been read, and keeps the last fifth for after the move.
type paced struct {
	r            *bytes.Reader
	left         atomic.Int64
	once         sync.Once
	begun, moved chan struct{}
}

func (p *paced) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.left.Store(int64(p.r.Len()))
	if int64(p.r.Len()) < p.r.Size()*4/5 {
		p.once.Do(func() { close(p.begun) })
	}
	if int64(p.r.Len()) < p.r.Size()/5 {
		<-p.moved
	}
	return n, err
}

func TestManyAndReset(t *testing.T) {
	const many = 500
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		w.a.take(a)
		var conns []*conn
		for range many {
			conns = append(conns, w.dial(a))
		}
		count := func(n *node, want int) {
			t.Helper()
			got, err := n.Established(a.Addr, port)
			must(t, err)
			if got != want {
				t.Fatalf("%s has %d connections, want %d", n.name, got, want)
			}
		}
		count(w.a, many)
		w.move(a, w.a, w.b)
		for _, c := range conns {
			c.mustEcho()
		}
		count(w.a, many)
		count(w.b, 0)
		fresh := w.dial(a)
		count(w.b, 1)
		if n, err := w.a.Established(a.Addr, port+1); n != 0 || err != nil {
			t.Errorf("on another port: %d connections, error %v", n, err)
		}
		if n, err := w.a.Established(other.Addr, port); n != 0 || err != nil {
			t.Errorf("on another VIP: %d connections, error %v", n, err)
		}

		// The deadline of a drain.
		start := time.Now()
		n, err := w.a.Reset(a.Addr)
		must(t, err)
		t.Logf("reset %d connections in %v", n, time.Since(start))
		if n != many {
			t.Errorf("reset %d connections, want %d", n, many)
		}
		must(t, w.a.Unkeep(a.Addr))
		must(t, w.b.Unforward(a.Addr))
		for _, c := range conns {
			if _, err := c.r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("client has %v without sending, want a reset", err)
			}
		}
		count(w.a, 0)
		w.expectServer(fresh, w.b)
	})
}

// moved moves a VIP from a to b, and returns a connection with each.
func (w *world) moved(a Address) (ofA, ofB *conn) {
	w.t.Helper()
	w.a.take(a)
	ofA = w.dial(a)
	w.move(a, w.a, w.b)
	return ofA, w.dial(a)
}

func TestChain(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		ofA, ofB := w.moved(a)
		w.move(a, w.b, w.c)
		ofC := w.dial(a)
		w.expectServer(ofA, w.a)
		w.expectServer(ofB, w.b)
		w.expectServer(ofC, w.c)
		// And round: C's and B's connections by way of A.
		w.move(a, w.c, w.a)
		w.expectServer(w.dial(a), w.a)
		w.expectServer(ofA, w.a)
		w.expectServer(ofB, w.b)
		w.expectServer(ofC, w.c)
	})
}

func TestBackAndForth(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		ofA, ofB := w.moved(a)
		for range 3 {
			w.move(a, w.b, w.a)
			w.expectServer(ofA, w.a)
			w.expectServer(ofB, w.b)
			w.expectServer(w.dial(a), w.a)
			w.move(a, w.a, w.b)
			w.expectServer(ofA, w.a)
			w.expectServer(ofB, w.b)
			w.expectServer(w.dial(a), w.b)
		}
		if f := w.a.forwardsTo(a.Addr); f.IsValid() {
			t.Errorf("the former owner still forwards to %v", f)
		}
		// A connection that nobody knows ends at once, and does not go round.
		must(t, w.b.Unforward(a.Addr))
		w.expectReset(ofA)
		w.expectServer(ofB, w.b)
	})
}

// TestRing has two nodes forward to each other, as they may for a moment, and sends them
// packets of a connection that neither has: they have to come to an end.
func TestRing(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		ofA, ofB := w.moved(a)
		must(t, w.a.Forward(a.Addr, ports, w.b.own[familyOf(a.Addr)]))
		defer func() { check(t, w.a.Unforward(a.Addr)) }()
		w.expectServer(ofA, w.a)
		w.expectServer(ofB, w.b)

		const strays = 10
		client := netip.MustParseAddrPort(w.dial(a).LocalAddr().String())
		before := w.a.received() + w.b.received()
		must(t, w.client.Do(func() error {
			for i := range uint16(strays) {
				stray := netip.AddrPortFrom(client.Addr(), 1000+i) // no connection of the client's
				if err := Tickle(t.Context(), stray, []netip.AddrPort{netip.AddrPortFrom(a.Addr, port)}); err != nil {
					return err
				}
			}
			return nil
		}))
		// Nothing says that they have ended: what is received has to stay the same.
		last := uint64(0)
		until(t, "strays come to an end", func() bool {
			now := w.a.received() + w.b.received() - before
			if now > 100*strays {
				t.Fatalf("%d strays have been received %d times", strays, now)
			}
			rests := now == last && now >= strays*(hops-1)
			last = now
			time.Sleep(20 * time.Millisecond)
			return rests
		})
		t.Logf("%d strays were received %d times", strays, last)
		w.expectServer(ofA, w.a)
		w.expectServer(ofB, w.b)
	})
}

// received is how many frames have come to the node.
func (n *node) received() uint64 {
	n.t.Helper()
	return link(n.t, n.host).Attrs().Statistics.RxPackets
}

func TestSeveralVIPs(t *testing.T) {
	w := newWorld(t)
	all := []Address{vip4, other, vip6}
	olds := map[Address]*conn{}
	for _, a := range all {
		w.a.take(a)
		olds[a] = w.dial(a)
		w.move(a, w.a, w.b)
	}
	for _, a := range all {
		w.expectServer(olds[a], w.a)
		w.expectServer(w.dial(a), w.b)
	}
	// Ending one leaves the others alone.
	must(t, w.b.Unforward(other.Addr))
	must(t, w.a.Unkeep(other.Addr))
	w.expectReset(olds[other])
	w.expectServer(olds[vip4], w.a)
	w.expectServer(olds[vip6], w.a)
	// A wrong target and the right one again.
	must(t, w.b.Forward(vip4.Addr, ports, w.c.own[ipv4]))
	must(t, w.b.Forward(vip4.Addr, ports, w.a.own[ipv4]))
	w.expectServer(olds[vip4], w.a)
}

func TestClientsOnTheNodes(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		w.a.take(a)
		onGiver, onTaker, onThird := w.dialFrom(w.a.host, a), w.dialFrom(w.b.host, a), w.dialFrom(w.c.host, a)
		w.move(a, w.a, w.b)
		w.expectServer(onGiver, w.a)
		w.expectServer(onThird, w.a)
		w.expectReset(onTaker) // at once, where forwarding would have it hang
		w.expectServer(w.dialFrom(w.a.host, a), w.a)
		w.expectServer(w.dialFrom(w.b.host, a), w.b)
		w.expectServer(w.dialFrom(w.c.host, a), w.b)
		if _, err := w.a.Reset(a.Addr); err != nil {
			t.Fatal(err)
		}
		must(t, w.a.Unkeep(a.Addr))
		w.expectServer(w.dialFrom(w.a.host, a), w.b)
	})
}

// TestSilent checks that one who keeps does not speak for the VIP, even when asked or when
// it has to ask itself.
func TestSilent(t *testing.T) {
	w := newWorld(t)
	w.a.take(vip4)
	w.a.take(vip6)
	old4, old6 := w.dial(vip4), w.dial(vip6)
	w.move(vip4, w.a, w.b)
	w.move(vip6, w.a, w.b)
	claims := w.claims(w.a.port.MAC)
	forget := func(h *lab.Host, neighbour netip.Addr) {
		must(t, h.Netlink().NeighDel(&netlink.Neigh{LinkIndex: link(t, h).Attrs().Index, IP: neighbour.AsSlice()}))
	}
	for range 3 {
		for _, x := range []struct {
			a      Address
			c      *conn
			client string
		}{{vip4, old4, "10.77.0.200"}, {vip6, old6, "fd77::200"}} {
			forget(w.client, x.a.Addr)                      // the client has to ask for the VIP,
			forget(w.a.host, netip.MustParseAddr(x.client)) // the keeper for the client
			w.expectServer(x.c, w.a)
			w.expectServer(w.dial(x.a), w.b)
		}
	}
	if got := claims(); len(got) != 0 {
		t.Errorf("the keeper said: %v", got)
	}
}

// claims collects ARP from a MAC in which the sender is a VIP.
func (w *world) claims(mac net.HardwareAddr) (stop func() []string) {
	w.t.Helper()
	var c *packet.Conn
	must(w.t, w.client.Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, err = packet.Listen(ifi, packet.Datagram, unix.ETH_P_ARP, nil)
		return err
	}))
	var got []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			var p arp.Packet
			if p.UnmarshalBinary(b[:n]) != nil {
				continue
			}
			if bytes.Equal(p.SenderHardwareAddr, mac) && (p.SenderIP == vip4.Addr || p.SenderIP == other.Addr) {
				got = append(got, fmt.Sprintf("%v: %v is at %v", p.Operation, p.SenderIP, p.SenderHardwareAddr))
			}
		}
	}()
	return func() []string {
		_ = c.Close()
		<-done
		return got
	}
}

// traces is all that this package may have left on a node.
func (n *node) traces() []string {
	n.t.Helper()
	var found []string
	for _, f := range []family{ipv4, ipv6} {
		routes, err := n.host.Netlink().RouteListFiltered(f.netlink(), &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		must(n.t, err)
		for _, r := range routes {
			if r.Protocol == routeProtocol {
				found = append(found, "route "+r.Dst.String())
			}
		}
	}
	must(n.t, n.host.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := c.ListTables()
		for _, t := range tables {
			if strings.HasPrefix(t.Name, tableName) {
				found = append(found, fmt.Sprintf("table %d %s", t.Family, t.Name))
			}
		}
		return err
	}))
	slices.Sort(found)
	return found
}

func TestSweep(t *testing.T) {
	w := newWorld(t)
	for _, a := range []Address{vip4, vip6} {
		must(t, w.a.Keep(a.Addr))
		must(t, w.a.Forward(a.Addr, ports, w.b.own[familyOf(a.Addr)]))
	}
	want := []string{"route 10.77.0.100/32", "route fd77::100/128", "table 10 hamesh", "table 2 hamesh", "table 3 hamesh"}
	if got := w.a.traces(); !slices.Equal(got, want) {
		t.Fatalf("kernel has %q, want %q", got, want)
	}
	// As if the process had been killed: nothing is known any more.
	w.a.open()
	if got := w.a.traces(); !slices.Equal(got, want) {
		t.Fatalf("after another Open the kernel has %q, want %q", got, want)
	}
	for range 2 {
		must(t, w.a.Sweep())
		if got := w.a.traces(); len(got) != 0 {
			t.Fatalf("after a sweep the kernel has %q", got)
		}
	}
	// It works on, and leaves nothing when everything has ended properly either.
	w.a.take(vip4)
	old := w.dial(vip4)
	w.move(vip4, w.a, w.b)
	w.expectServer(old, w.a)
	for _, n := range []*node{w.a, w.b} {
		for range 2 {
			must(t, n.Unkeep(vip4.Addr))
			must(t, n.Unforward(vip4.Addr))
		}
		if got := n.traces(); len(got) != 0 {
			t.Errorf("%s: in the end the kernel has %q", n.name, got)
		}
	}
}

func TestHealsWhatOthersRemove(t *testing.T) {
	w := newWorld(t)
	w.a.take(vip4)
	old := w.dial(vip4)
	w.move(vip4, w.a, w.b)
	for _, n := range []*node{w.a, w.b} {
		must(t, n.host.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			c.FlushRuleset()
			return c.Flush()
		}))
		if slices.ContainsFunc(n.traces(), func(s string) bool { return strings.HasPrefix(s, "table") }) {
			t.Fatal("not flushed")
		}
	}
	must(t, w.a.Keep(vip4.Addr))
	must(t, w.b.Forward(vip4.Addr, ports, w.a.own[ipv4]))
	w.expectServer(old, w.a)
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	stranger := netip.MustParseAddr("10.77.0.102")
	own := w.b.own[ipv4]
	_, established := w.a.Established(stranger, port)
	_, reset := w.a.Reset(stranger)
	for name, err := range map[string]error{
		"Keep": w.a.Keep(stranger), "Unkeep": w.a.Unkeep(stranger), "Forward": w.a.Forward(stranger, ports, own),
		"Unforward": w.a.Unforward(stranger), "Established": established, "Reset": reset,
	} {
		if !errors.Is(err, ErrNotManaged) {
			t.Errorf("%s: %v, want ErrNotManaged", name, err)
		}
	}
	for name, err := range map[string]error{
		"no port":      w.a.Forward(vip4.Addr, nil, own),
		"port 0":       w.a.Forward(vip4.Addr, []uint16{0}, own),
		"no target":    w.a.Forward(vip4.Addr, ports, netip.Addr{}),
		"other family": w.a.Forward(vip4.Addr, ports, w.b.own[ipv6]),
		"to a VIP":     w.a.Forward(vip4.Addr, ports, other.Addr),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if got := w.a.traces(); len(got) != 0 {
		t.Errorf("kernel has %q", got)
	}
}

// with runs f on the node with these capabilities in effect and no others.
func (n *node) with(capabilities uint32, f func() error) error {
	return n.host.Do(func() error {
		header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var before [2]unix.CapUserData
		if err := unix.Capget(header, &before[0]); err != nil {
			return err
		}
		less := before
		less[0].Effective, less[1].Effective = capabilities, 0
		if err := unix.Capset(header, &less[0]); err != nil {
			return err
		}
		err := f()
		return errors.Join(err, unix.Capset(header, &before[0]))
	})
}

func TestCapabilities(t *testing.T) {
	w := newWorld(t)
	w.a.take(vip4)
	c := w.dial(vip4)
	everything := func(k *Kernel) error {
		_, err := k.Established(vip4.Addr, port)
		errs := []error{err}
		for _, a := range []Address{vip4, vip6} {
			errs = append(errs, k.Keep(a.Addr), k.Forward(a.Addr, ports, w.b.own[familyOf(a.Addr)]),
				k.Unforward(a.Addr), k.Unkeep(a.Addr))
		}
		errs = append(errs, k.Sweep())
		n, err := k.Reset(vip4.Addr)
		if err == nil && n != 1 {
			err = fmt.Errorf("reset %d connections, want 1", n)
		}
		return errors.Join(append(errs, err)...)
	}
	config := Config{Managed: []Address{vip4, vip6}, Log: hclog.NewNullLogger()}
	err := w.a.with(0, func() error {
		_, err := Open(config)
		return err
	})
	if !errors.Is(err, ErrPermission) {
		t.Errorf("with none: %v, want ErrPermission", err)
	}
	must(t, w.a.with(1<<unix.CAP_NET_ADMIN, func() error {
		k, err := Open(config)
		if err != nil {
			return err
		}
		defer k.Close()
		return everything(k)
	}))
	if err := c.echo(); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("client has %v, want a reset", err)
	}
}

func TestUnsupportedIsNamed(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOENT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT} {
		err := explain("nf_tables expression dup", fmt.Errorf("conn.Receive: %w", errno))
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "this kernel lacks nf_tables expression dup") {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := explain("nf_tables", unix.ENOBUFS); errors.Is(err, ErrUnsupported) {
		t.Errorf("a passing error: %v", err)
	}
}

// TestLatency measures what lies on the way of a move.
func TestLatency(t *testing.T) {
	w := newWorld(t)
	took := map[string][]time.Duration{}
	measure := func(name string, f func() error) {
		start := time.Now()
		must(t, f())
		took[name] = append(took[name], time.Since(start))
	}
	for range 50 {
		for _, a := range []Address{vip4, vip6} {
			f := fmt.Sprint(" ", a.Addr)
			measure("Keep"+f, func() error { return w.a.Keep(a.Addr) })
			measure("Forward"+f, func() error { return w.a.Forward(a.Addr, ports, w.b.own[familyOf(a.Addr)]) })
			measure("Established"+f, func() error { _, err := w.a.Established(a.Addr, port); return err })
			measure("Unforward"+f, func() error { return w.a.Unforward(a.Addr) })
			measure("Unkeep"+f, func() error { return w.a.Unkeep(a.Addr) })
		}
	}
	for name, all := range took {
		slices.Sort(all)
		t.Logf("%-24s first quartile %8v  median %8v  worst %8v", name, all[len(all)/4], all[len(all)/2], all[len(all)-1])
		// Far from the rule, so that only a change of kind fails on a busy machine.
		if median := all[len(all)/2]; median > 20*time.Millisecond {
			t.Errorf("%s takes %v", name, median)
		}
	}
}
