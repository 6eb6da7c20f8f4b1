package credentials

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Credentials are a CA bundle, a certificate and its key, in PEM files.
type Credentials struct {
	caFile, certFile, keyFile string

	mu     sync.Mutex
	stamps []fs.FileInfo // of the files when material was read
	material
}

// material is what the files held when they were last found good.
type material struct {
	roots  *x509.CertPool
	pair   tls.Certificate
	expiry time.Time
}

// Open reads the files. It fails where one is missing or holds no PEM, where the key does
// not belong to the certificate, and where the CA has not signed the certificate or the
// certificate is not valid now.
func Open(caFile, certFile, keyFile string) (*Credentials, error) {
	c := &Credentials{caFile: caFile, certFile: certFile, keyFile: keyFile}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again if they have changed. Where they are bad, as they are in
// the middle of a renewal, it returns why and keeps what was read before. Handshakes call
// it by themselves; other callers learn of files that went bad.
func (c *Credentials) Reload() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var stamps []fs.FileInfo
	for _, file := range []string{c.caFile, c.certFile, c.keyFile} {
		stamp, err := os.Stat(file)
		if err != nil {
			return fmt.Errorf("reading TLS files: %w", err)
		}
		stamps = append(stamps, stamp)
	}
	if slices.EqualFunc(stamps, c.stamps, sameFile) {
		return nil
	}
	material, err := read(c.caFile, c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	c.stamps, c.material = stamps, material
	return nil
}

func sameFile(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

func read(caFile, certFile, keyFile string) (material, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return material{}, fmt.Errorf("reading the CA certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return material{}, fmt.Errorf("reading the CA certificate: %s holds no certificate in PEM form", caFile)
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return material{}, fmt.Errorf("reading certificate %s with key %s: %w", certFile, keyFile, err)
	}
	intermediates := x509.NewCertPool()
	for _, der := range pair.Certificate[1:] {
		intermediate, err := x509.ParseCertificate(der)
		if err != nil {
			return material{}, fmt.Errorf("reading certificate %s: %w", certFile, err)
		}
		intermediates.AddCert(intermediate)
	}
	_, err = pair.Leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return material{}, fmt.Errorf("checking certificate %s against CA %s: %w", certFile, caFile, err)
	}
	return material{roots: roots, pair: pair, expiry: pair.Leaf.NotAfter}, nil
}

// current returns the newest good material.
func (c *Credentials) current() material {
	// Bad files are no reason to stop talking while the old certificate is good; where it
	// is not, the handshake itself says so.
	_ = c.Reload()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.material
}

// Expiry returns when the certificate in use ends.
func (c *Credentials) Expiry() time.Time { return c.current().expiry }

// Server returns credentials for a gRPC server, which demands that callers show a
// certificate of the CA.
func (c *Credentials) Server() credentials.TransportCredentials { return transport{c, ""} }

// Client returns credentials for a gRPC client. The called server's certificate must be
// the CA's and carry serverName, a member's name or address.
func (c *Credentials) Client(serverName string) credentials.TransportCredentials {
	return transport{c, serverName}
}

// transport makes each handshake with the newest material.
type transport struct {
	*Credentials
	serverName string
}

// ClientHandshake expects the server to be authority, which gRPC takes from Info.
func (t transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	m := t.current()
	return credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      m.roots,
		Certificates: []tls.Certificate{m.pair},
	}).ClientHandshake(ctx, authority, conn)
}

func (t transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	m := t.current()
	return credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		ClientCAs:    m.roots,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		Certificates: []tls.Certificate{m.pair},
	}).ServerHandshake(conn)
}

func (t transport) Info() credentials.ProtocolInfo {
	//nolint:staticcheck // deprecated for callers; grpc still takes the authority from it
	return credentials.ProtocolInfo{SecurityProtocol: "tls", ServerName: t.serverName}
}

func (t transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName is part of the interface, and deprecated there.
func (t transport) OverrideServerName(string) error {
	return errors.New("the server's name is given to Client")
}
