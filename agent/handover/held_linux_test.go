package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// control calls f with a connection's descriptor.
func control(t *testing.T, c syscall.Conn, f func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	var failed error
	must(t, raw.Control(func(fd uintptr) { failed = f(int(fd)) }))
	must(t, failed)
}

// unacked returns how many segments of a connection have not been acknowledged.
func unacked(t *testing.T, c *net.TCPConn) (n uint32) {
	t.Helper()
	control(t, c, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			n = info.Unacked
		}
		return err
	})
	return n
}

// Nothing is acknowledged on a connection that bears the mark, however much was sent, and
// all of it when the mark is off; connections without it notice nothing.
func TestHoldBack(t *testing.T) {
	w := newWorld(t)
	const held = port + 1
	for _, a := range []Address{vip4, vip6} {
		w.a.on(a)
		must(t, w.a.HoldBack([]uint16{port, held}))
		w.expectServer(w.dial(a), w.a)

		l, err := w.a.host.Listen("tcp", fmt.Sprintf(":%d", held))
		must(t, err)
		mark := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, HeldMark) }
		control(t, l.(*net.TCPListener), mark)
		raw, err := w.client.DialContext(context.Background(), &net.Dialer{Timeout: limit}, "tcp", netip.AddrPortFrom(a.Addr, held).String())
		must(t, err)
		client := raw.(*net.TCPConn)
		_, err = client.Write(make([]byte, 3000))
		must(t, err)
		server, err := l.Accept()
		must(t, err)
		time.Sleep(300 * time.Millisecond)
		if unacked(t, client) == 0 {
			t.Errorf("%v: what was sent on a connection that is held back was acknowledged", a.Addr)
		}
		control(t, server.(*net.TCPConn), func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0) })
		until(t, "acknowledged", func() bool { return unacked(t, client) == 0 })
		for _, c := range []interface{ Close() error }{client, server, l} {
			must(t, c.Close())
		}
	}
	must(t, w.a.EndHoldBack())
	must(t, w.a.HoldBack(ports))
	must(t, w.a.Sweep())
	if got := w.a.traces(); len(got) != 0 {
		t.Errorf("after a sweep the kernel has %q", got)
	}
}

// Both ends of a connection within a node end with the address, unless it is here or kept.
func TestEndStranded(t *testing.T) {
	w := newWorld(t)
	stranded := func(a Address, spared ...uint16) (n int) {
		t.Helper()
		must(t, w.a.host.Do(func() (err error) {
			n, err = EndStranded(a.Addr, spared...)
			return err
		}))
		return n
	}
	for _, a := range []Address{vip4, vip6} {
		w.a.on(a)
		within, remote := w.dialFrom(w.a.host, a), w.dial(a)
		if n := stranded(a); n != 0 {
			t.Fatalf("%v: %d connections ended though the address is here", a.Addr, n)
		}
		must(t, w.a.Keep(a.Addr))
		w.a.off(a)
		if n := stranded(a); n != 0 {
			t.Fatalf("%v: %d connections ended though they are kept", a.Addr, n)
		}
		within.mustEcho()
		must(t, w.a.Unkeep(a.Addr))
		if n := stranded(a, port); n != 2 { // both ends
			t.Errorf("%v: %d connections ended, want 2", a.Addr, n)
		}
		if err := within.echo(); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("%v: within the node: %v, want it to be aborted", a.Addr, err)
		}
		w.a.on(a)
		remote.mustEcho() // it was spared
		w.a.off(a)
		if n := stranded(a); n != 1 {
			t.Errorf("%v: %d connections ended, want 1", a.Addr, n)
		}
		must(t, remote.Close())
	}
}
