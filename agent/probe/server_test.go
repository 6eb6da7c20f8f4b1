package probe

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hamesh/hamesh/agent/health"
)

// writePair writes a certificate that is its own issuer, and its key.
func writePair(t *testing.T) (certFile, keyFile string, cert *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("tls.crt", "CERTIFICATE", der), write("tls.key", "PRIVATE KEY", keyDER), cert
}

// A server that wants to know its clients.
func TestClientCertificate(t *testing.T) {
	certFile, keyFile, cert := writePair(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // checks that fail are the point
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	server.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	server.StartTLS()
	defer server.Close()
	cfg := Config{Address: netip.MustParseAddrPort(server.Listener.Addr().String()), Scheme: HTTPS, Timeout: 4 * time.Second}
	if r := first(t, cfg); r.OK || r.Reason != "TLS: certificate required" {
		t.Errorf("without a certificate: %+v", r)
	}
	cfg.CertFile, cfg.KeyFile = certFile, keyFile
	if r := first(t, cfg); !r.OK {
		t.Errorf("with a certificate: %+v", r)
	}
	cfg.Interval, cfg.OnResult = time.Second, func(health.Result) {}
	cfg.KeyFile = certFile
	if _, err := New(cfg); err == nil {
		t.Error("a file that has no key was taken")
	}
}

// A server behind the PROXY protocol is told that the check is nobody else's connection.
func TestHeader(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	came := make(chan string, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		head := make([]byte, len(localHeader))
		r := bufio.NewReader(conn)
		if _, err := io.ReadFull(r, head); err != nil {
			return
		}
		came <- string(head)
		if _, err := http.ReadRequest(r); err == nil {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	}()
	cfg := Config{Address: netip.MustParseAddrPort(listener.Addr().String()), Scheme: HTTP, Header: true, Timeout: 4 * time.Second}
	if r := first(t, cfg); !r.OK {
		t.Errorf("result %+v", r)
	}
	// The command LOCAL with nothing after it.
	if got := <-came; got != "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00" {
		t.Errorf("header %q", got)
	}
}

// With the default pace, a server that answers 503 is down within fall intervals and a
// tenth of a second, and one that hangs within 1.2 s; with some allowance here for a busy
// machine.
func TestDetection(t *testing.T) {
	for name, test := range map[string]struct {
		sick  http.HandlerFunc
		bound time.Duration
	}{
		"503":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, 1100 * time.Millisecond},
		"hung": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 1200 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var ill atomic.Bool
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if ill.Load() {
					test.sick(w, r)
				}
			}))
			defer server.Close()
			states := make(chan health.State, 100)
			p, err := New(Config{
				Address: netip.MustParseAddrPort(server.Listener.Addr().String()), Scheme: HTTP, Path: "/readyz",
				Interval: 500 * time.Millisecond, Timeout: 400 * time.Millisecond, Rise: 2, Fall: 2,
				OnResult: func(r health.Result) { states <- r.State },
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- p.Run(ctx) }()
			for s := health.Unknown; s != health.Up; s = <-states {
			}
			// The worst moment is right after a check.
			ill.Store(true)
			began := time.Now()
			for s := health.Up; s != health.Down; {
				select {
				case s = <-states:
				case <-ctx.Done():
					t.Fatal("never found to be down")
				}
			}
			took := time.Since(began)
			t.Logf("down after %v", took)
			if took > test.bound+500*time.Millisecond {
				t.Errorf("down after %v, want %v", took, test.bound)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}
