package announce

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"
)

// probeWaits are how long to listen after each probe, and once more: the last read finds
// what came while the process slept through the end of the one before.
var probeWaits = []time.Duration{150 * time.Millisecond, 150 * time.Millisecond, 90 * time.Millisecond, 10 * time.Millisecond}

// Probe asks the segment whether anybody has the address, by three probes in 300 ms, and
// listens for 100 ms more. It returns the MAC of the first that answers for the address or
// announces it, at once; at the end, of somebody who is only probing for it as well, which
// may be another member; or nil. What comes from the interface's own MAC does not count,
// so a holder may ask whether it is the only one.
//
// RFC 5227, 1.1 takes 4 to 7 s for this and RFC 4862, 5.4 one or two, for the slowest
// links and hosts; but the VIP has no holder meanwhile, and a host on a data centre's
// wire answers within a millisecond. The risk is a stranger who answers later, or whose
// switch port does not pass frames yet: he is heard by the [Listener] once he speaks.
//
// The error is ctx's, or [ErrPermission], or syscall.ENETDOWN where the interface is down
// or has no carrier, or another of the sockets. Sockets are opened in the network
// namespace of the calling thread.
func Probe(ctx context.Context, target Target) (net.HardwareAddr, error) {
	mac, err := probe(ctx, target)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("probe for %v on %s: %w", target.Addr, target.Interface, err)
	}
	return mac, nil
}

func probe(ctx context.Context, target Target) (net.HardwareAddr, error) {
	ifi, err := net.InterfaceByName(target.Interface)
	if err != nil {
		return nil, fmt.Errorf("find the interface: %w", err)
	}
	if ifi.Flags&net.FlagRunning == 0 {
		return nil, unix.ENETDOWN // a silence that means nothing
	}
	question, to, err := probeFrame(target.Addr, ifi.HardwareAddr)
	if err != nil {
		return nil, fmt.Errorf("make a probe from MAC %v: %w", ifi.HardwareAddr, err)
	}
	e, err := openEar(ifi.Index, []netip.Addr{target.Addr})
	if err != nil {
		return nil, err
	}
	defer e.close()
	defer context.AfterFunc(ctx, e.close)()

	var rival net.HardwareAddr
	for i, wait := range probeWaits {
		if i < len(probeWaits)-1 {
			if _, err := e.conn.WriteTo(question, &packet.Addr{HardwareAddr: to}); err != nil {
				return nil, fmt.Errorf("send a probe: %w", err)
			}
		}
		if err := e.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return nil, fmt.Errorf("limit the time to listen: %w", err)
		}
		for {
			c, err := e.hear()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, err
			}
			if bytes.Equal(c.mac, ifi.HardwareAddr) {
				continue
			}
			if c.kind != Probing {
				return c.mac, nil
			}
			rival = c.mac
		}
	}
	return rival, nil
}

// probeFrame makes a probe, and says which MAC it goes to.
func probeFrame(addr netip.Addr, mac net.HardwareAddr) (b []byte, to net.HardwareAddr, err error) {
	if addr.Is4() {
		p, err := arp.NewPacket(arp.OperationRequest, mac, netip.IPv4Unspecified(), make(net.HardwareAddr, len(broadcast)), addr)
		if err != nil {
			return nil, nil, err
		}
		b, err = p.MarshalBinary()
		return b, broadcast, err
	}
	group, err := ndp.SolicitedNodeMulticast(addr)
	if err != nil {
		return nil, nil, err
	}
	// By hand: an ICMPv6 socket does not send from the unspecified address.
	body, err := ndp.MarshalMessageChecksum(&ndp.NeighborSolicitation{TargetAddress: addr}, netip.IPv6Unspecified(), group)
	if err != nil {
		return nil, nil, err
	}
	b = make([]byte, ip6HeaderSize, ip6HeaderSize+len(body))
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(body)))
	b[ip6Next], b[ip6HopLimit] = icmpv6, ndp.HopLimit
	g := group.As16()
	copy(b[ip6Source+16:], g[:])
	return append(b, body...), net.HardwareAddr{0x33, 0x33, g[12], g[13], g[14], g[15]}, nil // RFC 2464 section 7
}
