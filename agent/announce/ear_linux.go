package announce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ear hears claims to some addresses of one family on one interface.
type ear struct {
	conn   *packet.Conn
	groups *icmp.PacketConn // keeps the interface in multicast groups; nil for IPv4
	index  int
	parse  func(b []byte, from net.HardwareAddr) (claim, bool)
	buf    [1500]byte
}

// openEar begins to hear; the addresses are one at least, and all of one family. Set
// down and up again, the interface is heard as before; once it is gone, its ear is deaf.
func openEar(index int, addrs []netip.Addr) (*ear, error) {
	e, err := tryEar(index, addrs)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: %w", ErrPermission, err)
	}
	return e, err
}

func tryEar(index int, addrs []netip.Addr) (*ear, error) {
	e := &ear{index: index, parse: parseARP}
	filter, protocol := arpFilter(addrs), unix.ETH_P_ARP
	ifi := &net.Interface{Index: index}
	if addrs[0].Is6() {
		e.parse = parseND
		filter, protocol = ndFilter(addrs), unix.ETH_P_IPV6
		var err error
		if e.groups, err = joinGroups(ifi, addrs); err != nil {
			return nil, err
		}
	}
	raw, err := bpf.Assemble(filter)
	if err == nil {
		// A datagram socket's filter and reader see the packet without the Ethernet
		// header, so nothing depends on its length.
		e.conn, err = packet.Listen(ifi, packet.Datagram, protocol, &packet.Config{Filter: raw})
	}
	if err != nil {
		e.close()
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	return e, nil
}

// joinGroups joins the groups that those who probe for the addresses send to. A packet
// socket could open the interface's own filter to them; but only an IPv6 socket also
// tells the switches, which pass on only what somebody wants (RFC 4541).
func joinGroups(ifi *net.Interface, addrs []netip.Addr) (*icmp.PacketConn, error) {
	c, err := icmp.ListenPacket("ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, fmt.Errorf("open an ICMPv6 socket: %w", err)
	}
	var nothing ipv6.ICMPFilter // nobody reads here
	nothing.SetAll(true)
	err = c.IPv6PacketConn().SetICMPFilter(&nothing)
	var joined []netip.Addr
	for _, addr := range addrs {
		if err != nil {
			break
		}
		var group netip.Addr
		if group, err = ndp.SolicitedNodeMulticast(addr); err != nil || slices.Contains(joined, group) {
			continue
		}
		joined = append(joined, group)
		err = c.IPv6PacketConn().JoinGroup(ifi, &net.IPAddr{IP: group.AsSlice()})
	}
	if err != nil {
		_ = c.Close() // the error before is the one to tell
		return nil, fmt.Errorf("join the multicast groups of those who probe: %w", err)
	}
	return c, nil
}

// hear waits for the next claim. It ends with an error when the ear is closed, when a
// deadline of its connection has passed, and with ENETDOWN once each time the interface
// is set down or is found down: it may be called again then.
func (e *ear) hear() (claim, error) {
	for {
		n, from, err := e.conn.ReadFrom(e.buf[:])
		if err != nil {
			return claim{}, fmt.Errorf("listen: %w", err)
		}
		if c, ok := e.parse(e.buf[:n], from.(*packet.Addr).HardwareAddr); ok {
			return c, nil
		}
	}
}

func (e *ear) close() {
	if e.conn != nil {
		e.conn.Close()
	}
	if e.groups != nil {
		_ = e.groups.Close() // nothing was written that could be lost
	}
}
