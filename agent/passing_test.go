package agent

import (
	"bytes"
	"net/netip"
	"os"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy"
)

// TestPassing checks that all that a proxy was comes through, in more than one message, and
// that each descriptor is the one of its session.
func TestPassing(t *testing.T) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var both [2]*passing
	for i := range both {
		if both[i], err = newPassing(os.NewFile(uintptr(ends[i]), "end")); err != nil {
			t.Fatal(err)
		}
		defer both[i].conn.Close()
		if err := both[i].conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	// Each is a file of its own, known again by its inode.
	inode := func(fd int) uint64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	open := func() int {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		unix.Close(pipe[1])
		t.Cleanup(func() { unix.Close(pipe[0]) })
		return pipe[0]
	}
	want := map[string]*relay{
		"a": {handed: proxy.Handed{Listener: open()}, own: []health.Report{{Backend: "x", State: health.Down, Reason: "refused", Refuses: true}, {Backend: "y", State: health.NotReady, Reason: "HTTP 500"}}},
		"b": {handed: proxy.Handed{Listener: -1}},
	}
	for i := range passedAtOnce {
		s := proxy.HandedSession{
			Client: open(), Server: -1, From: netip.MustParseAddrPort("10.77.1.1:4711"), Age: time.Duration(i),
			Up: proxy.HandedHalf{Pending: bytes.Repeat([]byte{byte(i)}, i*100), Ended: i%2 == 0, Moved: uint64(i)},
		}
		if i%5 > 0 {
			s.Server, s.Backend = open(), "x"
		}
		want["a"].handed.Sessions = append(want["a"].handed.Sessions, s)
	}
	sent := make(chan error, 1)
	go func() { sent <- both[0].sendRelays(want) }()
	got, err := both[1].receiveRelays()
	if err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	same := func(what string, want int, got *int) {
		if (want < 0) != (*got < 0) || (want >= 0 && inode(want) != inode(*got)) {
			t.Fatalf("%s is another file", what)
		}
		if *got >= 0 {
			unix.Close(*got)
		}
		*got = want
	}
	for name, w := range want {
		g := got[name]
		if g == nil || len(g.handed.Sessions) != len(w.handed.Sessions) {
			t.Fatalf("proxy %s came as %+v", name, g)
		}
		same("the listener of "+name, w.handed.Listener, &g.handed.Listener)
		for i, s := range w.handed.Sessions {
			same("a client", s.Client, &g.handed.Sessions[i].Client)
			same("a server", s.Server, &g.handed.Sessions[i].Server)
			if len(s.Up.Pending) == 0 {
				g.handed.Sessions[i].Up.Pending = s.Up.Pending // nil or empty
			}
		}
		if !reflect.DeepEqual(w, g) {
			t.Errorf("proxy %s came as something else", name)
		}
	}
}
