//go:build linux

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long the lab waits for a process to do what it was told.
const patience = 15 * time.Second

// process is a running command and the file that its output goes to.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended and err is set
	err  error
	// killed: of one that is not our child nobody else says how it has ended.
	killed atomic.Bool
}

// launch starts cmd on the host; what it prints is appended to the file log, unless
// cmd already says where it goes.
func launch(h *Host, cmd *exec.Cmd, log string) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log of %s: %w", cmd.Args[0], err)
	}
	defer f.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = f
	}
	if cmd.Stderr == nil {
		cmd.Stderr = f
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := h.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", cmd.Args[0], h.Name, err)
	}
	p := &process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
		// Its children are ours now, as we are process 1. By its process group we wait
		// for them alone, and take nothing from other waits.
		for err := error(nil); err == nil || errors.Is(err, unix.EINTR); {
			_, err = unix.Wait4(-cmd.Process.Pid, nil, 0, nil)
		}
	}()
	return p, nil
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stoppedInOrder says whether it has ended by itself, with success.
func (p *process) stoppedInOrder() bool {
	return p != nil && !p.running() && p.err == nil && !p.killed.Load()
}

func (p *process) signal(s os.Signal) error {
	if !p.running() {
		return fmt.Errorf("signal a process that is not running: %w", os.ErrProcessDone)
	}
	if s == unix.SIGKILL {
		p.killed.Store(true)
	}
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("signal %s: %w", p.cmd.Args[0], err)
	}
	return nil
}

// end sends a signal and waits until the process has ended. One that is not running
// is fine; one that does not end in time is an error, and killed.
func (p *process) end(s os.Signal) error {
	if !p.running() {
		return nil
	}
	if err := p.signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		return errors.Join(
			fmt.Errorf("%s did not end within %s of %v:\n%s", p.cmd.Args[0], patience, s, tail(p.log)),
			p.signal(unix.SIGKILL))
	}
}

var chatter = regexp.MustCompile(`(?m)^\S+ \[DEBUG\] hameshd\.store\.etcd: .*\n`)

// tail returns the last lines of a file, or why it cannot be read. What the libraries in an
// agent tell of their inner lives would push out what matters.
func tail(path string) string {
	const most = 8 << 10
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	b = chatter.ReplaceAll(b, nil)
	if len(b) > most {
		b = b[len(b)-most:]
		if _, after, ok := bytes.Cut(b, []byte("\n")); ok {
			b = after
		}
	}
	return string(b)
}

// killAll kills every process in the host's network but the spared one (0: none) and
// waits until none is left, so that also what a process of the lab has started itself
// is gone.
func (h *Host) killAll(spared int) error {
	deadline := time.Now().Add(patience)
	for {
		pids, err := h.others(spared)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v on %s survive SIGKILL", pids, h.Name)
		}
		if err := h.signalAll(unix.SIGKILL, spared); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// signalAll signals every process in the host's network but the spared one (0: none).
func (h *Host) signalAll(s unix.Signal, spared int) error {
	pids, err := h.others(spared)
	for _, pid := range pids {
		if err := unix.Kill(pid, s); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d on %s: %w", pid, h.Name, err)
		}
	}
	return err
}

func (h *Host) others(spared int) ([]int, error) {
	pids, err := h.processes()
	return slices.DeleteFunc(pids, func(pid int) bool { return pid == spared }), err
}

// processes lists the living processes in the host's network.
func (h *Host) processes() ([]int, error) {
	var own unix.Stat_t
	if err := unix.Fstat(int(h.ns), &own); err != nil {
		return nil, fmt.Errorf("identify the network of %s: %w", h.Name, err)
	}
	paths, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, path := range paths {
		var st unix.Stat_t
		// A process that has ended, reaped or not, has no namespaces any more.
		if unix.Stat(path, &st) != nil || st.Ino != own.Ino || st.Dev != own.Dev {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(path, "/")[2])
		if err != nil {
			return nil, err
		}
		// Process 1 is this program, here only because a thread of it is inside Do.
		if pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// run runs cmd on the host to its end, which has to come in time, and returns what it printed and its exit status.
func (h *Host) run(cmd *exec.Cmd) (stdout, stderr string, status int, err error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err = h.Do(cmd.Start)
	if err == nil {
		late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // fails only if it has ended
		defer late.Stop()
		err = cmd.Wait()
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return "", "", 0, fmt.Errorf("run %s on %s: %w", cmd.Args[0], h.Name, err)
	}
	status = cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return "", "", 0, fmt.Errorf("run %s on %s: ended by %v", cmd.Args[0], h.Name, ws.Signal())
	}
	return out.String(), complaint.String(), status, nil
}
