package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// orphansWithin is how long the first process waits for what the agent has left behind,
// its guard, before it ends and takes all of it along.
const orphansWithin = 7 * time.Second

// runAsFirst is what hameshd does where it is the first process of a container: it runs
// the agent as a child. When the first process ends, the kernel kills every other one
// (pid_namespaces(7)), and a guard that dies with its agent is none. It passes signals on
// and reaps (wait(2)).
func runAsFirst(args []string, stdout, stderr io.Writer) int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	agent := exec.Command("/proc/self/exe", args...)
	agent.Args[0] = os.Args[0]
	agent.Env = append(os.Environ(), envFirst+"=1")
	agent.Stdout, agent.Stderr = stdout, stderr
	if err := agent.Start(); err != nil {
		fmt.Fprintln(stderr, "hameshd: could not start the agent:", err)
		return exitFailed
	}
	go func() {
		for s := range signals {
			_ = agent.Process.Signal(s) // it may have ended
		}
	}()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Fprintln(stderr, "hameshd: could not wait for the agent:", err)
			return exitFailed
		case pid == agent.Process.Pid:
			reapRest()
			if status.Signaled() {
				return 128 + int(status.Signal())
			}
			return status.ExitStatus()
		}
	}
}

// reapRest waits until no other process is left, or for as long as a guard may take.
func reapRest() {
	for deadline := time.Now().Add(orphansWithin); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.ECHILD) {
				return
			}
			if pid <= 0 {
				break
			}
		}
	}
}
