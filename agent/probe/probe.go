package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hamesh/hamesh/agent/health"
)

// Scheme is how a backend is checked.
type Scheme int

// The zero Scheme is invalid.
const (
	_ Scheme = iota
	// HTTPS gets a path over TLS.
	HTTPS
	// HTTP gets a path without TLS.
	HTTP
	// TCP only connects. It cannot tell an API server that hangs from one that works,
	// and a TLS server logs each check as a failed handshake.
	TCP
)

// Config says what is checked, and how.
type Config struct {
	Address netip.AddrPort
	Scheme  Scheme
	Path    string // for HTTP and HTTPS, such as "/readyz"
	// CAFile has the certificates, as PEM, that the server's must be signed by. Where
	// it is empty, any certificate will do: the check asks whether the server works;
	// who it is, clients verify for themselves through the proxy.
	CAFile string
	// Names are whom the server's certificate must be for, one of them, where CAFile is set:
	// addresses or DNS names. None: Address. A check through a proxy reaches any of several
	// servers, at an address that is none of theirs.
	Names []string
	// CertFile and KeyFile, as PEM, are shown to a server that asks for a certificate, as
	// one with --anonymous-auth=false does. They are read again for each check, so that
	// renewed ones need no restart. Both or neither is set.
	CertFile, KeyFile string
	// Header: a header of the PROXY protocol comes first, that says that the connection
	// is the checker's own (doc/proxy-protocol.txt of HAProxy, section 2.2, LOCAL).
	Header   bool
	Interval time.Duration // from the start of one check to the next, see pace
	Timeout  time.Duration // of the whole check: connect, handshake and answer
	Rise     int           // successes in a row that make it up
	Fall     int           // failures in a row that make it down
	// Known is what an earlier probe of the same backend has found; Unknown: there was none.
	Known health.State
	// OnResult gets every result, one at a time, and must not block: the next check
	// waits for it.
	OnResult func(health.Result)
}

// Probe checks one backend.
type Probe struct {
	cfg   Config
	check func(context.Context) error
	count *health.Check
	hurry chan struct{}
}

// New returns a probe that does nothing until Run. It fails for a Config that cannot
// work, or if one of its files cannot be read or does not have in it what it should.
func New(cfg Config) (*Probe, error) {
	p := &Probe{
		cfg:   cfg,
		count: health.NewCheck(cfg.Rise, cfg.Fall),
		hurry: make(chan struct{}, 1),
	}
	p.count.Resume(cfg.Known)
	if !cfg.Address.IsValid() || cfg.Interval <= 0 || cfg.Timeout <= 0 || cfg.OnResult == nil {
		return nil, errors.New("a probe needs an address, an interval, a timeout and someone who takes its results")
	}
	dial := new(net.Dialer).DialContext
	if cfg.Header {
		dial = dialWithHeader
	}
	switch cfg.Scheme {
	case HTTPS:
		tlsConfig, err := tlsConfig(cfg)
		if err != nil {
			return nil, err
		}
		p.check = get("https://"+cfg.Address.String(), cfg.Path, dial, tlsConfig)
	case HTTP:
		p.check = get("http://"+cfg.Address.String(), cfg.Path, dial, nil)
	case TCP:
		p.check = connect(cfg.Address.String(), dial)
	default:
		return nil, fmt.Errorf("unknown scheme %d", cfg.Scheme)
	}
	return p, nil
}

// Run checks at once, and then again and again until ctx ends; then it returns nil.
// While the results are in doubt, too few of them as yet for a decision, it checks twice
// as often; and where a backend that was well does not answer within half the time-out, the
// next check does not wait for the end of that one.
func (p *Probe) Run(ctx context.Context) error {
	for {
		started := time.Now()
		answer := p.start(ctx)
		if s := p.count.State(); s == health.Up || s == health.NotReady {
			select {
			case a := <-answer:
				answer <- a // there is room for one
			case <-time.After(p.cfg.Timeout / 2):
				started = time.Now()
				next := p.start(ctx)
				if !p.take(ctx, <-answer) {
					return nil
				}
				answer = next
			}
		}
		if !p.take(ctx, <-answer) || !p.wait(ctx, started) {
			return nil
		}
	}
}

// Hurry makes a check due when the last one is half an interval old, because there are
// signs that the backend's state has changed. It never blocks.
func (p *Probe) Hurry() {
	select {
	case p.hurry <- struct{}{}:
	default:
	}
}

// wait returns true when the next check is due, false when ctx has ended.
func (p *Probe) wait(ctx context.Context, started time.Time) bool {
	interval := p.cfg.Interval
	if p.count.Doubtful() {
		interval /= 2
	}
	due := started.Add(pace(started, interval))
	hurry := p.hurry
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-hurry:
			hurry = nil
			timer.Reset(min(time.Until(due), time.Until(started.Add(p.cfg.Interval/2))))
		case <-timer.C:
			return true
		}
	}
}

// tempo is this process' own, in thousandths of the configured interval, so that the checks
// of all nodes do not keep hitting a server together.
var tempo = time.Duration(900 + rand.IntN(201))

// pace is the time to the next check: up to 1.1 intervals, and half of that at least.
// All checks of this process fall into the same step, so that they wake it up once
// for all backends, not once for each: at rest that is most of what they cost.
func pace(started time.Time, interval time.Duration) time.Duration {
	step := interval * tempo / 1000
	return step - time.Duration(started.UnixNano())%(step/2)
}

// answer is how one check ended.
type answer struct {
	err  error
	took time.Duration
}

// start begins a check. The answer comes in time, whatever the backend does.
func (p *Probe) start(ctx context.Context) chan answer {
	c := make(chan answer, 1)
	go func() {
		started := time.Now()
		ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
		defer cancel()
		err := p.check(ctx)
		c <- answer{err, time.Since(started)}
	}()
	return c
}

// take counts an answer and tells of it; false when ctx has ended.
func (p *Probe) take(ctx context.Context, a answer) bool {
	if ctx.Err() != nil {
		return false
	}
	result := health.Result{OK: a.err == nil, Took: a.took}
	if a.err != nil {
		result.Reason = p.reason(a.err)
	}
	p.count.Observe(outcome(a.err), result.Reason)
	result.State, result.Refuses = p.count.State(), p.count.Refuses()
	p.cfg.OnResult(result)
	return true
}

// outcome is what the end of a check counts as. A server that a check finds to be itself
// wrong, as by its certificate, is none that answers.
func outcome(err error) health.Outcome {
	var status *statusError
	switch {
	case err == nil:
		return health.Passed
	case errors.As(err, &status) && status.lives:
		return health.Unready
	case errors.Is(err, syscall.ECONNREFUSED):
		return health.Refused
	}
	return health.Silent
}

// statusError is an answer other than 200.
type statusError struct {
	status int
	failed []string // the checks of its own that have failed, as it says
	lives  bool     // as its /livez says
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("HTTP %d", e.status)
	if len(e.failed) > 0 {
		text = fmt.Sprintf("%s failed (%s)", strings.Join(e.failed, ", "), text)
	}
	if len(e.failed) > 0 && e.lives {
		text = "not ready: " + text
	}
	return text
}

const (
	// livePath is where kube-apiserver says whether it lives, whatever it is ready for: also
	// while it is being stopped and serves on (k8s.io/apiserver, server/healthz.go).
	livePath = "/livez"
	// answerLimit is how much of an answer is read, in bytes: far beyond what a health check
	// answers.
	answerLimit = 64 << 10
	// failedLimit is how many failed checks a reason names, and failedLength how long each
	// name may be, in bytes.
	failedLimit, failedLength = 3, 40
)

// failedChecks finds the checks that an answer says have failed, in kube-apiserver's form:
// a line "[-]NAME failed: REASON" for each (k8s.io/apiserver, server/healthz/healthz.go). What
// it finds is fit for people and for a status.
func failedChecks(body []byte) (names []string) {
	for line := range strings.Lines(string(body)) {
		rest, found := strings.CutPrefix(line, "[-]")
		name, _, failed := strings.Cut(rest, " failed")
		if !found || !failed || name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
			continue
		}
		if len(names) == failedLimit {
			return append(names, "...")
		}
		names = append(names, name[:min(len(name), failedLength)])
	}
	return names
}

// dialFunc connects to a server.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// localHeader is a whole header of the PROXY protocol: the signature, version 2 with the
// command LOCAL, no family, no addresses.
const localHeader = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"

// dialWithHeader connects and sends localHeader.
func dialWithHeader(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, localHeader); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// get returns a check that gets a path of a server. Where the answer is not 200, it asks
// whether the server lives.
func get(server, path string, dial dialFunc, tlsConfig *tls.Config) func(context.Context) error {
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:       dial,
			TLSClientConfig:   tlsConfig,
			DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	ask := func(ctx context.Context, path string) (status int, body []byte, err error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, server+path, nil)
		if err != nil {
			return 0, nil, err
		}
		req.Header.Set("User-Agent", "hamesh-probe")
		resp, err := client.Do(req)
		if err != nil {
			return 0, nil, err
		}
		defer resp.Body.Close()
		// A server may hang after its headers too.
		body, err = io.ReadAll(io.LimitReader(resp.Body, answerLimit))
		return resp.StatusCode, body, err
	}
	return func(ctx context.Context) error {
		status, body, err := ask(ctx, path)
		if err != nil || status == http.StatusOK {
			return err
		}
		unready := &statusError{status: status, failed: failedChecks(body)}
		if path != livePath {
			status, _, err = ask(ctx, livePath)
			unready.lives = err == nil && status == http.StatusOK
		}
		return unready
	}
}

func connect(address string, dial dialFunc) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := dial(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// tlsConfig makes what a check needs of TLS, and reads the files once, so that wrong ones
// are found at start.
func tlsConfig(cfg Config) (*tls.Config, error) {
	// Most of a check's cost is the handshake; a server that is started anew needs a whole one.
	c := &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	if cfg.CAFile == "" {
		c.InsecureSkipVerify = true
	} else {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("reading the certificate authority: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("no certificate in %s", cfg.CAFile)
		}
		if len(cfg.Names) > 0 {
			c.InsecureSkipVerify = true // by the one name that it knows; verify knows them all
			c.VerifyConnection = func(state tls.ConnectionState) error { return verify(state, c.RootCAs, cfg.Names) }
		}
	}
	if cfg.CertFile == "" && cfg.KeyFile == "" {
		return c, nil
	}
	read := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("reading the certificate for the backends: %w", err)
		}
		return &pair, nil
	}
	if _, err := read(); err != nil {
		return nil, err
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return read() }
	return c, nil
}

// verify checks a server's certificate as crypto/tls does, for any of several names.
func verify(state tls.ConnectionState, roots *x509.CertPool, names []string) error {
	own, between := state.PeerCertificates[0], x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := own.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between})
	if err == nil {
		for _, name := range names {
			if err = own.VerifyHostname(name); err == nil {
				return nil
			}
		}
	}
	return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
}

// reason says in a few words why a check failed.
func (p *Probe) reason(err error) string {
	var (
		netErr    net.Error
		errno     syscall.Errno
		status    *statusError
		alert     tls.AlertError
		untrusted *tls.CertificateVerificationError
		remote    *net.OpError
	)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &netErr) && netErr.Timeout():
		return fmt.Sprintf("timeout after %v", p.cfg.Timeout)
	case errors.As(err, &status):
		return status.Error()
	case errors.As(err, &untrusted):
		return "TLS: " + untrusted.Err.Error()
	case errors.Is(err, http.ErrSchemeMismatch):
		return "TLS: the server speaks plain HTTP"
	case errors.As(err, &remote) && remote.Op == "remote error": // an alert, crypto/tls
		return "TLS: " + strings.TrimPrefix(remote.Err.Error(), "tls: ")
	case errors.As(err, &alert):
		return "TLS: " + alert.Error()
	case errors.Is(err, syscall.ECONNRESET):
		return "connection reset"
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed without an answer"
	}
	if wrapped := new(url.Error); errors.As(err, &wrapped) {
		return wrapped.Err.Error() // without the URL, which says nothing new
	}
	return err.Error()
}
