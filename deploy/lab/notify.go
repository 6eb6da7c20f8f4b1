//go:build linux

package lab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// notices is a service manager's side of sd_notify(3), as far as the lab has to know.
type notices struct{ conn *net.UnixConn }

// listenForNotices calls mainPID whenever a service says that another process is its main
// one from now on.
func listenForNotices(path string, mainPID func(pid int)) (*notices, error) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listen for notices: %w", err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			for line := range strings.Lines(string(b[:n])) {
				if value, ok := strings.CutPrefix(strings.TrimSpace(line), "MAINPID="); ok {
					if pid, err := strconv.Atoi(value); err == nil {
						mainPID(pid)
					}
				}
			}
		}
	}()
	return &notices{conn}, nil
}

func (n *notices) path() string { return n.conn.LocalAddr().String() }

func (n *notices) close() error {
	if n == nil {
		return nil
	}
	if err := n.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// follow returns the process that goes on in place of this one. Whoever launched the first
// of the line waits for it too, as they are one process group.
func (p *process) follow(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("follow process %d: %w", pid, err)
	}
	found, err := os.FindProcess(pid)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	next := &process{cmd: &exec.Cmd{Args: p.cmd.Args, Process: found}, log: p.log, done: make(chan struct{})}
	go func() {
		defer close(next.done)
		defer func() { _ = unix.Close(fd) }()
		// Readable when it has ended (pidfd_open(2)).
		for err := error(unix.EINTR); errors.Is(err, unix.EINTR); {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
	}()
	return next, nil
}
