package agent_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent"
	"github.com/hamesh/hamesh/deploy/lab"
)

// TestFirstProcess runs hameshd as the first process of a pid namespace: output and exit
// status are those of the agent that it runs.
func TestFirstProcess(t *testing.T) {
	for _, c := range []struct {
		arg    string
		status int
		stdout string
	}{
		{"version", 0, "hameshd " + agent.Version + "\n"},
		{"nonsense", 2, ""},
	} {
		cmd := lab.Command("hameshd", c.arg)
		var stdout bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
		err := cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != c.status {
			t.Errorf("%s: exit status %d, want %d (%v)", c.arg, got, c.status, err)
		}
		if stdout.String() != c.stdout {
			t.Errorf("%s: printed %q, want %q", c.arg, &stdout, c.stdout)
		}
	}
}
