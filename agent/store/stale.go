package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// staleAfter is how often in a row a segment was sent again, in vain, on a connection that
	// is given up while the store does not answer: since some 1.4 s (RFC 6298, 5.5, from
	// 200 ms on).
	staleAfter = 3
	// backAfter is the same on a connection to a member that can be reached again: since
	// 600 ms. Where it is less, the kernel tries again soon.
	backAfter = 2
	// synSent is the state of a connection that is being made (TCP_SYN_SENT,
	// include/net/tcp_states.h): whoever makes it has a time limit.
	synSent = 2
	// backlog is how many members may have come back and not been looked at.
	backlog = 16
)

// backAt is when connections to a member are looked at that can be reached again: at once,
// and later, since it may still lack its own end of the path.
var backAt = []time.Duration{0, 100 * time.Millisecond, 300 * time.Millisecond, time.Second}

// PathBack says that a member can be reached again. Connections of the embedded store with it
// on which the kernel waits for its next try are ended, so that they are made anew: after an
// outage of half a minute that try may be as far away again (RFC 6298, 5.5), and until then
// the two could not agree on anything, though both are well. It does not block.
func (s *Store) PathBack(member netip.Addr) {
	select {
	case s.back <- member:
	default: // those that wait say enough: it is looked at all
	}
}

// unstick ends connections between etcd's members on which nothing gets through: to a member
// that can be reached again, and to any while the store does not answer. etcd means to time
// them out after 5 s, but the dialer with that time-out is not the one its transport uses
// (client/pkg/v3/transport, NewTimeoutTransport sets Dial beside DialContext).
func (s *Store) unstick(ctx context.Context, port uint16) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	type look struct {
		at     time.Time
		member netip.Addr
	}
	var looks []look
	told := false
	reset := func(least uint8, with netip.Addr) {
		n, err := resetStale(port, least, with)
		if err != nil && !told {
			told = true
			s.log.Warn("cannot reset connections between etcd's members on which nothing gets through", "error", err)
		}
		if n > 0 {
			s.log.Info("reset connections between etcd's members on which nothing got through", "connections", n)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case member := <-s.back:
			for _, after := range backAt {
				looks = append(looks, look{time.Now().Add(after), member})
			}
		case <-timer.C:
		case <-tick.C:
			if !s.available() {
				reset(staleAfter, netip.Addr{})
			}
		}
		next := time.Hour
		looks = slices.DeleteFunc(looks, func(l look) bool {
			left := time.Until(l.at)
			if left <= 0 {
				reset(backAfter, l.member)
				return true
			}
			next = min(next, left)
			return false
		})
		timer.Reset(next)
	}
}

// resetStale resets this host's connections from or to a port, with one other host or, where
// that is not valid, with any, on which a segment was sent again so often at least, and
// returns how many. It needs CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY.
func resetStale(port uint16, least uint8, with netip.Addr) (n int, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := netlink.SocketDiagTCPInfo(family)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return n, fmt.Errorf("list TCP connections: %w", err)
		}
		for _, c := range all {
			id := c.InetDiagMsg.ID
			if c.TCPInfo == nil || c.InetDiagMsg.State == synSent || c.TCPInfo.Retransmits < least || (id.SourcePort != port && id.DestinationPort != port) {
				continue
			}
			if other, ok := netip.AddrFromSlice(id.Destination); with.IsValid() && (!ok || other.Unmap() != with) {
				continue
			}
			if err := destroy(family, id); err != nil {
				return n, fmt.Errorf("reset a connection: %w", err)
			}
			n++
		}
	}
	return n, nil
}

// destroy has the kernel abort one connection (sock_diag(7), SOCK_DESTROY).
func destroy(family uint8, id netlink.SocketID) error {
	b := []byte{family, unix.IPPROTO_TCP, 0, 0} // struct inet_diag_req_v2
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint16(b, id.SourcePort)
	b = binary.BigEndian.AppendUint16(b, id.DestinationPort)
	for _, ip := range []net.IP{id.Source, id.Destination} {
		if family == unix.AF_INET {
			ip = append(ip.To4(), make([]byte, 12)...)
		}
		b = append(b, ip...)
	}
	b = binary.NativeEndian.AppendUint32(b, id.Interface)
	b = binary.NativeEndian.AppendUint32(b, id.Cookie[0])
	b = binary.NativeEndian.AppendUint32(b, id.Cookie[1])
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddRawData(b)
	if _, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
