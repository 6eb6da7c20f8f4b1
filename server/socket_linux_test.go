package server

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestSocketCallers opens the socket's mode, as somebody might, so that only what the
// kernel says about the caller is left to refuse it.
func TestSocketCallers(t *testing.T) {
	// A user namespace with one user in it has nobody else (user_namespaces(7)).
	users, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if mapped := strings.Fields(string(users)); os.Geteuid() != 0 || len(mapped) == 3 && mapped[2] == "1" {
		if os.Getenv("CI") != "" {
			t.Fatal("CI runs this as root")
		}
		t.Skip("only root may call as somebody else, where there is somebody else")
	}
	const owner, group, nobody = 4241, 4242, 65534
	// Not t.TempDir: nobody but its owner may enter that.
	dir, err := os.MkdirTemp("", "hamesh") //nolint:usetesting // as said above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "hameshd.sock")
	listener, err := ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	for _, err := range []error{os.Chmod(dir, 0o755), os.Chmod(path, 0o666), os.Chown(path, owner, group)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	many := make([]uint32, 100)
	for i := range many {
		many[i] = uint32(5000 + i)
	}
	for name, test := range map[string]struct {
		uid, gid uint32
		groups   []uint32
		want     bool
	}{
		"root":                     {0, 0, nil, true},
		"owner":                    {owner, nobody, nil, true},
		"group":                    {nobody, group, nil, true},
		"supplementary group":      {nobody, nobody, []uint32{1, group}, true},
		"last of many groups":      {nobody, nobody, append(many, group), true},
		"nobody":                   {nobody, nobody, nil, false},
		"others' groups":           {nobody, nobody, many, false},
		"uid that equals the gid":  {group, nobody, nil, false},
		"gid that equals an owner": {nobody, owner, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			client, err := dialAs(path, test.uid, test.gid, test.groups)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = client.Close() }()
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			info, err := identifySocket(conn.(*net.UnixConn))
			if (err == nil) != test.want {
				t.Errorf("let in: %v, want %v (%v)", err == nil, test.want, err)
			}
			if err == nil && info.uid != test.uid {
				t.Errorf("uid %d, want %d", info.uid, test.uid)
			}
		})
	}
}

// dialAs connects from a thread with other credentials. The raw calls change that thread
// alone, and it ends with the goroutine, which stays locked to it.
func dialAs(path string, uid, gid uint32, groups []uint32) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		_, _, groupErr := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0)
		_, _, gidErr := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid))
		_, _, uidErr := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		for _, errno := range []unix.Errno{groupErr, gidErr, uidErr} {
			if errno != 0 {
				done <- result{nil, errno}
				return
			}
		}
		conn, err := net.Dial("unix", path)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
