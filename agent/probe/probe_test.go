package probe

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/hamesh/hamesh/agent/health"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// first runs a probe until its first result.
func first(t *testing.T, cfg Config) health.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var result health.Result
	cfg.Path, cfg.Interval, cfg.Rise, cfg.Fall = "/readyz", time.Minute, 2, 1
	cfg.OnResult = func(r health.Result) { result = r; cancel() }
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(ctx); err != nil {
		t.Fatal(err)
	}
	return result
}

func TestProbe(t *testing.T) {
	const short, long = 100 * time.Millisecond, 4 * time.Second
	release := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok")) })
	answer := func(h http.HandlerFunc) *httptest.Server {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0) // checks that fail are the point
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	well := answer(mux.ServeHTTP)
	unready := answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	// As kube-apiserver, whose /livez goes on while it is being stopped.
	stopping := func(status int, failed string, live http.HandlerFunc) *httptest.Server {
		return answer(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == livePath {
				live(w, r)
				return
			}
			http.Error(w, failed, status)
		})
	}
	lives := func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok")) }
	dies := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }
	const shutdown = "[+]ping ok\n[-]shutdown failed: reason withheld\nreadyz check failed\n"
	parting := stopping(http.StatusInternalServerError, shutdown, lives)
	mute := stopping(http.StatusInternalServerError, "not now", lives)
	dying := stopping(http.StatusInternalServerError, "[-]etcd failed: reason withheld\n[-]poststarthook/x failed\n", dies)
	partingInSilence := stopping(http.StatusInternalServerError, shutdown, func(http.ResponseWriter, *http.Request) { <-release })
	stranger401 := stopping(http.StatusUnauthorized, "{}", lives)
	moved := answer(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, well.URL+"/readyz", http.StatusFound)
	})
	hung := answer(func(http.ResponseWriter, *http.Request) { <-release })
	stuck := answer(func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte("ok"))
		http.NewResponseController(w).Flush()
		<-release
	})
	t.Cleanup(func() { close(release) }) // before the servers' own, which wait for their handlers
	plain := httptest.NewServer(mux)
	t.Cleanup(plain.Close)

	// Accepts in the kernel only, as a server does whose process is stopped.
	stopped, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopped.Close() })
	rude, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rude.Close() })
	go func() {
		for {
			conn, err := rude.Accept()
			if err != nil {
				return
			}
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}
	}()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()

	write := func(name string, pem []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, pem, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certificate := func(s *httptest.Server) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	}
	ca := write("ca.crt", certificate(well))

	tests := []struct {
		name    string
		addr    net.Addr
		scheme  Scheme
		caFile  string
		timeout time.Duration
		want    string // "" is well; a prefix of the reason otherwise
	}{
		{"well", well.Listener.Addr(), HTTPS, "", long, ""},
		{"well and verified", well.Listener.Addr(), HTTPS, ca, long, ""},
		{"well without TLS", plain.Listener.Addr(), HTTP, "", long, ""},
		{"well for TCP", stopped.Addr(), TCP, "", long, ""},
		{"not ready", unready.Listener.Addr(), HTTPS, "", long, "HTTP 503"},
		{"not ready, and lives", parting.Listener.Addr(), HTTPS, "", long, "not ready: shutdown failed (HTTP 500)"},
		{"not ready for an unknown reason, and lives", mute.Listener.Addr(), HTTPS, "", long, "HTTP 500"},
		{"refuses to say, and lives", stranger401.Listener.Addr(), HTTPS, "", long, "HTTP 401"},
		{"not ready, and does not live", dying.Listener.Addr(), HTTPS, "", long, "etcd, poststarthook/x failed (HTTP 500)"},
		{"not ready, and does not say whether it lives", partingInSilence.Listener.Addr(), HTTPS, "", short, "shutdown failed (HTTP 500)"},
		{"elsewhere", moved.Listener.Addr(), HTTPS, "", long, "HTTP 302"},
		{"hung before the headers", hung.Listener.Addr(), HTTPS, "", short, "timeout after 100ms"},
		{"hung after the headers", stuck.Listener.Addr(), HTTPS, "", short, "timeout after 100ms"},
		{"stopped", stopped.Addr(), HTTPS, "", short, "timeout after 100ms"},
		{"closed", closed.Addr(), HTTPS, "", long, "connection refused"},
		{"closed for TCP", closed.Addr(), TCP, "", long, "connection refused"},
		{"resets", rude.Addr(), HTTPS, "", long, "connection reset"},
		{"TLS to a plain server", plain.Listener.Addr(), HTTPS, "", long, "TLS: the server speaks plain HTTP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := first(t, Config{
				Address: netip.MustParseAddrPort(tt.addr.String()),
				Scheme:  tt.scheme, CAFile: tt.caFile, Timeout: tt.timeout,
			})
			if r.OK != (tt.want == "") || r.Reason != tt.want {
				t.Errorf("got %+v, want reason %q", r, tt.want)
			}
			want := health.Down
			switch {
			case r.OK:
				want = health.Up
			case strings.HasSuffix(tt.name, "and lives"):
				want = health.NotReady
			}
			if r.State != want || r.Refuses != strings.HasPrefix(tt.name, "closed") {
				t.Errorf("state %v, refuses: %v; want %v", r.State, r.Refuses, want)
			}
			if r.Took <= 0 || r.Took > tt.timeout+2*time.Second {
				t.Errorf("took %v with timeout %v", r.Took, tt.timeout)
			}
		})
	}

	t.Run("certificate for one of several names", func(t *testing.T) {
		names := []string{"10.77.0.11", "example.com"} // for which httptest's is
		cfg := Config{Address: netip.MustParseAddrPort(well.Listener.Addr().String()), Scheme: HTTPS, CAFile: ca, Timeout: long, Names: names}
		if r := first(t, cfg); !r.OK {
			t.Errorf("got %+v", r)
		}
		cfg.Names = names[:1]
		if r := first(t, cfg); r.OK || !strings.HasPrefix(r.Reason, "TLS: x509: ") {
			t.Errorf("for none of the names: got %+v, want a TLS failure", r)
		}
		cfg.Names, cfg.CAFile = names, write("third.crt", stranger(t))
		if r := first(t, cfg); r.OK || !strings.HasPrefix(r.Reason, "TLS: x509: ") {
			t.Errorf("of another authority: got %+v, want a TLS failure", r)
		}
	})

	t.Run("certificate of another authority", func(t *testing.T) {
		other := write("other.crt", stranger(t))
		r := first(t, Config{
			Address: netip.MustParseAddrPort(well.Listener.Addr().String()),
			Scheme:  HTTPS, CAFile: other, Timeout: long,
		})
		if r.OK || !strings.HasPrefix(r.Reason, "TLS: x509: ") {
			t.Errorf("got %+v, want a TLS failure", r)
		}
	})
}

// What a server says of itself is its own choice, and is to be read by people.
func TestFailedChecks(t *testing.T) {
	long := strings.Repeat("x", 1000)
	for body, want := range map[string]string{
		"": "[]", "ok": "[]", "[-]": "[]", "[-] failed: x": "[]", "shutdown failed": "[]", "[+]ping ok": "[]",
		"[-]etcd failed: reason withheld":                                 "[etcd]",
		"[-]\x1b[2J failed: x\n[-]a b failed: x\n[-]\xff failed: x":       "[]",
		"[-]a failed\n[-]b failed\n[-]c failed\n[-]d failed\n[-]e failed": "[a b c ...]",
		"[-]" + long + " failed: x":                                       "[" + long[:failedLength] + "]",
	} {
		if got := fmt.Sprint(failedChecks([]byte(body))); got != want {
			t.Errorf("%.40q: got %s, want %s", body, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	good := Config{
		Address: netip.MustParseAddrPort("127.0.0.1:6443"), Scheme: HTTPS,
		Interval: time.Second, Timeout: time.Second, OnResult: func(health.Result) {},
	}
	empty := filepath.Join(t.TempDir(), "empty.crt")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Config){
		"no address":       func(c *Config) { c.Address = netip.AddrPort{} },
		"no scheme":        func(c *Config) { c.Scheme = 0 },
		"no interval":      func(c *Config) { c.Interval = 0 },
		"no timeout":       func(c *Config) { c.Timeout = 0 },
		"nobody to tell":   func(c *Config) { c.OnResult = nil },
		"no such file":     func(c *Config) { c.CAFile = empty + "x" },
		"nothing in there": func(c *Config) { c.CAFile = empty },
	} {
		bad := good
		spoil(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}

// timed runs a probe on a false clock against answers, and returns when each check
// began.
func timed(t *testing.T, took time.Duration, answers []error, after func(p *Probe, n int)) []time.Duration {
	var began []time.Duration
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var n atomic.Int32
	var p *Probe
	p, err := New(Config{
		Address: netip.MustParseAddrPort("127.0.0.1:6443"), Scheme: TCP,
		Interval: time.Second, Timeout: 800 * time.Millisecond, Rise: 2, Fall: 2,
		OnResult: func(health.Result) {
			if i := int(n.Add(1)); i == len(answers) {
				cancel()
			} else if after != nil {
				after(p, i)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var mu sync.Mutex
	p.check = func(context.Context) error {
		mu.Lock()
		began = append(began, time.Since(start))
		i := len(began) - 1
		mu.Unlock()
		time.Sleep(took)
		return answers[min(i, len(answers)-1)]
	}
	if err := p.Run(ctx); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(began)
}

func TestPace(t *testing.T) {
	bad := errors.New("HTTP 503")
	within := func(t *testing.T, began []time.Duration, i int, low, high time.Duration) {
		t.Helper()
		if gap := began[i] - began[i-1]; gap < low || gap > high {
			t.Errorf("check %d began %v after the one before; want %v to %v", i, gap, low, high)
		}
	}
	const ms = time.Millisecond
	t.Run("at once, then at intervals", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := timed(t, 300*ms, make([]error, 50), nil)
			if began[0] != 0 {
				t.Errorf("the first check began after %v", began[0])
			}
			within(t, began, 1, 450*ms, 1100*ms)
			for i := 2; i < len(began); i++ {
				within(t, began, i, 900*ms, 1100*ms)
			}
		})
	})
	t.Run("all in step", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			started := time.Now()
			var began [2][]time.Duration
			var both sync.WaitGroup
			for i := range began {
				time.Sleep(time.Duration(i) * 170 * ms)
				late := time.Since(started)
				both.Go(func() {
					for _, at := range timed(t, 10*ms, make([]error, 9), nil) {
						began[i] = append(began[i], late+at)
					}
				})
			}
			both.Wait()
			// Two steps an interval: what begins late may fall into the other one.
			half := tempo * ms / 2
			apart := (began[1][5] - began[0][5]) % half
			if min(apart, half-apart) > ms {
				t.Errorf("checks of one process are %v apart: %v", apart, began)
			}
		})
	})
	t.Run("faster in doubt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := timed(t, 10*ms, []error{nil, bad, bad, nil, nil, nil}, nil)
			within(t, began, 1, 450*ms, 1100*ms)
			within(t, began, 2, 450*ms, 550*ms)
			within(t, began, 3, 900*ms, 1100*ms)
			within(t, began, 4, 450*ms, 550*ms)
			within(t, began, 5, 900*ms, 1100*ms)
		})
	})
	t.Run("before the end of one that takes long", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := timed(t, 800*ms, []error{nil, bad, bad, bad, bad}, nil)
			within(t, began, 2, 400*ms, 400*ms)
			within(t, began, 3, 450*ms, 1100*ms) // it is down: one at a time
			within(t, began, 4, 800*ms, 1100*ms)
		})
	})
	t.Run("in a hurry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := timed(t, 10*ms, make([]error, 4), func(p *Probe, n int) {
				if n == 2 {
					p.Hurry()
					p.Hurry()
				}
			})
			within(t, began, 1, 450*ms, 1100*ms)
			within(t, began, 2, 500*ms, 500*ms)
			within(t, began, 3, 450*ms, 1100*ms)
		})
	})
}

// stranger returns a certificate that has signed nothing but itself.
func stranger(t *testing.T) []byte {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
