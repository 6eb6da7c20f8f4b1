package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hamesh/hamesh/deploy/lab"
)

// TestTimerSlack checks that the kernel may let every thread of an agent and of its guard
// sleep longer by a twentieth of the default timing's margin of 93 ms, those that Go started
// before main included.
func TestTimerSlack(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	n := owner(t, m)
	pids := []int{n.AgentPID()}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range children {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // its thread has ended
		}
		for _, field := range strings.Fields(string(b)) {
			var pid int
			if _, err := fmt.Sscan(field, &pid); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	if len(pids) < 2 {
		t.Error("there is no guard")
	}
	for _, pid := range pids {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, thread := range threads {
			b, err := os.ReadFile("/proc/" + thread.Name() + "/timerslack_ns")
			if err != nil {
				continue // it has ended
			}
			if got := strings.TrimSpace(string(b)); got != "4650000" {
				t.Errorf("process %d, thread %s: a slack of %s ns", pid, thread.Name(), got)
			}
		}
	}
}
