//go:build linux

package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	defaultDelay     = 700 * time.Millisecond
	defaultSlowDelay = 20 * time.Second

	// again is an ordinary client's pause after an error.
	again = 100 * time.Millisecond
	// spread is the time in which a load's connections are opened.
	spread = time.Second
)

// Ordinary is what clients do that are as patient as kubectl, the kubelet and client-go:
// they dial for 30 s, ask a silent HTTP/2 connection after 30 s whether it lives, and wait
// for an answer as long as TCP does. They never try a request again.
type Ordinary struct {
	Target netip.AddrPort
	From   []netip.Addr // source addresses, used in turn; none: all of the client's

	Calls       float64       // a second: a new connection, one request, and its end
	Connections int           // kept, each with one request after the other
	Delay       time.Duration // after which these are answered; 0: 0.7 s
	Every       time.Duration // from one request of a kept connection to its next; 0: as soon as it is answered
	Slow        int           // as Connections, with requests that are answered after SlowDelay
	SlowDelay   time.Duration // 0: 20 s
	Watches     int           // held open, silent after their first line
}

// StartOrdinary starts a load of ordinary clients; it goes on until Run.Stop, which does
// not wait for what is under way: that is returned as unfinished.
func (c *Client) StartOrdinary(o Ordinary) (*Run, error) {
	if o.Delay == 0 {
		o.Delay = defaultDelay
	}
	if o.SlowDelay == 0 {
		o.SlowDelay = defaultSlowDelay
	}
	if len(o.From) == 0 {
		o.From = c.Sources
	}
	if !o.Target.IsValid() || o.Calls < 0 || o.Calls > 10_000 || min(o.Connections, o.Slow, o.Watches) < 0 || min(o.Delay, o.SlowDelay, o.Every) < 0 {
		return nil, fmt.Errorf("start ordinary clients: out of range: %+v", o)
	}
	return c.start(order{Ordinary: &o})
}

// Client runs loads on the node itself, whose kernel chooses their source address: that of
// the VIP where the node holds it. It is of no use any more once the power was off.
func (n *Node) Client() (*Client, error) {
	host := n.Host()
	if host == nil {
		return nil, fmt.Errorf("a client on %s: it is powered off", n.Name)
	}
	return &Client{Host: host, Port: n.Port(), certificate: n.mesh.Client.certificate, log: n.mesh.Client.log}, nil
}

// UnderWay returns what ordinary clients wait for at this time, each as if the load were
// stopped now.
func (r *Run) UnderWay() ([]Sample, error) {
	if _, err := io.WriteString(r.stdin, "\n"); err != nil {
		return nil, fmt.Errorf("ask a client: %w", err)
	}
	select {
	case samples := <-r.looks:
		return samples, nil
	case <-r.process.done:
		return nil, errors.New("ask a client: it has ended")
	case <-time.After(patience):
		return nil, errors.New("ask a client: no answer")
	}
}

// ordinary is a load of ordinary clients, in their process.
type ordinary struct {
	Ordinary
	trust    *tls.Config
	messages chan<- message

	mu       sync.Mutex
	underWay map[*call]struct{}
}

// call is one thing that a client waits for.
type call struct {
	Sample
	line *line
}

// sample is what is known of the call now.
func (c *call) sample() Sample {
	c.line.mu.Lock()
	defer c.line.mu.Unlock()
	s := c.Sample
	s.End, s.Connected, s.Backend = time.Now(), c.line.connected, c.line.backend
	if c.line.lost.After(s.Start) {
		s.End = c.line.lost
	}
	if c.line.local.IsValid() {
		s.Source, s.Port = c.line.local.Addr(), c.line.local.Port()
	}
	return s
}

// line is a client's transport, which has one connection at a time.
type line struct {
	transport *http.Transport

	mu        sync.Mutex
	connected time.Time
	local     netip.AddrPort
	backend   string    // who has answered over this connection; empty: nobody yet
	lost      time.Time // when the end of the connection was read; zero: not yet
}

// wire is a connection that notes its end. That is when a client knows: its requests learn of
// it when this process, which has hundreds of others to tell, comes to them.
type wire struct {
	net.Conn
	line *line
}

func (w wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.line.mu.Lock()
		defer w.line.mu.Unlock()
		if w.line.lost.IsZero() {
			w.line.lost = time.Now()
		}
	}
	return n, err
}

func (o *ordinary) source(index int) (source netip.Addr) {
	if len(o.From) > 0 {
		source = o.From[index%len(o.From)]
	}
	return source
}

func (o *ordinary) newLine(source netip.Addr) *line {
	l := &line{}
	dialer := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}
	if source.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	l.transport = &http.Transport{
		// Here is seen when a connection is established, also when a request finds
		// one that is there already.
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			l.mu.Lock()
			l.connected, l.local, l.backend, l.lost = time.Time{}, netip.AddrPort{}, "", time.Time{}
			l.mu.Unlock()
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.connected = time.Now()
			if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
				l.local = netip.AddrPortFrom(a.AddrPort().Addr().Unmap(), uint16(a.Port))
			}
			return wire{conn, l}, nil
		},
		TLSClientConfig:     o.trust.Clone(),
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
	}
	return l
}

// run runs the load until ctx ends, and says what is under way whenever it is asked.
func (o *ordinary) run(ctx context.Context, asked <-chan struct{}) {
	var work sync.WaitGroup
	work.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-asked:
				o.messages <- message{UnderWay: o.look()}
			}
		}
	})
	index := 0
	keep := func(number int, kind Kind, path string, delay time.Duration) {
		for i := range number {
			source := o.source(index)
			// Not all at one moment, which would come again with every answer, and be too much
			// for a machine that is clients and servers at once.
			pause := time.Duration(i) * spread / time.Duration(number)
			index++
			work.Go(func() { o.keep(ctx, pause, kind, source, path, delay) })
		}
	}
	keep(o.Connections, Kept, "/wait?for="+o.Delay.String(), o.Delay)
	keep(o.Slow, Kept, "/wait?for="+o.SlowDelay.String(), o.SlowDelay)
	keep(o.Watches, Watch, "/watch?interval=0", 0)
	if o.Calls > 0 {
		for n := range dues(ctx, o.Calls) {
			source := o.source(n)
			work.Go(func() {
				l := o.newLine(source)
				defer l.transport.CloseIdleConnections()
				_ = o.do(ctx, l, Call, source, "/wait?for="+o.Delay.String(), o.Delay) // is a sample
			})
		}
	}
	work.Wait()
}

func (o *ordinary) look() []Sample {
	o.mu.Lock()
	defer o.mu.Unlock()
	var all []Sample
	for c := range o.underWay {
		s := c.sample()
		s.Unfinished = true
		all = append(all, s)
	}
	return all
}

// keep asks over one connection again and again, and over a new one after an error.
func (o *ordinary) keep(ctx context.Context, pause time.Duration, kind Kind, source netip.Addr, path string, delay time.Duration) {
	for l := o.newLine(source); ; l = o.newLine(source) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		for next := time.Now(); o.do(ctx, l, kind, source, path, delay) == nil; {
			next = next.Add(o.Every)
			select {
			case <-ctx.Done():
			case <-time.After(time.Until(next)):
			}
		}
		l.transport.CloseIdleConnections()
		pause = again
	}
}

// do sends one request and waits for all of its answer.
func (o *ordinary) do(ctx context.Context, l *line, kind Kind, source netip.Addr, path string, delay time.Duration) error {
	c := &call{Sample{Kind: kind, Source: source, Start: time.Now(), Delay: delay}, l}
	o.mu.Lock()
	o.underWay[c] = struct{}{}
	o.mu.Unlock()
	err := o.get(ctx, l, path)
	if err == nil && kind == Watch {
		err = io.EOF // a watch has no end
	}
	s := c.sample()
	if s.Unfinished = err != nil && ctx.Err() != nil; !s.Unfinished {
		s.Error = cause(err)
	}
	o.mu.Lock()
	delete(o.underWay, c)
	o.mu.Unlock()
	o.messages <- message{Sample: s}
	return err
}

func (o *ordinary) get(ctx context.Context, l *line, path string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+o.Target.String()+path, nil)
	if err != nil {
		return err
	}
	response, err := l.transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	lines := bufio.NewReader(response.Body)
	if _, err := lines.ReadString('\n'); err != nil {
		return err
	}
	l.mu.Lock()
	l.backend = response.Header.Get("Server")
	l.mu.Unlock()
	_, err = io.Copy(io.Discard, lines)
	return err
}
