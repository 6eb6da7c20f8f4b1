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

// poll is an epoll instance that one goroutine waits on, in one of two ways.
//
// While events come one soon after the other it waits in the system call itself, without
// telling Go's scheduler, and keeps its processor meanwhile (see threads). Go's own poller,
// which an epoll instance can be nested in (epoll(7)), takes the wake-ups of two more threads
// to get an event to its goroutine: a busy machine stands idle for a tenth of the time.
//
// With nothing to do it waits by Go's poller all the same. Where a thread is in a system
// call, Go looks after its processor every 20 µs at first, and for 10 ms: that cost an agent
// at rest more than its heartbeats did.
type poll struct {
	fd     int
	wakeFD int
	last   time.Time     // when wait has returned
	gap    time.Duration // since it had returned before that
	events [128]unix.EpollEvent
	ready  int // of events
	failed syscall.Errno

	// file is another epoll instance, which Go's poller watches. It tells of fd's events only
	// while the goroutine waits that way: each event would wake Go's threads otherwise.
	// While there are many events in a row fd is not even in it, since that makes
	// EPOLL_CTL_ADD dearer; to put it in takes the kernel a look at all that fd watches.
	file   *os.File
	nested bool            // fd is in it
	rapid  int             // events in a row that were not waited for that way
	outer  int             // its descriptor
	raw    syscall.RawConn // its
	alarm  time.Time       // when its deadline is; zero: it has none
	look   func(uintptr) bool
}

const (
	// lull is how long it takes without an event until no more is expected soon.
	lull = time.Millisecond
	// manyRapid is how many events in a row make a busy time.
	manyRapid = 1000
)

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
	p := &poll{fd: -1, wakeFD: -1}
	if err := p.open(); err != nil {
		p.close()
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	return p, nil
}

func (p *poll) open() (err error) {
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if p.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	if err = p.add(p.wakeFD, watchWake, wakeToken); err != nil {
		return err
	}
	if p.outer, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err = unix.SetNonblock(p.outer, true); err != nil { // Go's poller takes no others
		closeSocket(p.outer)
		return err
	}
	p.file = os.NewFile(uintptr(p.outer), "epoll")
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return err
	}
	p.look = func(uintptr) bool { return p.fetch(0) }
	return p.file.SetReadDeadline(time.Time{}) // fails where Go cannot wait for it
}

func (p *poll) close() {
	if p.file != nil {
		p.file.Close()
	}
	for _, fd := range []int{p.wakeFD, p.fd} {
		if fd >= 0 {
			closeSocket(fd)
		}
	}
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
// zero: not at all; negative: for ever. It may return without any before that.
func (p *poll) wait(most time.Duration) ([]unix.EpollEvent, error) {
	first := time.Duration(0)
	if most != 0 && p.gap < lull {
		first = lull
		if p.rapid == 0 {
			// Go's poller has lent its thread to this goroutine, which keeps it now. A
			// goroutine that becomes ready has Go wake another one, which polls when it has
			// nothing else to do; else nobody would for 10 ms.
			go func() {}()
		}
	}
	var err error
	if !p.fetch(first) && (most < 0 || most > first) {
		p.rapid = 0
		err = p.park(most)
	} else if first > 0 {
		if p.rapid++; p.rapid == manyRapid && p.nested {
			p.nested = false
			err = unix.EpollCtl(p.outer, unix.EPOLL_CTL_DEL, p.fd, nil)
		}
	}
	if err == nil && p.failed != 0 {
		err = p.failed
	}
	now := time.Now()
	p.last, p.gap = now, now.Sub(p.last)
	return p.events[:p.ready], err
}

// fetch is epoll_wait(2); it waits for whole milliseconds at most. It reports whether there
// is anything, or nothing more to wait for.
func (p *poll) fetch(most time.Duration) bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)),
		uintptr(most/time.Millisecond), 0, 0)
	p.ready, p.failed = int(n), errno
	if errno != 0 {
		p.ready = 0
	}
	if errno == unix.EINTR {
		p.failed = 0
	}
	return p.ready > 0 || p.failed != 0
}

// park waits for events by Go's poller.
func (p *poll) park(most time.Duration) error {
	// An alarm too early costs one vain turn. Setting it anew at each turn costs more.
	if until := time.Now().Add(most); most > 0 && (p.alarm.IsZero() || until.Before(p.alarm)) {
		p.alarm = until
		if err := p.file.SetReadDeadline(until); err != nil {
			return err
		}
	}
	op := unix.EPOLL_CTL_MOD
	if !p.nested {
		p.nested, op = true, unix.EPOLL_CTL_ADD
	}
	if err := unix.EpollCtl(p.outer, op, p.fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return err
	}
	err := p.raw.Read(p.look)
	if e := unix.EpollCtl(p.outer, unix.EPOLL_CTL_MOD, p.fd, &unix.EpollEvent{}); e != nil {
		return e
	}
	if os.IsTimeout(err) {
		p.alarm = time.Time{}
		return p.file.SetReadDeadline(time.Time{})
	}
	return err
}

// wake ends a wait, from any goroutine.
func (p *poll) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(p.wakeFD, one[:]) // edge-triggered: it need not be read, and does not fill up
}
