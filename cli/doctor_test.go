package cli

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/hamesh/hamesh/cli/pki"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// sound is a mesh in which nothing is wrong, with everything that is reached on loopback.
func sound(api *apiServer) *hameshv1.GetStatusResponse {
	s := healthy()
	s.Nodes[2].Role, s.Nodes[2].Eligible = hameshv1.Role_ROLE_CANDIDATE, true
	for i, n := range s.Nodes {
		n.Address = fmt.Sprint("127.0.0.", i+2)
		n.Boot, n.ConfigDigests = uint64(i+1), []string{"m", "v", "p", "t", "s", "a"}
	}
	s.Vips[0].Address, s.Vips[0].Interface = "127.0.0.1", "eth0"
	s.Proxies = []*hameshv1.Proxy{{Name: "kube-api", Port: uint32(api.port())}}
	for _, b := range s.Backends {
		b.Address = fmt.Sprint("127.0.0.1:", api.port())
	}
	s.Problems = nil
	return s
}

// insecurely says that there are no certificates to be looked at.
func insecurely(s *hameshv1.GetStatusResponse) *hameshv1.GetStatusResponse {
	s.Problems = append(s.Problems, &hameshv1.Problem{Code: "TLS_INSECURE", Message: "members do not authenticate each other", Fix: "hactl pki init and issue"})
	return s
}

func codesOf(findings []finding) (codes []string) {
	for _, f := range findings {
		codes = append(codes, f.Code)
	}
	return codes
}

// complete fails where a finding does not say all that it has to.
func complete(t *testing.T, findings []finding) {
	t.Helper()
	for _, f := range findings {
		if f.Code == "" || f.Found == "" || f.Why == "" || f.Fix == "" {
			t.Errorf("incomplete: %+v", f)
		}
	}
}

func TestDoctorCommand(t *testing.T) {
	api := newAPIServer(t)
	sick := sound(api)
	sick.State, sick.Problems = hameshv1.State_STATE_DEGRADED, degraded().GetProblems()
	for _, output := range outputs {
		for name, test := range map[string]struct {
			status *hameshv1.GetStatusResponse
			exit   int
		}{
			"well": {sound(api), exitDone},
			"sick": {sick, exitDegraded},
		} {
			t.Run(name+"/"+output, func(t *testing.T) {
				exit, out, errs := hactl(t.Context(), "doctor", "-o", output, "--endpoint", serve(t, &agent{states: []*hameshv1.GetStatusResponse{test.status}}))
				if exit != test.exit || errs != "" {
					t.Errorf("exit %d, want %d: %s\n%s", exit, test.exit, errs, out)
				}
				if output == "table" {
					golden(t, "doctor-command-"+name, out)
				}
			})
		}
	}
	if exit, _, _ := hactl(t.Context(), "doctor", "--endpoint", "unix:///nonexistent/s"); exit != exitUnreachable {
		t.Errorf("exit %d", exit)
	}
}

func TestDoctorOfTheMesh(t *testing.T) {
	api := newAPIServer(t)
	for name, test := range map[string]struct {
		change func(*hameshv1.GetStatusResponse)
		want   []string
	}{
		"nothing":            {func(*hameshv1.GetStatusResponse) {}, nil},
		"problems":           {func(s *hameshv1.GetStatusResponse) { insecurely(s) }, []string{"TLS_INSECURE"}},
		"versions":           {func(s *hameshv1.GetStatusResponse) { s.Nodes[1].Version = "v0.2.0" }, []string{"VERSIONS_DIFFER"}},
		"an unknown version": {func(s *hameshv1.GetStatusResponse) { s.Nodes[1].Version, s.Nodes[1].ConfigDigests = "", nil }, nil},
		"timing": {func(s *hameshv1.GetStatusResponse) { s.Nodes[1].ConfigDigests = []string{"m", "v", "p", "x", "s", "a"} },
			[]string{"CONFIGURATIONS_DIFFER"}},
		"timing, told by the mesh": {func(s *hameshv1.GetStatusResponse) {
			s.Nodes[1].ConfigDigests = []string{"m", "v", "p", "x", "s", "a"}
			s.Problems = append(s.Problems, &hameshv1.Problem{Code: "CONFIGURATIONS_DIFFER", Message: "timing.holdWindow: 300ms on cp-1, 200ms on cp-2", Fix: "mend it"})
		}, []string{"CONFIGURATIONS_DIFFER"}},
		"of another version": {func(s *hameshv1.GetStatusResponse) {
			s.Nodes[1].Version, s.Nodes[1].ConfigDigests = "v0.2.0", []string{"m", "v", "p", "x", "s", "a"}
		}, []string{"VERSIONS_DIFFER"}},
		"two members":   {func(s *hameshv1.GetStatusResponse) { s.Nodes = s.Nodes[:2] }, []string{"TWO_MEMBERS"}},
		"four members":  {func(s *hameshv1.GetStatusResponse) { s.Nodes = append(s.Nodes, s.Nodes[0]) }, []string{"EVEN_MEMBERS"}},
		"external, two": {func(s *hameshv1.GetStatusResponse) { s.Nodes, s.Store.Kind = s.Nodes[:2], "external" }, nil},
		"one candidate": {func(s *hameshv1.GetStatusResponse) {
			s.Nodes[1].Role, s.Nodes[2].Role = hameshv1.Role_ROLE_WITNESS, hameshv1.Role_ROLE_WITNESS
		}, []string{"ONE_CANDIDATE"}},
		"one backend":     {func(s *hameshv1.GetStatusResponse) { s.Backends = s.Backends[:1] }, []string{"ONE_BACKEND"}},
		"no such backend": {func(s *hameshv1.GetStatusResponse) { s.Proxies = nil }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := sound(api)
			test.change(s)
			var all []finding
			for _, c := range (&doctor{status: s}).meshChecks() {
				found, err := c.look(t.Context())
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
				all = append(all, found...)
			}
			complete(t, all)
			if got := codesOf(all); !slices.Equal(got, test.want) {
				t.Errorf("found %v, want %v", got, test.want)
			}
		})
	}
	s := sound(api)
	s.Nodes[1].ConfigDigests[3], s.Nodes[1].ConfigDigests[5] = "x", "x"
	found, _ := (&doctor{status: s}).configurations(t.Context())
	if len(found) != 1 || !strings.Contains(found[0].Found, "cp-2 and cp-1 differ in: timing, api and tls") {
		t.Errorf("%+v", found)
	}
	s.Nodes[2].Boot = 0
	if _, err := (&doctor{status: s}).versions(t.Context()); err == nil || !strings.Contains(err.Error(), "cp-3") {
		t.Errorf("a member that was not heard: %v", err)
	}
}

// examineReach makes the checks of what can be reached.
func examineReach(t *testing.T, d *doctor) (all []finding, incomplete []string) {
	t.Helper()
	for _, c := range d.reachChecks() {
		found, err := c.look(t.Context())
		all = append(all, found...)
		if err != nil {
			incomplete = append(incomplete, c.name)
		}
	}
	complete(t, all)
	return all, incomplete
}

func TestDoctorReaches(t *testing.T) {
	api := newAPIServer(t)
	ahead := newAPIServer(t)
	ahead.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(time.Minute).UTC().Format(http.TimeFormat))
	})
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deaf := uint32(closed.Addr().(*net.TCPAddr).Port)
	closed.Close()
	well := func() time.Time { return now }
	for name, test := range map[string]struct {
		change     func(*hameshv1.GetStatusResponse)
		self       string
		at         func() time.Time
		want       []string
		incomplete []string
	}{
		"nothing":    {func(*hameshv1.GetStatusResponse) {}, "", well, nil, []string{"ports"}},
		"a dead VIP": {func(s *hameshv1.GetStatusResponse) { s.Proxies[0].Port = deaf }, "", well, []string{"VIP_UNREACHABLE"}, []string{"ports"}},
		"a VIP that nobody has": {func(s *hameshv1.GetStatusResponse) { s.Proxies[0].Port, s.Vips[0].Holders = deaf, nil },
			"", well, nil, []string{"ports"}},
		"a VIP that the certificate lacks": {func(s *hameshv1.GetStatusResponse) {
			s.Vips[0].Address, s.Vips[0].Holders, s.Backends = "10.77.0.100", nil, s.Backends[:1]
		},
			"", well, []string{"CERTIFICATE_LACKS_VIP"}, []string{"ports"}},
		"another proxy's certificate": {func(s *hameshv1.GetStatusResponse) {
			s.Proxies = append(s.Proxies, &hameshv1.Proxy{Name: "konnectivity", Port: s.Proxies[0].Port})
			s.Vips[0].Address, s.Vips[0].Holders = "10.77.0.100", nil
			for _, b := range s.Backends {
				b.Proxy = "konnectivity"
			}
		}, "", well, nil, []string{"ports"}},
		"certificates that end": {func(s *hameshv1.GetStatusResponse) { s.Backends = s.Backends[:2] }, "",
			func() time.Time { return api.Certificate().NotAfter.Add(-time.Hour) }, []string{"CERTIFICATE_ENDS", "CERTIFICATE_ENDS"}, []string{"ports"}},
		"a clock": {func(s *hameshv1.GetStatusResponse) { s.Backends[1].Address = fmt.Sprint("127.0.0.1:", ahead.port()) }, "", well,
			[]string{"CLOCKS_DIFFER"}, []string{"ports"}},
		"an API server that is down": {func(s *hameshv1.GetStatusResponse) { s.Backends[1].Address = fmt.Sprint("127.0.0.1:", deaf) }, "", well,
			nil, []string{"ports", "api-certificates", "clocks"}},
		"ports": {func(s *hameshv1.GetStatusResponse) {
			s.ApiPort, s.Store.PeerPort = uint32(api.port()), deaf
			for _, n := range s.Nodes {
				n.Address = "127.0.0.1"
			}
		}, "cp-1", well, []string{"PORT_UNREACHABLE", "PORT_UNREACHABLE"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := insecurely(sound(api))
			test.change(s)
			d := &doctor{command: &command{now: test.at}, status: s, self: test.self}
			found, incomplete := examineReach(t, d)
			if got := codesOf(found); !slices.Equal(got, test.want) || !slices.Equal(incomplete, test.incomplete) {
				t.Errorf("found %v, want %v; incomplete %v, want %v\n%+v", got, test.want, incomplete, test.incomplete, found)
			}
		})
	}
}

// What was not found out because the time is over is no finding.
func TestDoctorOutOfTime(t *testing.T) {
	s := insecurely(sound(newAPIServer(t)))
	s.ApiPort = s.Proxies[0].Port
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d := &doctor{command: &command{now: func() time.Time { return now }}, status: s, self: "cp-1"}
	for _, c := range d.reachChecks() {
		found, err := c.look(ctx)
		if len(found) > 0 || (err == nil) != (c.name == "mesh-certificates") {
			t.Errorf("%s: %+v, %v", c.name, found, err)
		}
	}
}

// The certificates of the mesh are looked at without one of one's own.
func TestDoctorOfMeshCertificates(t *testing.T) {
	api, dir := newAPIServer(t), t.TempDir()
	if _, err := pki.Init(dir, "prod"); err != nil {
		t.Fatal(err)
	}
	issue := func(t *testing.T, name string, role pki.Role, validity time.Duration) pki.Files {
		t.Helper()
		r := pki.Request{Name: name, Role: role, Validity: validity}
		if role == pki.RoleAgent {
			r.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		files, err := pki.Issue(dir, r)
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	for name, test := range map[string]struct {
		agent, own time.Duration
		want       []string
	}{
		"well":       {300 * 24 * time.Hour, 300 * 24 * time.Hour, nil},
		"the agents": {10 * 24 * time.Hour, 300 * 24 * time.Hour, []string{"CERTIFICATE_ENDS"}},
		"hactl":      {300 * 24 * time.Hour, 10 * 24 * time.Hour, []string{"CERTIFICATE_ENDS"}},
	} {
		t.Run(name, func(t *testing.T) {
			files := issue(t, strings.ReplaceAll("cp-"+name, " ", "-"), pki.RoleAgent, test.agent)
			pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
			if err != nil {
				t.Fatal(err)
			}
			listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13})
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				for {
					c, err := listener.Accept()
					if err != nil {
						return
					}
					go func() { _ = c.(*tls.Conn).Handshake(); c.Close() }()
				}
			}()
			s := sound(api)
			s.ApiPort = uint32(listener.Addr().(*net.TCPAddr).Port)
			s.Nodes = s.Nodes[:1]
			s.Nodes[0].Address = "127.0.0.1"
			own := issue(t, strings.ReplaceAll("op-"+name, " ", "-"), pki.RoleOperator, test.own)
			d := &doctor{command: &command{now: time.Now, cert: own.Cert}, status: s}
			found, err := d.meshCertificates(t.Context())
			if got := codesOf(found); err != nil || !slices.Equal(got, test.want) {
				t.Errorf("found %v, want %v, %v", got, test.want, err)
			}
			complete(t, found)
			d.cert = filepath.Join(dir, "none")
			if _, err := d.meshCertificates(t.Context()); err == nil {
				t.Error("a certificate that is not there was read")
			}
		})
	}
}

func TestDoctorReport(t *testing.T) {
	s := degraded()
	s.Nodes = s.Nodes[:2]
	d := &doctor{command: &command{now: func() time.Time { return now }}, status: s, self: "cp-1", root: fstest.MapFS{}}
	report := d.report(t.Context(), append(d.meshChecks(), d.hostChecks()...))
	for _, output := range outputs {
		var out strings.Builder
		c := &command{out: &out, output: output}
		if done, err := c.plain(report); err != nil {
			t.Fatal(err)
		} else if !done {
			out.WriteString(view{now: now, wide: output == "wide"}.doctor(report))
		}
		if output == "json" && !json.Valid([]byte(out.String())) {
			t.Error("no JSON")
		}
		golden(t, "doctor-"+output, out.String())
	}
}
