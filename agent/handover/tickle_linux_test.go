package handover

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTickle has a node die with idle connections: their clients learn it from the node
// that takes over, those of that node itself do not suffer.
func TestTickle(t *testing.T) {
	both(t, func(t *testing.T, a Address) {
		w := newWorld(t)
		w.a.take(a)
		var idle []*conn
		var clients []netip.AddrPort
		for range 300 {
			c := w.dial(a)
			idle = append(idle, c)
			clients = append(clients, c.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort())
		}
		w.a.announcer.Stop(a.VIP)
		must(t, w.a.port.Cut())
		w.b.take(a)
		alive := w.dial(a)
		w.expectServer(alive, w.b)

		// Without the news nobody would know.
		must(t, idle[0].SetReadDeadline(time.Now().Add(100*time.Millisecond)))
		if _, err := idle[0].r.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("before it is tickled a client has %v", err)
		}
		start := time.Now()
		must(t, w.b.host.Do(func() error {
			return Tickle(context.Background(), netip.AddrPortFrom(a.Addr, port), clients)
		}))
		sent := time.Since(start)
		for _, c := range idle {
			must(t, c.SetReadDeadline(time.Now().Add(limit)))
			if _, err := c.r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("a tickled client has %v, want a reset", err)
			}
		}
		t.Logf("%d clients were told in %v and knew after %v", len(idle), sent, time.Since(start))

		// A connection that lives is not harmed. This node's connection tracking may know
		// it, and refuse to send such a segment.
		err := w.b.host.Do(func() error {
			return Tickle(context.Background(), netip.AddrPortFrom(a.Addr, port),
				[]netip.AddrPort{alive.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort()})
		})
		if err != nil && !errors.Is(err, unix.EPERM) {
			t.Error(err)
		}
		alive.mustEcho()
	})
}

// A socket that only sends keeps nothing of what others send; shutting it down would not do.
func TestDeafen(t *testing.T) {
	here := netip.AddrFrom4([4]byte{127, 8, 7, 6})
	open := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		must(t, err)
		t.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}
	deaf, shut := open(), open()
	must(t, deafen(deaf))
	if err := unix.Shutdown(shut, unix.SHUT_RD); err != nil && !errors.Is(err, unix.ENOTCONN) {
		t.Fatal(err)
	}
	for _, fd := range []int{deaf, shut} {
		must(t, unix.Bind(fd, sockaddr(here)))
	}
	if c, err := net.Dial("tcp", netip.AddrPortFrom(here, 9).String()); err == nil {
		_ = c.Close()
	}
	waiting := func(fd int) bool {
		n, _, err := unix.Recvfrom(fd, make([]byte, 64), 0)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		return n > 0
	}
	if waiting(deaf) {
		t.Error("segments of others wait in a socket that nobody reads")
	}
	if !waiting(shut) {
		t.Error("shutdown would have been enough")
	}
}
