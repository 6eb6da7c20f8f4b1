//go:build linux

package lab_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
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

func timedOut(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
