package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// staleAfter is how often in a row a segment was sent again, in vain, on a connection that
// is given up: since some 1.4 s (RFC 6298, 5.5, from 200 ms on).
const staleAfter = 3

// unstick resets connections between etcd's members on which nothing gets through, while
// the store does not answer. etcd means to time them out after 5 s, but the dialer with
// that time-out is not the one its transport uses (client/pkg/v3/transport,
// NewTimeoutTransport sets Dial beside DialContext). So after a silent outage of a minute
// the kernel's next try would be a minute away, and the store too.
func (s *Store) unstick(ctx context.Context, port uint16) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	told := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if s.available() {
			continue
		}
		n, err := resetStale(port)
		if err != nil && !told {
			told = true
			s.log.Warn("cannot reset connections between etcd's members on which nothing gets through", "error", err)
		}
		if n > 0 {
			s.log.Debug("reset connections between etcd's members on which nothing got through", "connections", n)
		}
	}
}

// resetStale resets this host's connections from or to a port on which nothing gets
// through, and returns how many. It needs CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY.
func resetStale(port uint16) (n int, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := netlink.SocketDiagTCPInfo(family)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return n, fmt.Errorf("list TCP connections: %w", err)
		}
		for _, c := range all {
			id := c.InetDiagMsg.ID
			if c.TCPInfo == nil || c.TCPInfo.Retransmits < staleAfter || (id.SourcePort != port && id.DestinationPort != port) {
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
