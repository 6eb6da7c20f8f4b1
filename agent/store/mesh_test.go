package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/ownership"
)

const patience = 20 * time.Second

var origin = time.Now()

func clock() ownership.Instant { return ownership.Instant(time.Since(origin)) }

// mesh is some members in this process, each on a loopback address of its own.
type mesh struct {
	t     *testing.T
	dir   string
	ca    *authority // nil: no TLS
	ports [2]int
	addrs []netip.Addr
	nodes []*node
	boot  uint64
}

// node is one life of a member.
type node struct {
	t      *testing.T
	name   string
	boot   uint64
	store  *Store
	cancel context.CancelFunc
	ended  chan error // Run's answer

	mu     sync.Mutex
	events []ownership.Event
}

func newMesh(t *testing.T, size int, ca *authority) *mesh {
	m := &mesh{t: t, dir: t.TempDir(), ca: ca, nodes: make([]*node, size), boot: 100}
	net := [2]byte{byte(1 + mrand.IntN(250)), byte(mrand.IntN(250))}
	for i := range size {
		m.addrs = append(m.addrs, netip.AddrFrom4([4]byte{127, net[0], net[1], byte(i + 1)}))
	}
	m.ports = [2]int{freePort(t, m.addrs[0]), freePort(t, m.addrs[0])}
	t.Cleanup(func() { m.stop(m.all()...) })
	return m
}

func freePort(t *testing.T, a netip.Addr) int {
	l, err := net.Listen("tcp", netip.AddrPortFrom(a, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (m *mesh) all() (is []int) {
	for i := range m.nodes {
		is = append(is, i)
	}
	return is
}

func name(i int) string { return fmt.Sprintf("cp-%d", i+1) }

func (m *mesh) dataDir(i int) string { return filepath.Join(m.dir, name(i)) }

func (m *mesh) config(i int) Config {
	cfg := Config{
		Mesh:     "test",
		Member:   name(i),
		DataDir:  m.dataDir(i),
		Embedded: &Embedded{ClientPort: m.ports[0], PeerPort: m.ports[1], Address: m.addrs[i]},
		Boot:     m.boot,
		LeaseTTL: 2 * time.Second,
		Poll:     50 * time.Millisecond,
		Now:      clock,
		Log:      testLog(name(i)),
	}
	for j, a := range m.addrs {
		cfg.Members = append(cfg.Members, Member{Name: name(j), Address: a})
	}
	if m.ca != nil {
		cfg.TLS = m.ca.issue(m.t, name(i), m.addrs[i])
	}
	return cfg
}

// start gives each of these members a new life.
func (m *mesh) start(is ...int) {
	m.t.Helper()
	for _, i := range is {
		m.boot++
		m.nodes[i] = run(m.t, m.config(i))
	}
}

func (m *mesh) stop(is ...int) {
	m.t.Helper()
	var all sync.WaitGroup
	for _, i := range is {
		if n := m.nodes[i]; n != nil {
			m.nodes[i] = nil
			all.Go(n.stop)
		}
	}
	all.Wait()
}

func run(t *testing.T, cfg Config) *node {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &node{t: t, name: cfg.Member, boot: cfg.Boot, store: s, cancel: cancel, ended: make(chan error, 1)}
	go func() { n.ended <- s.Run(ctx) }()
	go func() {
		for {
			select {
			case ev := <-s.Events():
				n.mu.Lock()
				n.events = append(n.events, ev)
				n.mu.Unlock()
			case <-s.life.Done():
				return
			}
		}
	}()
	return n
}

func (n *node) stop() {
	n.cancel()
	if err := n.store.Close(); err != nil {
		n.t.Errorf("%s: %v", n.name, err)
	}
}

func (n *node) seen() []ownership.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.events[:len(n.events):len(n.events)]
}

// await polls until ok or patience ends.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %s", what, patience)
		}
	}
}

// snapshot waits for one that was asked for from now on, and that ok likes.
func (n *node) snapshot(what string, ok func(ownership.StoreSnapshot) bool) ownership.StoreSnapshot {
	n.t.Helper()
	from := clock()
	var found ownership.StoreSnapshot
	await(n.t, fmt.Sprintf("snapshot with %s on %s", what, n.name), func() bool {
		evs := n.seen()
		if len(evs) > 200 {
			evs = evs[len(evs)-200:]
		}
		for _, ev := range evs {
			if s, is := ev.(ownership.StoreSnapshot); is && s.SentAt >= from && ok(s) {
				found = s
				return true
			}
		}
		return false
	})
	return found
}

// ready waits for the first snapshot, which comes once the boot is recorded.
func (n *node) ready() {
	n.t.Helper()
	n.snapshot("any", func(ownership.StoreSnapshot) bool { return true })
}

// leaseOf waits for a lease other than not.
func (n *node) leaseOf(not int64) int64 {
	n.t.Helper()
	var lease int64
	await(n.t, "lease of "+n.name, func() bool {
		for _, ev := range n.seen() {
			if r, is := ev.(ownership.LeaseRenewed); is && r.Lease != not {
				lease = r.Lease
			}
		}
		return lease != 0
	})
	return lease
}

var writeID uint64

func (n *node) write(w ownership.Write) ownership.WriteResult {
	n.t.Helper()
	writeID++
	w.ID = writeID
	n.store.Write(w)
	var found ownership.WriteResult
	await(n.t, "write result", func() bool {
		for _, ev := range n.seen() {
			if r, is := ev.(ownership.WriteResult); is && r.ID == w.ID {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

// commit is write for what must not stay unknown: an election in between is no fault.
func (n *node) commit(w ownership.Write) ownership.WriteResult {
	n.t.Helper()
	for end := time.Now().Add(patience); ; {
		res := n.write(w)
		if res.Outcome != ownership.Unknown || time.Now().After(end) {
			return res
		}
		now := record(n.snapshot("a record", func(ownership.StoreSnapshot) bool { return true }), w.Record.VIP)
		if now.Revision != w.Compare {
			return ownership.WriteResult{ID: res.ID, SentAt: res.SentAt, Outcome: ownership.Written, Record: now}
		}
	}
}

func record(s ownership.StoreSnapshot, vip string) ownership.Record {
	for _, r := range s.Records {
		if r.VIP == vip {
			return r
		}
	}
	return ownership.Record{VIP: vip, Gone: true}
}

func testLog(name string) hclog.Logger {
	level := hclog.Off
	if testing.Verbose() {
		level = hclog.Warn
	}
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: level})
}

// authority signs certificates for tests.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.key, a.cert = sign(t, nil, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, filepath.Join(a.dir, "ca.crt"), filepath.Join(a.dir, "ca.key"))
	return a
}

func (a *authority) issue(t *testing.T, name string, addr netip.Addr) *TLSFiles {
	t.Helper()
	f := &TLSFiles{
		CAFile:   filepath.Join(a.dir, "ca.crt"),
		CertFile: filepath.Join(a.dir, name+".crt"),
		KeyFile:  filepath.Join(a.dir, name+".key"),
	}
	sign(t, a.cert, a.key, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		IPAddresses: []net.IP{addr.AsSlice()},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, f.CertFile, f.KeyFile)
	return f
}

func sign(t *testing.T, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, c *x509.Certificate, certFile, keyFile string) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if parent == nil {
		parent, parentKey = c, key
	}
	c.SerialNumber = big.NewInt(mrand.Int64())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: der},
		keyFile:  {Type: "EC PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}
