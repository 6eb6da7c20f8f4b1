//go:build linux

package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		spread string
	}{
		{nil, "–"},
		{[]float64{2}, "2"},
		{[]float64{3, 1, 2}, "2 (1 to 3)"},
		{[]float64{4, 1, 2, 3}, "2.50 (1 to 4)"},
		{[]float64{7, 7}, "7"},
		{[]float64{1234.5, 0.125, 12.345}, "12.3 (0.12 to 1234)"},
	} {
		if got := spread(c.values); got != c.spread {
			t.Errorf("%v: %s, want %s", c.values, got, c.spread)
		}
	}
	if got := ratio([]float64{1, 2, 3}, []float64{4}); got != "0.50" {
		t.Errorf("ratio %s", got)
	}
	if got := ratio([]float64{1}, []float64{0}); got != "–" {
		t.Errorf("ratio to nothing: %s", got)
	}
}

func TestGrowing(t *testing.T) {
	for most, want := range map[int][]int{10_000: {1, 10, 100, 1000, 10_000}, 9800: {1, 10, 100, 1000, 9800}, 300: {1, 10, 100, 300}} {
		if got := growing(most); !slices.Equal(got, want) {
			t.Errorf("up to %d: %v, want %v", most, got, want)
		}
	}
}

// TestTables checks that each figure of all runs is in one row, direct ones only where
// there are any.
func TestTables(t *testing.T) {
	b := benchmark{Most: 10, Rate: 100}
	for run := 1; run <= 3; run++ {
		for i, v := range rivals {
			var s sheet
			s.add(topRate, "/s", float64(100*run/(i+1)))
			s.addOver(1, "latency", "µs", float64(10*i+run))
			s.addOver(10, "latency", "µs", float64(20*i+run))
			if v.command != nil {
				s.add("cost", "", float64(i))
			}
			b.Turns = append(b.Turns, played{run, v.name, s})
		}
	}
	text := strings.Join([]string{b.main().RenderMarkdown(), b.growth().RenderMarkdown()}, "\n")
	for _, row := range []string{
		"| connections, one request each, /s | 200 (100 to 300) | 100 (50 to 150) | 66 (33 to 100) | 50 (25 to 75) | 0.50 | 0.25 |",
		"| cost | – | 1 | 2 | 3 | 3.00 | – |",
		"| latency, µs | HAProxy | 12 | 22 |",
	} {
		if strings.Count(text, row) != 1 {
			t.Errorf("no row, or several, %q in\n%s", row, text)
		}
	}
}

// TestFootprint checks that what a child costs is counted too.
func TestFootprint(t *testing.T) {
	before, err := footprintOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sh", "-c", "while :; do :; done")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	if !slices.Contains(family(os.Getpid()), child.Process.Pid) {
		t.Errorf("%d is not among %v", child.Process.Pid, family(os.Getpid()))
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		after, err := footprintOf(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after.cpu-before.cpu > 20*time.Millisecond && after.descriptors > before.descriptors && after.rss > before.rss && after.pss > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a busy child is not seen: %+v, before %+v", after, before)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
