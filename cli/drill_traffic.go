package cli

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// patience is how long a client waits for a connection, and for one answer on it.
	patience = 2 * time.Second
	// knocksAtOnce bounds the connections under way: all that begin within patience, at the
	// highest rate, and some more.
	knocksAtOnce = 512
	// drillStreams is how many connections are kept, half of them idle.
	drillStreams = 10
	// speakEvery is the time between two requests on a stream that speaks.
	speakEvery = 200 * time.Millisecond
)

// Why a connection of a drill failed, or a stream broke.
const (
	causeRefused     = "refused"
	causeReset       = "reset"
	causeClosed      = "closed"
	causeTimedOut    = "timedOut"
	causeUnreachable = "unreachable"
	causeOther       = "other"
)

var causes = []struct {
	err  error
	name string
}{
	{syscall.ECONNREFUSED, causeRefused},
	{syscall.ECONNRESET, causeReset},
	{syscall.EPIPE, causeReset},
	{io.EOF, causeClosed},
	{io.ErrUnexpectedEOF, causeClosed},
	{os.ErrDeadlineExceeded, causeTimedOut},
	{context.DeadlineExceeded, causeTimedOut},
	{syscall.ETIMEDOUT, causeTimedOut},
	{syscall.EHOSTUNREACH, causeUnreachable},
	{syscall.ENETUNREACH, causeUnreachable},
}

func cause(err error) string {
	for _, c := range causes {
		if errors.Is(err, c.err) {
			return c.name
		}
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return causeTimedOut
	}
	// net/http gives these two of HTTP/2 no value to compare with: nobody answered a ping, and
	// the other side closed after it had said that it would.
	switch said := err.Error(); {
	case strings.Contains(said, "http2: client connection lost"):
		return causeTimedOut
	case strings.Contains(said, "http2: server sent GOAWAY and closed the connection"):
		return causeClosed
	}
	return causeOther
}

// traffic is what a client does during a drill: it opens one connection after the other.
type traffic struct {
	address string // host:port
	every   time.Duration
	https   bool // else connecting is all

	work sync.WaitGroup
	mu   sync.Mutex
	done []knock // in the order of their ends
	late int     // knocks left out, because too many were under way
}

// knock is one new connection: opened, and answered where the other side speaks HTTPS.
type knock struct {
	begun, ended time.Time
	cause        string // empty: it was answered
}

// probe finds out whether the address answers, and whether it speaks HTTPS.
func (t *traffic) probe(ctx context.Context) error {
	// What refuses a handshake once may have been in trouble; what speaks no TLS does so
	// each time.
	for range 3 {
		t.https = true
		if err := t.knock(ctx); err == nil {
			return nil
		}
	}
	t.https = false
	return t.knock(ctx)
}

// run knocks until ctx ends, and returns when every knock has ended.
func (t *traffic) run(ctx context.Context) {
	defer t.work.Wait()
	tick := time.NewTicker(t.every)
	defer tick.Stop()
	places := make(chan struct{}, knocksAtOnce)
	// Not ctx: what has begun may end by itself, so that its end says something.
	own := context.WithoutCancel(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case places <- struct{}{}:
		default:
			t.mu.Lock()
			t.late++
			t.mu.Unlock()
			continue
		}
		t.work.Go(func() {
			k := knock{begun: time.Now()}
			if err := t.knock(own); err != nil {
				k.cause = cause(err)
			}
			k.ended = time.Now()
			<-places
			t.mu.Lock()
			t.done = append(t.done, k)
			t.mu.Unlock()
		})
	}
}

func (t *traffic) knock(ctx context.Context) error {
	c, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if !t.https {
		return nil
	}
	_, err = c.get()
	return err
}

// client is one connection.
type client struct {
	net.Conn
	from *bufio.Reader
	host string
}

func (t *traffic) open(ctx context.Context) (*client, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.address)
	if err != nil {
		return nil, err
	}
	c := &client{Conn: conn, host: t.address}
	if t.https {
		// Whose certificate it is does not matter here; hactl doctor looks at that.
		secured := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
		if err := secured.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		c.Conn = secured
	}
	c.from = bufio.NewReader(c.Conn)
	return c, nil
}

// get asks for /readyz. Any answer will do: what is measured is the way to it. last says
// that the other side wants no further request on this connection.
func (c *client) get() (last bool, err error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	request, err := http.NewRequest(http.MethodGet, "https://"+c.host+"/readyz", nil)
	if err != nil {
		return false, err
	}
	if err := request.Write(c); err != nil {
		return false, err
	}
	response, err := http.ReadResponse(c.from, request)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return false, err
	}
	return response.Close, c.SetDeadline(time.Time{})
}

// streams are established connections that are watched for breaks.
type streams struct {
	stop context.CancelFunc
	work sync.WaitGroup

	mu      sync.Mutex
	broken  map[string]int // by cause
	silence time.Duration  // the longest one between two answers of one that speaks
}

// keep opens the streams of one phase. Half of them speak, where the other side does.
func (t *traffic) keep(ctx context.Context) (*streams, error) {
	watched, stop := context.WithCancel(ctx)
	s := &streams{stop: stop, broken: map[string]int{}}
	for i := range drillStreams {
		c, err := t.settle(ctx)
		if err != nil {
			s.release()
			return nil, fmt.Errorf("opening stream %d: %w", i+1, err)
		}
		s.work.Go(func() {
			// Ends what waits for the other side; closing again fails, which is fine.
			defer context.AfterFunc(watched, func() { c.Close() })()
			defer c.Close()
			var err error
			if t.https && i%2 == 0 {
				err = s.speak(watched, c)
			} else {
				err = s.idle(c)
			}
			if err != nil && watched.Err() == nil {
				s.mu.Lock()
				s.broken[cause(err)]++
				s.mu.Unlock()
			}
		})
	}
	return s, nil
}

// settle opens one stream. Something may always happen to one connection, which the knocks
// tell of; only what fails again and again is no ground to measure on.
func (t *traffic) settle(ctx context.Context) (c *client, err error) {
	for range 3 {
		if c, err = t.open(ctx); err != nil {
			continue
		}
		if !t.https {
			return c, nil
		}
		// Also those that will be idle: a server is quicker to close a connection on which
		// it was never asked for anything (net/http.Server.ReadHeaderTimeout).
		if _, err = c.get(); err == nil {
			return c, nil
		}
		c.Close()
	}
	return nil, err
}

// release closes the streams and returns how many broke before, by cause, and the longest
// silence.
func (s *streams) release() (broken map[string]int, silence time.Duration) {
	s.stop()
	s.work.Wait()
	return s.broken, s.silence
}

// idle waits until the connection breaks or ctx ends it.
func (*streams) idle(c *client) error {
	_, err := io.Copy(io.Discard, c.from)
	if err == nil {
		err = io.EOF
	}
	return err
}

// speak asks again and again until the connection breaks, the other side has had enough,
// or ctx ends.
func (s *streams) speak(ctx context.Context, c *client) error {
	for answered := time.Now(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(speakEvery):
		}
		last, err := c.get()
		now := time.Now()
		s.mu.Lock()
		s.silence = max(s.silence, now.Sub(answered))
		s.mu.Unlock()
		if err != nil || last {
			return err
		}
		answered = now
	}
}
