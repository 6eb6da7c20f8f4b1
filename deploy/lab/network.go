//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// labNS is the network namespace that the program itself lives in: the switch is there.
var labNS netns.NsHandle = -1

// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h: no link-local address.
const addrGenNone = 1

var errOutside = errors.New("not in the lab: call lab.Enter first")

// currentNS opens the calling thread's network namespace.
func currentNS() (netns.NsHandle, error) {
	// /proc/self would be the process's first thread, whichever asks.
	ns, err := netns.GetFromPath("/proc/thread-self/ns/net")
	if err != nil {
		return -1, fmt.Errorf("open network namespace: %w", err)
	}
	return ns, nil
}

// Host is one machine's network: an anonymous network namespace. It ends when it is
// closed and no process in it is left.
type Host struct {
	Name string

	ns    netns.NsHandle
	links *netlink.Handle
}

// NewHost makes a host with nothing but a loopback interface. IPv6 addresses on it are
// usable at once: duplicate address detection, a second on each new link, is off.
func NewHost(name string) (*Host, error) {
	if !inside {
		return nil, errOutside
	}
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result)
	go func() {
		// Never unlocked: the thread ends with this goroutine, and so nobody else
		// ever finds itself in this namespace.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{-1, fmt.Errorf("make a network namespace: %w", err)}
			return
		}
		ns, err := currentNS()
		made <- result{ns, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, r.err)
	}
	h := &Host{Name: name, ns: r.ns}
	if err := h.settle(); err != nil {
		return nil, errors.Join(fmt.Errorf("make host %s: %w", name, err), h.Close())
	}
	return h, nil
}

func (h *Host) settle() error {
	var err error
	if h.links, err = netlink.NewHandleAt(h.ns); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	lo, err := h.links.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.links.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	// Both are needed: the kernel skips detection only where both say so
	// (net/ipv6/addrconf.c, addrconf_dad_begin).
	for _, which := range []string{"all", "default"} {
		if err := h.Sysctl("net/ipv6/conf/"+which+"/accept_dad", "0"); err != nil {
			return err
		}
	}
	return nil
}

// Do runs f in the host's network: on the calling goroutine, whose thread is moved
// there and back. Goroutines that f starts are elsewhere; sockets that f opens stay in
// the host's network for ever. It returns f's error.
func (h *Host) Do(f func() error) (err error) {
	runtime.LockOSThread()
	back, err := currentNS()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		if e := netns.Set(back); e != nil {
			// The thread stays locked, so that it dies with its goroutine.
			err = errors.Join(err, fmt.Errorf("leave the network of %s: %w", h.Name, e))
		} else {
			runtime.UnlockOSThread()
		}
		err = errors.Join(err, back.Close())
	}()
	if err := netns.Set(h.ns); err != nil {
		return fmt.Errorf("enter the network of %s: %w", h.Name, err)
	}
	return f()
}

// Start starts cmd in the host's network. Waiting for it is the caller's business.
func (h *Host) Start(cmd *exec.Cmd) error { return h.Do(cmd.Start) }

// DialContext connects from the host, as net.Dialer.DialContext does. The address has
// to be a literal one: resolving a name would happen elsewhere.
func (h *Host) DialContext(ctx context.Context, d *net.Dialer, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := h.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens on the host, as net.Listen does.
func (h *Host) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// Netlink is a netlink handle inside the host's network, for the host's lifetime.
func (h *Host) Netlink() *netlink.Handle { return h.links }

// Sysctl sets a value under /proc/sys in the host's network, such as
// "net/ipv4/conf/all/arp_ignore".
func (h *Host) Sysctl(path, value string) error {
	return h.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0o644); err != nil {
			return fmt.Errorf("set %s: %w", path, err)
		}
		return nil
	})
}

// Close lets go of the host. Links to it go with the namespace, once no process is left in it.
func (h *Host) Close() error {
	if h.links != nil {
		h.links.Close()
		h.links = nil
	}
	if !h.ns.IsOpen() {
		return nil
	}
	if err := h.ns.Close(); err != nil {
		return fmt.Errorf("close host %s: %w", h.Name, err)
	}
	return nil
}

// Switch joins hosts as one Ethernet segment: a bridge without spanning tree and
// without multicast snooping, which forwards as soon as a port is up.
type Switch struct {
	name  string
	links *netlink.Handle

	mu     sync.Mutex
	ports  int
	blocks map[*block]struct{}
}

// NewSwitch makes a switch; name is an interface name of at most ten characters,
// since its ports are called after it.
func NewSwitch(name string) (*Switch, error) {
	if !inside {
		return nil, errOutside
	}
	links, err := netlink.NewHandleAt(labNS)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	s := &Switch{name: name, links: links, blocks: make(map[*block]struct{})}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	snooping := false // else neighbour discovery would wait for group reports
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := links.LinkAdd(bridge); err != nil {
		links.Close()
		return nil, fmt.Errorf("make switch %s: %w", name, err)
	}
	if err := s.up(bridge); err != nil {
		return nil, errors.Join(fmt.Errorf("make switch %s: %w", name, err), s.Close())
	}
	return s, nil
}

// up brings an interface of the switch up, without an address of its own.
func (s *Switch) up(l netlink.Link) error {
	if err := s.links.LinkSetIP6AddrGenMode(l, addrGenNone); err != nil {
		return fmt.Errorf("set address mode of %s: %w", l.Attrs().Name, err)
	}
	if err := s.links.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring %s up: %w", l.Attrs().Name, err)
	}
	return nil
}

// Close takes the switch away, its ports with it.
func (s *Switch) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.links == nil {
		return nil
	}
	var errs []error
	clear(s.blocks)
	errs = append(errs, s.applyBlocks())
	links, err := s.links.LinkList()
	errs = append(errs, err)
	for _, l := range links {
		if l.Attrs().Name == s.name || isPort(s.name, l.Attrs().Name) {
			if err := s.links.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("delete %s: %w", l.Attrs().Name, err))
			}
		}
	}
	s.links.Close()
	s.links = nil
	return errors.Join(errs...)
}

func isPort(bridge, name string) bool {
	var n int
	_, err := fmt.Sscanf(name, bridge+".%d", &n)
	return err == nil
}

// Port is a host's cable to a switch.
type Port struct {
	Host      *Host
	Interface string           // the host's end
	MAC       net.HardwareAddr // of the host's end

	sw   *Switch
	name string // the switch's end
}

// Attach gives the host an interface on the switch, up, with the given addresses
// (address and prefix length).
func (s *Switch) Attach(h *Host, ifname string, prefixes ...netip.Prefix) (*Port, error) {
	p, err := s.attach(h, ifname, nil, prefixes)
	if err != nil {
		return nil, fmt.Errorf("attach %s to %s: %w", h.Name, s.name, err)
	}
	return p, nil
}

// attach is Attach with a given MAC address; nil: the kernel picks one.
func (s *Switch) attach(h *Host, ifname string, mac net.HardwareAddr, prefixes []netip.Prefix) (*Port, error) {
	s.mu.Lock()
	s.ports++
	p := &Port{Host: h, Interface: ifname, sw: s, name: fmt.Sprintf("%s.%d", s.name, s.ports)}
	s.mu.Unlock()

	veth := netlink.NewVeth(netlink.NewLinkAttrs())
	veth.Name = p.name
	veth.PeerName = ifname
	veth.PeerHardwareAddr = mac
	veth.PeerNamespace = netlink.NsFd(h.ns)
	if err := s.links.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("make a cable: %w", err)
	}
	if err := p.Rejoin(); err != nil {
		return nil, err
	}
	if err := s.up(veth); err != nil {
		return nil, err
	}
	link, err := h.links.LinkByName(ifname)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", ifname, err)
	}
	p.MAC = link.Attrs().HardwareAddr
	if err := h.links.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", ifname, err)
	}
	for _, prefix := range prefixes {
		if err := h.AddAddress(ifname, prefix); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// AddAddress gives an interface of the host one more address.
func (h *Host) AddAddress(ifname string, prefix netip.Prefix) error {
	link, err := h.links.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("find %s: %w", ifname, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   prefix.Addr().AsSlice(),
		Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
	}}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.links.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add %s to %s: %w", prefix, ifname, err)
	}
	return nil
}

// DeleteAddress takes an address off an interface of the host.
func (h *Host) DeleteAddress(ifname string, prefix netip.Prefix) error {
	link, err := h.links.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("find %s: %w", ifname, err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   prefix.Addr().AsSlice(),
		Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
	}}
	if err := h.links.AddrDel(link, addr); err != nil {
		return fmt.Errorf("delete %s from %s: %w", prefix, ifname, err)
	}
	return nil
}

// Cut pulls the cable: nothing passes, and the host sees its carrier go.
func (p *Port) Cut() error { return p.change("cut", p.sw.links.LinkSetDown) }

// Mend plugs the cable in again after Cut.
func (p *Port) Mend() error { return p.change("mend", p.sw.links.LinkSetUp) }

// Isolate drops every frame to and from the host, which notices nothing by itself: its
// carrier stays.
func (p *Port) Isolate() error { return p.change("isolate", p.sw.links.LinkSetNoMaster) }

// Rejoin ends Isolate.
func (p *Port) Rejoin() error {
	return p.change("rejoin", func(l netlink.Link) error {
		bridge, err := p.sw.links.LinkByName(p.sw.name)
		if err != nil {
			return err
		}
		return p.sw.links.LinkSetMaster(l, bridge)
	})
}

// remove takes the cable away, with the host's interface.
func (p *Port) remove() error { return p.change("remove", p.sw.links.LinkDel) }

func (p *Port) change(what string, f func(netlink.Link) error) error {
	l, err := p.sw.links.LinkByName(p.name)
	if err == nil {
		err = f(l)
	}
	if err != nil {
		return fmt.Errorf("%s port %s of %s: %w", what, p.name, p.Host.Name, err)
	}
	return nil
}

// Frames says which frames are meant. The zero value means all.
type Frames struct {
	TCPPort uint16 // only TCP over IPv4 or IPv6 from or to this port; 0: any frame, ARP included
}

type block struct {
	from, to *Port
	frames   Frames
}

// Block silently drops the frames that the switch would pass from one port to another,
// in that direction only. The returned function ends it; calling that again does no harm.
func (s *Switch) Block(from, to *Port, frames Frames) (lift func() error, err error) {
	return s.block([]*block{{from, to, frames}})
}

// Partition silently drops the frames between ports of different groups, in both
// directions and from one instant on. The returned function is as Block's.
func (s *Switch) Partition(frames Frames, groups ...[]*Port) (lift func() error, err error) {
	var blocks []*block
	for i, froms := range groups {
		for j, tos := range groups {
			if i == j {
				continue
			}
			for _, from := range froms {
				for _, to := range tos {
					blocks = append(blocks, &block{from, to, frames})
				}
			}
		}
	}
	return s.block(blocks)
}

func (s *Switch) block(blocks []*block) (lift func() error, err error) {
	lift = func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.links == nil {
			return nil // closed: nothing is passed, and nothing blocked
		}
		for _, b := range blocks {
			delete(s.blocks, b)
		}
		return s.applyBlocks()
	}
	s.mu.Lock()
	for _, b := range blocks {
		s.blocks[b] = struct{}{}
	}
	err = s.applyBlocks()
	s.mu.Unlock()
	if err != nil {
		return nil, errors.Join(err, lift())
	}
	return lift, nil
}

// applyBlocks makes the kernel's rules those of s.blocks, in one transaction.
func (s *Switch) applyBlocks() error {
	c, err := nftables.New(nftables.WithNetNSFd(int(labNS)))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyBridge, Name: s.name}
	c.AddTable(table) // so that there is one to delete
	c.DelTable(table)
	if len(s.blocks) > 0 {
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{
			Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
		})
		for b := range s.blocks {
			for _, match := range b.frames.matches() {
				rule := append(ports(b.from.name, b.to.name), match...)
				c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(rule, &expr.Verdict{Kind: expr.VerdictDrop})})
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set blocks of switch %s: %w", s.name, err)
	}
	return nil
}

// ports matches frames that come in by one interface and would leave by another.
func ports(in, out string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: padded(in)},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: padded(out)},
	}
}

func padded(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// matches returns the alternatives that together match f.
func (f Frames) matches() [][]expr.Any {
	if f.TCPPort == 0 {
		return [][]expr.Any{nil}
	}
	var alternatives [][]expr.Any
	for _, offset := range []uint32{0, 2} { // source and destination port (RFC 9293 section 3.1)
		alternatives = append(alternatives, []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(f.TCPPort)},
		})
	}
	return alternatives
}
