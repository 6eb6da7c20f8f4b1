//go:build linux

package lab_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestAPIServer(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1})
	trust, err := m.TLS()
	must(t, err)
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(protocol, func(t *testing.T) {
			transport := &http.Transport{
				TLSClientConfig:   trust.Clone(),
				ForceAttemptHTTP2: protocol == "HTTP/2.0",
				DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					return m.Client.Host.DialContext(ctx, &net.Dialer{}, network, address)
				},
			}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: soon}
			base := "https://" + direct(m.Nodes[0]).String()

			ask := func(path string, body []byte) (status int, answer string, trailer http.Header) {
				t.Helper()
				response, err := client.Post(base+path, "", bytes.NewReader(body))
				must(t, err)
				defer response.Body.Close()
				b, err := io.ReadAll(response.Body)
				must(t, err)
				if response.Proto != protocol || response.Header.Get("Server") != "cp-1" {
					t.Errorf("%s by %q over %s", path, response.Header.Get("Server"), response.Proto)
				}
				return response.StatusCode, string(b), response.Trailer
			}
			if _, answer, _ := ask("/version", nil); answer != "cp-1\n" {
				t.Errorf("version %q", answer)
			}
			asked := time.Now()
			if _, answer, _ := ask("/wait?for=50ms", nil); answer != "cp-1\n" || time.Since(asked) < 50*time.Millisecond {
				t.Errorf("wait: %q after %s", answer, time.Since(asked))
			}
			body := bytes.Repeat([]byte("0123456789"), 100_000)
			hash := sha256.Sum256(body)
			if _, answer, trailer := ask("/echo", body); answer != string(body) || trailer.Get("Sha256") != hex.EncodeToString(hash[:]) {
				t.Errorf("echo of %d bytes: %d bytes, trailer %v", len(body), len(answer), trailer)
			}
			if status, _, _ := ask("/readyz", nil); status != http.StatusOK {
				t.Errorf("well: status %d", status)
			}
			api := m.Nodes[0].API
			must(t, api.Sick())
			if status, _, _ := ask("/readyz", nil); status != http.StatusInternalServerError {
				t.Errorf("sick: status %d", status)
			}
			if status, _, _ := ask("/livez", nil); status != http.StatusInternalServerError {
				t.Errorf("sick: /livez has status %d", status)
			}
			must(t, api.Unready())
			if status, answer, _ := ask("/readyz", nil); status != http.StatusInternalServerError || !strings.Contains(answer, "\n[-]informer-sync failed: reason withheld\n") {
				t.Errorf("not ready: status %d, %q", status, answer)
			}
			if status, _, _ := ask("/livez", nil); status != http.StatusOK {
				t.Errorf("not ready: /livez has status %d", status)
			}
			must(t, api.Hang())
			client.Timeout = brief
			if response, err := client.Get(base + "/readyz"); !timedOut(err) {
				t.Errorf("hang: %v, want a time-out", err)
				if err == nil {
					response.Body.Close()
				}
			}
			client.Timeout = soon
			must(t, api.Well())
			if status, _, _ := ask("/readyz", nil); status != http.StatusOK {
				t.Errorf("well again: status %d", status)
			}
		})
	}
}

// A server that is stopped says so, serves on, and ends when it has answered.
func TestAPIServerStops(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, Agentless: true})
	r, err := m.Client.StartOrdinary(lab.Ordinary{Target: direct(m.Nodes[0]), Connections: 4, Delay: 300 * time.Millisecond})
	must(t, err)
	must(t, lab.Await(soon, func() error {
		if spread := lab.Spread(r.Samples()); spread["cp-1"] < 4 {
			return fmt.Errorf("connected: %v", spread)
		}
		return nil
	}))
	began := time.Now()
	must(t, m.Nodes[0].API.Stop(time.Second))
	took := time.Since(began)
	calls, err := r.Stop()
	must(t, err)
	if took < time.Second || took > soon {
		t.Errorf("stopped after %v", took)
	}
	late := 0
	for _, c := range lab.Finished(calls, lab.Kept) {
		if c.Error != "" && c.End.Before(began.Add(time.Second)) {
			t.Errorf("failed %v after the stop: %s", c.End.Sub(began), c.Error)
		}
		if c.Error == "" && c.Start.After(began) {
			late++
		}
	}
	if late == 0 {
		t.Error("it answered nothing that was asked after the stop was ordered")
	}
	must(t, m.Nodes[0].API.Start())
}

// A server tells each client to go away now and then, and so the client comes back by a new
// connection.
func TestAPIServerSendsAway(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, Agentless: true})
	for _, chance := range []float64{0, 0.2} {
		must(t, m.Nodes[0].API.SetGoaway(chance))
		r, err := m.Client.StartOrdinary(lab.Ordinary{Target: direct(m.Nodes[0]), Connections: 2, Delay: time.Millisecond, Every: 5 * time.Millisecond})
		must(t, err)
		time.Sleep(brief * 5)
		connections := map[netip.AddrPort]bool{}
		samples, err := r.Stop()
		must(t, err)
		for _, c := range lab.Finished(samples, lab.Kept) {
			if c.Error != "" {
				t.Errorf("with chance %v: %s", chance, c.Error)
			}
			connections[netip.AddrPortFrom(c.Source, c.Port)] = true
		}
		if many := len(connections) > 2; many != (chance > 0) {
			t.Errorf("with chance %v: %d connections of 2 clients", chance, len(connections))
		}
	}
}

func TestAPIServerRefusesAnonymous(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, Agentless: true})
	must(t, m.Nodes[0].API.RefuseAnonymous())
	files := m.ClientFiles()
	pair, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
	must(t, err)
	for want, certificates := range map[int][]tls.Certificate{http.StatusUnauthorized: nil, http.StatusOK: {pair}} {
		trust, err := m.TLS()
		must(t, err)
		trust.Certificates = certificates
		client := &http.Client{Timeout: soon, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: trust,
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				return m.Client.Host.DialContext(ctx, &net.Dialer{}, network, address)
			},
		}}
		for _, path := range []string{"/readyz", "/livez", "/version"} {
			response, err := client.Get("https://" + direct(m.Nodes[0]).String() + path)
			must(t, err)
			response.Body.Close()
			if response.StatusCode != want {
				t.Errorf("%s with %d certificates: status %d, want %d", path, len(certificates), response.StatusCode, want)
			}
		}
	}
}

func timedOut(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
