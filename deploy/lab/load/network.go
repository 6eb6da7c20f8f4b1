//go:build linux

package load

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// Own makes every address of a prefix one of the host's, without listing any: the route
// "local PREFIX dev lo" is what the kernel itself keeps for each address (ip-route(8)).
func Own(h *lab.Host, prefix netip.Prefix) error {
	lo, err := h.Netlink().LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo of %s: %w", h.Name, err)
	}
	err = h.Netlink().RouteAdd(&netlink.Route{
		LinkIndex: lo.Attrs().Index, Dst: network(prefix),
		Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
	})
	if err != nil {
		return fmt.Errorf("make %s local to %s: %w", prefix, h.Name, err)
	}
	return nil
}

// Reach lets a host find a prefix that another one owns, by one of the other's addresses
// on their common segment: one neighbour entry then stands for all of the prefix.
func Reach(h *lab.Host, prefix netip.Prefix, by netip.Addr) error {
	if err := h.Netlink().RouteAdd(&netlink.Route{Dst: network(prefix), Gw: by.AsSlice()}); err != nil {
		return fmt.Errorf("route %s of %s by %s: %w", prefix, h.Name, by, err)
	}
	return nil
}

func network(p netip.Prefix) *net.IPNet {
	p = p.Masked()
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
