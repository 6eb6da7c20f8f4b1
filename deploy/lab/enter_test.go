//go:build linux

package lab_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestEnter(t *testing.T) {
	if pid := os.Getpid(); pid != 1 {
		t.Errorf("process id %d, want 1", pid)
	}
	interfaces, err := net.Interfaces()
	must(t, err)
	if i := slices.IndexFunc(interfaces, func(i net.Interface) bool { return i.Name == "lo" }); i < 0 || interfaces[i].Flags&net.FlagUp == 0 {
		t.Errorf("interfaces %v, want lo, up", interfaces)
	}
	must(t, os.WriteFile(lab.Dir()+"/file", nil, 0o600))
	must(t, os.Remove(lab.Dir()+"/file"))
}

const envInner = "HAMESH_LAB_TEST_INNER"

// TestInner is no test by itself, but what the lab within the lab does in the others.
func TestInner(t *testing.T) {
	switch os.Getenv(envInner) {
	case "exit":
		os.Exit(7)
	case "wait":
		must(t, lab.Command("sleeper").Start())
		fmt.Println("waiting")
		select {}
	}
}

// inner is this program started anew from outside, as a user would.
func inner(what string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestInner$")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "HAMESH_LAB_")
	}), envInner+"="+what)
	return cmd
}

func TestEnterPassesTheExitStatusOn(t *testing.T) {
	err := inner("exit").Run()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("got %v, want exit status 7", err)
	}
}

func TestNothingOutlivesAKilledLab(t *testing.T) {
	cmd := inner("wait")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line := make([]byte, len("waiting\n"))
	_, err = io.ReadFull(out, line)
	must(t, err)
	if n := len(processes(t)); n != 4 {
		t.Errorf("%d processes, want 4: this one, the one outside, the one inside and its child", n)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	must(t, lab.Await(soon, func() error {
		if left := processes(t); len(left) != 1 {
			return fmt.Errorf("left behind: %v", left)
		}
		return nil
	}))
}

func TestEnterRefusesAPlaceNotItsOwn(t *testing.T) {
	cmd := inner("exit")
	cmd.Env = append(cmd.Env, "HAMESH_LAB_INSIDE=root")
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 125 {
		t.Errorf("got %v, want exit status 125", err)
	}
}
