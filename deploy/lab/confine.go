//go:build linux

package lab

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// envConfined is set for an agent once its capabilities are those it has in production.
const envConfined = "HAMESH_LAB_CONFINED"

// From linux/securebits.h.
const (
	secbitNoRoot       = 1 << 0
	secbitNoRootLocked = 1 << 1
)

// kept are the only capabilities an agent needs: addresses, and raw frames.
var kept = []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}

// confined wraps an agent's main so that it has the kept capabilities and can regain
// no others. Capabilities belong to threads; to have them on all, the one thread that
// gives them up executes the program anew (execve(2) ends the others).
func confined(main func(args []string) int) func(args []string) int {
	return func(args []string) int {
		if os.Getenv(envConfined) != "" {
			return main(args)
		}
		runtime.LockOSThread()
		err := dropCapabilities()
		if err == nil {
			err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), envConfined+"=1"))
		}
		fmt.Fprintln(os.Stderr, "lab: confine the agent:", err)
		return exitCannot
	}
}

// dropCapabilities leaves the calling thread, and whatever it executes, the kept
// capabilities alone: see capabilities(7).
func dropCapabilities() error {
	// Without these bits, user 0 would get the whole bounding set at each execve.
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secbitNoRoot|secbitNoRootLocked, 0, 0, 0); err != nil {
		return fmt.Errorf("set securebits: %w", err)
	}
	var mask uint32
	for _, c := range kept {
		mask |= 1 << c
	}
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if c < 32 && mask&(1<<c) != 0 {
			continue
		}
		// EINVAL: a capability that this kernel does not know.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: mask, Permitted: mask, Inheritable: mask}} // all below 32
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	for _, c := range kept {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
			return fmt.Errorf("keep capability %d across execve: %w", c, err)
		}
	}
	return nil
}
