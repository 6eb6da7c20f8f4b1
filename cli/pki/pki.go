package pki

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/google/renameio/v2"
	"go.step.sm/crypto/keyutil"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"
)

const (
	caName     = "ca"
	caValidity = 10 * 365 * 24 * time.Hour
	// backdate allows for nodes whose clocks run behind.
	backdate = time.Hour
)

// DefaultValidity is how long an issued certificate is good.
const DefaultValidity = 365 * 24 * time.Hour

// ErrExists says that a file is there already and was not asked to be replaced.
var ErrExists = errors.New("the file exists already")

// ErrInvalid says that what was asked for makes no sense.
var ErrInvalid = errors.New("invalid request")

// Role is what the bearer of a certificate may do.
type Role int

// The zero Role is invalid.
const (
	_ Role = iota
	// RoleAgent is a member of the mesh.
	RoleAgent
	// RoleOperator sees and changes the mesh.
	RoleOperator
	// RoleViewer only sees it.
	RoleViewer
)

// ParseRole reads "agent", "operator" or "viewer".
func ParseRole(s string) (Role, error) {
	for _, role := range []Role{RoleAgent, RoleOperator, RoleViewer} {
		if s == role.String() {
			return role, nil
		}
	}
	return 0, fmt.Errorf("role %q is none of agent, operator, viewer", s)
}

// String returns what [ParseRole] reads.
func (r Role) String() string {
	switch r {
	case RoleAgent:
		return "agent"
	case RoleOperator:
		return "operator"
	case RoleViewer:
		return "viewer"
	}
	return fmt.Sprintf("Role(%d)", int(r))
}

// Files are the paths of a certificate and its key.
type Files struct{ Cert, Key string }

func filesOf(dir, name string) Files {
	return Files{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
}

// A name becomes part of a URI, a DNS name and a file name.
var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

func checkName(what, name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%s %q is not 1 to 63 lower-case letters, digits, dots and dashes with a letter or digit at both ends", what, name)
	}
	return nil
}

// Init makes the CA of mesh in dir: ca.crt and ca.key, good for ten years. dir is made
// where it is missing. It fails with [ErrExists] where there is a CA already, and with
// [ErrInvalid] where mesh cannot be the name of one.
func Init(dir, mesh string) (Files, error) {
	if err := checkName("mesh", mesh); err != nil {
		return Files{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	files := filesOf(dir, caName)
	if err := checkFree(files); err != nil {
		return Files{}, err
	}
	key, err := newKey()
	if err != nil {
		return Files{}, err
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: mesh + " hamesh CA"},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: mesh}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caValidity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := x509util.CreateCertificate(template, template, key.Public(), key)
	if err != nil {
		return Files{}, fmt.Errorf("making the CA certificate: %w", err)
	}
	return files, write(files, cert, key)
}

// Request says what certificate to issue.
type Request struct {
	Name string
	Role Role
	// Addresses are where peers and hactl reach an agent: one at least. Other roles have
	// none, since they serve nothing.
	Addresses []netip.Addr
	// Validity is how long the certificate is good from now on, and must end before the
	// CA's; 0: DefaultValidity.
	Validity time.Duration
	// Replace allows to replace the files of the same name: a renewal.
	Replace bool
}

// Issue makes a certificate of the CA in dir, with a new key: NAME.crt and NAME.key, the
// key readable by its owner alone. It fails with [ErrExists] where the files are there and
// are not to be replaced, and with [ErrInvalid] where the request contradicts itself.
func Issue(dir string, request Request) (Files, error) {
	if request.Validity == 0 {
		request.Validity = DefaultValidity
	}
	if err := request.check(); err != nil {
		return Files{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	files := filesOf(dir, request.Name)
	if !request.Replace {
		if err := checkFree(files); err != nil {
			return Files{}, err
		}
	}
	ca, caKey, mesh, err := openCA(dir)
	if err != nil {
		return Files{}, err
	}
	template := request.template(mesh)
	if template.NotAfter.After(ca.NotAfter) {
		return Files{}, fmt.Errorf("the certificate would end after its CA, which ends %s: ask for a shorter validity, or make a new CA",
			ca.NotAfter.Format(time.RFC3339))
	}
	key, err := newKey()
	if err != nil {
		return Files{}, err
	}
	cert, err := x509util.CreateCertificate(template, ca, key.Public(), caKey)
	if err != nil {
		return Files{}, fmt.Errorf("making the certificate of %s: %w", request.Name, err)
	}
	return files, write(files, cert, key)
}

func (r Request) check() error {
	if err := checkName("name", r.Name); err != nil {
		return err
	}
	switch {
	case r.Name == caName:
		return fmt.Errorf("name %q is the CA's own", caName)
	case r.Role != RoleAgent && r.Role != RoleOperator && r.Role != RoleViewer:
		return fmt.Errorf("invalid role %s", r.Role)
	case r.Role == RoleAgent && len(r.Addresses) == 0:
		return fmt.Errorf("an agent needs the address at which peers reach it")
	case r.Role != RoleAgent && len(r.Addresses) > 0:
		return fmt.Errorf("role %s has no addresses: it serves nothing", r.Role)
	case r.Validity < time.Minute:
		return fmt.Errorf("validity %s is shorter than a minute", r.Validity)
	}
	return nil
}

func (r Request) template(mesh string) *x509.Certificate {
	now := time.Now()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: r.Role.String() + ":" + r.Name},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: mesh, Path: "/" + r.Role.String() + "/" + r.Name}},
		NotBefore:   now.Add(-backdate),
		NotAfter:    now.Add(r.Validity),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if r.Role != RoleAgent {
		return template
	}
	// The embedded etcd lets in the members by their common names: no operator may have
	// a member's.
	template.Subject.CommonName = r.Name
	template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	template.DNSNames = []string{r.Name, "localhost"}
	template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, address := range r.Addresses {
		template.IPAddresses = append(template.IPAddresses, address.Unmap().AsSlice())
	}
	return template
}

// openCA reads the CA in dir, and the mesh it is for.
func openCA(dir string) (*x509.Certificate, crypto.Signer, string, error) {
	files := filesOf(dir, caName)
	cert, err := pemutil.ReadCertificate(files.Cert)
	if err != nil {
		return nil, nil, "", fmt.Errorf("reading the CA certificate: %w", err)
	}
	read, err := pemutil.Read(files.Key)
	if err != nil {
		return nil, nil, "", fmt.Errorf("reading the CA key: %w", err)
	}
	key, ok := read.(crypto.Signer)
	if !ok {
		return nil, nil, "", fmt.Errorf("reading the CA key: %s holds no private key", files.Key)
	}
	if !cert.IsCA || len(cert.URIs) != 1 || cert.URIs[0].Scheme != "spiffe" {
		return nil, nil, "", fmt.Errorf("reading the CA certificate: %s is not the CA of a mesh", files.Cert)
	}
	return cert, key, cert.URIs[0].Host, nil
}

func newKey() (crypto.Signer, error) {
	key, err := keyutil.GenerateSigner("EC", "P-256", 0)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return key, nil
}

func checkFree(files Files) error {
	for _, file := range []string{files.Cert, files.Key} {
		if _, err := os.Lstat(file); err == nil {
			return fmt.Errorf("%s: %w", file, ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("looking for %s: %w", file, err)
		}
	}
	return nil
}

func write(files Files, cert *x509.Certificate, key crypto.Signer) error {
	keyBlock, err := pemutil.Serialize(key, pemutil.WithPKCS8(true))
	if err != nil {
		return fmt.Errorf("encoding the key: %w", err)
	}
	certBlock, err := pemutil.Serialize(cert)
	if err != nil {
		return fmt.Errorf("encoding the certificate: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(files.Cert), 0o700); err != nil {
		return fmt.Errorf("making the directory: %w", err)
	}
	if err := renameio.WriteFile(files.Key, pem.EncodeToMemory(keyBlock), 0o600); err != nil {
		return fmt.Errorf("writing the key: %w", err)
	}
	if err := renameio.WriteFile(files.Cert, pem.EncodeToMemory(certBlock), 0o644); err != nil {
		return fmt.Errorf("writing the certificate: %w", err)
	}
	return nil
}
