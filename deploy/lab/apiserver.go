//go:build linux

package lab

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
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
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// apiPort is where the stand-in API servers listen.
const apiPort = 6443

// mode is what the stand-in's /readyz does.
type mode string

const (
	well     mode = "well"     // 200
	sick     mode = "sick"     // 500, as a real one whose etcd fails, and /livez too
	unready  mode = "unready"  // 500, as a real one that is not ready, and /livez is 200
	hang     mode = "hang"     // accepts, and does not answer
	stopping mode = "stopping" // as unready, for that the server is being stopped
)

// stopWithin is how long a server that stops lets requests under way go on, as
// kube-apiserver does by default (--request-timeout).
const stopWithin = 60 * time.Second

// APIServer is the stand-in for one node's Kubernetes API server: HTTPS, HTTP/1.1 and
// HTTP/2, with a Server header that tells which one answers.
//
//	/readyz, /livez         as Well, Sick, Unready, Hang and Stop say
//	/version                the server's name
//	/watch?interval=100ms   lines "name sequence", one at once and then every interval; 0: no more
//	/wait?for=700ms         the server's name, after that time
//	/echo                   the request's body, with its SHA-256 in the trailer Sha256
//
// It asks for a client's certificate and wants none, unless RefuseAnonymous says so.
type APIServer struct {
	node *Node

	mu      sync.Mutex
	process *process
	tell    io.WriteCloser
	answers *bufio.Scanner
	// What it is started with.
	refusesAnonymous bool
	goawayChance     float64
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
		"-cert", certificate, "-key", key, "-client-ca", clientFiles(filepath.Dir(a.node.dir)).CA,
		fmt.Sprintf("-anonymous=%t", !a.refusesAnonymous), fmt.Sprintf("-goaway=%g", a.goawayChance))
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

func (a *APIServer) become(m mode) error { return a.order(string(m), nil) }

// order tells the server's process something, and waits until it has obeyed. What remember
// changes, a server that is started later has too.
func (a *APIServer) order(order string, remember func()) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if remember != nil {
		remember()
	}
	if !a.process.running() {
		return fmt.Errorf("make API server of %s %s: it is not running", a.node.Name, order)
	}
	if _, err := fmt.Fprintln(a.tell, order); err != nil {
		return fmt.Errorf("make API server of %s %s: %w", a.node.Name, order, err)
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

// Sick makes /readyz and /livez answer 500; all else goes on.
func (a *APIServer) Sick() error { return a.become(sick) }

// Unready makes /readyz answer 500 and /livez 200; all else goes on.
func (a *APIServer) Unready() error { return a.become(unready) }

// RefuseAnonymous makes it answer 401 to whoever shows no certificate of Mesh.ClientFiles,
// whatever is asked, as kube-apiserver with --anonymous-auth=false; from now on and after
// each Start.
func (a *APIServer) RefuseAnonymous() error {
	return a.order("certain", func() { a.refusesAnonymous = true })
}

// SetGoaway makes it end each HTTP/2 connection with that chance, 0 to 1, at each request, after
// the answer (GOAWAY), as kube-apiserver with --goaway-chance; from now on and after each
// Start.
func (a *APIServer) SetGoaway(chance float64) error {
	return a.order(fmt.Sprintf("goaway %g", chance), func() { a.goawayChance = chance })
}

// Stop stops the server as SIGTERM stops kube-apiserver, and returns when it has ended: for
// the given time it serves on and says that it is not ready (--shutdown-delay-duration), then
// it accepts no more connections, answers what it was asked, and tells HTTP/2 clients to go
// away.
func (a *APIServer) Stop(delay time.Duration) error {
	if err := a.order("stop "+delay.String(), nil); err != nil {
		return err
	}
	p := a.running()
	select {
	case <-p.done:
	case <-time.After(delay + stopWithin + patience):
		return errors.Join(fmt.Errorf("API server of %s does not stop", a.node.Name), p.end(unix.SIGKILL))
	}
	if p.err != nil {
		return fmt.Errorf("API server of %s: %w\n%s", a.node.Name, p.err, tail(a.log()))
	}
	return nil
}

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

// serveAPI is the stand-in's process. It obeys an order a line on standard input and
// answers each with "done"; it ends with its standard input, or when it is told to stop.
func serveAPI(args []string) int {
	flags := flag.NewFlagSet("apiserver", flag.ExitOnError)
	name := flags.String("name", "", "what to answer as")
	listen := flags.String("listen", "", "address to listen on")
	cert := flags.String("cert", "", "certificate file")
	key := flags.String("key", "", "key file")
	clientCA := flags.String("client-ca", "", "file of the authority of clients' certificates")
	anonymous := flags.Bool("anonymous", true, "whether clients without a certificate are served")
	goaway := flags.Float64("goaway", 0, "chance of each HTTP/2 request to be a connection's last one")
	_ = flags.Parse(args) // exits by itself

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Print(err)
		return 1
	}
	clients, err := trustedTLS(*clientCA)
	if err != nil {
		log.Print(err)
		return 1
	}
	s := &standIn{name: *name, mode: well, changed: make(chan struct{}), clients: clients.RootCAs}
	s.certain.Store(!*anonymous)
	s.goaway.Store(*goaway)
	failed := make(chan error, 1)
	server := &http.Server{
		Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12},
	}
	go func() { failed <- server.ServeTLS(listener, *cert, *key) }()
	fmt.Println("done")
	ended := make(chan error, 1)
	go func() {
		for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
			order, value, _ := strings.Cut(orders.Text(), " ")
			switch order {
			case "certain":
				s.certain.Store(true)
			case "goaway":
				chance, _ := strconv.ParseFloat(value, 64) // the lab has written it
				s.goaway.Store(chance)
			case "stop":
				delay, _ := time.ParseDuration(value) // likewise
				s.become(stopping)
				time.AfterFunc(delay, func() { ended <- stop(server) })
			default:
				s.become(mode(order))
			}
			fmt.Println("done")
		}
		ended <- nil
	}()
	for {
		select {
		case err := <-failed:
			if errors.Is(err, http.ErrServerClosed) {
				failed = nil // it is being stopped
				continue
			}
			log.Print(err)
			return 1
		case err := <-ended:
			if err != nil {
				log.Print(err)
				return 1
			}
			return 0
		}
	}
}

// stop ends a server in good order.
func stop(server *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	if err := server.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil // as kube-apiserver, which then ends with what is under way
}

type standIn struct {
	name    string
	clients *x509.CertPool // authorities of clients' certificates
	certain atomic.Bool    // whether who shows none is refused
	goaway  atomic.Value   // float64

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
	mux.HandleFunc("/livez", s.readyz)
	mux.HandleFunc("/watch", s.watch)
	mux.HandleFunc("/wait", s.wait)
	mux.HandleFunc("/echo", s.echo)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", s.name)
		// The server makes a GOAWAY of it (net/http), as in kube-apiserver
		// (k8s.io/apiserver, server/filters/goaway.go).
		if r.ProtoMajor == 2 && rand.Float64() < s.goaway.Load().(float64) {
			w.Header().Set("Connection", "close")
		}
		if s.certain.Load() && !s.known(r) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintln(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}`)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// known reports whether a client has shown a certificate of the lab.
func (s *standIn) known(r *http.Request) bool {
	if len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	_, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: s.clients, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil
}

// readyz answers as kube-apiserver does (k8s.io/apiserver, server/healthz/healthz.go), /livez
// too.
func (s *standIn) readyz(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/")
	for {
		m, changed := s.state()
		failed := map[mode]string{sick: "etcd", unready: "informer-sync", stopping: "shutdown"}[m]
		switch {
		case m == well, path == "livez" && (m == unready || m == stopping):
			fmt.Fprint(w, "ok")
			return
		case failed != "":
			http.Error(w, fmt.Sprintf("[+]ping ok\n[-]%s failed: reason withheld\n%s check failed", failed, path), http.StatusInternalServerError)
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
	private, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
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
	certificate, key := certificateFiles(dir)
	return writePair(certificate, key, template, template, private, private)
}

func clientFiles(dir string) Files {
	return Files{CA: filepath.Join(dir, "client-ca.crt"), Certificate: filepath.Join(dir, "client.crt"), Key: filepath.Join(dir, "client.key")}
}

// writeClientCertificate makes an authority of clients and one client's certificate by it.
func writeClientCertificate(dir string) error {
	authority, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		return fmt.Errorf("make the key of the clients' authority: %w", err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		return fmt.Errorf("make a client's key: %w", err)
	}
	issuer := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hamesh lab clients"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	client := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "hamesh-check"},
		NotBefore: issuer.NotBefore, NotAfter: issuer.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	files := clientFiles(dir)
	return errors.Join(
		writePair(files.CA, filepath.Join(dir, "client-ca.key"), issuer, issuer, authority, authority),
		writePair(files.Certificate, files.Key, client, issuer, private, authority))
}

// writePair issues a certificate and writes it, and its key.
func writePair(certificate, key string, template, issuer *x509.Certificate, private, by *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(crand.Reader, template, issuer, private.Public(), by)
	if err != nil {
		return fmt.Errorf("make the certificate %s: %w", certificate, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return fmt.Errorf("encode the key %s: %w", key, err)
	}
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
