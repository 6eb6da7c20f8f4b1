package proxy

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is the capacity asked of a pipe, the most that a user may have by default
	// (pipe(7), /proc/sys/fs/pipe-max-size): so many bytes go from one socket to the
	// other by two system calls. pipeLeast is what makes splicing worth while.
	pipeSize  = 1 << 20
	pipeLeast = 64 << 10
	// pipesMost bounds the pipes in use in the whole process. With pipeSize that is half
	// of what /proc/sys/fs/pipe-user-pages-soft grants an unprivileged user by default.
	pipesMost = 32
	// pipesSpare is how many unused ones a loop keeps.
	pipesSpare = 4
)

// pipesOpen counts the pipes of all loops.
var pipesOpen atomic.Int32

// pipe holds what has been spliced from one socket and not yet to the other one.
type pipe struct {
	r, w int
	size int
	n    int // bytes in it
}

// pipes are the unused ones of one loop.
type pipes []*pipe

// borrow returns an empty pipe; nil: there is none to be had.
func (p *pipes) borrow() *pipe {
	if n := len(*p); n > 0 {
		got := (*p)[n-1]
		*p = (*p)[:n-1]
		return got
	}
	if pipesOpen.Add(1) > pipesMost {
		pipesOpen.Add(-1)
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		pipesOpen.Add(-1)
		return nil
	}
	got := &pipe{r: fds[0], w: fds[1]}
	size, err := unix.FcntlInt(uintptr(got.w), unix.F_SETPIPE_SZ, pipeSize)
	if err != nil {
		// The user has too many pipe buffers; what it got instead may be tiny (pipe(7)).
		size, _ = unix.FcntlInt(uintptr(got.w), unix.F_GETPIPE_SZ, 0)
	}
	if got.size = size; size < pipeLeast {
		got.close()
		return nil
	}
	return got
}

// give takes a pipe back. One that is not empty is closed, with what is in it.
func (p *pipes) give(back *pipe) {
	if back.n > 0 || len(*p) >= pipesSpare {
		back.close()
		return
	}
	*p = append(*p, back)
}

func (p *pipes) close() {
	for _, unused := range *p {
		unused.close()
	}
	*p = nil
}

func (p *pipe) close() {
	closeSocket(p.r)
	closeSocket(p.w)
	pipesOpen.Add(-1)
}
