//go:build linux

package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultTimeout  = time.Second
	defaultInterval = 100 * time.Millisecond

	// streamRetry is the pause before a stream that broke, or could not be opened, is
	// opened again.
	streamRetry = 20 * time.Millisecond
)

// Load is what clients do to a target.
type Load struct {
	Target  netip.AddrPort // the VIP, or a node's API server itself
	Rate    float64        // new connections a second, each with one request; 0: none
	Timeout time.Duration  // from the time a request was due to its last byte; 0: 1 s
	From    []netip.Addr   // source addresses of the client's, used in turn; none: all

	Streams  int           // watches held open, each from the next address
	Interval time.Duration // between the lines of a stream; 0: 100 ms
	Silence  time.Duration // a stream silent for so long is given up as broken; 0: 3 s
}

// Client is a host with many addresses from which loads are run.
type Client struct {
	Host          *Host
	Port          *Port
	Sources       []netip.Addr
	SecondSources []netip.Addr // those of IPv6 on a dual segment

	certificate string
	log         string
}

func newClient(m *Mesh) (*Client, error) {
	host, err := NewHost("client")
	if err != nil {
		return nil, err
	}
	c := &Client{Host: host, log: filepath.Join(m.dir, "client.log")}
	c.certificate, _ = certificateFiles(m.dir)
	var prefixes []netip.Prefix
	for i, p := range m.plans {
		sources := []*[]netip.Addr{&c.Sources, &c.SecondSources}[i]
		for n := range m.options.Clients {
			prefix := p.client(n)
			*sources = append(*sources, prefix.Addr())
			prefixes = append(prefixes, prefix)
		}
	}
	if c.Port, err = m.Switch.Attach(host, hostInterface, prefixes...); err != nil {
		return nil, errors.Join(err, host.Close())
	}
	return c, nil
}

func (c *Client) close() error {
	return errors.Join(c.Host.killAll(0), c.Host.Close())
}

// order is what the client process is started with: one of two loads.
type order struct {
	Load
	Ordinary    *Ordinary `json:",omitempty"` // nil: Load
	Certificate string
}

// Run is a load that is being run, by a process of its own.
type Run struct {
	process *process
	stdin   io.WriteCloser
	decoded chan error
	looks   chan []Sample // the answers to UnderWay

	mu      sync.Mutex
	samples []Sample
}

// Start starts a load; it goes on until Run.Stop.
func (c *Client) Start(l Load) (*Run, error) {
	if l.Timeout == 0 {
		l.Timeout = defaultTimeout
	}
	if l.Interval == 0 {
		l.Interval = defaultInterval
	}
	if l.Silence == 0 {
		l.Silence = 3 * time.Second
	}
	if len(l.From) == 0 {
		l.From = c.Sources
	}
	if !l.Target.IsValid() || len(l.From) == 0 || l.Rate < 0 || l.Rate > 10_000 || l.Streams < 0 {
		return nil, fmt.Errorf("start a load: out of range: %+v", l)
	}
	return c.start(order{Load: l})
}

func (c *Client) start(o order) (*Run, error) {
	o.Certificate = c.certificate
	arg, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encode a load: %w", err)
	}
	cmd := Command("client", string(arg))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start a load: %w", err)
	}
	out, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start a load: %w", err)
	}
	cmd.Stdout = w
	p, err := launch(c.Host, cmd, c.log)
	_ = w.Close() // the child has its own
	if err != nil {
		_ = out.Close()
		return nil, err
	}
	r := &Run{process: p, stdin: stdin, decoded: make(chan error, 1), looks: make(chan []Sample, 1)}
	go func() { r.decoded <- r.decode(out) }()
	return r, nil
}

func (r *Run) decode(out io.ReadCloser) error {
	defer out.Close()
	for d := json.NewDecoder(bufio.NewReader(out)); ; {
		var m message
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read a client's samples: %w", err)
		}
		if m.Kind == 0 {
			select {
			case r.looks <- m.UnderWay:
			default: // nobody waits for it any more
			}
			continue
		}
		r.mu.Lock()
		r.samples = append(r.samples, m.Sample)
		r.mu.Unlock()
	}
}

// Stop ends the load, waits for the requests under way and returns every sample. It is
// called once.
func (r *Run) Stop() ([]Sample, error) {
	_ = r.stdin.Close() // says "enough"; fails only if the process has ended, told below
	select {
	case <-r.process.done:
	case <-time.After(patience):
		return nil, errors.Join(errors.New("the client does not end"), r.process.end(unix.SIGKILL))
	}
	if err := errors.Join(r.process.err, <-r.decoded); err != nil {
		return nil, fmt.Errorf("client: %w\n%s", err, tail(r.process.log))
	}
	return r.Samples(), nil
}

// Samples returns what has been seen so far.
func (r *Run) Samples() []Sample {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Sample(nil), r.samples...)
}

func init() { Role("client", serveLoad) }

// message is what a client's process writes: a sample or, where that is the zero value,
// what is under way.
type message struct {
	Sample
	UnderWay []Sample `json:",omitempty"`
}

// serveLoad is the client's process: it runs a load until its standard input ends, and
// writes each sample to standard output as it happens. Each line of standard input asks
// ordinary clients what is under way.
func serveLoad(args []string) int {
	if err := runLoad(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type load struct {
	order
	trust    *tls.Config
	messages chan message
}

func runLoad(args []string) error {
	l := load{messages: make(chan message, 1024)}
	if len(args) != 1 {
		return errors.New("want one argument, an order")
	}
	if err := json.Unmarshal([]byte(args[0]), &l.order); err != nil {
		return fmt.Errorf("read the order: %w", err)
	}
	var err error
	if l.trust, err = trustedTLS(l.Certificate); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	asked := make(chan struct{})
	go func() {
		defer cancel()
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			select {
			case asked <- struct{}{}:
			case <-time.After(patience): // such a load has nobody who answers
			}
		}
	}()
	written := make(chan error, 1)
	go func() {
		var err error
		e := json.NewEncoder(os.Stdout)
		for m := range l.messages {
			err = errors.Join(err, e.Encode(m))
		}
		written <- err
	}()
	if l.Ordinary != nil {
		o := ordinary{Ordinary: *l.Ordinary, trust: l.trust, messages: l.messages, underWay: make(map[*call]struct{})}
		o.run(ctx, asked)
	} else {
		var work sync.WaitGroup
		for i := range l.Streams {
			work.Go(func() { l.stream(ctx, i) })
		}
		l.requests(ctx, &work)
		work.Wait()
	}
	close(l.messages)
	return <-written
}

func (l *load) say(s Sample) { l.messages <- message{Sample: s} }

// requests starts one request after the other, each when it is due, however long the
// others take: a load that waited would hide what a user feels. At most rate × timeout
// are under way.
func (l *load) requests(ctx context.Context, work *sync.WaitGroup) {
	if l.Rate == 0 {
		return
	}
	for n, due := range dues(ctx, l.Rate) {
		source := l.From[n%len(l.From)]
		work.Go(func() {
			// Not under ctx: what has begun is measured to its end.
			limited, cancel := context.WithDeadline(context.Background(), due.Add(l.Timeout))
			defer cancel()
			backend, err := l.request(limited, source)
			l.say(Sample{Kind: Request, Source: source, Start: due, End: time.Now(), Backend: backend, Error: cause(err)})
		})
	}
}

// dues yields the number and the time of one thing after the other, so many a second,
// each when it is due, until ctx ends.
func dues(ctx context.Context, rate float64) iter.Seq2[int, time.Time] {
	return func(yield func(int, time.Time) bool) {
		start := time.Now()
		timer := time.NewTimer(0)
		defer timer.Stop()
		for n := 0; ; n++ {
			due := start.Add(time.Duration(float64(n) / rate * float64(time.Second)))
			timer.Reset(time.Until(due))
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			if !yield(n, due) {
				return
			}
		}
	}
}

// get opens a new connection and sends one request over it. The connection is closed
// with the response's body.
func (l *load) get(ctx context.Context, source netip.Addr, path string) (*http.Response, error) {
	dialer := &tls.Dialer{
		NetDialer: &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))},
		Config:    l.trust,
	}
	transport := &http.Transport{
		// Under ctx, for the transport's own would go on dialling after ctx has ended.
		DialTLSContext: func(_ context.Context, network, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, address)
		},
		DisableKeepAlives: true,
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.Target.String()+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		_ = response.Body.Close()
		return nil, errors.New(response.Status)
	}
	return response, nil
}

func (l *load) request(ctx context.Context, source netip.Addr) (backend string, err error) {
	response, err := l.get(ctx, source, "/version")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.Header.Get("Server"), err
}

// stream holds one watch open for ever, opening it again when it breaks.
func (l *load) stream(ctx context.Context, index int) {
	source := l.From[index%len(l.From)]
	for ctx.Err() == nil {
		opened := time.Now()
		backend, err := l.watch(ctx, index, source)
		if ctx.Err() != nil {
			return // our own end
		}
		kind := Broken
		if backend == "" {
			kind = Unopened
		}
		l.say(Sample{Kind: kind, Source: source, Stream: index, Start: opened, End: time.Now(), Backend: backend, Error: cause(err)})
		select {
		case <-ctx.Done():
		case <-time.After(streamRetry):
		}
	}
}

// watch reads one stream to its end and returns the backend it came from, empty if no
// line came, and why it ended.
func (l *load) watch(ctx context.Context, index int, source netip.Addr) (backend string, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	opening := time.AfterFunc(l.Timeout, func() { cancel(errSilent) })
	defer opening.Stop()
	response, err := l.get(ctx, source, "/watch?interval="+l.Interval.String())
	if err != nil {
		return "", errors.Join(err, context.Cause(ctx))
	}
	defer response.Body.Close()
	for lines := bufio.NewReader(response.Body); ; {
		if _, err := lines.ReadString('\n'); err != nil {
			return backend, errors.Join(err, context.Cause(ctx))
		}
		opening.Reset(l.Silence)
		now := time.Now()
		backend = response.Header.Get("Server")
		l.say(Sample{Kind: Line, Source: source, Stream: index, Start: now, End: now, Backend: backend})
	}
}

var errSilent = errors.New("silent")

// cause names an error in a word or two, so that samples can be counted by it.
func cause(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errSilent):
		return "silent"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.Is(err, unix.ECONNRESET):
		return "reset"
	case errors.Is(err, unix.ECONNABORTED):
		return "aborted"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "closed"
	}
	return err.Error()
}
