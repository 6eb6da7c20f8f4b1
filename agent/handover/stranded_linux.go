package handover

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// EndStranded ends the TCP connections of this node whose local address is addr, if the node
// does not have it any more, neither on an interface nor by a route ([Kernel.Keep]), and
// returns how many. Without that both ends of a connection within the node hang: the kernel
// sends nothing from an address that is not local (net/ipv4/route.c, ip_route_output_key_hash),
// and tells nobody. Their processes get ECONNABORTED.
//
// Connections with other hosts at one of the spared local ports are left alone: they go on if
// the address comes back, and their clients are told by whoever else gets it.
//
// It needs CAP_NET_ADMIN. An error wraps ErrPermission, or ErrUnsupported where the kernel has
// no SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY).
func EndStranded(addr netip.Addr, spared ...uint16) (n int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("end connections whose local address %v has gone: %w", addr, err)
		}
	}()
	s := &sockets{}
	defer s.close()
	if err := s.openDiag(); err != nil {
		return 0, err
	}
	local, err := s.isLocal(addr)
	if err != nil || local {
		return 0, err
	}
	found, err := s.connections(addr, 0)
	for _, c := range found {
		if port, other := c.ends(); other != addr && slices.Contains(spared, port) {
			continue
		}
		if err := s.reset(c); err != nil {
			return n, err
		}
		n++
	}
	return n, err
}

// ends returns the local port and the other end's address, from struct inet_diag_sockid
// (linux/inet_diag.h).
func (c connection) ends() (port uint16, other netip.Addr) {
	port = binary.BigEndian.Uint16(c.id[:])
	if c.family == unix.AF_INET {
		return port, netip.AddrFrom4([4]byte(c.id[20:24]))
	}
	return port, netip.AddrFrom16([16]byte(c.id[20:36])).Unmap()
}

// isLocal says whether packets to an address are delivered on this node.
func (s *sockets) isLocal(addr netip.Addr) (bool, error) {
	routes, err := s.routes.RouteListFiltered(familyOf(addr).netlink(), &netlink.Route{
		Table: unix.RT_TABLE_LOCAL, Dst: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
	}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	if err != nil {
		return false, fmt.Errorf("list local routes: %w", err)
	}
	return len(routes) > 0, nil
}
