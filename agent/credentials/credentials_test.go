package credentials_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	grpccredentials "google.golang.org/grpc/credentials"

	"github.com/hamesh/hamesh/agent/credentials"
	"github.com/hamesh/hamesh/cli/pki"
)

func initCA(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := pki.Init(dir, "prod"); err != nil {
		t.Fatal(err)
	}
	return dir
}

func issue(t *testing.T, dir, name string, validity time.Duration) pki.Files {
	t.Helper()
	files, err := pki.Issue(dir, pki.Request{
		Name: name, Role: pki.RoleAgent, Validity: validity, Replace: true,
		Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.11")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func open(t *testing.T, dir string, files pki.Files) *credentials.Credentials {
	t.Helper()
	c, err := credentials.Open(filepath.Join(dir, "ca.crt"), files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// handshake connects client to server, and returns what each learns of the other.
func handshake(t *testing.T, client, server grpccredentials.TransportCredentials, authority string) (seenByClient, seenByServer grpccredentials.TLSInfo, err error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	type result struct {
		info grpccredentials.AuthInfo
		err  error
	}
	served := make(chan result, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			served <- result{nil, err}
			return
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, info, err := server.ServerHandshake(conn)
		_ = conn.Close()
		served <- result{info, err}
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, info, clientErr := client.ClientHandshake(ctx, authority, conn)
	if clientErr != nil {
		_ = conn.Close()
	}
	s := <-served
	if clientErr != nil {
		return seenByClient, seenByServer, clientErr
	}
	if s.err != nil {
		return seenByClient, seenByServer, s.err
	}
	return info.(grpccredentials.TLSInfo), s.info.(grpccredentials.TLSInfo), nil
}

func TestMutual(t *testing.T) {
	dir := initCA(t)
	one, two := open(t, dir, issue(t, dir, "cp-1", 0)), open(t, dir, issue(t, dir, "cp-2", 0))
	client, server, err := handshake(t, two.Client("cp-1"), one.Server(), "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	if got := client.State.PeerCertificates[0].Subject.CommonName; got != "cp-1" {
		t.Errorf("the client sees %q", got)
	}
	if got := server.State.VerifiedChains[0][0].Subject.CommonName; got != "cp-2" {
		t.Errorf("the server sees %q", got)
	}
	//nolint:staticcheck // what grpc takes the authority from
	if got := two.Client("cp-1").Info().ServerName; got != "cp-1" {
		t.Errorf("gRPC would expect %q", got)
	}
	if _, _, err := handshake(t, two.Client("cp-3"), one.Server(), "cp-3"); err == nil || !strings.Contains(err.Error(), "cp-3") {
		t.Errorf("cp-1 was taken for cp-3: %v", err)
	}
	other := initCA(t)
	stranger := open(t, other, issue(t, other, "cp-2", 0))
	if _, _, err := handshake(t, stranger.Client("cp-1"), one.Server(), "cp-1"); err == nil {
		t.Error("another CA's server was believed")
	}
	if _, _, err := handshake(t, two.Client("cp-2"), stranger.Server(), "cp-2"); err == nil {
		t.Error("another CA's server was believed")
	}
}

func TestRenewal(t *testing.T) {
	dir := initCA(t)
	files := issue(t, dir, "cp-1", time.Hour)
	own, peer := open(t, dir, files), open(t, dir, issue(t, dir, "cp-2", 0))
	if left := time.Until(own.Expiry()); left > time.Hour || left < 59*time.Minute {
		t.Errorf("ends in %s", left)
	}
	server, client := own.Server(), peer.Client("cp-1")
	before, _, err := handshake(t, client, server, "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	issue(t, dir, "cp-1", 2*time.Hour)
	after, _, err := handshake(t, client, server, "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	if before.State.PeerCertificates[0].Equal(after.State.PeerCertificates[0]) {
		t.Error("the renewed certificate is not used")
	}
	if left := time.Until(own.Expiry()); left < time.Hour {
		t.Errorf("after renewal ends in %s", left)
	}

	// In the middle of a renewal, key and certificate do not match: the old pair serves on.
	if err := os.Rename(filepath.Join(dir, "cp-2.key"), files.Key); err != nil {
		t.Fatal(err)
	}
	if err := own.Reload(); err == nil || !strings.Contains(err.Error(), "match") {
		t.Errorf("Reload: %v", err)
	}
	if _, _, err := handshake(t, client, server, "cp-1"); err != nil {
		t.Errorf("with half renewed files: %v", err)
	}
}

func TestNewCA(t *testing.T) {
	dir := initCA(t)
	server := open(t, dir, issue(t, dir, "cp-1", 0)).Server()
	next := initCA(t)
	issued := issue(t, next, "cp-2", 0)
	// While the CA changes, every node trusts both.
	var bundle []byte
	for _, ca := range []string{dir, next} {
		pem, err := os.ReadFile(filepath.Join(ca, "ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(bundle, pem...)
	}
	for _, ca := range []string{dir, next} {
		if err := os.WriteFile(filepath.Join(ca, "ca.crt"), bundle, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := handshake(t, open(t, next, issued).Client("cp-1"), server, "cp-1"); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir, other := initCA(t), initCA(t)
	one, two := issue(t, dir, "cp-1", 0), issue(t, dir, "cp-2", 0)
	ca := filepath.Join(dir, "ca.crt")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ ca, cert, key, want string }{
		"CA missing":   {dir + "/none", one.Cert, one.Key, "no such file"},
		"CA empty":     {empty, one.Cert, one.Key, "no certificate in PEM form"},
		"cert missing": {ca, dir + "/none", one.Key, "no such file"},
		"cert empty":   {ca, empty, one.Key, empty},
		"other key":    {ca, one.Cert, two.Key, "match"},
		"other CA":     {filepath.Join(other, "ca.crt"), one.Cert, one.Key, "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := credentials.Open(test.ca, test.cert, test.key); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}
