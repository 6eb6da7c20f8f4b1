package proxy

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// poll is an epoll instance that one goroutine waits on.
//
// The epoll's own descriptor is watched by Go's network poller (epoll instances may be
// nested, epoll(7)), so that a goroutine with nothing to do waits like any other one: it
// occupies no thread, and the timers and connections of the rest of the agent do not wait
// for Go to notice that a thread is stuck in a system call.
type poll struct {
	fd     int
	file   *os.File // the same descriptor
	raw    syscall.RawConn
	wakeFD int
	events [128]unix.EpollEvent
	ready  int // of events
	failed syscall.Errno
	waited bool      // since it was last set to false
	rests  int       // times that pass was asked
	alarm  time.Time // when file's deadline is; zero: it has none
	// What is to be waited for, made once, since a closure for each wait would be garbage.
	fetch, pass func(fd uintptr) bool
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
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	p := &poll{fd: fd, wakeFD: -1}
	// Only non-blocking descriptors get to Go's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		closeSocket(fd)
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	p.file = os.NewFile(uintptr(fd), "epoll")
	if p.raw, err = p.file.SyscallConn(); err == nil {
		p.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err == nil {
		err = p.file.SetReadDeadline(time.Time{}) // it fails where Go cannot wait for the file
	}
	if err == nil {
		err = p.add(p.wakeFD, watchWake, wakeToken)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	p.fetch = func(uintptr) bool {
		p.ready, p.failed = p.collect()
		if p.ready == 0 && p.failed == 0 {
			p.waited = true
			return false
		}
		return true
	}
	p.pass = func(uintptr) bool {
		if p.rests++; p.rests%2 == 0 {
			return true
		}
		p.wake() // here, where Go already minds what happens
		return false
	}
	return p, nil
}

func (p *poll) close() {
	if p.wakeFD >= 0 {
		closeSocket(p.wakeFD)
	}
	p.file.Close()
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

// collect fetches the events there are, and does not wait.
func (p *poll) collect() (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)), 0, 0, 0)
	if errno == unix.EINTR {
		return 0, 0
	}
	return int(n), errno
}

// look fetches the events there are.
func (p *poll) look() ([]unix.EpollEvent, error) {
	n, errno := p.collect()
	if errno != 0 {
		return nil, errno
	}
	return p.events[:n], nil
}

// wait fetches the events there are, and waits for one until a time; zero: for ever.
func (p *poll) wait(until time.Time) ([]unix.EpollEvent, error) {
	// An alarm too early costs one vain turn. Setting it anew at each turn costs more.
	if !until.IsZero() && (p.alarm.IsZero() || until.Before(p.alarm)) {
		p.alarm = until
		if err := p.file.SetReadDeadline(until); err != nil {
			return nil, err
		}
	}
	p.ready = 0
	err := p.raw.Read(p.fetch)
	if os.IsTimeout(err) {
		p.alarm = time.Time{}
		return nil, p.file.SetReadDeadline(time.Time{})
	}
	if err == nil && p.failed != 0 {
		err = p.failed
	}
	return p.events[:max(p.ready, 0)], err
}

// rest gives way to whatever else is ready in this process, the network's events included,
// for which Go's scheduler looks when a goroutine waits: this one does for an event of its
// own making.
func (p *poll) rest() error {
	err := p.raw.Read(p.pass)
	if os.IsTimeout(err) {
		return nil // wait finds that out too
	}
	return err
}

// wake ends a wait, from any goroutine.
func (p *poll) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(p.wakeFD, one[:]) // edge-triggered: it need not be read, and does not fill up
}
