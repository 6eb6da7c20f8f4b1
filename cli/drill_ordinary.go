package cli

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// ordinaryRate is how many one-shot requests begin in a second, and ordinaryKept how many
	// connections are kept: light beside the other new connections, and often enough that some
	// request meets each change of the owner.
	ordinaryRate = 10
	ordinaryKept = 5
	// ordinaryAtOnce bounds the one-shots under way: all that begin while one may dial.
	ordinaryAtOnce = 300
	// ordinaryGrace is how long ordinary clients may go on after the drill. It is longer than
	// patience, so that what is unfinished then has waited too long by any measure.
	ordinaryGrace = 3 * time.Second
	// ordinaryAgain is the pause of a kept connection's client after an error.
	ordinaryAgain = 100 * time.Millisecond
)

// ordinaryDialer dials as client-go does.
var ordinaryDialer = net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}

// ordinary is what clients do during a drill that are as patient as kubectl, the kubelet and
// client-go: they wait for an answer as long as TCP does, and never try a request again.
type ordinary struct {
	address string // host:port
	https   bool   // else connecting is all, and no connection is kept
	grace   time.Duration
	atOnce  int // one-shots

	work sync.WaitGroup
	mu   sync.Mutex
	done []request // in the order of their ends
	late int       // one-shots left out, because too many were under way
}

// request is what one ordinary client waited for.
type request struct {
	begun, ended time.Time
	kept         bool   // on a connection that is kept
	cause        string // empty: it was answered, or is unfinished
	unfinished   bool   // it still waited when the drill gave it up
}

// run asks until ctx ends, and returns when all is answered or the grace is over.
func (o *ordinary) run(ctx context.Context) {
	// Not ctx: what has begun may end by itself, so that its end says something.
	own, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	o.work.Go(func() { o.repeat(ctx, own) })
	if o.https {
		for i := range ordinaryKept {
			// Not all at one moment, so that one of them soon meets whatever happens.
			pause := speakEvery * time.Duration(i) / ordinaryKept
			o.work.Go(func() { o.keep(ctx, own, pause) })
		}
	}
	<-ctx.Done()
	defer time.AfterFunc(o.grace, giveUp).Stop()
	o.work.Wait()
}

// repeat begins one-shots until ctx ends.
func (o *ordinary) repeat(ctx, own context.Context) {
	tick := time.NewTicker(time.Second / ordinaryRate)
	defer tick.Stop()
	places := make(chan struct{}, o.atOnce)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case places <- struct{}{}:
		default:
			o.mu.Lock()
			o.late++
			o.mu.Unlock()
			continue
		}
		o.work.Go(func() {
			defer func() { <-places }()
			t := ordinaryTransport()
			defer t.CloseIdleConnections()
			_ = o.do(own, t, false) // is recorded
		})
	}
}

// keep asks over one connection again and again, and over a new one after an error.
func (o *ordinary) keep(ctx, own context.Context, pause time.Duration) {
	for ctx.Err() == nil {
		t := ordinaryTransport()
		for sleep(ctx, pause) == nil {
			if pause = speakEvery; o.do(own, t, true) != nil {
				pause = ordinaryAgain
				break
			}
		}
		t.CloseIdleConnections()
	}
}

// do sends one request, waits for all of its answer and records it.
func (o *ordinary) do(ctx context.Context, t *http.Transport, kept bool) error {
	r := request{begun: time.Now(), kept: kept}
	err := o.get(ctx, t)
	r.ended = time.Now()
	if r.unfinished = err != nil && ctx.Err() != nil; err != nil && !r.unfinished {
		r.cause = cause(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done = append(o.done, r)
	return err
}

// get asks for what the impatient client asks for. Any answer will do.
func (o *ordinary) get(ctx context.Context, t *http.Transport) error {
	if !o.https {
		conn, err := ordinaryDialer.DialContext(ctx, "tcp", o.address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+o.address+"/readyz", nil)
	if err != nil {
		return err
	}
	response, err := t.RoundTrip(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return err
}

// ordinaryTransport has one connection at a time, with the settings of client-go.
func ordinaryTransport() *http.Transport {
	return &http.Transport{
		DialContext: ordinaryDialer.DialContext,
		// Whose certificate it is does not matter here; hactl doctor looks at that.
		TLSClientConfig:     &tls.Config{InsecureSkipVerify: true},
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
	}
}
