package proxy

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
)

// mixed sends size bytes in pieces of every size, with a stall now and then, and ends the
// direction; it returns their hash.
func mixed(conn *net.TCPConn, seed uint64, size int) ([32]byte, error) {
	random := rand.New(rand.NewPCG(seed, 1))
	source := rand.NewChaCha8([32]byte{byte(seed)})
	hash := sha256.New()
	for size > 0 {
		var n int
		switch random.IntN(4) {
		case 0:
			n = 1 + random.IntN(10)
		case 1:
			n = 1 + random.IntN(5000)
		default:
			n = 1 + random.IntN(1<<20)
		}
		n = min(n, size)
		piece := make([]byte, n)
		source.Read(piece)
		hash.Write(piece)
		if _, err := conn.Write(piece); err != nil {
			return [32]byte{}, err
		}
		size -= n
		if random.IntN(20) == 0 {
			time.Sleep(time.Duration(random.IntN(3)) * time.Millisecond)
		}
	}
	return [32]byte(hash.Sum(nil)), conn.CloseWrite()
}

// taken reads to the end, slowly now and then, and returns the hash.
func taken(conn *net.TCPConn, seed uint64) ([32]byte, error) {
	random := rand.New(rand.NewPCG(seed, 2))
	hash := sha256.New()
	buf := make([]byte, 256<<10)
	for {
		n, err := conn.Read(buf[:1+random.IntN(len(buf))])
		hash.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			return [32]byte(hash.Sum(nil)), nil
		}
		if err != nil {
			return [32]byte{}, err
		}
		if random.IntN(50) == 0 {
			time.Sleep(time.Duration(random.IntN(3)) * time.Millisecond)
		}
	}
}

// exchange sends and reads at the same time, and returns both hashes.
func exchange(conn *net.TCPConn, seed uint64, size int) (sent, got [32]byte, err error) {
	var sending sync.WaitGroup
	var sendErr error
	sending.Go(func() { sent, sendErr = mixed(conn, seed, size) })
	got, err = taken(conn, seed)
	sending.Wait()
	return sent, got, errors.Join(err, sendErr)
}

// withoutPipes makes relaying do without pipes until the test ends.
func withoutPipes(t *testing.T) {
	pipesOpen.Add(pipesMost)
	t.Cleanup(func() { pipesOpen.Add(-pipesMost) })
}

// Nothing is lost, changed or put out of order, with splicing and without, whatever the
// sizes and however the sides stall; a frozen proxy goes on as another one.
func TestIntegrity(t *testing.T) {
	for _, mode := range []string{"with pipes", "without pipes", "frozen again and again"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "without pipes" {
				withoutPipes(t)
			}
			const sessions, size = 6, 12 << 20
			type result struct {
				sent, got [32]byte
				err       error
			}
			var mu sync.Mutex
			served := map[string]result{}
			s := serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
				var r result
				var id [8]byte
				if _, err := io.ReadFull(conn, id[:]); err != nil {
					return // an attempt that a freeze has ended
				}
				r.sent, r.got, r.err = exchange(conn, 100, size/2)
				mu.Lock()
				served[string(id[:])] = r
				mu.Unlock()
			})
			p := start(t, nil, s)
			stop := make(chan struct{})
			var freezing sync.WaitGroup
			if mode == "frozen again and again" {
				freezing.Go(func() { p = freezeOften(t, p, s, stop) })
			}
			clients := make([]result, sessions)
			var group sync.WaitGroup
			port := p.Port()
			for i := range sessions {
				group.Go(func() {
					c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
					if err != nil {
						t.Error(err)
						return
					}
					conn := c.(*net.TCPConn)
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(time.Minute))
					r := &clients[i]
					if _, r.err = name(conn); r.err == nil {
						_, r.err = fmt.Fprintf(conn, "%08d", i)
					}
					if r.err == nil {
						r.sent, r.got, r.err = exchange(conn, uint64(i), size)
					}
				})
			}
			group.Wait()
			close(stop)
			freezing.Wait()
			eventually(t, "all have ended", func() bool { return p.Stats().Connections == 0 })
			eventually(t, "all were served", func() bool { mu.Lock(); defer mu.Unlock(); return len(served) == sessions })
			for i, c := range clients {
				far := served[fmt.Sprintf("%08d", i)]
				if err := errors.Join(c.err, far.err); err != nil {
					t.Errorf("session %d: %v", i, err)
				} else if c.sent != far.got || c.got != far.sent {
					t.Errorf("session %d: the bytes differ: up %t, down %t", i, c.sent != far.got, c.got != far.sent)
				}
			}
		})
	}
}

// freezeOften freezes a proxy and has another one adopt what is left of it, over and over.
func freezeOften(t *testing.T, p *Proxy, s *server, stop chan struct{}) *Proxy {
	for round := 0; ; round++ {
		select {
		case <-stop:
			if round < 2 {
				t.Errorf("frozen %d times only", round)
			}
			return p
		case <-time.After(2 * time.Millisecond):
		}
		handed := p.Freeze()
		next, err := New(p.cfg)
		if err == nil {
			err = next.Adopt(handed)
		}
		if err != nil {
			t.Error(err)
			return p
		}
		run(t, next)
		p = next
	}
}

// What a session needs while it is idle: two descriptors, no buffer, no pipe.
func TestIdleSessionsCostTwoDescriptors(t *testing.T) {
	p := start(t, nil, serve(t, "127.0.0.11:0", echo))
	mustName(t, dial(t, p, "")) // so that the network is set up
	before := openFiles(t)
	const sessions = 50
	for range sessions {
		conn := dial(t, p, "")
		mustName(t, conn)
		conn.Write(make([]byte, 100_000))
		if _, err := io.ReadFull(conn, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
	}
	// Each has two in the proxy, and two in this test for the client and the server.
	if got := openFiles(t) - before; got > 4*sessions+2*int(pipesOpen.Load()) || got < 4*sessions {
		t.Errorf("%d descriptors for %d sessions, want four each, and %d pipes", got, sessions, pipesOpen.Load())
	}
	onAll(p.started(), func(l *loop) {
		for _, s := range l.sessions {
			if s.phase == relaying && (s.up.pending != nil || s.down.pending != nil || s.up.pipe != nil || s.down.pipe != nil) {
				t.Errorf("an idle session holds a buffer: %+v", s)
			}
		}
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// One direction of a session has ended, and nobody ends the other one.
func TestHalfClosedSessionsEnd(t *testing.T) {
	p := start(t, nil, serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
		io.Copy(io.Discard, conn)
		awaitReset(conn)
	}))
	onAll(p.started(), func(l *loop) { l.halfClosed.after = 100 * time.Millisecond })
	conn := dial(t, p, "")
	mustName(t, conn)
	conn.CloseWrite()
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("got %v, want a reset", err)
	}
	eventually(t, "the cause is counted", func() bool { return p.Stats().Ended[HalfClosedTimeout] == 1 })
}

// Urgent data in the middle of what is spliced is left out, as by any reader that does not
// ask for it (tcp(7)); nothing else is, and nothing waits.
func TestUrgentData(t *testing.T) {
	const before, after = 512 << 10, 96 << 10
	p := start(t, nil, serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
		buf := make([]byte, before+after)
		for {
			if _, err := io.ReadFull(conn, buf); err != nil {
				return
			}
			if _, err := conn.Write(buf[:1]); err != nil {
				return
			}
		}
	}))
	conn := dial(t, p, "")
	mustName(t, conn)
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		_, err := conn.Write(make([]byte, before))
		var sent error
		errOfRaw := raw.Write(func(fd uintptr) bool {
			sent = unix.Sendto(int(fd), []byte{'!'}, unix.MSG_OOB|unix.MSG_DONTWAIT, nil)
			return sent != unix.EAGAIN
		})
		if err == nil {
			_, err = conn.Write(make([]byte, after))
		}
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
		if err := errors.Join(err, sent, errOfRaw); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}

// A session that moves much leaves others their turn.
func TestBulkLeavesOthersTheirTurn(t *testing.T) {
	s := serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
		first := make([]byte, 1)
		if _, err := conn.Read(first); err != nil {
			return
		}
		if first[0] == 'e' {
			echo(conn)
			return
		}
		for buf := make([]byte, 1<<20); ; {
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	})
	p := start(t, nil, s)
	var bulk sync.WaitGroup
	defer bulk.Wait()
	for range 8 {
		conn := dial(t, p, "")
		mustName(t, conn)
		conn.Write([]byte("b"))
		bulk.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{conn}) })
		defer conn.Close()
	}
	conn := dial(t, p, "")
	mustName(t, conn)
	conn.Write([]byte("e"))
	var worst time.Duration
	for range 200 {
		began := time.Now()
		conn.Write([]byte("x"))
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Since(began))
	}
	t.Logf("worst answer beside eight bulk streams: %v", worst)
	if worst > 2*time.Second {
		t.Errorf("an answer took %v", worst)
	}
}

// Connections that end in every way, on both sides, leave nothing behind: no descriptor, no
// pipe, and by goleak no goroutine.
func TestSoak(t *testing.T) {
	connections := 100_000
	if raceEnabled {
		connections = 20_000
	}
	if testing.Short() {
		connections /= 20
	}
	before := openFiles(t)
	servers := three(t, func(conn *net.TCPConn) {
		var order [1]byte
		if _, err := conn.Read(order[:]); err != nil {
			return
		}
		switch order[0] {
		case 'r':
			crash(conn)
		case 'c':
		case 'b':
			conn.Write(make([]byte, 300_000))
			crash(conn)
		case 'h':
			conn.CloseWrite()
			io.Copy(io.Discard, struct{ io.Reader }{conn})
		default:
			echo(conn)
		}
	})
	p := start(t, nil, servers...)
	var group sync.WaitGroup
	const workers = 16
	for worker := range workers {
		group.Go(func() {
			random := rand.New(rand.NewPCG(7, uint64(worker)))
			for range connections / workers {
				conn, err := net.DialTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 2, byte(worker), byte(1+random.IntN(250)))},
					&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(p.Port())})
				if err != nil {
					t.Error(err)
					return
				}
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				order := "rcbhe"[random.IntN(5)]
				switch random.IntN(6) {
				case 0:
					crash(conn)
				case 1:
					conn.Write([]byte{order})
					crash(conn)
				case 2:
					conn.Write(append([]byte{order}, make([]byte, random.IntN(100_000))...))
					crash(conn)
				case 3:
					conn.CloseWrite()
					io.Copy(io.Discard, struct{ io.Reader }{conn})
				case 4:
					conn.Write([]byte{order})
					conn.CloseWrite()
					io.Copy(io.Discard, struct{ io.Reader }{conn})
				case 5:
					conn.Write([]byte{order})
					conn.Read(make([]byte, 100))
				}
				crash(conn)
			}
		})
	}
	group.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	eventually(t, "all are accepted", func() bool { return p.Stats().Accepted == uint64(connections/workers*workers) })
	if err := p.Drain(ctx); err != nil {
		t.Error(err)
	}
	stats := p.Stats()
	t.Logf("%d connections ended by %v", stats.Accepted, stats.Ended)
	var ended uint64
	for _, n := range stats.Ended {
		ended += n
	}
	if ended != stats.Accepted || p.causes[0].Load() != 0 || established(p) != 0 {
		t.Errorf("%d of %d ended, %d are established", ended, stats.Accepted, established(p))
	}
	for _, b := range p.backends {
		if n := b.load.Load(); n != 0 {
			t.Errorf("backend %s has a load of %d", b.Name, n)
		}
	}
	p.Close()
	for _, s := range servers {
		s.kill()
	}
	eventually(t, "no descriptor is left", func() bool { return openFiles(t) <= before && pipesOpen.Load() == 0 })
}

// Thousands are reset at once, and whoever says so need not wait for it.
func TestManyAreResetAtOnce(t *testing.T) {
	sessions := 2000
	if raceEnabled {
		sessions = 500
	}
	servers := three(t, func(conn *net.TCPConn) { conn.Read(make([]byte, 1)) })
	p := start(t, nil, servers[0])
	conns := make([]*net.TCPConn, sessions)
	for i := range conns {
		conns[i] = dial(t, p, client(i))
		mustName(t, conns[i])
	}
	began := time.Now()
	all(p, health.Disabled)
	told := time.Since(began)
	eventually(t, "all are reset", func() bool { return established(p) == 0 })
	took := time.Since(began)
	t.Logf("%d sessions were reset within %v, SetBackends took %v", sessions, took, told)
	if took > time.Second || told > 200*time.Millisecond {
		t.Errorf("resetting took %v, saying so %v", took, told)
	}
	for _, conn := range conns {
		if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
			t.Fatalf("got %v, want a reset", err)
		}
	}
	if n := p.Stats().Ended[BackendDisabled]; n != uint64(sessions) {
		t.Errorf("%d were counted", n)
	}
}
