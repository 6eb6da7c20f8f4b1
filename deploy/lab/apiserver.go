//go:build linux

package lab

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// apiPort is where the stand-in API servers listen.
const apiPort = 6443

// mode is what the stand-in's /readyz does.
type mode string

const (
	well mode = "well" // 200
	sick mode = "sick" // 500, as a real one whose check fails
	hang mode = "hang" // accepts, and does not answer
)

// APIServer is the stand-in for one node's Kubernetes API server: HTTPS, HTTP/1.1 and
// HTTP/2, with a Server header that tells which one answers.
//
//	/readyz                 as Well, Sick and Hang say
//	/version                the server's name
//	/watch?interval=100ms   lines "name sequence", one at once and then every interval; 0: no more
//	/wait?for=700ms         the server's name, after that time
//	/echo                   the request's body, with its SHA-256 in the trailer Sha256
type APIServer struct {
	node *Node

	mu      sync.Mutex
	process *process
	tell    io.WriteCloser
	answers *bufio.Scanner
}

// Start starts the server, ready, and waits until it listens. A running one stays.
func (a *APIServer) Start() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process.running() {
		return nil
	}
	certificate, key := certificateFiles(filepath.Dir(a.node.dir))
	cmd := Command("apiserver", "-name", a.node.Name, "-listen", fmt.Sprintf(":%d", apiPort),
		"-cert", certificate, "-key", key)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start API server of %s: %w", a.node.Name, err)
	}
	// Not StdoutPipe, which Wait would close under the reader.
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start API server of %s: %w", a.node.Name, err)
	}
	cmd.Stdout = w
	p, err := launch(a.node.Host(), cmd, a.log())
	_ = w.Close() // the child has its own
	if err != nil {
		_ = r.Close()
		return err
	}
	go func() {
		<-p.done
		_ = r.Close()
	}()
	a.process, a.tell, a.answers = p, stdin, bufio.NewScanner(r)
	return a.await()
}

func (a *APIServer) log() string { return filepath.Join(a.node.dir, "apiserver.log") }

// await reads the server's next answer.
func (a *APIServer) await() error {
	if !a.answers.Scan() || a.answers.Text() != "done" {
		return fmt.Errorf("API server of %s does not answer: %q\n%s",
			a.node.Name, a.answers.Text(), tail(a.log()))
	}
	return nil
}

func (a *APIServer) become(m mode) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.process.running() {
		return fmt.Errorf("make API server of %s %s: it is not running", a.node.Name, m)
	}
	if _, err := fmt.Fprintln(a.tell, m); err != nil {
		return fmt.Errorf("make API server of %s %s: %w", a.node.Name, m, err)
	}
	return a.await()
}

func (a *APIServer) running() *process {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.process
}

// Well makes /readyz answer 200, as at start.
func (a *APIServer) Well() error { return a.become(well) }

// Sick makes /readyz answer 500; all else goes on.
func (a *APIServer) Sick() error { return a.become(sick) }

// Hang makes /readyz not answer at all; all else goes on.
func (a *APIServer) Hang() error { return a.become(hang) }

// Kill ends the server at once, by SIGKILL; its kernel resets the connections.
func (a *APIServer) Kill() error {
	return a.locked(func(p *process) error { return p.end(unix.SIGKILL) })
}

// Freeze stops the server's process (SIGSTOP): its kernel still accepts connections, nobody answers.
func (a *APIServer) Freeze() error {
	return a.locked(func(p *process) error { return p.signal(unix.SIGSTOP) })
}

// Thaw ends Freeze.
func (a *APIServer) Thaw() error {
	return a.locked(func(p *process) error { return p.signal(unix.SIGCONT) })
}

func (a *APIServer) locked(f func(*process) error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return f(a.process)
}

func init() { Role("apiserver", serveAPI) }

// serveAPI is the stand-in's process. It obeys a mode a line on standard input and
// answers each with "done"; it ends with its standard input.
func serveAPI(args []string) int {
	flags := flag.NewFlagSet("apiserver", flag.ExitOnError)
	name := flags.String("name", "", "what to answer as")
	listen := flags.String("listen", "", "address to listen on")
	cert := flags.String("cert", "", "certificate file")
	key := flags.String("key", "", "key file")
	_ = flags.Parse(args) // exits by itself

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Print(err)
		return 1
	}
	s := &standIn{name: *name, mode: well, changed: make(chan struct{})}
	failed := make(chan error, 1)
	go func() {
		server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second}
		failed <- server.ServeTLS(listener, *cert, *key)
	}()
	fmt.Println("done")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
			s.become(mode(orders.Text()))
			fmt.Println("done")
		}
	}()
	select {
	case err := <-failed:
		log.Print(err)
		return 1
	case <-ended:
		return 0
	}
}

type standIn struct {
	name string

	mu      sync.Mutex
	mode    mode
	changed chan struct{} // closed at the next change of mode
}

func (s *standIn) become(m mode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode = m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *standIn) state() (mode, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mode, s.changed
}

func (s *standIn) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/readyz", s.readyz)
	mux.HandleFunc("/version", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, s.name) })
	mux.HandleFunc("/watch", s.watch)
	mux.HandleFunc("/wait", s.wait)
	mux.HandleFunc("/echo", s.echo)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", s.name)
		mux.ServeHTTP(w, r)
	})
}

func (s *standIn) readyz(w http.ResponseWriter, r *http.Request) {
	for {
		m, changed := s.state()
		switch m {
		case well:
			fmt.Fprint(w, "ok")
			return
		case sick:
			http.Error(w, "[-]etcd failed: reason withheld", http.StatusInternalServerError)
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (s *standIn) watch(w http.ResponseWriter, r *http.Request) {
	interval, err := time.ParseDuration(r.URL.Query().Get("interval"))
	if err != nil || interval < 0 {
		http.Error(w, "interval: want a duration of at least 0", http.StatusBadRequest)
		return
	}
	var next <-chan time.Time // never, where the stream stays silent
	if interval > 0 {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		next = ticker.C
	}
	for sequence := 0; ; sequence++ {
		fmt.Fprintln(w, s.name, sequence)
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-next:
		case <-r.Context().Done():
			return
		}
	}
}

func (s *standIn) wait(w http.ResponseWriter, r *http.Request) {
	delay, err := time.ParseDuration(r.URL.Query().Get("for"))
	if err != nil || delay < 0 {
		http.Error(w, "for: want a duration of at least 0", http.StatusBadRequest)
		return
	}
	select {
	case <-time.After(delay):
		fmt.Fprintln(w, s.name)
	case <-r.Context().Done():
	}
}

func (s *standIn) echo(w http.ResponseWriter, r *http.Request) {
	// HTTP/1.1 handlers may not read on after they began to write, otherwise.
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Trailer", "Sha256")
	hash := sha256.New()
	if _, err := io.Copy(w, io.TeeReader(r.Body, hash)); err != nil {
		panic(http.ErrAbortHandler) // the client must not take it for the end
	}
	w.Header().Set("Sha256", hex.EncodeToString(hash.Sum(nil)))
}

func certificateFiles(dir string) (certificate, key string) {
	return filepath.Join(dir, "api.crt"), filepath.Join(dir, "api.key")
}

// writeCertificate makes one self-signed certificate for all stand-ins, good for the
// given addresses.
func writeCertificate(dir string, addresses []netip.Addr) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make API server key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "hamesh lab API server"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(30 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
		DNSNames:              []string{"localhost"},
	}
	for _, a := range addresses {
		template.IPAddresses = append(template.IPAddresses, a.AsSlice())
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return fmt.Errorf("make API server certificate: %w", err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return fmt.Errorf("encode API server key: %w", err)
	}
	certificate, key := certificateFiles(dir)
	return errors.Join(
		os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
}

// trustedTLS is a client's configuration that trusts the stand-ins' certificate alone.
func trustedTLS(certificate string) (*tls.Config, error) {
	b, err := os.ReadFile(certificate)
	if err != nil {
		return nil, fmt.Errorf("read API server certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read API server certificate: no certificate in %s", certificate)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}
