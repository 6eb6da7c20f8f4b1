package announce

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv6"
)

// Offsets in an ARP packet for IPv4 on Ethernet (RFC 826), and in an IPv6 packet with
// ICMPv6 next (RFC 8200; RFC 4861, 4.3 and 4.4).
const (
	arpProtocol = 2 // with the lengths of both kinds of address
	arpSender   = 14
	arpTarget   = 24

	ip6Next       = 6
	ip6HopLimit   = 7
	ip6Source     = 8
	ip6HeaderSize = 40
	icmpType      = ip6HeaderSize // with the code
	ndTarget      = icmpType + 8
)

const (
	arpIPv4OnEthernet = 0x0800_06_04
	icmpv6            = 58
)

// claim is what one frame says.
type claim struct {
	addr netip.Addr
	mac  net.HardwareAddr
	kind Kind
}

// arpFilter lets through what speaks as one of the addresses, or probes for one.
func arpFilter(addrs []netip.Addr) []bpf.Instruction {
	p := require(arpProtocol, 4, arpIPv4OnEthernet)
	p = append(p, accept(arpSender, addrs)...)
	p = append(p, require(arpSender, 4, 0)...)
	p = append(p, accept(arpTarget, addrs)...)
	return append(p, bpf.RetConstant{Val: 0})
}

// ndFilter does so for neighbour discovery. It looks for the ICMPv6 header right behind
// the IPv6 header, where every system puts it.
func ndFilter(addrs []netip.Addr) []bpf.Instruction {
	na := append(accept(ndTarget, addrs), bpf.RetConstant{Val: 0})
	p := require(ip6Next, 1, icmpv6)
	// What has passed a router has a lower one (RFC 4861, 7.1).
	p = append(p, require(ip6HopLimit, 1, ndp.HopLimit)...)
	p = append(p,
		bpf.LoadAbsolute{Off: icmpType, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(ipv6.ICMPTypeNeighborAdvertisement) << 8, SkipTrue: 1},
		bpf.Jump{Skip: uint32(len(na))})
	p = append(p, na...)
	p = append(p, require(icmpType, 2, uint32(ipv6.ICMPTypeNeighborSolicitation)<<8)...)
	p = append(p, accept(ip6Source, addrs)...)
	for word := uint32(0); word < 16; word += 4 {
		p = append(p, require(ip6Source+word, 4, 0)...)
	}
	p = append(p, accept(ndTarget, addrs)...)
	return append(p, bpf.RetConstant{Val: 0})
}

// require drops the frame unless it has this value there.
func require(off uint32, size int, val uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: off, Size: size},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: val, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
}

// accept lets the frame through if it has one of the addresses there.
func accept(off uint32, addrs []netip.Addr) []bpf.Instruction {
	var p []bpf.Instruction
	for _, addr := range addrs {
		for b, at := addr.AsSlice(), off; len(b) > 0; b, at = b[4:], at+4 {
			p = append(p,
				bpf.LoadAbsolute{Off: at, Size: 4},
				bpf.JumpIf{
					Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(b),
					SkipTrue: uint8(2*(len(b)/4-1) + 1), // the words to come, and the return
				})
		}
		p = append(p, bpf.RetConstant{Val: 1 << 16}) // all of the frame
	}
	return p
}

// parseARP reads an ARP packet that has passed arpFilter; false if it claims nothing.
func parseARP(b []byte, _ net.HardwareAddr) (claim, bool) {
	var p arp.Packet
	if err := p.UnmarshalBinary(b); err != nil {
		return claim{}, false
	}
	switch {
	case p.SenderIP == p.TargetIP:
		return claim{p.SenderIP, p.SenderHardwareAddr, Announcement}, true
	case !p.SenderIP.IsUnspecified():
		return claim{p.SenderIP, p.SenderHardwareAddr, Answer}, true
	default:
		return claim{p.TargetIP, p.SenderHardwareAddr, Probing}, p.Operation == arp.OperationRequest
	}
}

// parseND reads an IPv6 packet that has passed ndFilter, and came from this MAC. What is
// malformed claims nothing: everybody ignores it (RFC 4861, 7.1).
func parseND(b []byte, from net.HardwareAddr) (claim, bool) {
	if len(b) < ip6HeaderSize {
		return claim{}, false
	}
	source := netip.AddrFrom16([16]byte(b[ip6Source:]))
	body := b[ip6HeaderSize:]
	size := int(binary.BigEndian.Uint16(b[4:]))
	if size > len(body) {
		return claim{}, false
	}
	m, err := ndp.ParseMessage(body[:size])
	if err != nil {
		return claim{}, false
	}
	switch m := m.(type) {
	case *ndp.NeighborAdvertisement:
		kind := Announcement
		if m.Solicited || source == m.TargetAddress {
			kind = Answer
		}
		return claim{m.TargetAddress, linkLayer(m.Options, ndp.Target, from), kind}, true
	case *ndp.NeighborSolicitation:
		if source.IsUnspecified() {
			return claim{m.TargetAddress, from, Probing}, true
		}
		return claim{source, linkLayer(m.Options, ndp.Source, from), Answer}, true
	}
	return claim{}, false
}

// linkLayer returns the MAC that the options name, or else the one given.
func linkLayer(options []ndp.Option, direction ndp.Direction, otherwise net.HardwareAddr) net.HardwareAddr {
	for _, o := range options {
		if l, ok := o.(*ndp.LinkLayerAddress); ok && l.Direction == direction {
			return l.Addr
		}
	}
	return otherwise
}
