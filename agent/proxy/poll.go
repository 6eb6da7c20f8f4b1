package proxy

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// poll is an epoll instance that one goroutine waits on, in the system call itself: Go's
// own poller, which the instance could be nested in, takes two more threads' wake-ups to
// get an event to its goroutine.
type poll struct {
	fd     int
	wakeFD int
	events [128]unix.EpollEvent
}

// Directions of interest; edge-triggered.
const (
	watchSocket = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
	watchWake   = unix.EPOLLIN | unix.EPOLLET
)

// token is what comes back with an event. EPOLL_CTL_ADD keeps it for a descriptor.
type token struct{ high, low int32 }

// wakeToken is that of the descriptor that ends a wait.
var wakeToken = token{high: -1}

func newPoll() (*poll, error) {
	p := &poll{wakeFD: -1}
	var err error
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	if p.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = p.add(p.wakeFD, watchWake, wakeToken)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	return p, nil
}

func (p *poll) close() {
	if p.wakeFD >= 0 {
		closeSocket(p.wakeFD)
	}
	closeSocket(p.fd)
}

func (p *poll) add(fd int, events uint32, t token) error {
	event := unix.EpollEvent{Events: events, Fd: t.high, Pad: t.low}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(p.fd), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&event)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("watching a descriptor: %w", errno)
	}
	return nil
}

func (p *poll) remove(fd int) {
	_ = unix.EpollCtl(p.fd, unix.EPOLL_CTL_DEL, fd, nil) // it may not be there
}

// wait fetches the events there are. Where there are none it waits for one, for some time:
// zero: not at all; negative: for ever.
func (p *poll) wait(most time.Duration) ([]unix.EpollEvent, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)), 0, 0, 0)
	if n == 0 && errno == 0 && most != 0 {
		ms := -1
		if most > 0 {
			ms = int((most + time.Millisecond - 1) / time.Millisecond)
		}
		// Only here Go is told that the thread may sleep.
		n, _, errno = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)), uintptr(ms), 0, 0)
	}
	switch errno {
	case 0:
		return p.events[:n], nil
	case unix.EINTR:
		return nil, nil
	default:
		return nil, errno
	}
}

// wake ends a wait, from any goroutine.
func (p *poll) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(p.wakeFD, one[:]) // edge-triggered: it need not be read, and does not fill up
}
