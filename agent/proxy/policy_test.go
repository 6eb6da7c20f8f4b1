package proxy

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/health"
)

func TestLimits(t *testing.T) {
	p := start(t, func(c *Config) { c.Limits = Limits{Connections: 5, PerClient: 3} }, three(t, echo)...)
	var conns []*net.TCPConn
	for i := range 5 {
		conn := dial(t, p, client(i/3))
		mustName(t, conn)
		conns = append(conns, conn)
	}
	began := time.Now()
	if err := refused(p); !isReset(err) {
		t.Errorf("one too many: %v, want a reset", err)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("refusing took %v", took)
	}
	if got := p.Full(netip.MustParseAddr(client(9))); got != Limit {
		t.Errorf("a full proxy is said to be so by %v", got)
	}
	conns[4].Close()
	eventually(t, "there is room again", func() bool { return p.Stats().Connections == 4 })
	conn, err := net.DialTCP("tcp4", &net.TCPAddr{IP: net.ParseIP(client(0))}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(p.Port())})
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if !isReset(err) {
		t.Errorf("one too many of a client: %v, want a reset", err)
	}
	if own, other := p.Full(netip.MustParseAddr(client(0))), p.Full(netip.MustParseAddr(client(1))); own != ClientLimit || other != 0 {
		t.Errorf("full for one client by %v, for another one by %v", own, other)
	}
	mustName(t, dial(t, p, client(1)))
	stats := p.Stats()
	if stats.Ended[Limit] != 1 || stats.Ended[ClientLimit] != 1 || stats.Limit != 5 || stats.Accepted != 8 {
		t.Errorf("stats %+v", stats)
	}
}

// A backend that drains keeps its connections for a while, and one that comes back in
// time keeps them for good.
func TestDrainTimeout(t *testing.T) {
	for _, state := range []health.State{health.Draining, health.Down} {
		t.Run(state.String(), func(t *testing.T) {
			s := serve(t, "127.0.0.11:0", echo)
			p := start(t, func(c *Config) { c.OnDown, c.DrainTimeout = OnDownDrain, 200*time.Millisecond }, s)
			conn := dial(t, p, "")
			mustName(t, conn)
			all(p, state)
			all(p, health.Up)
			time.Sleep(300 * time.Millisecond)
			conn.Write([]byte("x"))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatalf("the drain was ended, and yet: %v", err)
			}
			began := time.Now()
			all(p, state)
			if _, err := conn.Read(make([]byte, 1)); !isReset(err) || time.Since(began) < 200*time.Millisecond {
				t.Errorf("%v after %v, want a reset after 200 ms", err, time.Since(began))
			}
			eventually(t, "the cause is counted", func() bool { return p.Stats().Ended[DrainTimeout] == 1 })
		})
	}
}

// The time of a drain runs from its beginning, though the backend ceases to be ready meanwhile;
// and where no other one is well, it does not begin before one is.
func TestDrainTimeoutOfOneNotReady(t *testing.T) {
	const timeout = 300 * time.Millisecond
	s, other := serve(t, "127.0.0.11:0", echo), serve(t, "127.0.0.12:0", echo)
	p := start(t, func(c *Config) { c.DrainTimeout = timeout }, s, other)
	connect := func() *net.TCPConn {
		t.Helper()
		p.SetBackends(map[string]health.State{s.name: health.Up, other.name: health.Disabled})
		conn := dial(t, p, "")
		mustName(t, conn)
		p.SetBackends(map[string]health.State{other.name: health.Up})
		return conn
	}
	conn := connect()
	began := time.Now()
	p.SetBackends(map[string]health.State{s.name: health.Draining})
	time.Sleep(timeout * 2 / 3)
	p.SetBackends(map[string]health.State{s.name: health.NotReady})
	_, err := conn.Read(make([]byte, 1))
	if took := time.Since(began); !isReset(err) || took < timeout || took > timeout*3/2 {
		t.Errorf("%v after %v, want a reset after %v", err, took, timeout)
	}

	conn = connect()
	all(p, health.NotReady)
	time.Sleep(timeout * 3 / 2)
	conn.Write([]byte("x"))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatalf("no other one was well, and yet: %v", err)
	}
	began = time.Now()
	p.SetBackends(map[string]health.State{other.name: health.Up})
	if _, err := conn.Read(make([]byte, 1)); !isReset(err) || time.Since(began) < timeout {
		t.Errorf("%v after %v, want a reset after %v", err, time.Since(began), timeout)
	}
}

// A backend that recovers gets its clients back one by one, each for good.
func TestSlowStart(t *testing.T) {
	const slowStart = 3 * time.Second
	servers := three(t, echo)
	p := start(t, func(c *Config) { c.SlowStart = slowStart }, servers...)
	var own []string // clients that belong to the first
	for i := 0; len(own) < 30; i++ {
		if best(client(i), servers...) == servers[0].name {
			own = append(own, client(i))
		}
	}
	met := func() (n int) {
		for _, c := range own {
			conn := dial(t, p, c)
			if mustName(t, conn) == servers[0].name {
				n++
			}
			conn.Close()
		}
		return n
	}
	if n := met(); n != len(own) {
		t.Fatalf("at first %d of %d came to the backend", n, len(own))
	}
	p.SetBackends(map[string]health.State{servers[0].name: health.Down})
	p.SetBackends(map[string]health.State{servers[0].name: health.Up})
	began := time.Now()
	last := 0
	for time.Since(began) < slowStart {
		at := time.Since(began)
		n := met()
		if n < last {
			t.Errorf("%d clients after %d: some went to and fro", n, last)
		}
		if at < slowStart/10 && n > len(own)*2/3 && time.Since(began) < slowStart/5 {
			t.Errorf("%d of %d clients came at once", n, len(own))
		}
		last = n
	}
	if n := met(); n != len(own) {
		t.Errorf("in the end %d of %d came", n, len(own))
	}
	// One that was well all the time has nothing to recover from.
	p.SetBackends(map[string]health.State{servers[0].name: health.Down})
	p.SetBackends(map[string]health.State{servers[0].name: health.Up}, servers[0].name)
	if n := met(); n != len(own) {
		t.Errorf("%d of %d came at once to a backend that was well", n, len(own))
	}
	// With nobody else up there is nothing to wait for.
	all(p, health.Down)
	p.SetBackends(map[string]health.State{servers[0].name: health.Up})
	if n := met(); n != len(own) {
		t.Errorf("alone it got %d of %d", n, len(own))
	}
}

// No backend has many more connections than its share.
func TestBoundedLoad(t *testing.T) {
	servers := three(t, echo)
	p := start(t, func(c *Config) { c.LoadFactor = 1.25 }, servers...)
	met := map[string]int{}
	const one = "127.9.9.9"
	const connections = 150
	for range connections { // all from one address: affinity alone would send them to one
		met[mustName(t, dial(t, p, one))]++
	}
	if n := met[best(one, servers...)]; n < 60 || n > 64 { // 1.25 * 150 / 3 = 62.5
		t.Errorf("the first in rank has %d of %d connections: %v", n, connections, met)
	}
}

// lines is a log that a test reads.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

// ended returns what was logged of connections that ended.
func (l *lines) ended(t *testing.T) (all []map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.buf.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatal(err)
		}
		if fields["@message"] == "connection ended" {
			all = append(all, fields)
		}
	}
	return all
}

// Each end of a connection has its cause, in the log and in the counts.
func TestCauses(t *testing.T) {
	tests := []struct {
		cause  Cause
		server func(*net.TCPConn)
		client func(*testing.T, *Proxy)
	}{
		{ClientClosed, echo, func(t *testing.T, p *Proxy) { conn := dial(t, p, ""); mustName(t, conn); conn.Close() }},
		{ServerClosed, func(*net.TCPConn) {}, func(t *testing.T, p *Proxy) {
			conn := dial(t, p, "")
			mustName(t, conn)
			io.Copy(io.Discard, conn)
			conn.Close()
		}},
		{ClientReset, echo, func(t *testing.T, p *Proxy) { conn := dial(t, p, ""); mustName(t, conn); crash(conn) }},
		{ServerReset, func(conn *net.TCPConn) { conn.Read(make([]byte, 1)); crash(conn) }, func(t *testing.T, p *Proxy) {
			conn := dial(t, p, "")
			mustName(t, conn)
			conn.Write([]byte("x"))
			io.Copy(io.Discard, conn)
		}},
		{BackendDown, echo, func(t *testing.T, p *Proxy) {
			mustName(t, dial(t, p, ""))
			p.SetBackends(map[string]health.State{"127.0.0.11": health.Down, "127.0.0.12": health.Up})
		}},
		{BackendDisabled, echo, func(t *testing.T, p *Proxy) { mustName(t, dial(t, p, "")); all(p, health.Disabled) }},
		{NoBackend, echo, func(_ *testing.T, p *Proxy) { all(p, health.Disabled); refused(p) }},
		{Shutdown, echo, func(t *testing.T, p *Proxy) { mustName(t, dial(t, p, "")); p.Close() }},
	}
	for _, tt := range tests {
		t.Run(tt.cause.String(), func(t *testing.T) {
			var log lines
			p := start(t, func(c *Config) {
				c.ConnectionLog, c.Log = LogAll, hclog.New(&hclog.LoggerOptions{Output: &log, JSONFormat: true})
			}, serve(t, "127.0.0.11:0", tt.server), serve(t, "127.0.0.12:0", echo))
			p.SetBackends(map[string]health.State{"127.0.0.12": health.Disabled})
			tt.client(t, p)
			eventually(t, "it is counted", func() bool { return p.Stats().Ended[tt.cause] == 1 })
			eventually(t, "it is logged", func() bool { return len(log.ended(t)) == 1 })
			line := log.ended(t)[0]
			if line["cause"] != tt.cause.String() || !strings.HasPrefix(line["local"].(string), "127.0.0.1:") || line["client"] == "" {
				t.Errorf("line %v", line)
			}
			if tt.cause != NoBackend && (line["backend"] != "127.0.0.11" || line["received"].(float64) != 16 && tt.cause != ServerReset) {
				t.Errorf("line %v", line)
			}
		})
	}
}

// Of a flood only so many lines are logged, and how many were not.
func TestConnectionLogIsBounded(t *testing.T) {
	var log lines
	j := newJournal("kube-api", hclog.New(&hclog.LoggerOptions{Output: &log, JSONFormat: true}))
	began := time.Now()
	s := &session{client: socket{fd: -1}}
	const noted = 5000
	for range noted {
		j.note(s, NoBackend, 0)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("noting took %v", took)
	}
	eventually(t, "there is room", func() bool { return len(j.lines) < journalBuffer })
	j.note(s, NoBackend, 0)
	j.close()
	logged, unlogged := 0, 0
	for _, line := range log.ended(t) {
		logged++
		if n, ok := line["unlogged"].(float64); ok {
			unlogged += int(n)
		}
	}
	if logged > 2*journalBuffer || logged+unlogged != noted+1 {
		t.Errorf("%d lines, %d told to be left out, of %d", logged, unlogged, noted+1)
	}
}

func TestErrorsAreLoggedAlone(t *testing.T) {
	var log lines
	p := start(t, func(c *Config) {
		c.ConnectionLog, c.Log = LogErrors, hclog.New(&hclog.LoggerOptions{Output: &log, JSONFormat: true})
	}, serve(t, "127.0.0.11:0", echo))
	conn := dial(t, p, "")
	mustName(t, conn)
	conn.Close()
	eventually(t, "it has ended", func() bool { return p.Stats().Ended[ClientClosed] == 1 })
	conn = dial(t, p, "")
	mustName(t, conn)
	crash(conn)
	eventually(t, "the other one is logged", func() bool { return len(log.ended(t)) > 0 })
	if got := log.ended(t); len(got) != 1 || got[0]["cause"] != "client-reset" {
		t.Errorf("logged %v", got)
	}
}

// readHeader parses a header of the PROXY protocol, version 2, by its specification.
func readHeader(r io.Reader) (client, local netip.AddrPort, err error) {
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return client, local, err
	}
	if string(head[:12]) != "\r\n\r\n\x00\r\nQUIT\n" || head[12] != 0x21 {
		return client, local, fmt.Errorf("not a header for another's connection: %q", head)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return client, local, err
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]]
	if size == 0 || len(body) != 2*size+4 {
		return client, local, fmt.Errorf("family %#x with %d bytes", head[13], len(body))
	}
	from, _ := netip.AddrFromSlice(body[:size])
	to, _ := netip.AddrFromSlice(body[size : 2*size])
	ports := body[2*size:]
	return netip.AddrPortFrom(from, binary.BigEndian.Uint16(ports)), netip.AddrPortFrom(to, binary.BigEndian.Uint16(ports[2:])), nil
}

func TestGreeting(t *testing.T) {
	type greeting struct {
		client, local netip.AddrPort
		rest          string
		err           error
	}
	came := make(chan greeting, 1)
	p := start(t, func(c *Config) { c.Greeting = GreetingV2 }, serve(t, "127.0.0.11:0", func(conn *net.TCPConn) {
		var g greeting
		if g.client, g.local, g.err = readHeader(conn); g.err == nil {
			rest, err := io.ReadAll(conn)
			g.rest, g.err = string(rest), err
		}
		came <- g
	}))
	for _, to := range []string{"127.0.0.1", "127.0.0.5", "::1"} {
		conn, err := net.Dial("tcp", net.JoinHostPort(to, fmt.Sprint(p.Port())))
		if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
			continue // no IPv6 here
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "hello")
		conn.(*net.TCPConn).CloseWrite()
		g := <-came
		if g.err != nil || g.rest != "hello" || g.client.String() != conn.LocalAddr().String() || g.local.String() != conn.RemoteAddr().String() {
			t.Errorf("to %s: %+v, want client %v, local %v", to, g, conn.LocalAddr(), conn.RemoteAddr())
		}
		conn.Close()
	}
	eventually(t, "the header is not counted", func() bool { return p.Stats().Backends[0].Sent%5 == 0 && p.Stats().Connections == 0 })
}
