package proxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/proxy/affinity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a stand-in for an API server: it sends its name, and then does with the
// connection what the test wants.
type server struct {
	name     string
	addr     netip.AddrPort
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	done     sync.WaitGroup
}

// serve starts a server that says its name first.
func serve(t *testing.T, address string, handle func(*net.TCPConn)) *server {
	t.Helper()
	return listens(t, address, func(conn *net.TCPConn) {
		fmt.Fprintf(conn, "%-16s", conn.LocalAddr().(*net.TCPAddr).IP)
		handle(conn)
	})
}

// kill ends the server as a crash of its process would.
func (s *server) kill() {
	s.listener.Close()
	s.mu.Lock()
	for _, conn := range s.conns {
		conn.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.done.Wait()
}

func echo(conn *net.TCPConn) {
	// Not by splicing, whose pipes would count among the descriptors.
	if _, err := io.Copy(conn, struct{ io.Reader }{conn}); err == nil {
		conn.CloseWrite()
	}
}

// three starts three servers on addresses of their own.
func three(t *testing.T, handle func(*net.TCPConn)) []*server {
	t.Helper()
	var servers []*server
	for i := range 3 {
		servers = append(servers, serve(t, fmt.Sprintf("127.0.0.%d:0", 11+i), handle))
	}
	return servers
}

// start runs a proxy in front of the servers, named by their addresses and all Up.
func start(t *testing.T, change func(*Config), servers ...*server) *Proxy {
	t.Helper()
	return startWith(t, nil, change, servers...)
}

// startWith prepares the proxy before it runs.
func startWith(t *testing.T, prepare func(*Proxy), change func(*Config), servers ...*server) *Proxy {
	t.Helper()
	cfg := Config{Name: "kube-api", OnDown: OnDownClose}
	for _, s := range servers {
		cfg.Backends = append(cfg.Backends, Backend{Name: s.name, Address: s.addr})
	}
	if change != nil {
		change(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(p)
	}
	if err := p.Listen(); err != nil {
		t.Fatal(err)
	}
	run(t, p)
	return p
}

// run runs a proxy, with all of its backends Up, until the test ends.
func run(t *testing.T, p *Proxy) {
	all(p, health.Up)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { ended <- p.Run(ctx) }()
	eventually(t, "it runs", func() bool { return len(p.started()) > 0 })
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		p.Close()
	})
}

func all(p *Proxy, state health.State) {
	states := map[string]health.State{}
	for _, b := range p.backends {
		states[b.Name] = state
	}
	p.SetBackends(states)
}

// dial connects to the proxy from an address of 127.0.0.0/8; empty: any.
func dial(t *testing.T, p *Proxy, from string) *net.TCPConn {
	t.Helper()
	var local *net.TCPAddr
	if from != "" {
		local = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	conn, err := net.DialTCP("tcp4", local, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(p.Port())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

// name reads which server a connection has come to.
func name(conn net.Conn) (string, error) {
	var buf [16]byte
	_, err := io.ReadFull(conn, buf[:])
	return strings.TrimSpace(string(buf[:])), err
}

func mustName(t *testing.T, conn net.Conn) string {
	t.Helper()
	got, err := name(conn)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// refused connects to a proxy that will not have it, and returns what becomes of it: a
// reset may come before connect(2) is over, or after.
func refused(p *Proxy) error {
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", p.Port()))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = io.Copy(io.Discard, conn)
	return err
}

// crash ends a connection by an RST.
func crash(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// awaitReset waits until a connection whose incoming stream has ended breaks.
func awaitReset(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var broken syscall.Errno
	err = raw.Read(func(fd uintptr) bool {
		broken = pendingError(int(fd))
		return broken != 0
	})
	return errors.Join(err, broken)
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// eventually waits until a condition holds, for 5 seconds at most.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not so: %s", what)
		}
	}
}

func established(p *Proxy) int {
	n := 0
	for _, b := range p.Stats().Backends {
		n += b.Established
	}
	return n
}

// best returns the server that is first in a client's rank among some.
func best(client string, servers ...*server) string {
	var ranked []affinity.Backend
	for _, s := range servers {
		ranked = append(ranked, affinity.Backend{Key: s.addr.String(), Weight: 1})
	}
	return servers[affinity.Rank(netip.MustParseAddr(client), ranked)[0]].name
}

func client(i int) string { return fmt.Sprintf("127.1.%d.%d", i/250, i%250+1) }

func TestAffinity(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	met := map[string]int{}
	for i := range 60 {
		want := best(client(i), servers...)
		for range 2 {
			conn := dial(t, p, client(i))
			if got := mustName(t, conn); got != want {
				t.Fatalf("client %s came to %s, want %s", client(i), got, want)
			}
			conn.Close()
		}
		met[want]++
	}
	if len(met) != 3 {
		t.Errorf("servers met: %v", met)
	}
	p.SetBackends(map[string]health.State{servers[0].name: health.Down})
	for i := range 60 {
		conn := dial(t, p, client(i))
		want := best(client(i), servers...)
		if want == servers[0].name {
			want = best(client(i), servers[1:]...)
		}
		if got := mustName(t, conn); got != want {
			t.Fatalf("client %s came to %s, want %s", client(i), got, want)
		}
		conn.Close()
	}
}

func TestIPv6Client(t *testing.T) {
	p := start(t, nil, three(t, echo)...)
	mustName(t, dial(t, p, ""))
	conn, err := net.Dial("tcp6", fmt.Sprintf("[::1]:%d", p.Port()))
	if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return // no IPv6 here, and IPv4 is served
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustName(t, conn)
}

func TestKilledBackendFailsNoNewConnection(t *testing.T) {
	servers := three(t, echo)
	var failures atomic.Int32
	p := start(t, func(c *Config) {
		c.OnConnectFailure = func(backend string, err error) {
			if errors.Is(err, ErrSilent) {
				return // on a busy machine
			}
			if backend != servers[1].name || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("backend %s failed with %v", backend, err)
			}
			failures.Add(1)
		}
	}, servers...)
	for i := range 500 {
		if i == 100 {
			servers[1].kill()
		}
		conn := dial(t, p, client(i))
		got := mustName(t, conn)
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i >= 100 && got == servers[1].name {
			t.Fatalf("connection %d came to the dead", i)
		}
		conn.Close()
	}
	// Nor does it cost every client a refusal.
	if n := failures.Load(); n < 1 || n > 50 {
		t.Errorf("%d failures reported", n)
	}
	if got := p.Stats().Backends[1].Failures; got != uint64(failures.Load()) {
		t.Errorf("%d failures counted, %d reported", got, failures.Load())
	}
}

// A server that is cut off answers nothing at all; here, as its queue is full.
func TestSilentBackendIsRaced(t *testing.T) {
	servers := three(t, echo)
	silent := full(t)
	p := start(t, func(c *Config) {
		c.Backends = append(c.Backends, Backend{Name: "silent", Address: silent, Weight: 1000})
	}, servers...)
	for i := range 5 {
		began := time.Now()
		got := mustName(t, dial(t, p, client(i)))
		if want := best(client(i), servers...); got != want {
			t.Errorf("client %s came to %s, want %s", client(i), got, want)
		}
		// The first client waits; for the next ones the silent one is the last to try.
		took := time.Since(began)
		if took > raceAfter+500*time.Millisecond || i == 0 && took < raceAfter {
			t.Errorf("connecting took %v", took)
		}
	}
}

// full returns an address that neither accepts nor refuses connections.
func full(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 20}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 20}), uint16(name.(*syscall.SockaddrInet4).Port))
	for range 10 {
		conn, err := net.DialTimeout("tcp", addr.String(), 50*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the queue is not full")
	return addr
}

func TestDownBackendsConnectionsAreReset(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	conns := map[string][]*net.TCPConn{}
	for i := range 90 {
		conn := dial(t, p, client(i))
		met := mustName(t, conn)
		conns[met] = append(conns[met], conn)
	}
	down := map[string]health.State{servers[2].name: health.Down}
	began := time.Now()
	p.SetBackends(down)
	for _, conn := range conns[servers[2].name] {
		if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
			t.Fatalf("a connection to the one that is down: %v, want a reset", err)
		}
	}
	if took := time.Since(began); took < gather || took > 50*gather {
		t.Errorf("resetting took %v, want %v", took, gather)
	}
	p.SetBackends(down)
	for _, s := range servers[:2] {
		for _, conn := range conns[s.name] {
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatalf("a connection to one that is up: %v", err)
			}
		}
	}
}

// Backends that go down all together keep their connections, and so do those that come
// back soon after the first.
func TestAllDownKeepsConnections(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	conns := map[string]*net.TCPConn{}
	for i := 0; len(conns) < len(servers); i++ {
		conn := dial(t, p, client(i))
		conns[mustName(t, conn)] = conn
	}
	lives := func(s *server) {
		t.Helper()
		if _, err := conns[s.name].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conns[s.name].Read(make([]byte, 1)); err != nil {
			t.Fatalf("a connection to %s: %v", s.name, err)
		}
	}
	for _, s := range servers { // one after the other, as an agent's checks end
		p.SetBackends(map[string]health.State{s.name: health.Down})
	}
	time.Sleep(3 * gather)
	for _, s := range servers {
		lives(s)
	}
	came := dial(t, p, clientsOf(servers[2], 1, servers...)[0]) // when there was nothing better
	if met := mustName(t, came); met != servers[2].name {
		t.Fatalf("a client of %s came to %s", servers[2].name, met)
	}
	began := time.Now()
	p.SetBackends(map[string]health.State{servers[0].name: health.Up})
	lives(servers[1])
	p.SetBackends(map[string]health.State{servers[1].name: health.Up})
	if _, err := conns[servers[2].name].Read(make([]byte, 1)); !isReset(err) || time.Since(began) < reprieve {
		t.Errorf("the one that stays down: %v after %v, want a reset after %v", err, time.Since(began), reprieve)
	}
	if _, err := came.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("the one that came to it meanwhile: %v, want a reset", err)
	}
	for _, s := range servers[:2] {
		lives(s)
	}
}

// One that is being drained is well, and may have the clients of one that goes down.
func TestDrainingIsRefuge(t *testing.T) {
	servers := three(t, echo)[:2]
	p := start(t, nil, servers...)
	conn := dial(t, p, clientsOf(servers[0], 1, servers...)[0])
	mustName(t, conn)
	p.SetBackends(map[string]health.State{servers[0].name: health.Down, servers[1].name: health.Draining})
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("%v, want a reset", err)
	}
}

// One that is not ready keeps its connections and gets no new ones, whatever OnDown says; gone
// after that, it loses them.
func TestNotReadyIsNotGone(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	conn := dial(t, p, "")
	met := mustName(t, conn)
	for _, state := range []health.State{health.NotReady, health.Draining, health.NotReady} {
		p.SetBackends(map[string]health.State{met: state})
		time.Sleep(3 * gather)
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatalf("while %v: %v", state, err)
		}
		if got := mustName(t, dial(t, p, "")); got == met {
			t.Errorf("a new connection came to %s while %v", met, state)
		}
	}
	p.SetBackends(map[string]health.State{met: health.Down})
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("down: %v, want a reset", err)
	}
}

// One that is not ready is a better choice than one that is down, and a worse one than one that
// drains; and it is no reason to send the clients of one that is down away.
func TestNotReadyIsBetterThanDown(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	conn := dial(t, p, clientsOf(servers[0], 1, servers...)[0])
	mustName(t, conn)
	p.SetBackends(map[string]health.State{servers[0].name: health.Down, servers[1].name: health.NotReady, servers[2].name: health.Down})
	for i := range 10 {
		if got := mustName(t, dial(t, p, client(i))); got != servers[1].name {
			t.Errorf("client %d came to %s, which is down", i, got)
		}
	}
	time.Sleep(3 * gather)
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Errorf("its client was sent to one that is not ready: %v", err)
	}
	p.SetBackends(map[string]health.State{servers[2].name: health.Draining})
	for i := range 10 {
		if got := mustName(t, dial(t, p, client(i))); got != servers[2].name {
			t.Errorf("client %d came to %s, which is not ready", i, got)
		}
	}
}

func TestDrainingAndOnDownDrainLeaveConnections(t *testing.T) {
	servers := three(t, echo)
	p := start(t, func(c *Config) { c.OnDown = OnDownDrain }, servers...)
	conn := dial(t, p, "")
	met := mustName(t, conn)
	for _, state := range []health.State{health.Draining, health.Down} {
		p.SetBackends(map[string]health.State{met: state})
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatalf("while %v: %v", state, err)
		}
		if got := mustName(t, dial(t, p, "")); got == met {
			t.Errorf("a new connection came to %s while %v", met, state)
		}
	}
	p.SetBackends(map[string]health.State{met: health.Disabled})
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("disabled: %v, want a reset", err)
	}
}

func TestAllDownFailsOpen(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	all(p, health.Down)
	for i := range 20 {
		if got, want := mustName(t, dial(t, p, client(i))), best(client(i), servers...); got != want {
			t.Errorf("client %s came to %s, want %s", client(i), got, want)
		}
	}
	if got := p.Stats().FailedOpen; got != 20 {
		t.Errorf("%d failed open, want 20", got)
	}
	p.SetBackends(map[string]health.State{servers[0].name: health.Draining})
	if got := mustName(t, dial(t, p, "")); got != servers[0].name {
		t.Errorf("came to %s; want the draining one before those that are down", got)
	}
	p.SetBackends(map[string]health.State{servers[0].name: health.Disabled})
	for i := range 20 {
		if got := mustName(t, dial(t, p, client(i))); got == servers[0].name {
			t.Errorf("came to the disabled one")
		}
	}
}

func TestNoneAcceptsResetsAtOnce(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	for _, s := range servers {
		s.kill()
	}
	for _, state := range []health.State{health.Up, health.Down, health.Disabled} {
		all(p, state)
		began := time.Now()
		if err := refused(p); !isReset(err) {
			t.Errorf("while all are %v: %v, want a reset", state, err)
		}
		if took := time.Since(began); took > raceAfter {
			t.Errorf("while all are %v it took %v", state, took)
		}
	}
	eventually(t, "three counted", func() bool { return p.Stats().Unserved == 3 })
}

// freePort returns a port that can be bound, below those the kernel gives to outgoing
// connections: one of those may linger there.
func freePort(t *testing.T) uint16 {
	t.Helper()
	for range 100 {
		port := 20_000 + rand.IntN(10_000)
		if l, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			l.Close()
			return uint16(port)
		}
	}
	t.Fatal("no free port found")
	return 0
}

func TestRefusesToLoop(t *testing.T) {
	port := freePort(t)
	var looped atomic.Bool
	p := start(t, func(c *Config) {
		c.Port = port
		c.Backends = []Backend{{Name: "self", Address: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.9"), port)}}
		c.OnConnectFailure = func(_ string, err error) { looped.Store(errors.Is(err, ErrLoop)) }
	})
	if err := refused(p); !isReset(err) {
		t.Errorf("got %v, want a reset", err)
	}
	if !looped.Load() || p.Stats().Accepted != 1 {
		t.Errorf("loop seen: %t; %d connections accepted, want 1", looped.Load(), p.Stats().Accepted)
	}
}

// Both directions carry 8 MB at once; each is ended by itself.
func TestHalfCloseBothWays(t *testing.T) {
	const size = 8 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	want := sha256.Sum256(data)
	hash := func(r io.Reader) ([32]byte, error) {
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err == nil && n != size {
			err = fmt.Errorf("%d bytes came, want %d", n, size)
		}
		return [32]byte(h.Sum(nil)), err
	}
	// Each side sends all, ends its direction, and reads the other to its end. The
	// side that begins ends long before the other one has begun.
	exchange := func(conn *net.TCPConn, first bool) error {
		send := func() error {
			if _, err := io.Copy(conn, bytes.NewReader(data)); err != nil {
				return err
			}
			return conn.CloseWrite()
		}
		check := func() error {
			got, err := hash(conn)
			if err == nil && got != want {
				err = errors.New("the bytes differ")
			}
			return err
		}
		if first {
			return errors.Join(send(), check())
		}
		return errors.Join(check(), send())
	}
	for _, clientFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("client first %t", clientFirst), func(t *testing.T) {
			served := make(chan error, 1)
			s := serve(t, "127.0.0.11:0", func(conn *net.TCPConn) { served <- exchange(conn, !clientFirst) })
			p := start(t, nil, s)
			conn := dial(t, p, "")
			mustName(t, conn)
			if err := exchange(conn, clientFirst); err != nil {
				t.Errorf("client: %v", err)
			}
			if err := <-served; err != nil {
				t.Errorf("server: %v", err)
			}
			eventually(t, "the connection has ended", func() bool { return established(p) == 0 })
			b := p.Stats().Backends[0]
			if b.Sent != size || b.Received != size+16 || b.Total != 1 {
				t.Errorf("counts %+v", b)
			}
		})
	}
	t.Run("at the same time", func(t *testing.T) {
		p := start(t, nil, serve(t, "127.0.0.11:0", echo))
		conn := dial(t, p, "")
		mustName(t, conn)
		sent := make(chan error, 1)
		go func() {
			_, err := conn.Write(data)
			sent <- errors.Join(err, conn.CloseWrite())
		}()
		got, err := hash(conn)
		if err = errors.Join(err, <-sent); err != nil || got != want {
			t.Errorf("equal: %t, error %v", got == want, err)
		}
	})
}

// A reader that stops holds the sender back, and loses nothing.
func TestSlowReader(t *testing.T) {
	const size = 64 << 20 // more than the kernel's buffers on the way
	written := make(chan struct{})
	s := serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
		conn.Write(make([]byte, size))
		close(written)
	})
	p := start(t, nil, s)
	conn := dial(t, p, "")
	conn.SetReadBuffer(256 << 10) // a window of less than loopback's MSS would take minutes
	mustName(t, conn)
	var at uint64
	eventually(t, "nothing moves any more", func() bool {
		before := p.Stats().Backends[0].Received
		time.Sleep(50 * time.Millisecond)
		at = p.Stats().Backends[0].Received
		return at == before
	})
	select {
	case <-written:
		t.Errorf("%d bytes were taken from the server while the client read nothing", at)
	default:
	}
	if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
		t.Errorf("%d bytes came, error %v", n, err)
	}
}

func TestResetsArePassedOn(t *testing.T) {
	ended := make(chan error, 1)
	tests := []struct {
		name   string
		server func(*net.TCPConn)
		client func(*Proxy)
	}{
		{"from the client", func(c *net.TCPConn) {
			_, err := c.Read(make([]byte, 1))
			ended <- err
		}, func(p *Proxy) {
			conn := dial(t, p, "")
			mustName(t, conn)
			crash(conn)
		}},
		{"from the client, after it ended its direction", func(c *net.TCPConn) {
			if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				ended <- fmt.Errorf("%d bytes and %w before the end", n, err)
				return
			}
			fmt.Fprint(c, "!")
			ended <- awaitReset(c)
		}, func(p *Proxy) {
			conn := dial(t, p, "")
			mustName(t, conn)
			conn.CloseWrite()
			conn.Read(make([]byte, 1))
			crash(conn)
		}},
		{"from the server", crash, func(p *Proxy) { ended <- refused(p) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t, nil, serve(t, "127.0.0.11:0", tt.server))
			tt.client(p)
			select {
			case err := <-ended:
				if !isReset(err) {
					t.Errorf("got %v, want a reset", err)
				}
			case <-time.After(5 * time.Second):
				t.Error("no reset came")
			}
			eventually(t, "the connection has ended", func() bool { return established(p) == 0 })
		})
	}
}

// Run does not end for want of descriptors, and goes on when there are some again.
func TestAcceptSurvives(t *testing.T) {
	p := start(t, nil, three(t, echo)...)
	mustName(t, dial(t, p, "")) // so that the network is set up
	waiting := dialWithDescriptors(t, p, 0, func() bool { return p.Stats().AcceptErrors > 0 })
	mustName(t, waiting)
	if p.Stats().AcceptErrors == 0 {
		t.Error("no error was met")
	}
}

// What the proxy itself is short of is not held against a backend.
func TestShortageIsNoFailureOfBackends(t *testing.T) {
	p := start(t, nil, three(t, echo)...)
	mustName(t, dial(t, p, ""))
	failed := func() bool { return p.Stats().Ended[Failed] > 0 }
	if _, err := dialWithDescriptors(t, p, 1, failed).Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("got %v, want a reset", err)
	}
	for _, b := range p.Stats().Backends {
		if b.Failures > 0 {
			t.Errorf("%s is said to have failed", b.Name)
		}
	}
}

// dialWithDescriptors connects to the proxy while the process has so many descriptors
// left, and gives the others back once the want of them has shown.
func dialWithDescriptors(t *testing.T, p *Proxy, left int, shown func() bool) net.Conn {
	t.Helper()
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "client")
	defer file.Close()
	few := before
	few.Cur = uint64(fd + 1 + left)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before)
	var spare []int // lower numbers may be free
	defer func() {
		for _, s := range spare {
			syscall.Close(s)
		}
	}()
	for err == nil {
		var s int
		if s, err = syscall.Dup(fd); err == nil {
			spare = append(spare, s)
		}
	}
	for ; left > 0; left-- {
		syscall.Close(spare[len(spare)-1])
		spare = spare[:len(spare)-1]
	}
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(p.Port())}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there were too few descriptors", shown)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

// A client's first bytes are acknowledged by what answers them.
func TestFirstBytesAreAcknowledgedByTheAnswer(t *testing.T) {
	fd, err := listenOn(0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeSocket(fd)
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", localAddr(fd).Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var taken int
	eventually(t, "it is accepted", func() bool {
		var errno syscall.Errno
		taken, _, errno = accept(fd)
		return errno == 0
	})
	defer closeSocket(taken)
	if quick, err := unix.GetsockoptInt(taken, unix.IPPROTO_TCP, unix.TCP_QUICKACK); quick != 0 || err != nil {
		t.Errorf("acknowledges at once: %d, error %v", quick, err)
	}
}

func TestSocketOptions(t *testing.T) {
	p := start(t, nil, serve(t, "127.0.0.11:0", echo))
	mustName(t, dial(t, p, ""))
	eventually(t, "the session is not a short one", func() bool {
		var young atomic.Bool
		onAll(p.started(), func(l *loop) { young.CompareAndSwap(false, l.aging.first != nil) })
		return !young.Load()
	})
	onAll(p.started(), func(l *loop) {
		for _, s := range l.sessions {
			for side, fd := range map[string]int{"client": s.client.fd, "server": s.server.fd} {
				for _, o := range []struct {
					name                string
					level, option, want int
				}{
					{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30_000},
					{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
					{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
					{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
					{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP},
				} {
					if got, err := unix.GetsockoptInt(fd, o.level, o.option); got != o.want || err != nil {
						t.Errorf("%s: %s is %d (error %v), want %d", side, o.name, got, err, o.want)
					}
				}
			}
		}
	})
}

func TestEnd(t *testing.T) {
	s := serve(t, "127.0.0.11:0", echo)
	p, err := New(Config{
		Name: "kube-api", OnDown: OnDownClose,
		Backends: []Backend{{Name: s.name, Address: s.addr}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context()); err == nil {
		t.Error("it ran without listening")
	}
	if err := p.Listen(); err != nil {
		t.Fatal(err)
	}
	if err := p.Listen(); err == nil {
		t.Error("it listens twice")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	conn := dial(t, p, "")
	mustName(t, conn)

	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", p.Port())); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection after the end: %v, want refusal", err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Errorf("an old connection after the end: %v", err)
	}

	short, cancelShort := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancelShort()
	if err := p.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("draining an open connection: %v", err)
	}
	p.Close()
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) {
		t.Errorf("after Close: %v, want a reset", err)
	}
	if err := p.Drain(t.Context()); err != nil {
		t.Errorf("draining what is empty: %v", err)
	}
	p.Close()
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{Name: "kube-api"}); err == nil {
		t.Error("no OnDown, no error")
	}
	if _, err := New(Config{Name: "kube-api", OnDown: OnDownClose, Backends: []Backend{{Name: "a"}}}); err == nil {
		t.Error("no address, no error")
	}
}
