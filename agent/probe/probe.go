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
	CAFile   string
	Interval time.Duration // from the start of one check to the next, spread by a tenth either way
	Timeout  time.Duration // of the whole check: connect, handshake and answer
	Rise     int           // successes in a row that make it up
	Fall     int           // failures in a row that make it down
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
// work, or if CAFile cannot be read or has no certificate in it.
func New(cfg Config) (*Probe, error) {
	p := &Probe{
		cfg:   cfg,
		count: health.NewCheck(cfg.Rise, cfg.Fall),
		hurry: make(chan struct{}, 1),
	}
	if !cfg.Address.IsValid() || cfg.Interval <= 0 || cfg.Timeout <= 0 || cfg.OnResult == nil {
		return nil, errors.New("a probe needs an address, an interval, a timeout and someone who takes its results")
	}
	switch cfg.Scheme {
	case HTTPS:
		tlsConfig, err := tlsConfig(cfg.CAFile)
		if err != nil {
			return nil, err
		}
		p.check = get("https://"+cfg.Address.String()+cfg.Path, tlsConfig)
	case HTTP:
		p.check = get("http://"+cfg.Address.String()+cfg.Path, nil)
	case TCP:
		p.check = connect(cfg.Address.String())
	default:
		return nil, fmt.Errorf("unknown scheme %d", cfg.Scheme)
	}
	return p, nil
}

// Run checks at once, and then again and again until ctx ends; then it returns nil.
// While the results are in doubt, too few of them as yet for a decision, it checks twice
// as often.
func (p *Probe) Run(ctx context.Context) error {
	for {
		started := time.Now()
		result := p.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		p.cfg.OnResult(result)
		if !p.wait(ctx, started) {
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
	// Spread, so that the checks of all nodes do not keep hitting a server together.
	interval := time.Duration(float64(p.cfg.Interval) * (0.9 + 0.2*rand.Float64()))
	if p.count.Doubtful() {
		interval /= 2
	}
	hurry := p.hurry
	timer := time.NewTimer(time.Until(started.Add(interval)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-hurry:
			hurry = nil
			timer.Reset(min(time.Until(started.Add(interval)), time.Until(started.Add(p.cfg.Interval/2))))
		case <-timer.C:
			return true
		}
	}
}

func (p *Probe) once(ctx context.Context) health.Result {
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	err := p.check(ctx)
	result := health.Result{OK: err == nil, Took: time.Since(started)}
	if err != nil {
		result.Reason = p.reason(err)
	}
	p.count.Observe(result.OK, result.Reason)
	result.State = p.count.State()
	return result
}

// statusError is an answer other than 200.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("HTTP %d", int(e)) }

func get(target string, tlsConfig *tls.Config) func(context.Context) error {
	client := &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:   tlsConfig,
			DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return err
		}
		req.Header.Set("User-Agent", "hamesh-probe")
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return statusError(resp.StatusCode)
		}
		// A server may hang after its headers too. The limit is far beyond what a
		// health check answers.
		_, err = io.CopyN(io.Discard, resp.Body, 64<<10)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	}
}

func connect(address string) func(context.Context) error {
	return func(ctx context.Context) error {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

func tlsConfig(caFile string) (*tls.Config, error) {
	if caFile == "" {
		return &tls.Config{InsecureSkipVerify: true}, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s", caFile)
	}
	return &tls.Config{RootCAs: pool}, nil
}

// reason says in a few words why a check failed.
func (p *Probe) reason(err error) string {
	var (
		netErr    net.Error
		errno     syscall.Errno
		status    statusError
		alert     tls.AlertError
		untrusted *tls.CertificateVerificationError
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
