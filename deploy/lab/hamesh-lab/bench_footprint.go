//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// footprint is what a process and its children cost.
type footprint struct {
	at          time.Time
	cpu         time.Duration // since each thread's start
	rss, pss    float64       // resident memory in bytes; pss counts what n processes share as an nth each
	descriptors int
}

// footprintOf reads /proc (proc_pid_smaps(5); schedstat: Documentation/scheduler/sched-stats.rst).
// The time of threads that have ended is missing; servers seldom end any.
func footprintOf(pid int) (u footprint, err error) {
	u.at = time.Now()
	u.cpu, err = processorsOf(pid)
	errs := []error{err}
	for _, pid := range family(pid) {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		u.descriptors += len(open)
		errs = append(errs, err)
		smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(smaps)) {
			if f := strings.Fields(line); len(f) == 3 {
				kilobytes, _ := strconv.ParseFloat(f[1], 64)
				switch f[0] {
				case "Rss:":
					u.rss += 1024 * kilobytes
				case "Pss:":
					u.pss += 1024 * kilobytes
				}
			}
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return u, fmt.Errorf("read what process %d costs: %w", pid, err)
	}
	return u, nil
}

// family is a process and all below it.
func family(pid int) []int {
	all := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // fails only for a bad pattern
	for _, list := range lists {
		children, _ := os.ReadFile(list) // gone with its thread, maybe
		for child := range bytes.FieldsSeq(children) {
			if n, err := strconv.Atoi(string(child)); err == nil {
				all = append(all, family(n)...)
			}
		}
	}
	return all
}

// processorsOf is the time that a process and all below it have run.
func processorsOf(pid int) (sum time.Duration, err error) {
	for _, pid := range family(pid) {
		cpu, err := processorTime(pid)
		if err != nil {
			return 0, fmt.Errorf("read the processor time of process %d: %w", pid, err)
		}
		sum += cpu
	}
	return sum, nil
}

// processorTime is the time that all threads of a process have run, to the nanosecond.
func processorTime(pid int) (sum time.Duration, err error) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // fails only for a bad pattern
	if len(threads) == 0 {
		return 0, os.ErrNotExist
	}
	for _, thread := range threads {
		b, err := os.ReadFile(thread)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return 0, err
		}
		var ran int64
		if _, err := fmt.Sscan(string(b), &ran); err != nil {
			return 0, fmt.Errorf("read %s: %w", thread, err)
		}
		sum += time.Duration(ran)
	}
	return sum, nil
}

// machineTime is the time that the machine's processors were busy since it started, a
// hypervisor's other guests included, to 10 ms (proc_stat(5)).
func machineTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	var user, nice, system, idle, iowait, irq, softirq, steal int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		return 0, fmt.Errorf("read /proc/stat: %w", err)
	}
	return time.Duration(user+nice+system+irq+softirq+steal) * 10 * time.Millisecond, nil
}

// processor is the name of the machine's processors.
func processor() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, ok := strings.CutPrefix(lines.Text(), "model name\t: "); ok {
			return name
		}
	}
	return "unknown"
}
