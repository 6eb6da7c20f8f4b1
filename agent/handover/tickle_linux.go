package handover

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// At most tickleBurst segments at once, and a pause after them: 20,000 in a second, which
// neither the link of the new owner notices nor the answers to them.
const (
	tickleBurst = 100
	ticklePause = 5 * time.Millisecond
)

// Tickle tells clients that nobody serves their connections with the VIP any more: it sends
// each a bare acknowledgement in the VIP's name, of nothing they have sent. Their kernels
// answer with what they expect (RFC 9293, 3.10.7.4: an unacceptable segment), that answer comes
// to this node, which has no such connection, and its kernel resets it. So a client that only
// waits learns in a round trip what keep-alive would tell it in minutes.
//
// The VIP has to be on here and announced. Where unknown packets are forwarded, the node at the
// end of that resets them, or knows the connection, which then goes on. A client without that
// connection is not harmed: its kernel sends a reset here. A kernel answers for the same
// connection once in half a second at most (tcp_invalid_ratelimit).
//
// It needs CAP_NET_RAW, returns early when ctx ends, and takes a millisecond for 20 clients.
func Tickle(ctx context.Context, vip netip.AddrPort, clients []netip.AddrPort) error {
	domain := unix.AF_INET
	if vip.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return explain("open a raw socket", err)
	}
	defer func() { _ = unix.Close(fd) }() // nothing is buffered that could fail
	if err := deafen(fd); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(vip.Addr())); err != nil {
		return fmt.Errorf("speak as %v: %w", vip.Addr(), err)
	}
	var failed error
	for i, client := range clients {
		if i > 0 && i%tickleBurst == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(ticklePause):
			}
		}
		// One client that cannot be reached must not keep the news from the others.
		if err := unix.Sendto(fd, acknowledgement(vip, client), 0, sockaddr(client.Addr())); err != nil && failed == nil {
			failed = fmt.Errorf("tickle %v: %w", client, err)
		}
	}
	return failed
}

// deafen has the kernel drop what comes for a raw socket, which gets a copy of every TCP
// segment for its address, into a buffer that nobody reads. shutdown(2) does not: raw
// sockets take no notice of it (raw_rcv, net/ipv4/raw.c).
func deafen(fd int) error {
	nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K} // accept 0 bytes (socket(7), SO_ATTACH_FILTER)
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing}); err != nil {
		return fmt.Errorf("stop listening: %w", err)
	}
	return nil
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Addr: a.As16()}
}

// acknowledgement is a TCP header with nothing but the flag ACK (RFC 9293, 3.1).
func acknowledgement(from, to netip.AddrPort) []byte {
	const length, flagACK, window = 20, 1 << 4, 1024
	var h []byte
	h = binary.BigEndian.AppendUint16(h, from.Port())
	h = binary.BigEndian.AppendUint16(h, to.Port())
	h = append(h, make([]byte, 8)...) // sequence and acknowledgement numbers
	h = append(h, length/4<<4, flagACK)
	h = binary.BigEndian.AppendUint16(h, window)
	h = append(h, make([]byte, 4)...) // checksum and urgent pointer

	// The pseudo header of IPv4 (RFC 9293, 3.1) and that of IPv6 (RFC 8200, 8.1) have the
	// same words that are not zero.
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint16(pseudo, length)
	pseudo = binary.BigEndian.AppendUint16(pseudo, unix.IPPROTO_TCP)
	sum := uint32(0)
	for _, part := range [][]byte{pseudo, h} {
		for ; len(part) > 0; part = part[2:] {
			sum += uint32(binary.BigEndian.Uint16(part))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[16:], ^uint16(sum))
	return h
}
