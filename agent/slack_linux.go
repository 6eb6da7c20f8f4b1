package agent

import (
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/config"
)

// slackShare is which part of its timing's margin an agent gives to timer slack: how much
// longer than asked the kernel may let its threads sleep (PR_SET_TIMERSLACK, prctl(2)). Go's
// monitor thread sleeps 20 µs at a time whenever something goes on, to look after the other
// threads. With the kernel's own slack, 50 µs, it is woken so often that an agent at rest
// costs half as much again, and one that relays a few per cent more.
const slackShare = 20

// defaultTimerSlack is the kernel's.
const defaultTimerSlack = 50 * time.Microsecond

// envSlack is the slack in nanoseconds that an agent has given itself, so that the one that
// goes on in its place knows that nobody else has chosen it.
const envSlack = "HAMESH_TIMER_SLACK"

// relax gives every thread of the process the timer slack that its configuration allows. A
// thread starts with that of the one that started it, and Go's runtime has started its own
// before main; but execve(2) keeps it. So the program is executed once more, in the same
// process. Where anything is in the way things stay as they are, and so they do where somebody
// has chosen another slack, as with systemd's TimerSlackNSec= (systemd.exec(5)).
func relax(path string) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	has := timerSlack()
	if own, _ := strconv.ParseInt(os.Getenv(envSlack), 10, 64); has != defaultTimerSlack && int64(has) != own {
		return
	}
	if f, err := os.Stat(path); err != nil || !f.Mode().IsRegular() {
		return // a pipe can be read once only
	}
	cfg, err := config.Load(path)
	if err != nil {
		return // told by who needs it
	}
	wants := cfg.Timing.Margin / slackShare
	program, err := os.Executable()
	if err != nil || wants == has || os.Setenv(envSlack, strconv.FormatInt(int64(wants), 10)) != nil {
		return
	}
	if unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(wants), 0, 0, 0) == nil && timerSlack() == wants {
		_ = syscall.Exec(program, os.Args, os.Environ())
	}
}

// timerSlack is the calling thread's; negative: unknown.
func timerSlack() time.Duration {
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return -1
	}
	return time.Duration(slack)
}
