package announce

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// sendTimeout bounds the wait for room in a socket's send buffer.
const sendTimeout = 20 * time.Millisecond

// sockets are what announcements go out by, one per interface and family. They stay
// open: opening one costs more than sending.
type sockets struct {
	links *netlink.Handle
	arp   map[string]*arpSocket
	ndp   map[string]*ndpSocket
}

type arpSocket struct {
	*packet.Conn
	index int
}

type ndpSocket struct {
	*ndp.Conn
	index int
	mac   net.HardwareAddr
}

func openWire() (wire, error) {
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	return &sockets{links, make(map[string]*arpSocket), make(map[string]*ndpSocket)}, nil
}

func (s *sockets) close() {
	for _, c := range s.arp {
		c.Close()
	}
	for _, c := range s.ndp {
		c.Close()
	}
	s.links.Close()
}

// announce looks the interface up each time: it may have been replaced by another of
// that name, and its MAC may have changed (a bond that fails over does that).
func (s *sockets) announce(t Target) error {
	l, err := s.links.LinkByName(t.Interface)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", t.Interface, err)
	}
	ifi := &net.Interface{
		Index: l.Attrs().Index, Name: l.Attrs().Name, MTU: l.Attrs().MTU,
		HardwareAddr: l.Attrs().HardwareAddr, Flags: l.Attrs().Flags,
	}
	if ifi.Flags&net.FlagUp == 0 {
		// The kernel would take the frame and drop it without a word.
		return fmt.Errorf("interface %s: %w", t.Interface, unix.ENETDOWN)
	}
	if t.Addr.Is4() {
		err = s.announceARP(t.Addr, ifi)
	} else {
		err = s.announceNDP(t.Addr, ifi)
	}
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: %w", ErrPermission, err)
	}
	if err != nil {
		return fmt.Errorf("announce %v on %s: %w", t.Addr, t.Interface, err)
	}
	return nil
}

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// announceARP sends both forms of gratuitous ARP, since some systems heed only one.
func (s *sockets) announceARP(addr netip.Addr, ifi *net.Interface) error {
	c := s.arp[ifi.Name]
	if c != nil && c.index != ifi.Index {
		c.Close()
		c = nil
		delete(s.arp, ifi.Name)
	}
	if c == nil {
		var err error
		if c, err = openARP(ifi); err != nil {
			return err
		}
		s.arp[ifi.Name] = c
	}
	for _, form := range []struct {
		op     arp.Operation
		target net.HardwareAddr
	}{
		// RFC 5227 section 3 with 2.1.1: the announcement is a request whose target
		// hardware address is ignored and should be zero.
		{arp.OperationRequest, make(net.HardwareAddr, len(broadcast))},
		// Linux takes a reply as gratuitous only if its target hardware address is the
		// sender's (net/ipv4/arp.c, arp_is_garp).
		{arp.OperationReply, ifi.HardwareAddr},
	} {
		p, err := arp.NewPacket(form.op, ifi.HardwareAddr, addr, form.target, addr)
		if err != nil {
			return fmt.Errorf("make an ARP packet from MAC %v: %w", ifi.HardwareAddr, err)
		}
		b, err := p.MarshalBinary()
		if err != nil {
			return fmt.Errorf("make an ARP packet: %w", err)
		}
		if err := c.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
			return fmt.Errorf("limit the time to send: %w", err)
		}
		if _, err := c.WriteTo(b, &packet.Addr{HardwareAddr: broadcast}); err != nil {
			return fmt.Errorf("send ARP: %w", err)
		}
	}
	return nil
}

func openARP(ifi *net.Interface) (*arpSocket, error) {
	// A packet socket's protocol is both what it sends and what it receives (packet(7)).
	// Nobody reads here, so the filter drops what is received before it is queued.
	nothing, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		return nil, fmt.Errorf("assemble a filter: %w", err)
	}
	// A datagram socket has the kernel write the Ethernet header, with the interface's
	// MAC as the source and whatever tags the device adds.
	c, err := packet.Listen(ifi, packet.Datagram, unix.ETH_P_ARP, &packet.Config{Filter: nothing})
	if err != nil {
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	return &arpSocket{c, ifi.Index}, nil
}

func (s *sockets) announceNDP(addr netip.Addr, ifi *net.Interface) error {
	c := s.ndp[ifi.Name]
	if c != nil && (c.index != ifi.Index || !bytes.Equal(c.mac, ifi.HardwareAddr)) {
		c.Close()
		c = nil
		delete(s.ndp, ifi.Name)
	}
	if c == nil {
		var err error
		if c, err = openNDP(ifi); err != nil {
			return err
		}
		s.ndp[ifi.Name] = c
	}
	// RFC 4861, 7.2.6: unsolicited, to all nodes. Override makes neighbours replace the
	// MAC that they know; Linux has no lock time for these (net/ipv6/ndisc.c).
	na := &ndp.NeighborAdvertisement{
		Override:      true,
		TargetAddress: addr,
		Options:       []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: ifi.HardwareAddr}},
	}
	err := c.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err == nil {
		err = c.WriteTo(na, nil, netip.IPv6LinkLocalAllNodes())
	}
	if err != nil {
		// The socket is bound to a link-local address that may have gone: the interface
		// loses its IPv6 addresses whenever it is set down.
		c.Close()
		delete(s.ndp, ifi.Name)
		return fmt.Errorf("send a neighbour advertisement: %w", err)
	}
	return nil
}

func openNDP(ifi *net.Interface) (*ndpSocket, error) {
	// RFC 4861, 4.4 wants an address of the interface as the source. The VIP itself would
	// do, but the node's own link-local address is there before and after it.
	// The interface goes by its number, which an address's zone may be: by name, package
	// net would take an index up to a minute old from its cache (net/interface.go,
	// ipv6ZoneCache), and so miss an interface that has been replaced.
	numbered := *ifi
	numbered.Name = strconv.Itoa(ifi.Index)
	c, _, err := ndp.Listen(&numbered, ndp.LinkLocal)
	if err != nil {
		return nil, fmt.Errorf("open a neighbour discovery socket on a link-local address: %w", err)
	}
	var nothing ipv6.ICMPFilter // nobody reads here
	nothing.SetAll(true)
	if err := c.SetICMPFilter(&nothing); err != nil {
		c.Close()
		return nil, fmt.Errorf("filter neighbour discovery: %w", err)
	}
	return &ndpSocket{c, ifi.Index, bytes.Clone(ifi.HardwareAddr)}, nil
}
