package proxy

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/health"
)

// replace changes a proxy to those servers, all of them Up.
func replace(t *testing.T, p *Proxy, change func(*Config), servers ...*server) {
	t.Helper()
	cfg := Config{OnDown: OnDownClose}
	for _, s := range servers {
		cfg.Backends = append(cfg.Backends, Backend{Name: s.name, Address: s.addr})
	}
	if change != nil {
		change(&cfg)
	}
	if err := p.Replace(cfg); err != nil {
		t.Fatal(err)
	}
	states := map[string]health.State{}
	for _, s := range servers {
		states[s.name] = health.Up
	}
	p.SetBackends(states)
}

func drains(cfg *Config) { cfg.OnDown, cfg.DrainTimeout = OnDownDrain, time.Hour }

// streams opens a connection of each of some clients, and returns them by their server.
func streams(t *testing.T, p *Proxy, n int) map[string][]*net.TCPConn {
	t.Helper()
	conns := map[string][]*net.TCPConn{}
	for i := range n {
		conn := dial(t, p, client(i))
		name := mustName(t, conn)
		conns[name] = append(conns[name], conn)
	}
	return conns
}

// says reports whether a connection to an echoing server works.
func says(conn net.Conn) error {
	if _, err := conn.Write([]byte("still there?")); err != nil {
		return err
	}
	var answer [12]byte
	if _, err := conn.Read(answer[:]); err != nil {
		return err
	}
	return nil
}

func names(p *Proxy) string {
	var names []string
	for _, b := range p.Stats().Backends {
		names = append(names, fmt.Sprintf("%s %v", b.Name, b.State))
	}
	return strings.Join(names, ", ")
}

func TestReplaceCloses(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	conns := streams(t, p, 30)
	gone := servers[1]
	replace(t, p, nil, servers[0], servers[2])
	for name, all := range conns {
		for _, conn := range all {
			if err := says(conn); (err != nil) != (name == gone.name) {
				t.Errorf("connection to %s, when %s is gone: %v", name, gone.name, err)
			}
		}
	}
	for name := range streams(t, p, 30) {
		if name == gone.name {
			t.Error("a new connection came to the backend that is gone")
		}
	}
	if got := p.Stats().Ended[BackendRemoved]; got != uint64(len(conns[gone.name])) {
		t.Errorf("%d sessions ended with their backend, want %d", got, len(conns[gone.name]))
	}
	if got, want := names(p), servers[0].name+" up, "+servers[2].name+" up"; got != want {
		t.Errorf("backends %s, want %s", got, want)
	}
}

func TestReplaceDrains(t *testing.T) {
	servers := three(t, echo)
	p := start(t, drains, servers...)
	conns := streams(t, p, 30)
	all := func(when string) {
		t.Helper()
		for name, all := range conns {
			for _, conn := range all {
				if err := says(conn); err != nil {
					t.Errorf("%s: connection to %s: %v", when, name, err)
				}
			}
		}
	}
	gone := servers[1]
	replace(t, p, drains, servers[0], servers[2])
	all("one is gone")
	for name := range streams(t, p, 30) {
		if name == gone.name {
			t.Error("a new connection came to the backend that is gone")
		}
	}
	// It is back before they have ended, and keeps them; with another backend in its place.
	fourth := serve(t, "127.0.0.14:0", echo)
	replace(t, p, drains, servers[0], fourth)
	replace(t, p, drains, servers...)
	all("it is back")
	if n := len(streams(t, p, 30)); n != 3 {
		t.Errorf("30 clients come to %d backends, want 3", n)
	}
	// And out again, for so long that it ends.
	replace(t, p, func(cfg *Config) { cfg.OnDown, cfg.DrainTimeout = OnDownDrain, 50*time.Millisecond }, servers[0], servers[2])
	eventually(t, "no connection is left to the backend that is gone", func() bool {
		return p.Stats().Ended[DrainTimeout] >= uint64(len(conns[gone.name]))
	})
	delete(conns, gone.name)
	all("its time is up")
}

// TestReplaceUnderLoad changes the backends again and again, and nobody notices.
func TestReplaceUnderLoad(t *testing.T) {
	servers := three(t, echo)
	p := start(t, drains, servers...)
	held := streams(t, p, 30)
	var failed, opened atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				opened.Add(1)
				conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", p.Port()))
				if err != nil {
					t.Errorf("client %d: %v", i, err)
					failed.Add(1)
					return
				}
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				if _, err = name(conn); err == nil {
					err = says(conn)
				}
				conn.Close()
				if err != nil {
					t.Errorf("client %d: %v", i, err)
					failed.Add(1)
					return
				}
			}
		})
	}
	for i := range 300 {
		if i%2 == 0 {
			replace(t, p, drains, servers[i/2%3], servers[(i/2+1)%3])
		} else {
			replace(t, p, drains, servers...)
		}
		p.Stats()
		time.Sleep(time.Millisecond)
	}
	close(stop)
	clients.Wait()
	t.Logf("%d connections during 300 changes, %d failed", opened.Load(), failed.Load())
	for name, all := range held {
		for _, conn := range all {
			if err := says(conn); err != nil {
				t.Errorf("connection to %s: %v", name, err)
			}
		}
	}
}

func TestReplaceAddress(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers[0])
	conn := dial(t, p, "")
	mustName(t, conn)
	other := Backend{Name: servers[0].name, Address: servers[1].addr}
	replace(t, p, func(cfg *Config) { cfg.Backends = []Backend{other} })
	if err := says(conn); err == nil {
		t.Error("a connection to the address that the backend had goes on")
	}
	if got := names(p); got != other.Name+" unknown" {
		t.Errorf("backends %s; another address is another backend", got)
	}
	if got := mustName(t, dial(t, p, "")); got != servers[1].name {
		t.Errorf("came to %s", got)
	}
}

func TestReplaceWeight(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers[:2]...)
	weigh := func(cfg *Config) { cfg.Backends[1].Weight = 256 }
	if got := len(streams(t, p, 10)[servers[1].name]); got == 10 {
		t.Fatal("all clients come to one of two backends")
	}
	replace(t, p, weigh, servers[:2]...)
	if got := len(streams(t, p, 10)[servers[1].name]); got < 9 {
		t.Errorf("%d of 10 clients come to a backend with nearly all the weight", got)
	}
}

func TestReplaceLimits(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	limit := func(perClient, connections int) {
		t.Helper()
		replace(t, p, func(cfg *Config) { cfg.Limits = Limits{PerClient: perClient, Connections: connections} }, servers...)
	}
	var conns []*net.TCPConn
	for range 3 {
		conns = append(conns, dial(t, p, ""))
		mustName(t, conns[len(conns)-1])
	}
	limit(3, 0) // which those from before count towards
	if err := refused(p); err == nil {
		t.Error("a fourth connection of a client that may have three")
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "connections have ended", func() bool { return p.Stats().Connections == 0 })
	p.mu.Lock()
	if len(p.clients) != 0 {
		t.Errorf("clients are left: %v", p.clients)
	}
	p.mu.Unlock()
	mustName(t, dial(t, p, ""))
	limit(0, 1)
	if err := refused(p); err == nil {
		t.Error("a second connection where one is allowed")
	}
	limit(0, 0)
	mustName(t, dial(t, p, ""))
}

func TestReplaceJournal(t *testing.T) {
	var text lockedBuffer
	servers := three(t, echo)
	p := start(t, func(cfg *Config) { cfg.Log = hclog.New(&hclog.LoggerOptions{Output: &text}) }, servers...)
	ended := func() {
		t.Helper()
		before := p.Stats().Ended[ClientClosed]
		conn := dial(t, p, "")
		mustName(t, conn)
		conn.Close()
		eventually(t, "a connection has ended", func() bool { return p.Stats().Ended[ClientClosed] > before })
	}
	ended()
	replace(t, p, func(cfg *Config) { cfg.ConnectionLog = LogAll }, servers...)
	ended()
	eventually(t, "it is in the log", func() bool { return strings.Count(text.String(), "connection ended") == 1 })
	replace(t, p, nil, servers...)
	ended()
	p.Close() // writes what is left
	if n := strings.Count(text.String(), "connection ended"); n != 1 {
		t.Errorf("%d lines:\n%s", n, text.String())
	}
}

func TestReplaceRefused(t *testing.T) {
	servers := three(t, echo)
	p := start(t, nil, servers...)
	before := names(p)
	for _, cfg := range []Config{
		{Backends: []Backend{{Name: "a", Address: servers[0].addr}}},
		{OnDown: OnDownClose, Backends: []Backend{{Name: "a"}}},
		{OnDown: OnDownClose, Backends: make([]Backend, 65)},
	} {
		if err := p.Replace(cfg); err == nil {
			t.Errorf("%+v was taken", cfg)
		}
	}
	if got := names(p); got != before {
		t.Errorf("backends %s, want %s", got, before)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(line []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(line)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}
