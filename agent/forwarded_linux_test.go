package agent_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
	traffic "github.com/hamesh/hamesh/deploy/lab/load"
)

const (
	cheapPort = 6444  // beside the API servers, whose handshakes would be most of the load
	bulkPort  = 6445  // of the backends for transfers
	bulkProxy = 16444 // and of their proxy
)

// withBulk adds a proxy for the bulk backends, which takes its share of the descriptors.
func withBulk(_ string, config map[string]any) {
	proxies := config["proxies"].([]any)
	var backends []any
	for _, b := range proxies[0].(map[string]any)["backends"].([]any) {
		b := b.(map[string]any)
		host := netip.MustParseAddrPort(b["address"].(string)).Addr()
		backends = append(backends, map[string]any{"name": b["name"], "node": b["node"], "address": netip.AddrPortFrom(host, bulkPort).String()})
	}
	config["proxies"] = append(proxies, map[string]any{
		"name": "bulk", "port": bulkProxy, "healthCheck": map[string]any{"scheme": "tcp"}, "backends": backends,
	})
}

// newCheapMesh makes a mesh whose backends are those of package traffic. A prefix is the
// client's, for a generator to come from. More may be changed in the nodes' configurations.
func newCheapMesh(t *testing.T, more ...func(node string, config map[string]any)) (m *lab.Mesh, sources netip.Prefix, backends []*traffic.Backend) {
	t.Helper()
	m = newMesh(t, lab.Options{Agentless: true, Edit: func(node string, config map[string]any) {
		withoutRamp(node, config)
		proxy := config["proxies"].([]any)[0].(map[string]any)
		proxy["healthCheck"] = map[string]any{"scheme": "tcp"}
		for _, b := range proxy["backends"].([]any) {
			b := b.(map[string]any)
			host := netip.MustParseAddrPort(b["address"].(string)).Addr()
			b["address"] = netip.AddrPortFrom(host, cheapPort).String()
		}
		for _, edit := range more {
			edit(node, config)
		}
	}})
	sources = netip.MustParsePrefix("10.99.0.0/16")
	if err := traffic.Own(m.Client.Host, sources); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		if err := traffic.Reach(n.Host(), sources, m.Client.Sources[0]); err != nil {
			t.Fatal(err)
		}
		b, err := traffic.StartBackend(n.Host(), cheapPort)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = b.Close() }) // ends with the mesh in any case
		backends = append(backends, b)
		if err := n.StartAgent(); err != nil {
			t.Fatal(err)
		}
	}
	return m, sources, backends
}

// What a client of a bulk backend says first.
const (
	uploads   = 'u' // the rest is data; it gets its SHA-256
	downloads = 'd' // it gets data until it says that it has enough, and then the SHA-256
)

// serveBulk serves transfers on a node until the test ends.
func serveBulk(t *testing.T, n *lab.Node) {
	t.Helper()
	l, err := n.Host().Listen("tcp", fmt.Sprintf(":%d", bulkPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				transfer(c.(*net.TCPConn))
			}()
		}
	}()
}

func transfer(c *net.TCPConn) {
	kind := make([]byte, 1)
	if _, err := io.ReadFull(c, kind); err != nil {
		return // a check
	}
	hash := sha256.New()
	if kind[0] == uploads {
		// What fails here, the client sees.
		if _, err := io.Copy(hash, c); err == nil {
			_, _ = c.Write(hash.Sum(nil))
		}
		return
	}
	var enough atomic.Bool
	go func() {
		_, _ = c.Read(kind)
		enough.Store(true)
	}()
	for b := newBlocks(); !enough.Load(); {
		block := b.next()
		if _, err := c.Write(block); err != nil {
			return
		}
		hash.Write(block)
	}
	_, _ = c.Write(hash.Sum(nil))
}

// blocks are data of which no two blocks are the same.
type blocks struct {
	block []byte
	n     uint64
}

func newBlocks() *blocks {
	b := &blocks{block: make([]byte, 256<<10)}
	_, _ = rand.Read(b.block) // never fails
	return b
}

func (b *blocks) next() []byte {
	b.n++
	binary.BigEndian.PutUint64(b.block, b.n)
	return b.block
}

// stage is how much was transferred in one of the three parts of a transfer.
type stage struct {
	bytes int64
	took  time.Duration
}

func (s stage) String() string {
	return fmt.Sprintf("%d MB at %.0f MB/s", s.bytes>>20, float64(s.bytes)/(1<<20)/s.took.Seconds())
}

// across passes half of so many bytes before the VIP moves, what it can meanwhile, and the
// other half after that.
func across(t *testing.T, m *lab.Mesh, to *lab.Node, total int64, pass func() (int64, error)) (before, meanwhile, after stage) {
	t.Helper()
	until := func(done func(stage) bool) (s stage) {
		for start := time.Now(); !done(s); s.took = time.Since(start) {
			n, err := pass()
			if s.bytes += n; err != nil {
				t.Fatalf("after %d bytes of this part: %v", s.bytes, err)
			}
		}
		return s
	}
	half := func(s stage) bool { return s.bytes >= total/2 }
	before = until(half)
	var moved atomic.Bool
	go func() {
		defer moved.Store(true)
		if _, stderr, status, err := to.Hactl("move-vip", "kube-api", "--to", to.Name, "--wait"); err != nil || status != 0 {
			t.Errorf("move to %s: status %d, %v: %s", to.Name, status, err, stderr)
		}
	}()
	meanwhile = until(func(stage) bool { return moved.Load() })
	return before, meanwhile, until(half)
}

// bulk connects to the bulk backends through the VIP.
func bulk(t *testing.T, m *lab.Mesh, kind byte) *net.TCPConn {
	t.Helper()
	var c net.Conn
	if err := lab.Await(10*time.Second, func() (err error) {
		c, err = m.Client.Host.DialContext(context.Background(), &net.Dialer{Timeout: time.Second}, "tcp", netip.AddrPortFrom(m.VIP().Addr(), bulkProxy).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{kind}); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// other is a node that is not the one.
func other(m *lab.Mesh, n *lab.Node) *lab.Node {
	if m.Nodes[0] == n {
		return m.Nodes[1]
	}
	return m.Nodes[0]
}

// TestForwarded moves a VIP with many connections and with long transfers, and measures what
// forwarding costs: the machine's processors, of which the taker's share cannot be told, as
// every node has the same kernel.
func TestForwarded(t *testing.T) {
	connections, rate, total := 2000, 4000.0, int64(1)<<30
	if raceDetector {
		connections, rate, total = 300, 500, 32<<20
	}
	m, sources, _ := newCheapMesh(t, withBulk)
	for _, n := range m.Nodes {
		serveBulk(t, n)
	}
	owner(t, m)
	healthy(t, m)

	t.Run("many connections", func(t *testing.T) {
		generator := func() *traffic.Generator {
			g, err := traffic.StartGenerator(m.Client.Host, traffic.Ends{
				Targets: []netip.AddrPort{m.VIP()}, From: sources.Addr().Next(), Sources: connections,
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = g.Close() }) // ends with the mesh in any case
			if _, err := g.Hold(connections); err != nil {
				t.Fatal(err)
			}
			return g
		}
		idle := busy(t, func() { time.Sleep(2 * time.Second) })
		g := generator()
		ask := func(g *traffic.Generator, how string) traffic.Latency {
			var l traffic.Latency
			share := busy(t, func() {
				var err error
				if l, err = g.Ask(traffic.Ask{Rate: rate, For: 4 * time.Second}); err != nil {
					t.Fatal(err)
				}
			})
			t.Logf("%s: %.0f requests a second over %d connections: p50 %v, p99 %v, slowest %v, failed %v; %.2f processors busy, of them %.2f without any load",
				how, rate, connections, l.P50, l.P99, l.Max, l.Failed, share, idle)
			if l.Failures() > 0 {
				t.Errorf("%s: %d requests failed: %v", how, l.Failures(), l.Failed)
			}
			return l
		}
		ask(g, "before the move")
		giver := owner(t, m)
		taker := other(m, giver)
		from := time.Now()
		move(t, m, taker)
		handing(t, m, taker, true, false)
		forwarded := ask(g, "forwarded")
		lost, err := g.Hold(connections)
		if err != nil {
			t.Fatal(err)
		}
		if lost > 0 {
			t.Errorf("the move broke %d of %d connections", lost, connections)
		}
		if forwarded.P50 > 20*time.Millisecond && !raceDetector {
			t.Errorf("forwarded requests take %v", forwarded.P50)
		}
		never(t, m, from, planned)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		handing(t, m, giver, false, false)
		handing(t, m, taker, false, false)
		ask(generator(), "new ones after the drain")
	})

	t.Run("upload", func(t *testing.T) {
		taker := other(m, owner(t, m))
		c := bulk(t, m, uploads)
		hash, data := sha256.New(), newBlocks()
		before, meanwhile, after := across(t, m, taker, total, func() (int64, error) {
			block := data.next()
			hash.Write(block)
			n, err := c.Write(block)
			return int64(n), err
		})
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || string(got) != string(hash.Sum(nil)) {
			t.Errorf("what arrived is not what was sent: %x, %v", got, err)
		}
		t.Logf("before the move %v, meanwhile %v, forwarded %v", before, meanwhile, after)
	})

	t.Run("download", func(t *testing.T) {
		taker := other(m, owner(t, m))
		c := bulk(t, m, downloads)
		// All but the last 32 bytes, which are the hash, and come last.
		var tail []byte
		hash, block := sha256.New(), make([]byte, 256<<10)
		pass := func() (int64, error) {
			n, err := c.Read(block)
			tail = append(tail, block[:n]...)
			if rest := len(tail) - sha256.Size; rest > 0 {
				hash.Write(tail[:rest])
				tail = append(tail[:0], tail[rest:]...)
			}
			return int64(n), err
		}
		before, meanwhile, after := across(t, m, taker, total, pass)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		var err error
		for err == nil {
			_, err = pass()
		}
		if !errors.Is(err, io.EOF) || string(tail) != string(hash.Sum(nil)) {
			t.Errorf("what arrived is not what was sent: %x, %v", tail, err)
		}
		t.Logf("before the move %v, meanwhile %v, forwarded %v", before, meanwhile, after)
	})
}

// busy is how many processors of the machine are busy while f runs (proc_stat(5)).
func busy(t *testing.T, f func()) float64 {
	t.Helper()
	ticks := func() (sum int64) {
		b, err := os.ReadFile("/proc/stat")
		if err != nil {
			t.Fatal(err)
		}
		var user, nice, system, idle, iowait, irq, softirq int64
		if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq); err != nil {
			t.Fatal(err)
		}
		return user + nice + system + irq + softirq
	}
	const perSecond = 100 // USER_HZ
	start, before := time.Now(), ticks()
	f()
	return float64(ticks()-before) / perSecond / time.Since(start).Seconds()
}
