//go:build linux

package load

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// frame is the length of a request and of its answer, in bytes. The first byte of a
// connection says what is wanted on it.
const frame = 64

const (
	opAnswer   = 'a' // an answer to each request
	opDownload = 'd' // bytes without end
	opUpload   = 'u' // none: what comes is dropped
)

// bulk is how much of a stream is moved by one system call, in bytes.
const bulk = 1 << 20

// epoll is an epoll instance (epoll(7)).
type epoll struct {
	fd     int
	events [512]unix.EpollEvent
}

func newEpoll() (*epoll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll instance: %w", err)
	}
	return &epoll{fd: fd}, nil
}

func (e *epoll) add(fd int, events uint32) error {
	return e.control(unix.EPOLL_CTL_ADD, fd, events)
}

func (e *epoll) modify(fd int, events uint32) error {
	return e.control(unix.EPOLL_CTL_MOD, fd, events)
}

func (e *epoll) control(op, fd int, events uint32) error {
	if err := unix.EpollCtl(e.fd, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("watch a connection: %w", err)
	}
	return nil
}

// wait returns what has happened, at the latest after a time; negative: however long it
// takes. epoll_wait(2) knows milliseconds only, which is coarse for thousands of events
// a second.
func (e *epoll) wait(atMost time.Duration) ([]unix.EpollEvent, error) {
	var limit *unix.Timespec
	if atMost >= 0 {
		t := unix.NsecToTimespec(int64(atMost))
		limit = &t
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(e.fd),
			uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), uintptr(unsafe.Pointer(limit)), 0, 0)
		switch errno {
		case 0:
			return e.events[:n], nil
		case unix.EINTR: // by the Go scheduler; that the time begins anew is soon made up for
			if atMost >= 0 {
				return nil, nil
			}
		default:
			return nil, fmt.Errorf("wait for events: %w", errno)
		}
	}
}

// endless is a file whose bytes a stream is made of, so that none is copied on the way
// into a socket.
func endless() (fd int, err error) {
	fd, err = unix.MemfdCreate("stream", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("make a file in memory: %w", err)
	}
	content := make([]byte, bulk)
	for i := range content {
		content[i] = opUpload
	}
	if _, err := unix.Write(fd, content); err != nil {
		return -1, fmt.Errorf("fill a file in memory: %w", err)
	}
	return fd, nil
}

// send moves what fits of a stream into a socket and returns how much that was.
func send(fd, from int) (int, error) {
	var at int64
	n, err := unix.Sendfile(fd, from, &at, bulk)
	if again(err) {
		return 0, nil
	}
	return n, err
}

// drop takes what there is of a stream out of a socket and returns how much that was. The
// bytes are not copied (tcp(7), MSG_TRUNC).
func drop(fd int) (n int, end bool, err error) {
	r, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), 0, bulk, unix.MSG_TRUNC, 0, 0)
	switch {
	case again(errno):
		return 0, false, nil
	case errno != 0:
		return 0, true, errno
	}
	return int(r), r == 0, nil
}

func again(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// Descriptors lets this process, and those that it starts from now on, open as many files
// as are wanted, and returns how many they may open: only the privileged may have more
// than was allowed them (getrlimit(2), CAP_SYS_RESOURCE).
func Descriptors(wanted uint64) (allowed uint64, err error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	most := max(limit.Max, wanted)
	err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most})
	if errors.Is(err, unix.EPERM) {
		most = limit.Max
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most})
	}
	if err != nil {
		return 0, fmt.Errorf("raise the limit of open files: %w", err)
	}
	return most, nil
}

func fatal(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}
