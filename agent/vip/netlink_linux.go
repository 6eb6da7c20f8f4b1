package vip

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Open connects to the kernel of the calling thread's network namespace, for good: all
// sockets are opened here. Only the managed addresses are ever touched; of each, the
// name, the address and the interface it belongs on count.
//
// Changing anything needs CAP_NET_ADMIN; opening and reading needs nothing.
func Open(log hclog.Logger, managed []Address) (*Kernel, error) {
	var tables [3]table
	var err error
	closeAll := func() {
		for _, t := range tables {
			t.close()
		}
	}
	for i := range tables {
		if tables[i], err = newTable(); err != nil {
			closeAll()
			return nil, err
		}
	}
	notices, err := newSubscription()
	if err != nil {
		closeAll()
		return nil, err
	}
	k, err := newKernel(log, managed, tables[0], tables[1], tables[2], notices)
	if err != nil {
		closeAll()
		notices.close()
		return nil, err
	}
	return k, nil
}

// replyTimeout bounds the wait for the kernel's answer. Rtnetlink works inside the
// sendto(2) that asks, so the answer is there at once; only lost memory makes it late.
const replyTimeout = 2 * time.Second

// table is one rtnetlink socket.
type table struct{ *netlink.Handle }

func newTable() (table, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return table{}, fmt.Errorf("open rtnetlink: %w", err)
	}
	if err := h.SetSocketTimeout(replyTimeout); err != nil {
		h.Close()
		return table{}, fmt.Errorf("limit rtnetlink's time: %w", err)
	}
	return table{h}, nil
}

func (t table) close() {
	if t.Handle != nil {
		t.Close()
	}
}

func (t table) index(iface string) (int, error) {
	l, err := t.LinkByName(iface)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return 0, fmt.Errorf("%s: %w", iface, ErrNoInterface)
	}
	if err != nil {
		return 0, fmt.Errorf("find interface %s: %w", iface, err)
	}
	return l.Attrs().Index, nil
}

// forever is the kernel's INFINITY_LIFE_TIME (include/net/addrconf.h).
const forever = math.MaxUint32

func (t table) list(match func(netip.Addr) bool) ([]place, error) {
	all, err := t.AddrList(nil, netlink.FAMILY_ALL)
	// A table that changed during the dump may be shown incompletely (NLM_F_DUMP_INTR).
	for i := 0; i < rounds && errors.Is(err, netlink.ErrDumpInterrupted); i++ {
		all, err = t.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var found []place
	for _, a := range all {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok || !match(addr) {
			continue
		}
		p := place{addr: addr, index: a.LinkIndex, iface: t.name(a.LinkIndex)}
		p.bits, _ = a.Mask.Size()
		if a.ValidLft != forever {
			p.valid = time.Duration(a.ValidLft) * time.Second
		}
		found = append(found, p)
	}
	return found, nil
}

// name of an interface; one that has just gone gets a name that no interface has.
func (t table) name(index int) string {
	l, err := t.LinkByIndex(index)
	if err != nil {
		return fmt.Sprintf("#%d", index)
	}
	return l.Attrs().Name
}

func (t table) put(p place) error {
	a := p.address()
	a.ValidLft = int(p.valid / time.Second)
	// Preferred for no time at all makes it deprecated, and so IPv6 takes it as a source
	// only where nothing else of that scope is left (RFC 6724, rule 3). IPv4 does not
	// look at that; there the source follows the route, and a /32 has none.
	a.PreferedLft = 0
	// Without it IPv6 makes a /128 route in the main table (net/ipv6/addrconf.c).
	a.Flags = unix.IFA_F_NOPREFIXROUTE
	if p.addr.Is6() {
		// Who owns the address is settled. Detection would hold it back for a second or
		// more, and fail for as long as the former holder is still there (RFC 4862, 5.4).
		a.Flags |= unix.IFA_F_NODAD
	}
	return explain(t.AddrReplace(nil, a))
}

// reached asks for the kernel's own route: package handover's would be gone too early.
func (t table) reached(p place) bool {
	if p.addr.Is4() {
		return true // at once
	}
	routes, err := t.RouteGetWithOptions(p.addr.AsSlice(), &netlink.RouteGetOptions{IifIndex: p.index})
	return err == nil && slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.Type == unix.RTN_LOCAL && r.Protocol == unix.RTPROT_KERNEL
	})
}

func (t table) remove(p place) error {
	switch err := explain(t.AddrDel(nil, p.address())); {
	case errors.Is(err, unix.EADDRNOTAVAIL), // no such address
		errors.Is(err, unix.ENODEV), // no such interface
		errors.Is(err, unix.ENXIO):  // an interface without IPv6 (net/ipv6/addrconf.c, inet6_addr_del)
		return nil
	case err != nil:
		return fmt.Errorf("take %v off %s: %w", p.addr, p.iface, err)
	}
	return nil
}

func (p place) address() *netlink.Addr {
	return &netlink.Addr{
		IPNet:     &net.IPNet{IP: p.addr.AsSlice(), Mask: net.CIDRMask(p.bits, p.addr.BitLen())},
		Scope:     unix.RT_SCOPE_UNIVERSE,
		LinkIndex: p.index,
	}
}

// explain adds what a person needs to know to the kernel's bare numbers.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, unix.EACCES): // net/ipv6/addrconf.c, ipv6_add_addr
		return fmt.Errorf("%w: %w", ErrNoIPv6, err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: %w", ErrNoInterface, err)
	}
	return err
}

// subscription is a socket for the kernel's notices, and one to read the state with.
type subscription struct {
	socket *nl.NetlinkSocket
	table
	names map[int]string // kept, since an address's last notice comes after its interface's
}

func newSubscription() (*subscription, error) {
	t, err := newTable()
	if err != nil {
		return nil, err
	}
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		t.close()
		return nil, fmt.Errorf("subscribe to rtnetlink: %w", err)
	}
	return &subscription{socket: s, table: t, names: make(map[int]string)}, nil
}

func (s *subscription) interrupt() { s.socket.Close() }

func (s *subscription) close() {
	s.socket.Close()
	s.table.close()
}

func (s *subscription) receive() ([]Change, error) {
	msgs, from, err := s.socket.Receive()
	if errors.Is(err, unix.ENOBUFS) {
		return nil, fmt.Errorf("%w: %w", errLost, err)
	}
	if err != nil {
		return nil, fmt.Errorf("receive from rtnetlink: %w", err)
	}
	if from.Pid != nl.PidKernel {
		return nil, nil // any local process may send to a netlink socket (netlink(7))
	}
	var changes []Change
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			if c, ok := s.addressChange(m.Header.Type, m.Data); ok {
				changes = append(changes, c)
			}
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			l, err := netlink.LinkDeserialize(nil, m.Data)
			if err != nil {
				return nil, fmt.Errorf("%w: parse a link: %w", errLost, err)
			}
			s.names[l.Attrs().Index] = l.Attrs().Name
			c := carrier(l)
			// Leaving a bridge sends RTM_DELLINK too, of family AF_BRIDGE.
			if m.Header.Type == unix.RTM_DELLINK && nl.DeserializeIfInfomsg(m.Data).Family == unix.AF_UNSPEC {
				c.Kind = CarrierDown
			}
			changes = append(changes, c)
		}
	}
	return changes, nil
}

// addressChange reads one address notice (rtnetlink(7), struct ifaddrmsg).
func (s *subscription) addressChange(typ uint16, data []byte) (Change, bool) {
	msg := nl.DeserializeIfAddrmsg(data)
	attrs, err := nl.ParseRouteAttr(data[msg.Len():])
	if err != nil {
		return Change{}, false
	}
	c := Change{Kind: Appeared, Interface: s.names[int(msg.Index)]}
	if typ == unix.RTM_DELADDR {
		c.Kind = Disappeared
	}
	if c.Interface == "" {
		c.Interface = s.name(int(msg.Index))
	}
	for _, a := range attrs {
		// IPv4 names the address itself IFA_LOCAL; IPv6 does so only beside a peer's,
		// and else says IFA_ADDRESS.
		if a.Attr.Type == unix.IFA_LOCAL || a.Attr.Type == unix.IFA_ADDRESS && !c.Addr.IsValid() {
			c.Addr, _ = netip.AddrFromSlice(a.Value)
		}
	}
	return c, c.Addr.IsValid()
}

func (s *subscription) snapshot(match func(netip.Addr) bool, interfaces []string) ([]Change, error) {
	if err := s.drain(); err != nil {
		return nil, err
	}
	links, err := s.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	places, err := s.list(match)
	if err != nil {
		return nil, err
	}
	var state []Change
	for _, p := range places {
		state = append(state, Change{Kind: Appeared, Addr: p.addr, Interface: p.iface})
	}
	clear(s.names)
	carriers := make(map[string]Kind)
	for _, l := range links {
		s.names[l.Attrs().Index] = l.Attrs().Name
		carriers[l.Attrs().Name] = carrier(l).Kind
	}
	for _, name := range interfaces {
		kind, ok := carriers[name]
		if !ok {
			kind = CarrierDown
		}
		state = append(state, Change{Kind: kind, Interface: name})
	}
	return state, nil
}

// drain drops what waits on the socket: it is older than the snapshot that follows, and
// what came after it may be lost. It is bounded, for the notices may never pause.
func (s *subscription) drain() error {
	defer func() { _ = s.socket.SetReceiveTimeout(&unix.Timeval{}) }()
	if err := s.socket.SetReceiveTimeout(&unix.Timeval{Usec: 1000}); err != nil {
		return fmt.Errorf("limit rtnetlink's time: %w", err)
	}
	for range 4096 {
		_, _, err := s.socket.Receive()
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS):
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, os.ErrClosed):
			return err
		default:
			return fmt.Errorf("receive from rtnetlink: %w", err)
		}
	}
	return nil
}

// carrier tells whether a link can carry frames: it was set up, and the lower layer says
// so too (netdevice(7), IFF_LOWER_UP).
func carrier(l netlink.Link) Change {
	const both = unix.IFF_UP | unix.IFF_LOWER_UP
	c := Change{Kind: CarrierDown, Interface: l.Attrs().Name}
	if l.Attrs().RawFlags&both == both {
		c.Kind = CarrierUp
	}
	return c
}
