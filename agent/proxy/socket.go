package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// goneAfter is how long a peer that does not answer is waited for.
const goneAfter = 30 * time.Second

type option struct{ level, name, value int }

// options are set on both sockets of a session. Those of clients have them from the socket
// that listens. Those of backends have the first one from the start, and the others, which
// are about what takes seconds, once a session has lasted for agedAfter: most of the many
// short ones never need them.
//
// Keep-alive notices a silent peer's death within goneAfter on an idle connection. There
// is no other limit on idleness: a watch may be silent for hours. The user timeout makes
// the kernel give up on a peer that leaves data unacknowledged for goneAfter. Without it
// that takes some 15 minutes (tcp(7), tcp_retries2), and keep-alive does not help, as the
// kernel sends no such probes while data is under way. It also ends a connection whose
// peer keeps its window shut for that long, and takes the place of a number of probes
// (net/ipv4/tcp_timer.c, tcp_keepalive_timer).
var options = []option{
	{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(goneAfter / 2 / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(goneAfter / 6 / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(goneAfter / time.Millisecond)},
}

// A connection with ackLater begins as if it were one of questions and answers already
// (tcp(7), TCP_QUICKACK). What a client sends first is acknowledged by the answer, and a
// backend's acceptance by what the client sends first, instead of by packets of their own:
// two or three of the twenty that a short connection takes. ackNow sends what is held back.
var (
	ackLater = option{unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0}
	ackNow   = option{unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1}
)

// listenOn binds a port on all addresses, IPv6 and IPv4, or on those of IPv4 where the
// kernel has no IPv6, and returns a socket that does not block.
func listenOn(port uint16) (int, error) {
	cfg := net.ListenConfig{
		Control: func(_, _ string, raw syscall.RawConn) error {
			var set error
			err := raw.Control(func(fd uintptr) { set = setOptions(int(fd)) })
			if err != nil {
				return err
			}
			return set
		},
	}
	// Multipath TCP is Go's default for listeners, but its sockets are not found as
	// TCP ones by those who look flows up in the kernel.
	cfg.SetMultipathTCP(false)
	listener, err := cfg.Listen(context.Background(), "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return -1, err
	}
	defer listener.Close()
	raw, err := listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, duplicated := -1, error(nil)
	if err := raw.Control(func(own uintptr) { fd, duplicated = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return -1, err
	}
	if duplicated != nil {
		return -1, duplicated
	}
	// Clients inherit it; listen(2) has taken it back if it was set before.
	if errno := setOption(fd, ackLater); errno != 0 {
		closeSocket(fd)
		return -1, os.NewSyscallError("setsockopt", errno)
	}
	return fd, nil
}

func setOptions(fd int) error {
	for _, o := range options {
		if errno := setOption(fd, o); errno != 0 {
			return fmt.Errorf("setting option %d of level %d of a socket: %w", o.name, o.level, errno)
		}
	}
	return nil
}

// The calls below never wait, since their sockets are non-blocking. So they do without
// telling Go's scheduler that this thread may block, which costs as much as the cheapest
// of them.

// accept takes the next connection from a listening socket, non-blocking too.
func accept(listener int) (int, netip.AddrPort, syscall.Errno) {
	var from unix.RawSockaddrInet6
	length := uint32(unsafe.Sizeof(from))
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&from)),
		uintptr(unsafe.Pointer(&length)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	return int(fd), addrPort(&from), 0
}

// addrPort returns what a socket's address says; a mapped IPv4 address as IPv4. The zone
// of a link-local address is left out, as it means nothing to anybody else.
func addrPort(from *unix.RawSockaddrInet6) netip.AddrPort {
	bytes := (*[28]byte)(unsafe.Pointer(from))
	port := uint16(bytes[2])<<8 | uint16(bytes[3]) // in network order (ip(7))
	if from.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(bytes[4:8])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(from.Addr).Unmap(), port)
}

// localAddr returns the local end of a socket; the zero AddrPort where it has none any more.
func localAddr(fd int) netip.AddrPort {
	var own unix.RawSockaddrInet6
	length := uint32(unsafe.Sizeof(own))
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&own)), uintptr(unsafe.Pointer(&length)))
	if errno != 0 {
		return netip.AddrPort{}
	}
	return addrPort(&own)
}

// target is an address in the kernel's form.
type target struct {
	raw    unix.RawSockaddrInet6
	length uintptr
}

func newTarget(to netip.AddrPort) target {
	t := target{length: unix.SizeofSockaddrInet6}
	bytes := (*[28]byte)(unsafe.Pointer(&t.raw))
	bytes[2], bytes[3] = byte(to.Port()>>8), byte(to.Port())
	if to.Addr().Is4() {
		t.raw.Family, t.length = unix.AF_INET, unix.SizeofSockaddrInet4
		copy(bytes[4:], to.Addr().AsSlice())
		return t
	}
	t.raw.Family, t.raw.Addr = unix.AF_INET6, to.Addr().As16()
	return t
}

func setOption(fd int, o option) syscall.Errno {
	value := int32(o.value)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(o.level), uintptr(o.name),
		uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	return errno
}

// connectTo makes a socket that is connecting, or connected, to a target.
func connectTo(to *target) (int, syscall.Errno) {
	s, _, errno := unix.RawSyscall(unix.SYS_SOCKET, uintptr(to.raw.Family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1, errno
	}
	errno = setOption(int(s), options[0])
	if errno == 0 {
		errno = setOption(int(s), ackLater)
	}
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&to.raw)), to.length)
	}
	if errno != 0 && errno != unix.EINPROGRESS {
		closeSocket(int(s))
		return -1, errno
	}
	return int(s), 0
}

func receive(fd int, buf []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// peek returns 1 if there is something to receive, 0 at the end of the stream.
func peek(fd int) (int, syscall.Errno) {
	var first byte
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&first)), 1, unix.MSG_PEEK, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func send(fd int, buf []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), unix.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// endOutput sends a FIN after all that has been sent.
func endOutput(fd int) syscall.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return errno
}

// closeSocket closes a descriptor; its number is free afterwards in any case (close(2)).
func closeSocket(fd int) {
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// abort closes a connection with an RST and drops what was not sent (socket(7),
// SO_LINGER with a time of zero).
func abort(fd int) {
	linger := unix.Linger{Onoff: 1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER,
		uintptr(unsafe.Pointer(&linger)), unsafe.Sizeof(linger), 0)
	closeSocket(fd)
}

// pendingError returns the error of a socket that no call has reported yet, and clears it.
func pendingError(fd int) syscall.Errno {
	var value int32
	length := uint32(unsafe.Sizeof(value))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR,
		uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&length)), 0)
	if errno == 0 {
		errno = syscall.Errno(value)
	}
	return errno
}

// hasInput reports whether a read would bring something, or the stream's end.
func hasInput(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&unix.POLLIN != 0
}
