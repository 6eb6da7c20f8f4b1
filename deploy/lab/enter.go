//go:build linux

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	envInside = "HAMESH_LAB_INSIDE" // set for the program once it is in the lab's namespaces: "root" or "rootless"
	envRole   = "HAMESH_LAB_ROLE"   // set for a process that the lab starts: which role it plays

	// exitCannot is the exit status of a program that could not enter the lab.
	exitCannot = 125

	dir = "/run/hamesh-lab" // on a tmpfs that only the lab sees
)

var (
	roles    = make(map[string]func(args []string) int)
	outerPID int  // this process as seen from outside
	rootless bool // whether there is a user namespace around
	inside   bool
)

// Role registers what a process started by Command(name, …) does: main gets the
// arguments after the program's name and returns the exit status. Roles are
// registered before Enter is called, in every program that starts them.
func Role(name string, main func(args []string) int) { roles[name] = main }

// Enter moves the program into fresh user (unless root), mount, pid and network
// namespaces. It has to be called first in main or TestMain, before any goroutine is
// started or file is opened: outside, it runs the program once more inside, waits and
// exits with its status (128+n where a signal n ended it), so that what follows Enter
// happens inside only. In a process started by Command it runs the role and exits.
//
// The program is process 1 of its pid namespace: when it ends, or whoever started it
// is killed, the kernel kills all that it started and frees every link and mount.
func Enter() {
	if name := os.Getenv(envRole); name != "" {
		main, ok := roles[name]
		if !ok {
			fatal(fmt.Errorf("no role %q is registered", name))
		}
		os.Exit(main(os.Args[1:]))
	}
	switch os.Getenv(envInside) {
	case "":
		status, err := runInside()
		if err != nil {
			fatal(err)
		}
		os.Exit(status)
	case "rootless":
		rootless = true
	}
	if err := settle(); err != nil {
		fatal(err)
	}
	inside = true
}

// Dir is a directory for the lab's files. It is in memory, seen by the lab's own
// processes alone, and gone with them.
func Dir() string { return dir }

// Command prepares a process of this same program that plays a registered role.
// Start it with Host.Start, or as any other command to have it in the lab's own
// namespace.
func Command(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = role
	cmd.Env = append(os.Environ(), envRole+"="+role)
	return cmd
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "lab:", err)
	os.Exit(exitCannot)
}

// runInside runs the program again in new namespaces and returns its exit status.
func runInside() (int, error) {
	// PDEATHSIG fires when the thread that started the child ends, not the process
	// (prctl(2), PR_SET_PDEATHSIG): this goroutine keeps the thread.
	runtime.LockOSThread()

	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), envInside+"=root")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Pdeathsig:  unix.SIGKILL,
		// Else the terminal's ^C would reach the child twice, and the nodes too.
		Setpgid: true,
	}
	if os.Geteuid() != 0 {
		cmd.Env = append(os.Environ(), envInside+"=rootless")
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("enter namespaces: %w (%s)", err, remedy())
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended just now, which Wait reports
		}
	}()
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("wait for the lab: %w", err)
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

func remedy() string {
	if os.Geteuid() == 0 {
		return "being root was not enough: a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN"
	}
	return "user namespaces seem not to be allowed here: run it as root"
}

// settle makes the new namespaces habitable.
func settle() error {
	if os.Getpid() != 1 {
		// Never mount anything over what others see.
		return fmt.Errorf("%s is set, but this is no namespace of the lab's own: unset it", envInside)
	}
	// The old /proc counts processes as the outside does: what a person needs to find us.
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return fmt.Errorf("read own process id: %w", err)
	}
	if outerPID, err = strconv.Atoi(self); err != nil {
		return fmt.Errorf("read own process id: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Process ids in /proc have to be those of the new namespace, or every
	// /proc/PID path means a stranger.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w (%s)", err, remedy())
	}
	run := filepath.Dir(dir)
	if err := unix.Mount("tmpfs", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount a private %s: %w", run, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if labNS, err = currentNS(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}
