package guard

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/vip"
	"github.com/hamesh/hamesh/deploy/lab"
)

const roleAgent = "agent"

// standIn is as much of an agent as a guard can see: it takes the lock, starts the guard,
// puts its VIPs on, prints the guard's process id, and then does what it reads. The
// arguments are the guard's configuration and the lock's path.
func standIn(args []string) int {
	if err := playAgent(args[0], args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "stand-in agent:", err)
		return exitFailed
	}
	return exitOK
}

func playAgent(config, path string) error {
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Debug})
	cfg := Config{Log: log}
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	var err error
	if cfg.Lock, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(cfg.Lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	g, err := Start(context.Background(), cfg)
	if err != nil {
		return err
	}
	kernel, err := vip.Open(log, cfg.VIPs)
	if err != nil {
		return err
	}
	if _, err := kernel.Set(func() []vip.Address { return cfg.VIPs }); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	fmt.Println(g.process.cmd.Process.Pid)
	for commands := bufio.NewScanner(os.Stdin); commands.Scan(); {
		switch commands.Text() {
		case "close":
			err = g.process.pipe.Close()
		case "sweep":
			_, err = kernel.Sweep()
		case "stop":
			cancel()
			err = <-ended
			g.Stop()
		}
		fmt.Println("done", err)
	}
	return nil
}

// agent is such a process, seen by the test.
type agent struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Writer
	out   *bufio.Reader
	guard int // process id of the first guard
}

func startAgent(t *testing.T, host *lab.Host, cfg Config, lock string) *agent {
	t.Helper()
	config, err := json.Marshal(cfg)
	must(t, err)
	a := &agent{t: t, cmd: lab.Command(roleAgent, string(config), lock)}
	a.cmd.Stderr = os.Stderr
	// Else the race detector keeps every process for a second longer.
	a.cmd.Env = append(a.cmd.Env, "GORACE=atexit_sleep_ms=0")
	a.in, err = a.cmd.StdinPipe()
	must(t, err)
	out, err := a.cmd.StdoutPipe()
	must(t, err)
	a.out = bufio.NewReader(out)
	must(t, host.Start(a.cmd))
	t.Cleanup(a.kill)
	_, err = fmt.Fscanln(a.out, &a.guard)
	must(t, err)
	// It becomes our child when its parent ends, for the test is process 1 of the lab.
	t.Cleanup(func() {
		_ = unix.Kill(a.guard, unix.SIGKILL) // reaped already: no such process
		_, _ = unix.Wait4(a.guard, nil, 0, nil)
	})
	return a
}

// tell makes the agent do something, and waits until it has.
func (a *agent) tell(command string) {
	a.t.Helper()
	_, err := fmt.Fprintln(a.in, command)
	must(a.t, err)
	line, err := a.out.ReadString('\n')
	must(a.t, err)
	if line != "done <nil>\n" {
		a.t.Fatalf("%s: %s", command, line)
	}
}

func (a *agent) signal(s unix.Signal) {
	a.t.Helper()
	must(a.t, a.cmd.Process.Signal(s))
}

// kill ends the agent as an accident does, and not its guard.
func (a *agent) kill() {
	_ = a.cmd.Process.Kill() // fails where it has ended already
	_ = a.cmd.Wait()
}

// waitGuard waits until agent and guard have ended, and returns the guard's exit status.
func (a *agent) waitGuard() int {
	a.t.Helper()
	_ = a.cmd.Wait() // killed, which is no news
	var status unix.WaitStatus
	await(a.t, 10*time.Second, "the guard ends", func() bool {
		pid, err := unix.Wait4(a.guard, &status, unix.WNOHANG, nil)
		must(a.t, err)
		return pid == a.guard
	})
	return status.ExitStatus()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await polls for something to become true.
func await(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !f(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, limit)
		}
	}
}
