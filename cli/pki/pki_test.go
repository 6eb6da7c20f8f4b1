package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/pemutil"
)

func mustInit(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	if _, err := Init(dir, "prod"); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestInit(t *testing.T) {
	dir := mustInit(t)
	ca, err := pemutil.ReadCertificate(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if !ca.IsCA || !ca.MaxPathLenZero || ca.CheckSignatureFrom(ca) != nil {
		t.Errorf("not a self-signed CA without intermediates: %+v", ca)
	}
	if years := time.Until(ca.NotAfter).Hours() / 24 / 365; years < 9.9 || years > 10.1 {
		t.Errorf("good for %.1f years, want 10", years)
	}
	before, _ := os.ReadFile(filepath.Join(dir, "ca.key"))
	if _, err := Init(dir, "prod"); !errors.Is(err, ErrExists) {
		t.Errorf("second Init: %v, want ErrExists", err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, "ca.key")); string(before) != string(after) {
		t.Error("second Init changed the CA key")
	}
}

func TestIssue(t *testing.T) {
	dir := mustInit(t)
	for _, test := range []struct {
		request Request
		cn, uri string
		usages  []x509.ExtKeyUsage
		dns     []string
		ips     []string
	}{{
		request: Request{Name: "cp-1", Role: RoleAgent, Addresses: []netip.Addr{
			netip.MustParseAddr("10.77.0.11"), netip.MustParseAddr("fd77::11")}},
		cn:     "cp-1",
		uri:    "spiffe://prod/agent/cp-1",
		usages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		dns:    []string{"cp-1", "localhost"},
		ips:    []string{"127.0.0.1", "::1", "10.77.0.11", "fd77::11"},
	}, {
		request: Request{Name: "alice", Role: RoleOperator},
		cn:      "operator:alice",
		uri:     "spiffe://prod/operator/alice",
		usages:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, {
		request: Request{Name: "grafana", Role: RoleViewer, Validity: 24 * time.Hour},
		cn:      "viewer:grafana",
		uri:     "spiffe://prod/viewer/grafana",
		usages:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}} {
		t.Run(test.request.Name, func(t *testing.T) {
			files, err := Issue(dir, test.request)
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
			if err != nil {
				t.Fatal(err)
			}
			cert := pair.Leaf
			var ips []string
			for _, ip := range cert.IPAddresses {
				ips = append(ips, ip.String())
			}
			if cert.Subject.CommonName != test.cn || len(cert.URIs) != 1 || cert.URIs[0].String() != test.uri {
				t.Errorf("CN %q, URIs %v", cert.Subject.CommonName, cert.URIs)
			}
			if !slices.Equal(cert.ExtKeyUsage, test.usages) || !slices.Equal(cert.DNSNames, test.dns) || !slices.Equal(ips, test.ips) {
				t.Errorf("usages %v, names %v, addresses %v", cert.ExtKeyUsage, cert.DNSNames, ips)
			}
			want := test.request.Validity
			if want == 0 {
				want = DefaultValidity
			}
			if got := time.Until(cert.NotAfter); got > want || got < want-time.Minute {
				t.Errorf("good for %s, want %s", got, want)
			}
			if info, err := os.Stat(files.Key); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("key: %v, %v", info.Mode(), err)
			}
		})
	}
}

func TestIssueReplaces(t *testing.T) {
	dir := mustInit(t)
	request := Request{Name: "alice", Role: RoleOperator}
	files, err := Issue(dir, request)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(files.Cert)
	if _, err := Issue(dir, request); !errors.Is(err, ErrExists) {
		t.Errorf("second Issue: %v, want ErrExists", err)
	}
	request.Replace = true
	if _, err := Issue(dir, request); err != nil {
		t.Error(err)
	}
	if after, _ := os.ReadFile(files.Cert); string(before) == string(after) {
		t.Error("not replaced")
	}
}

func TestRefusals(t *testing.T) {
	dir := mustInit(t)
	address := []netip.Addr{netip.MustParseAddr("10.77.0.11")}
	for name, test := range map[string]struct {
		request Request
		want    string
	}{
		"path":            {Request{Name: "../x", Role: RoleViewer}, "lower-case"},
		"empty":           {Request{Role: RoleViewer}, "lower-case"},
		"the CA":          {Request{Name: "ca", Role: RoleViewer}, "the CA's own"},
		"no role":         {Request{Name: "x"}, "invalid role"},
		"no address":      {Request{Name: "x", Role: RoleAgent}, "needs the address"},
		"address":         {Request{Name: "x", Role: RoleViewer, Addresses: address}, "serves nothing"},
		"negative":        {Request{Name: "x", Role: RoleViewer, Validity: -time.Hour}, "shorter than a minute"},
		"outlives the CA": {Request{Name: "x", Role: RoleViewer, Validity: 2 * caValidity}, "end after its CA"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Issue(dir, test.request); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	if _, err := Issue(t.TempDir(), Request{Name: "x", Role: RoleViewer}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
	if _, err := Init(t.TempDir(), "Prod/1"); err == nil {
		t.Error("a mesh name that is no host was taken")
	}
}
