//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Kept says what clients do that keep their HTTP/2 connection for as long as it lasts, as
// client-go does. They have no time-out.
type Kept struct {
	Target  netip.AddrPort // the VIP, or a node's API server itself
	Clients int            // each from another address of the client's: 1 to their number
	Path    string         // of each request, a POST, which is not sent again where its fate is unknown
	Every   time.Duration  // from one request of a client to its next one; 0: as soon as it is answered
}

// Call is one request and what came of it.
type Call struct {
	Client     int
	Start, End time.Time
	Server     string         // who answered; empty: nobody
	Local      netip.AddrPort // the client's end of the connection; the zero value: it got none
	Err        error
}

// Keeping is such clients at work.
type Keeping struct {
	cancel context.CancelFunc // stops new requests
	abort  context.CancelFunc // and those under way
	work   sync.WaitGroup

	mu    sync.Mutex
	calls []Call
	last  []string // who answered each client last; empty: it lost the connection since
}

// Keep starts clients that keep their connections; they go on until Keeping.Stop.
func (c *Client) Keep(k Kept) (*Keeping, error) {
	if k.Clients < 1 || k.Clients > len(c.Sources) {
		return nil, fmt.Errorf("keep connections: %d clients, and there are %d addresses", k.Clients, len(c.Sources))
	}
	trust, err := trustedTLS(c.certificate)
	if err != nil {
		return nil, err
	}
	enough, cancel := context.WithCancel(context.Background())
	ctx, abort := context.WithCancel(context.Background())
	r := &Keeping{cancel: cancel, abort: abort, last: make([]string, k.Clients)}
	for i := range k.Clients {
		from := &net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.Sources[i], 0))}
		transport := &http.Transport{TLSClientConfig: trust.Clone(), ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				return c.Host.DialContext(ctx, from, network, address)
			},
		}
		r.work.Go(func() {
			defer transport.CloseIdleConnections()
			for next := time.Now().Add(k.Every * time.Duration(i) / time.Duration(k.Clients)); ; next = next.Add(k.Every) {
				select {
				case <-enough.Done():
					return
				case <-time.After(time.Until(next)):
				}
				if enough.Err() != nil {
					return
				}
				r.note(call(ctx, &http.Client{Transport: transport}, i, "https://"+k.Target.String()+k.Path))
			}
		})
	}
	return r, nil
}

// call makes one request.
func call(ctx context.Context, client *http.Client, number int, url string) (c Call) {
	c = Call{Client: number, Start: time.Now()}
	defer func() { c.End = time.Now() }()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		c.Local, _ = netip.ParseAddrPort(got.Conn.LocalAddr().String())
	}})
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader("{}"))
	if err != nil {
		c.Err = err
		return c
	}
	response, err := client.Do(request)
	if err != nil {
		c.Err = err
		return c
	}
	defer response.Body.Close()
	if _, c.Err = io.Copy(io.Discard, response.Body); c.Err != nil {
		return c
	}
	c.Server = response.Header.Get("Server")
	switch {
	case response.StatusCode != http.StatusOK:
		c.Err = errors.New(response.Status)
	case response.ProtoMajor != 2:
		c.Err = fmt.Errorf("the answer came by %s", response.Proto)
	}
	return c
}

func (r *Keeping) note(c Call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
	r.last[c.Client] = c.Server
}

// Spread returns how many clients each server has answered last.
func (r *Keeping) Spread() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	spread := map[string]int{}
	for _, server := range r.last {
		if server != "" {
			spread[server]++
		}
	}
	return spread
}

// Count returns how many requests have ended.
func (r *Keeping) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.calls)
}

// Stop makes no more requests, waits for those under way, which are given up after a while,
// and returns all of them.
func (r *Keeping) Stop() []Call {
	r.cancel()
	defer r.abort()
	defer time.AfterFunc(patience, r.abort).Stop()
	r.work.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls
}
