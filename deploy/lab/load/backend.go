//go:build linux

package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// Backend is a server that answers requests, sends and takes streams, and holds what is
// silent.
type Backend struct{ worker *worker }

// Served is what a backend has seen.
type Served struct {
	Open  int64 // connections now
	Asked int64 // connections on which something was asked, ever: a mere check of the port is none
}

// StartBackend starts a backend on every IPv4 address of the host. It ends with Close, or
// with the lab.
func StartBackend(h *lab.Host, port uint16) (*Backend, error) {
	w, err := startWorker(h, roleBackend, port)
	if err != nil {
		return nil, err
	}
	return &Backend{w}, nil
}

// Served returns what it has seen until now.
func (b *Backend) Served() (s Served, err error) {
	err = b.worker.do(struct{}{}, &s, 0)
	return s, err
}

// Close ends the backend, with every connection to it.
func (b *Backend) Close() error { return b.worker.close() }

const roleBackend = "load-backend"

func init() {
	lab.Role(roleBackend, func(args []string) int {
		if err := serveBackend(args); err != nil {
			return fatal(err)
		}
		return 0
	})
}

func serveBackend(args []string) error {
	var port uint16
	if len(args) != 1 {
		return errors.New("want one argument, a port")
	}
	if err := json.Unmarshal([]byte(args[0]), &port); err != nil {
		return fmt.Errorf("read the port: %w", err)
	}
	b, err := newBackend(port)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- b.run() }()
	go func() {
		failed <- serve(os.Stdin, os.Stdout, func(struct{}) (any, error) {
			return Served{Open: b.open.Load(), Asked: b.asked.Load()}, nil
		})
	}()
	return <-failed
}

type backend struct {
	epoll    *epoll
	listener int
	stream   int // the file that downloads are made of
	conns    []served
	buf      [16 * frame]byte
	answers  [16 * frame]byte

	open, asked atomic.Int64
}

// served is one connection, by its descriptor.
type served struct {
	op  byte // 0: nothing was asked yet
	got int  // of a request, in bytes
}

func newBackend(port uint16) (b *backend, err error) {
	b = &backend{}
	if b.epoll, err = newEpoll(); err != nil {
		return nil, err
	}
	if b.stream, err = endless(); err != nil {
		return nil, err
	}
	b.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(b.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(b.listener, &unix.SockaddrInet4{Port: int(port)}),
		unix.Listen(b.listener, unix.SOMAXCONN),
		b.epoll.add(b.listener, unix.EPOLLIN),
	)
	if err != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, err)
	}
	return b, nil
}

func (b *backend) run() error {
	for {
		events, err := b.epoll.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			if int(e.Fd) == b.listener {
				err = b.accept()
			} else {
				err = b.step(int(e.Fd), e.Events)
			}
			if err != nil {
				return err
			}
		}
	}
}

func (b *backend) accept() error {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(b.listener), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch {
		case again(errno):
			return nil
		case errno == unix.ECONNABORTED:
			continue
		case errno != 0:
			return fmt.Errorf("accept: %w", errno)
		}
		fd := int(n)
		for fd >= len(b.conns) {
			b.conns = append(b.conns, make([]served, 4096)...)
		}
		b.conns[fd] = served{}
		b.open.Add(1)
		if err := b.epoll.add(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

// step does what a connection is ready for. A connection that fails is closed; the error
// returned is the server's own.
func (b *backend) step(fd int, events uint32) error {
	switch b.conns[fd].op {
	case opDownload:
		if _, err := send(fd, b.stream); err != nil || events&(unix.EPOLLRDHUP|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			b.close(fd)
		}
	case opUpload:
		if _, end, _ := drop(fd); end {
			b.close(fd)
		}
	default:
		return b.read(fd)
	}
	return nil
}

func (b *backend) read(fd int) error {
	c := &b.conns[fd]
	n, err := unix.Read(fd, b.buf[:])
	if again(err) {
		return nil
	}
	if err != nil || n == 0 {
		b.close(fd)
		return nil
	}
	if c.op == 0 {
		c.op = b.buf[0]
		b.asked.Add(1)
	}
	if c.op == opDownload {
		return b.epoll.modify(fd, unix.EPOLLOUT|unix.EPOLLRDHUP)
	}
	if c.op == opUpload {
		return nil
	}
	c.got += n
	if answers := c.got / frame; answers > 0 {
		c.got %= frame
		if sent, err := unix.Write(fd, b.answers[:answers*frame]); err != nil || sent < answers*frame {
			b.close(fd)
		}
	}
	return nil
}

func (b *backend) close(fd int) {
	_ = unix.Close(fd) // what it says is of the connection, which has ended
	b.open.Add(-1)
}
