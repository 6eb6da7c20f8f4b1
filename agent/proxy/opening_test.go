package proxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hamesh/hamesh/agent/health"
)

// hung starts a server whose kernel accepts connections, and that does nothing with them.
func hung(t *testing.T, address string) *server {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(listener.Addr().String())
	s := &server{name: addr.Addr().String(), addr: addr, listener: listener}
	t.Cleanup(s.kill)
	return s
}

// listens starts a server that waits for its clients to speak first.
func listens(t *testing.T, address string, handle func(*net.TCPConn)) *server {
	t.Helper()
	s := hung(t, address)
	s.done.Go(func() {
		for {
			conn, err := s.listener.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, conn)
			s.mu.Unlock()
			s.done.Go(func() {
				defer conn.Close()
				handle(conn.(*net.TCPConn))
			})
		}
	})
	return s
}

// tells reads so many bytes and sends the name of the server, and then what it has read.
func tells(address string, bytes int) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		got := make([]byte, bytes)
		if _, err := io.ReadFull(conn, got); err != nil {
			return
		}
		fmt.Fprintf(conn, "%-16s", address)
		conn.Write(got)
		echo(conn)
	}
}

// taking starts servers with the addresses that three has, the first of which hangs, and
// the others read so many bytes and tell their names.
func taking(t *testing.T, bytes int) []*server {
	t.Helper()
	servers := []*server{hung(t, "127.0.0.11:0")}
	for _, addr := range []string{"127.0.0.12", "127.0.0.13"} {
		servers = append(servers, listens(t, addr+":0", tells(addr, bytes)))
	}
	return servers
}

// clientsOf returns addresses of clients that are a server's.
func clientsOf(s *server, n int, servers ...*server) (addrs []string) {
	for i := 0; len(addrs) < n; i++ {
		if best(client(i), servers...) == s.name {
			addrs = append(addrs, client(i))
		}
	}
	return addrs
}

func statsOf(p *Proxy, s *server) BackendStats {
	all := p.Stats().Backends
	return all[slices.IndexFunc(all, func(b BackendStats) bool { return b.Name == s.name })]
}

// soon receives, within 5 seconds.
func soon[T any](t *testing.T, from chan T) (got T) {
	t.Helper()
	select {
	case got = <-from:
	case <-time.After(5 * time.Second):
		t.Fatal("nothing comes")
	}
	return got
}

// atRest fails unless no session of the proxy holds a copy.
func atRest(t *testing.T, p *Proxy) {
	t.Helper()
	onAll(p.started(), func(l *loop) {
		for _, s := range l.sessions {
			if s.up.opening != nil || s.opening.kept != nil || len(s.search.attempts) > 0 || s.timer.of == &l.racing {
				t.Errorf("a session is still in its opening: %+v", s)
			}
		}
		if l.openings.kept != 0 || len(l.openings.spare) > copiesSpare {
			t.Errorf("%d copies are in use, %d are spare", l.openings.kept, len(l.openings.spare))
		}
	})
}

// ask sends what a client says first, and returns who has answered and how soon; it fails
// unless the server got just that.
func ask(t *testing.T, conn *net.TCPConn, pieces ...[]byte) (server string, took time.Duration) {
	t.Helper()
	began := time.Now()
	for i, piece := range pieces {
		if i > 0 {
			time.Sleep(5 * time.Millisecond) // so that they may come one by one
		}
		if _, err := conn.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	server = mustName(t, conn)
	took = time.Since(began)
	said := bytes.Join(pieces, nil)
	got := make([]byte, len(said))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, said) {
		t.Errorf("the server got other bytes than the client sent")
	}
	return server, took
}

// certificate returns one that nobody trusts.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key}
}

// The clients of a server that hangs are served by others: the first ones after raceAfter,
// the next ones at once. What they then send and get is all there.
func TestClientsOfAHungServer(t *testing.T) {
	const size = 8 << 20
	cfg := &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
	secure := func(conn *net.TCPConn) {
		c := tls.Server(conn, cfg)
		if _, err := io.Copy(c, c); err == nil {
			c.CloseWrite()
		}
	}
	servers := []*server{hung(t, "127.0.0.11:0"), listens(t, "127.0.0.12:0", secure), listens(t, "127.0.0.13:0", secure)}
	before := openFiles(t)
	var mu sync.Mutex
	var told []string
	p := start(t, func(c *Config) {
		c.OnConnectFailure = func(backend string, err error) {
			mu.Lock()
			defer mu.Unlock()
			if backend == servers[0].name && errors.Is(err, ErrSilent) {
				told = append(told, backend)
			}
		}
	}, servers...)
	for i, from := range clientsOf(servers[0], 3, servers...) {
		conn := dial(t, p, from)
		c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
		began := time.Now()
		if err := c.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		t.Logf("handshake of client %d: %v", i, took)
		if i == 0 && took < raceAfter || took > raceAfter+time.Second {
			t.Errorf("the handshake took %v", took)
		}
		if i > 0 {
			c.Close()
			continue
		}
		sent := make(chan [32]byte, 1)
		go func() {
			hash := sha256.New()
			io.Copy(io.MultiWriter(c, hash), io.LimitReader(mathrand.NewChaCha8([32]byte{1}), size))
			c.CloseWrite()
			sent <- [32]byte(hash.Sum(nil))
		}()
		hash := sha256.New()
		if _, err := io.Copy(hash, c); err != nil {
			t.Fatal(err)
		}
		if <-sent != [32]byte(hash.Sum(nil)) {
			t.Error("the bytes differ")
		}
		c.Close()
	}
	eventually(t, "all have ended", func() bool { return p.Stats().Connections == 0 })
	stats := statsOf(p, servers[0])
	if stats.Outrun != 1 || stats.Established != 0 || stats.Total != 1 || stats.Failures != 0 || p.backends[0].load.Load() != 0 {
		t.Errorf("of the server that hangs: %+v", stats)
	}
	mu.Lock()
	if len(told) != 1 {
		t.Errorf("told %d times that it is silent", len(told))
	}
	mu.Unlock()
	atRest(t, p)

	// What it finds when it goes on: a connection that is gone.
	conn, err := servers[0].listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); !isReset(err) {
		t.Errorf("the connection to the server that hung: %v, want a reset", err)
	}
	conn.Close()

	// Once it is found well again, its clients are its own again.
	p.SetBackends(map[string]health.State{servers[0].name: health.Down})
	p.SetBackends(map[string]health.State{servers[0].name: health.Up})
	again := dial(t, p, clientsOf(servers[0], 1, servers...)[0])
	eventually(t, "a client comes to it again", func() bool { return statsOf(p, servers[0]).Total == 2 })
	again.Close()
	p.Close()
	eventually(t, "no descriptor is left", func() bool { return openFiles(t) <= before })
}

// However a ClientHello comes, all of it comes to the rival, and only that.
func TestHelloIsSentToARival(t *testing.T) {
	plain := hello(t, nil)
	split := records(plain, 200)
	for name, pieces := range map[string][][]byte{
		"at once":                       {plain},
		"in two pieces":                 {plain[:3], plain[3:]},
		"in five":                       {plain[:1], plain[1:5], plain[5:6], plain[6:100], plain[100:]},
		"in several records, in pieces": {split[:205], split[205:300], split[300:]},
	} {
		t.Run(name, func(t *testing.T) {
			servers := taking(t, len(bytes.Join(pieces, nil)))
			p := start(t, nil, servers...)
			got, took := ask(t, dial(t, p, clientsOf(servers[0], 1, servers...)[0]), pieces...)
			if got == servers[0].name || took < raceAfter || took > raceAfter+time.Second {
				t.Errorf("answered by %s after %v", got, took)
			}
			if n := statsOf(p, servers[0]).Outrun; n != 1 {
				t.Errorf("outrun %d times", n)
			}
			atRest(t, p)
		})
	}
}

// A PROXY header comes before the ClientHello, on each connection.
func TestRivalsAreGreeted(t *testing.T) {
	said := hello(t, nil)
	servers := taking(t, 28+len(said))
	p := start(t, func(c *Config) { c.Greeting = GreetingV2 }, servers...)
	conn := dial(t, p, clientsOf(servers[0], 1, servers...)[0])
	conn.Write(said)
	mustName(t, conn)
	got := make([]byte, 28+len(said))
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	want := appendHeader(nil, conn.LocalAddr().(*net.TCPAddr).AddrPort(), conn.RemoteAddr().(*net.TCPAddr).AddrPort())
	if !bytes.Equal(got, append(want, said...)) {
		t.Errorf("the rival got % x", got)
	}
}

// Whatever may have an effect is for one server alone, however long that takes.
func TestNothingElseIsSentTwice(t *testing.T) {
	plain := hello(t, nil)
	for name, pieces := range map[string][][]byte{
		"HTTP":                           {[]byte("POST /api/v1/pods HTTP/1.1\r\n")},
		"a ClientHello with early data":  {early(t)},
		"a ClientHello and a request":    {append(bytes.Clone(plain), "\x17\x03\x03\x00\x05hello"...)},
		"a part of a ClientHello":        {plain[:len(plain)-1]},
		"a part of one, byte by byte":    {plain[:1], plain[1:2], plain[2:3], plain[3:4]},
		"more than a ClientHello can be": {append(slices.Clone(plain[:11]), make([]byte, helloMost)...)},
		"more than is read at once":      {make([]byte, 3*scratchSize)},
	} {
		t.Run(name, func(t *testing.T) {
			size := len(bytes.Join(pieces, nil))
			servers := taking(t, size)
			slow := listens(t, "127.0.0.14:0", func(conn *net.TCPConn) {
				time.Sleep(3 * raceAfter)
				tells("127.0.0.14", size)(conn)
			})
			servers[0] = slow
			p := start(t, nil, servers...)
			if got, _ := ask(t, dial(t, p, clientsOf(slow, 1, servers...)[0]), pieces...); got != slow.name {
				t.Errorf("answered by %s", got)
			}
			for _, s := range servers[1:] {
				if n := statsOf(p, s).Total; n != 0 {
					t.Errorf("%s got %d connections", s.name, n)
				}
			}
			atRest(t, p)
		})
	}
}

// A client that goes on before its server has answered stays with it.
func TestAClientThatGoesOn(t *testing.T) {
	said := hello(t, nil)
	for name, then := range map[string]func(*testing.T, *net.TCPConn){
		"sends more": func(t *testing.T, conn *net.TCPConn) {
			if _, err := conn.Write([]byte("more")); err != nil {
				t.Error(err)
			}
		},
		"ends its direction": func(t *testing.T, conn *net.TCPConn) {
			if err := conn.CloseWrite(); err != nil {
				t.Error(err)
			}
		},
	} {
		for _, during := range []string{"before the race", "in the race"} {
			t.Run(name+" "+during, func(t *testing.T) {
				var mu sync.Mutex
				got, reset, gone := make(chan []byte, 1), make(chan error, 2), make(chan struct{})
				rival := func(conn *net.TCPConn) {
					_, err := io.Copy(io.Discard, conn)
					reset <- err
				}
				servers := []*server{
					listens(t, "127.0.0.11:0", func(conn *net.TCPConn) {
						<-gone
						more := make([]byte, len(said)+4)
						n, _ := io.ReadFull(conn, more)
						got <- more[:n]
						fmt.Fprintf(conn, "%-16s", "127.0.0.11")
						echo(conn)
					}),
					listens(t, "127.0.0.12:0", rival), listens(t, "127.0.0.13:0", rival),
				}
				p := start(t, nil, servers...)
				goOn := sync.OnceFunc(func() { close(gone) })
				defer goOn()
				conn := dial(t, p, clientsOf(servers[0], 1, servers...)[0])
				conn.Write(said)
				if during == "in the race" {
					eventually(t, "there is a rival", func() bool {
						rivals := 0
						onAll(p.started(), func(l *loop) {
							mu.Lock()
							defer mu.Unlock()
							for _, s := range l.sessions {
								if s.phase == relaying && len(s.search.attempts) == 1 && s.search.attempts[0].asked {
									rivals++
								}
							}
						})
						return rivals == 1
					})
				}
				then(t, conn)
				goOn()
				if met := mustName(t, conn); met != servers[0].name {
					t.Errorf("answered by %s", met)
				}
				want := said
				if name == "sends more" {
					want = append(slices.Clone(said), "more"...)
				}
				if all := soon(t, got); !bytes.Equal(all, want) {
					t.Errorf("its server got %d bytes, want %d", len(all), len(want))
				}
				if during == "in the race" {
					if err := soon(t, reset); !isReset(err) {
						t.Errorf("the rival's connection: %v, want a reset", err)
					}
				}
				if n := statsOf(p, servers[0]).Outrun; n != 0 {
					t.Errorf("outrun %d times", n)
				}
			})
		}
	}
}

// A server that is only slow keeps its client where it answers first, and is not avoided.
func TestASlowServerThatAnswersFirst(t *testing.T) {
	said := hello(t, nil)
	raced, reset := make(chan struct{}, 1), make(chan error, 1)
	rival := func(conn *net.TCPConn) {
		if _, err := io.ReadFull(conn, make([]byte, len(said))); err != nil {
			t.Error(err)
		}
		raced <- struct{}{}
		_, err := conn.Read(make([]byte, 1))
		reset <- err
	}
	servers := []*server{
		listens(t, "127.0.0.11:0", func(conn *net.TCPConn) {
			<-raced
			tells("127.0.0.11", len(said))(conn)
		}),
		listens(t, "127.0.0.12:0", rival), hung(t, "127.0.0.13:0"),
	}
	p := start(t, nil, servers...)
	var from string
	for i := 0; from == ""; i++ {
		if best(client(i), servers...) == servers[0].name && best(client(i), servers[1:]...) == servers[1].name {
			from = client(i)
		}
	}
	if got, _ := ask(t, dial(t, p, from), said); got != servers[0].name {
		t.Errorf("answered by %s", got)
	}
	if err := soon(t, reset); !isReset(err) {
		t.Errorf("the rival's connection: %v, want a reset", err)
	}
	for _, s := range servers {
		if stats := statsOf(p, s); stats.Outrun != 0 || p.backend(s.name).avoided(time.Since(origin)) {
			t.Errorf("%+v", stats)
		}
	}
	atRest(t, p)
}

// A server that is slow with one client and serves another one does not hang.
func TestABusyServerIsNotAvoided(t *testing.T) {
	said := hello(t, nil)
	servers := taking(t, len(said))
	first := make(chan struct{}, 1)
	servers[0] = listens(t, "127.0.0.14:0", func(conn *net.TCPConn) {
		select {
		case first <- struct{}{}: // gets a stream
			for _, err := conn.Write([]byte{0}); err == nil; _, err = conn.Write([]byte{0}) {
				time.Sleep(time.Millisecond)
			}
		default:
			awaitReset(conn)
		}
	})
	p := start(t, nil, servers...)
	from := clientsOf(servers[0], 2, servers...)
	stream := dial(t, p, from[0])
	if _, err := stream.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if got, _ := ask(t, dial(t, p, from[1]), said); got == servers[0].name {
		t.Error("the server that leaves it alone has answered")
	}
	if n := statsOf(p, servers[0]).Outrun; n != 1 {
		t.Errorf("outrun %d times", n)
	}
	if p.backend(servers[0].name).avoided(time.Since(origin)) {
		t.Error("it is avoided while it serves")
	}
}

// Of three servers two hang: the third one answers.
func TestTwoServersHang(t *testing.T) {
	said := hello(t, nil)
	servers := []*server{hung(t, "127.0.0.11:0"), hung(t, "127.0.0.12:0"), listens(t, "127.0.0.13:0", tells("127.0.0.13", len(said)))}
	p := start(t, nil, servers...)
	for _, s := range servers[:2] {
		for i, from := range clientsOf(s, 3, servers...) {
			got, took := ask(t, dial(t, p, from), said)
			if got != servers[2].name || took > 2*raceAfter+time.Second {
				t.Errorf("client %d of %s: answered by %s after %v", i, s.name, got, took)
			}
		}
	}
	for _, s := range servers[:2] {
		if n := p.backend(s.name).load.Load(); n != 0 {
			t.Errorf("%s has a load of %d", s.name, n)
		}
	}
	atRest(t, p)
}

// Where all are slow, clients are not sent round and round: a rival has its price, and a
// server that is not up is none.
func TestRivalsAreLimited(t *testing.T) {
	said := hello(t, nil)
	for name, limit := range map[string]func(*Proxy, []*server){
		"no credit": func(p *Proxy, _ []*server) {
			onAll(p.started(), func(l *loop) { l.openings.owed = rivalCredit - rivalPrice + 1 })
		},
		"no other is up": func(p *Proxy, servers []*server) {
			p.SetBackends(map[string]health.State{servers[1].name: health.Draining, servers[2].name: health.Down})
		},
		"none is up": func(p *Proxy, _ []*server) { all(p, health.Down) },
		"the others are avoided": func(p *Proxy, servers []*server) {
			for _, s := range servers[1:] {
				p.backend(s.name).muted.Store(int64(time.Since(origin) + time.Hour))
			}
		},
		"no copies": func(p *Proxy, _ []*server) {
			onAll(p.started(), func(l *loop) { l.openings.kept = keptMost })
			t.Cleanup(func() { onAll(p.started(), func(l *loop) { l.openings.kept -= keptMost }) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			servers := taking(t, len(said))
			servers[0] = listens(t, "127.0.0.14:0", func(conn *net.TCPConn) {
				time.Sleep(3 * raceAfter)
				tells("127.0.0.14", len(said))(conn)
			})
			p := start(t, nil, servers...)
			limit(p, servers)
			if got, _ := ask(t, dial(t, p, clientsOf(servers[0], 1, servers...)[0]), said); got != servers[0].name {
				t.Errorf("answered by %s", got)
			}
			if n := statsOf(p, servers[1]).Total + statsOf(p, servers[2]).Total; n != 0 {
				t.Errorf("the others got %d connections", n)
			}
		})
	}
}

// Servers hang for a while, answer late, refuse, or reset what they have accepted; clients
// go away at any time. Nothing is left of it, and nobody gets an answer that is not whole.
func TestOpeningsSoak(t *testing.T) {
	sessions := 3000
	if raceEnabled || testing.Short() {
		sessions = 600
	}
	said := hello(t, nil)
	before := openFiles(t)
	var servers []*server
	for i := range 3 {
		addr := fmt.Sprintf("127.0.0.%d", 11+i)
		servers = append(servers, listens(t, addr+":0", func(conn *net.TCPConn) {
			switch mathrand.IntN(8) {
			case 0:
				awaitReset(conn)
			case 1:
				crash(conn)
			case 2, 3:
				time.Sleep(time.Duration(mathrand.IntN(250)) * time.Millisecond)
				fallthrough
			default:
				tells(addr, len(said))(conn)
			}
		}))
	}
	p := start(t, nil, servers...)
	var group sync.WaitGroup
	var mu sync.Mutex
	answered := 0
	const workers = 60
	for worker := range workers {
		group.Go(func() {
			random := mathrand.New(mathrand.NewPCG(3, uint64(worker)))
			for range sessions / workers {
				conn, err := net.DialTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 3, byte(worker), byte(1+random.IntN(250)))},
					&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(p.Port())})
				if isReset(err) {
					continue // its server has, before connect(2) was over
				}
				if err != nil {
					t.Error(err)
					return
				}
				cut := 1 + random.IntN(len(said)-1)
				conn.Write(said[:cut])
				conn.Write(said[cut:])
				// A server that serves others meanwhile has (1 + busyLooks) * raceAfter.
				conn.SetDeadline(time.Now().Add(time.Duration(random.Int64N(int64(2 * (1 + busyLooks) * raceAfter)))))
				if _, err := name(conn); err == nil {
					conn.SetDeadline(time.Now().Add(20 * time.Second))
					got := make([]byte, len(said))
					if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, said) {
						t.Errorf("the answer is not whole: %v", err)
					}
					mu.Lock()
					answered++
					mu.Unlock()
				}
				crash(conn)
			}
		})
	}
	group.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	eventually(t, "all are accepted", func() bool { return p.Stats().Accepted == uint64(sessions/workers*workers) })
	if err := p.Drain(ctx); err != nil {
		t.Error(err)
	}
	outrun := uint64(0)
	for _, b := range p.Stats().Backends {
		outrun += b.Outrun
		if n := p.backend(b.Name).load.Load(); n != 0 || b.Established != 0 {
			t.Errorf("backend %s has a load of %d and %d connections", b.Name, n, b.Established)
		}
	}
	t.Logf("%d of %d clients were answered, %d by a rival; ended by %v", answered, sessions, outrun, p.Stats().Ended)
	if outrun == 0 {
		t.Error("no rival has ever answered first")
	}
	atRest(t, p)
	p.Close()
	for _, s := range servers {
		s.kill()
	}
	eventually(t, "no descriptor is left", func() bool { return openFiles(t) <= before })
}
