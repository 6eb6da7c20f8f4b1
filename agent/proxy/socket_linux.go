package proxy

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// goneAfter is how long a peer that does not answer is waited for.
const goneAfter = 30 * time.Second

// keepAlive notices a silent peer's death within goneAfter on an idle connection. There
// is no other limit on idleness: a watch may be silent for hours.
var keepAlive = net.KeepAliveConfig{
	Enable:   true,
	Idle:     goneAfter / 2,
	Interval: goneAfter / 6,
	Count:    3,
}

// setUserTimeout makes the kernel give up on a peer that leaves data unacknowledged for
// goneAfter. Without it that takes some 15 minutes (tcp(7), tcp_retries2), and
// keep-alive does not help, as the kernel sends no such probes while data is under way. It
// also ends a connection whose peer keeps its window shut for that long.
func setUserTimeout(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(goneAfter.Milliseconds()))
	})
	if err != nil {
		return err
	}
	return set
}

// read is read(2), repeated when a signal has interrupted it.
func read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// pendingError returns the error of a socket that no call has reported yet, and clears it.
func pendingError(fd int) error {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		return syscall.Errno(errno)
	}
	return err
}
