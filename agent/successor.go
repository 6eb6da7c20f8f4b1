package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// endsWithin is how long a process that has closed its end of the socket may take to end.
const endsWithin = time.Second

// successor is the process that is to go on in this one's place.
type successor struct {
	*passing
	cmd   *exec.Cmd
	done  chan struct{} // closed when it has ended
	spare func() bool   // from then on it need not end when this agent is told to
}

// startSuccessor starts a program as this one was started.
func startSuccessor(program string) (*successor, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for the new process: %w", err)
	}
	theirs := os.NewFile(uintptr(ends[1]), "successor")
	defer theirs.Close()
	own, err := newPassing(os.NewFile(uintptr(ends[0]), "successor"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	// systemd's watchdog is this process's until the other one is the main process
	// (sd_watchdog_enabled(3)).
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "WATCHDOG_PID=") }),
		envSucceeds+"="+strconv.Itoa(3)) // the first extra file
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the new process: %w", err), own.conn.Close())
	}
	s := &successor{passing: own, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its state tells
		close(s.done)
		// It may have left its end of the socket to another process.
		_ = s.conn.SetDeadline(time.Now())
	}()
	return s, nil
}

// within calls f, which talks to the process, and says why that fails.
func (s *successor) within(limit time.Duration, f func() error) error {
	if err := s.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	err := f()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && !s.ended(0):
		return fmt.Errorf("the new process has not done in %v what it has to", limit)
	case err != nil && s.ended(endsWithin):
		return fmt.Errorf("the new process has ended: %v", s.cmd.ProcessState)
	}
	return err
}

// hear waits for the process to say that it has done what it had to.
func (s *successor) hear(limit time.Duration) (w word, err error) {
	err = s.within(limit, func() error {
		_, err := s.receive(&w)
		return err
	})
	if err == nil && w.Error != "" {
		err = fmt.Errorf("the new process refuses: %s", w.Error)
	}
	return w, err
}

// ended waits for the end of the process, no longer than the limit.
func (s *successor) ended(limit time.Duration) bool {
	late, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	select {
	case <-s.done:
	case <-late.Done():
	}
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// fit waits until the process has found itself fit, and says what version it is.
func (s *successor) fit() (version string, err error) {
	w, err := s.hear(fitWithin)
	if err == nil && w.Format != passingFormat {
		err = fmt.Errorf("version %s passes connections on in format %d, this one in %d: a restart upgrades", w.Version, w.Format, passingFormat)
	}
	return w.Version, err
}

func (s *successor) kill() { _ = s.cmd.Process.Kill() } // fails where it has ended already

// discard ends the process.
func (s *successor) discard() {
	s.kill()
	<-s.done
	s.conn.Close()
}
