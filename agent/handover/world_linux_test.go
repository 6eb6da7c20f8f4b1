package handover

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/announce"
	"github.com/hamesh/hamesh/deploy/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}

const (
	port  = 16443
	limit = 5 * time.Second // for anything that should happen at once
)

var (
	vip4  = Address{"kube-api", netip.MustParseAddr("10.77.0.100"), "eth0"}
	vip6  = Address{"kube-api-6", netip.MustParseAddr("fd77::100"), "eth0"}
	other = Address{"other", netip.MustParseAddr("10.77.0.101"), "eth0"}
	ports = []uint16{port}
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}

// world is three nodes and a client on a switch.
type world struct {
	t       *testing.T
	a, b, c *node
	client  *lab.Host
	seen    *lab.Port // of the client
}

// node is one that serves and has a Kernel.
type node struct {
	*Kernel
	t         *testing.T
	name      string
	host      *lab.Host
	port      *lab.Port
	own       map[family]netip.Addr
	announcer *announce.Announcer
	announced chan announce.First
	epoch     int64
	ends      chan error // how each connection ended: nil for a FIN
}

func newWorld(t *testing.T) *world {
	t.Helper()
	sw, err := lab.NewSwitch("sw")
	must(t, err)
	t.Cleanup(func() { check(t, sw.Close()) })
	attach := func(name string, last int) (*lab.Host, *lab.Port) {
		host, err := lab.NewHost(name)
		must(t, err)
		t.Cleanup(func() { check(t, host.Close()) })
		p, err := sw.Attach(host, "eth0",
			netip.MustParsePrefix(fmt.Sprintf("10.77.0.%d/24", last)), netip.MustParsePrefix(fmt.Sprintf("fd77::%d/64", last)))
		must(t, err)
		until(t, "link-local address", func() bool {
			addrs, err := host.Netlink().AddrList(link(t, host), netlink.FAMILY_V6)
			must(t, err)
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					return true
				}
			}
			return false
		})
		return host, p
	}
	w := &world{t: t}
	w.client, w.seen = attach("client", 200)
	for i, n := range []**node{&w.a, &w.b, &w.c} {
		name := fmt.Sprintf("cp-%d", i+1)
		host, p := attach(name, 11+i)
		*n = &node{
			t: t, name: name, host: host, port: p,
			own: map[family]netip.Addr{
				ipv4: netip.MustParseAddr(fmt.Sprintf("10.77.0.%d", 11+i)),
				ipv6: netip.MustParseAddr(fmt.Sprintf("fd77::%d", 11+i)),
			},
			announced: make(chan announce.First, 64),
			ends:      make(chan error, 1024),
		}
		// What a Kubernetes node is like, and strict besides.
		for _, s := range []string{"ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv6/conf/all/forwarding"} {
			must(t, host.Sysctl("net/"+s, "1"))
		}
		must(t, host.Do((*n).firewall))
		(*n).open()
		(*n).serve()
		(*n).announce()
	}
	return w
}

func link(t *testing.T, h *lab.Host) netlink.Link {
	t.Helper()
	l, err := h.Netlink().LinkByName("eth0")
	must(t, err)
	return l
}

// firewall drops what connection tracking takes for invalid, as many do.
func (n *node) firewall() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "firewall"})
	for _, hook := range []*nftables.ChainHook{nftables.ChainHookPrerouting, nftables.ChainHookOutput} {
		in := c.AddChain(&nftables.Chain{
			Name: fmt.Sprint("hook", *hook), Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: hook, Priority: nftables.ChainPriorityMangle,
		})
		c.AddRule(&nftables.Rule{Table: table, Chain: in, Exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitINVALID), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
	}
	return c.Flush()
}

func (n *node) open() {
	n.t.Helper()
	must(n.t, n.host.Do(func() (err error) {
		n.Kernel, err = Open(Config{Managed: []Address{vip4, vip6, other}, Log: hclog.NewNullLogger()})
		return err
	}))
	k := n.Kernel
	n.t.Cleanup(k.Close)
}

// serve says the node's name on each connection and echoes what comes; a connection that
// begins with 'u' gets the SHA-256 of the rest at its end instead.
func (n *node) serve() {
	n.t.Helper()
	l, err := n.host.Listen("tcp", fmt.Sprintf(":%d", port))
	must(n.t, err)
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	n.t.Cleanup(func() {
		cancel()
		check(n.t, l.Close())
		group.Wait()
	})
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
				defer conn.Close()
				err := n.talk(conn)
				if ctx.Err() == nil {
					n.ends <- err
				}
			})
		}
	})
}

func (n *node) talk(conn net.Conn) error {
	if _, err := fmt.Fprintln(conn, n.name); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	first, err := r.Peek(1)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if first[0] != 'u' {
		// Not io.Copy to conn: splicing would not touch this program's memory.
		_, err := io.Copy(struct{ io.Writer }{conn}, r)
		return err
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, r); err != nil {
		return err
	}
	_, err = fmt.Fprintln(conn, hex.EncodeToString(hash.Sum(nil)))
	return err
}

func (n *node) announce() {
	n.announcer = announce.New(hclog.NewNullLogger(), announce.Config{
		LeaseTTL:  time.Second,
		Announced: func(f announce.First) { n.announced <- f },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- n.host.Do(func() error { return n.announcer.Run(ctx) })
	}()
	n.t.Cleanup(func() {
		cancel()
		check(n.t, <-done)
	})
}

// on puts the VIP on; off takes it off.
func (n *node) on(a Address) {
	n.t.Helper()
	must(n.t, n.host.AddAddress("eth0", netip.PrefixFrom(a.Addr, a.Addr.BitLen())))
	if a.Addr.Is6() {
		// The kernel makes the local route a moment later, from a work queue.
		until(n.t, "local route", func() bool {
			routes, err := n.host.Netlink().RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
			must(n.t, err)
			for _, r := range routes {
				if r.Dst != nil && r.Dst.IP.Equal(a.Addr.AsSlice()) && r.Protocol != routeProtocol {
					return true
				}
			}
			return false
		})
	}
}

func (n *node) off(a Address) {
	n.t.Helper()
	must(n.t, n.host.Netlink().AddrDel(link(n.t, n.host), &netlink.Addr{IPNet: &net.IPNet{
		IP: a.Addr.AsSlice(), Mask: net.CIDRMask(a.Addr.BitLen(), a.Addr.BitLen()),
	}}))
}

// tell announces the VIP and waits until the announcement is out.
func (n *node) tell(a Address) {
	n.t.Helper()
	n.epoch++
	n.announcer.Start(announce.Target{VIP: a.VIP, Addr: a.Addr, Interface: a.Interface}, n.epoch)
	for {
		select {
		case f := <-n.announced:
			if f.VIP == a.VIP {
				return
			}
		case <-time.After(limit):
			n.t.Fatal("not announced")
		}
	}
}

// take is the first owner's way to a VIP.
func (n *node) take(a Address) {
	n.t.Helper()
	n.on(a)
	n.tell(a)
}

// move moves a VIP as package doc says, with the rule for those who see a new owner.
func (w *world) move(a Address, from, to *node) {
	w.t.Helper()
	f := familyOf(a.Addr)
	from.announcer.Stop(a.VIP)
	must(w.t, from.Keep(a.Addr))
	from.off(a)
	must(w.t, to.Forward(a.Addr, ports, from.own[f]))
	for _, n := range []*node{w.a, w.b, w.c} {
		if n.forwardsTo(a.Addr) == to.own[f] {
			must(w.t, n.Unforward(a.Addr))
		}
	}
	to.on(a)
	must(w.t, to.Unkeep(a.Addr))
	to.tell(a)
}

func (n *node) forwardsTo(a netip.Addr) netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.forwards[a].to
}

// conn is a client's connection to a VIP.
type conn struct {
	*net.TCPConn
	t      *testing.T
	r      *bufio.Reader
	server string // by name
	n      int
}

func (w *world) dial(a Address) *conn {
	w.t.Helper()
	return w.dialFrom(w.client, a)
}

func (w *world) dialFrom(h *lab.Host, a Address) *conn {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	d := &net.Dialer{}
	raw, err := h.DialContext(ctx, d, "tcp", netip.AddrPortFrom(a.Addr, port).String())
	must(w.t, err)
	w.t.Cleanup(func() { _ = raw.Close() }) // some are closed in the test
	must(w.t, raw.SetDeadline(time.Now().Add(10*limit)))
	c := &conn{TCPConn: raw.(*net.TCPConn), t: w.t, r: bufio.NewReader(raw)}
	c.server, err = c.r.ReadString('\n')
	must(w.t, err)
	c.server = strings.TrimSuffix(c.server, "\n")
	return c
}

// echo sends a line and gets it back.
func (c *conn) echo() error {
	c.n++
	line := fmt.Sprintf("line %d\n", c.n)
	if _, err := io.WriteString(c, line); err != nil {
		return err
	}
	got, err := c.r.ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("sent %q, got %q", line, got)
	}
	return err
}

func (c *conn) mustEcho() {
	c.t.Helper()
	if err := c.echo(); err != nil {
		c.t.Fatalf("connection with %s: %v", c.server, err)
	}
}

func (w *world) expectServer(c *conn, n *node) {
	w.t.Helper()
	if c.server != n.name {
		w.t.Fatalf("served by %s, want %s", c.server, n.name)
	}
	c.mustEcho()
}

func (w *world) expectReset(c *conn) {
	w.t.Helper()
	if err := c.echo(); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		w.t.Fatalf("connection with %s: %v, want a reset", c.server, err)
	}
}
