//go:build linux

package lab_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func newMesh(t *testing.T, o lab.Options) *lab.Mesh {
	t.Helper()
	m, err := lab.NewMesh(o)
	must(t, err)
	t.Cleanup(func() { closed(t, m) })
	return m
}

// measured runs a load around f and reports on the time that f took, and a moment more.
func measured(t *testing.T, m *lab.Mesh, l lab.Load, f func()) lab.Report {
	t.Helper()
	run, err := m.Client.Start(l)
	must(t, err)
	must(t, lab.Await(soon, func() error {
		if r := lab.Summarize(run.Samples(), time.Time{}, time.Now()); r.Requests == 0 && l.Rate > 0 || r.Streams < l.Streams {
			return errors.New("the load has not begun")
		}
		return nil
	}))
	from := time.Now()
	f()
	samples, err := run.Stop()
	must(t, err)
	return lab.Summarize(samples, from, time.Now())
}

// processes lists the ids of all processes there are, but for those that have ended and
// whose parent has not yet looked.
func processes(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	return slices.DeleteFunc(paths, func(path string) bool {
		status, err := os.ReadFile(path + "/status")
		return err != nil || strings.Contains(string(status), "State:\tZ")
	})
}

func direct(n *lab.Node) netip.AddrPort { return netip.AddrPortFrom(n.Address, 6443) }

func TestMeshLeavesNothing(t *testing.T) {
	m, err := lab.NewMesh(lab.Options{})
	must(t, err)
	owner, err := m.WaitOwner(soon)
	must(t, err)
	if owner.Name != "cp-1" {
		t.Errorf("owner %s", owner.Name)
	}
	must(t, m.WaitHealthy(soon))
	_, err = m.Client.Start(lab.Load{Target: m.VIP(), Rate: 50, Streams: 2})
	must(t, err)
	must(t, m.Close())
	must(t, m.Close())

	must(t, lab.Await(soon, func() error {
		left := processes(t)
		links, err := filepath.Glob("/proc/sys/net/ipv4/conf/seg*")
		must(t, err)
		files, err := filepath.Glob(lab.Dir() + "/mesh-*")
		must(t, err)
		if len(left) != 1 || len(links) != 0 || len(files) != 0 {
			return fmt.Errorf("left behind: processes %v, links %v, files %v", left, links, files)
		}
		return nil
	}))
}

func TestMeshClosesWhatFailed(t *testing.T) {
	_, err := lab.NewMesh(lab.Options{TLS: func(string, netip.Addr) (lab.Files, error) {
		return lab.Files{}, os.ErrNotExist
	}})
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v, want that there are no certificates", err)
	}
	closed(t, newMesh(t, lab.Options{Nodes: 1})) // would fail if the switch were still there
}

func TestAgentIsConfined(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	_, err := m.WaitOwner(soon)
	must(t, err)
	// Bits 12 and 13, CAP_NET_ADMIN and CAP_NET_RAW, in each of the five sets.
	if n := strings.Count(m.Nodes[0].Log(), "\t0000000000003000\n"); n != 5 {
		t.Errorf("the agent has other capabilities than it should:\n%s", m.Nodes[0].Log())
	}
}

func TestPowerOff(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 2})
	owner, err := m.WaitOwner(soon)
	must(t, err)
	before := owner.Port().MAC.String()
	report := measured(t, m, lab.Load{Target: m.VIP(), Rate: 50, Streams: 1, Silence: time.Second}, func() {
		must(t, owner.PowerOff())
		must(t, owner.PowerOff())
		if has, err := owner.Has(netip.MustParseAddr(vip)); err != nil || has {
			t.Errorf("a node without power has the VIP (%v)", err)
		}
		if left := processes(t); len(left) != 5 { // this one, the client, two of the other node and its child
			t.Errorf("processes %v after power-off, want 5", left)
		}
		time.Sleep(1500 * time.Millisecond)
		must(t, owner.PowerOn())
		must(t, lab.Await(soon, func() error {
			if holders := m.Recorder.Now(); len(holders) != 1 {
				return fmt.Errorf("holders %v", holders)
			}
			return nil
		}))
		time.Sleep(500 * time.Millisecond)
	})
	// No machine without power says goodbye: nothing is reset or closed.
	if report.Errors["refused"] > 5 || report.Errors["reset"]+report.Errors["closed"] > 0 ||
		report.Errors["timed out"]+report.Errors["unreachable"] == 0 || report.Gap < 1500*time.Millisecond {
		t.Errorf("a client saw %+v", report)
	}
	if report.Breaks["silent"] != 1 || report.Broken != 1 || report.Silence < 1500*time.Millisecond {
		t.Errorf("a stream saw %+v", report)
	}
	if after := owner.Port().MAC.String(); after != before {
		t.Errorf("MAC address %s after power-on, %s before", after, before)
	}
}

func TestAgentLife(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, Witnesses: 1})
	n := m.Nodes[0]
	_, err := m.WaitOwner(soon)
	must(t, err)
	from := time.Now()
	must(t, n.Freeze())
	must(t, n.Thaw())
	must(t, n.StopAgent())
	must(t, n.StopAgent())
	must(t, lab.Await(soon, func() error {
		if holders := m.Recorder.Now(); len(holders) != 0 {
			return fmt.Errorf("holders %v", holders)
		}
		return nil
	}))
	must(t, n.StartAgent())
	_, err = m.WaitOwner(soon)
	must(t, err)
	must(t, n.KillAgent())
	if holders := m.Recorder.Now(); len(holders) != 1 {
		t.Errorf("holders %v after SIGKILL, want the kernel to keep the address", holders)
	}
	if h := m.Recorder.Between(from, time.Now()); h.Min != 0 || h.Max != 1 || len(h.Spans) != 3 || h.LongestNone == 0 {
		t.Errorf("recorded %+v, want held, not held, held", h)
	}
	must(t, n.StartAgent())
}

func TestRecorderSeesTwoHolders(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 2})
	_, err := m.WaitOwner(soon)
	must(t, err)
	from := time.Now()
	must(t, m.Node("cp-2").Host().AddAddress("eth0", netip.MustParsePrefix(vip+"/32")))
	must(t, lab.Await(soon, func() error {
		if holders := m.Recorder.Now(); !slices.Equal(holders, []string{"cp-1", "cp-2"}) {
			return fmt.Errorf("holders %v", holders)
		}
		return nil
	}))
	time.Sleep(100 * time.Millisecond)
	if h := m.Recorder.Between(from, time.Now()); h.Max != 2 || h.LongestSeveral < 80*time.Millisecond {
		t.Errorf("recorded %+v", h)
	}
	if h := m.Recorder.Between(time.Time{}, from); h.Max != 1 {
		t.Errorf("recorded %+v before", h)
	}
}

func TestClientMeasuresAKnownGap(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	n := m.Nodes[0]
	const pause = 300 * time.Millisecond
	report := measured(t, m, lab.Load{Target: direct(n), Rate: 50, Streams: 2, Interval: 20 * time.Millisecond}, func() {
		time.Sleep(200 * time.Millisecond)
		must(t, n.API.Freeze())
		time.Sleep(pause)
		must(t, n.API.Thaw())
		time.Sleep(500 * time.Millisecond)
	})
	for what, got := range map[string]time.Duration{"gap": report.Gap, "silence": report.Silence} {
		// The race detector makes handshakes slow; a second says that it is this pause.
		if got < pause || got > pause+time.Second {
			t.Errorf("measured a %s of %s, made one of %s", what, got, pause)
		}
	}
	if report.Failed != 0 || report.Broken != 0 || report.Backends["cp-1"] != report.Requests || report.Requests < 45 {
		t.Errorf("a pause of %s is no failure: %+v", pause, report)
	}
	if len(report.BySource) != 20 {
		t.Errorf("%d sources took part, want 20", len(report.BySource))
	}
}

func TestAPIServerIsKilled(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	n := m.Nodes[0]
	report := measured(t, m, lab.Load{Target: direct(n), Rate: 50, Streams: 3}, func() {
		must(t, n.API.Kill())
		time.Sleep(200 * time.Millisecond)
		must(t, n.API.Start())
		time.Sleep(200 * time.Millisecond)
	})
	if report.Errors["refused"] == 0 || report.Broken != 3 || report.Unopened == 0 || report.Gap < 200*time.Millisecond {
		t.Errorf("a client saw %+v", report)
	}
}
