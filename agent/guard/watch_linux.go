package guard

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// watch sleeps until the agent, whose child this process is, ends or releases the guard;
// it calls watching once it would notice either. It needs Linux 5.3 (pidfd_open(2)).
func watch(agent int, commands *os.File, watching func()) (ending, error) {
	fd, err := unix.PidfdOpen(agent, 0)
	if err == nil {
		defer func() { _ = unix.Close(fd) }()
	}
	// A process whose parent ends gets another one for good. Still the agent's child after
	// the open, it was so before, and that process id could be nobody else's.
	if unix.Getppid() != agent {
		return died, nil
	}
	if err != nil {
		return 0, fmt.Errorf("watch the agent, process %d: %w", agent, err)
	}
	watching()

	// In this order: an agent that says leave and ends right then is seen to have said it.
	fds := []unix.PollFd{
		{Fd: int32(fd), Events: unix.POLLIN}, // readable when the process has ended, all threads of it
		{Fd: int32(commands.Fd()), Events: unix.POLLIN},
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return 0, fmt.Errorf("watch the agent: %w", err)
		}
		if fds[1].Revents != 0 {
			command := make([]byte, 1)
			if n, err := commands.Read(command); n == 0 || err != nil {
				// That the pipe is closed says nothing; poll(2) passes over negative numbers.
				fds[1].Fd = -1
			} else if command[0] == leave {
				return released, nil
			}
		}
		if fds[0].Revents != 0 {
			return died, nil
		}
	}
}
