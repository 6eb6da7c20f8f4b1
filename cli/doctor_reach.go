package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// expiresSoon is how long before its end a certificate is reported: long enough for
	// whoever has to ask somebody.
	expiresSoon = 30 * 24 * time.Hour
	// clocksApart is how far two clocks may differ. What is measured is a second off at
	// most (RFC 9110, section 5.6.7: Date has no fractions).
	clocksApart = 3 * time.Second
)

// reachChecks are of what can be reached from here.
func (d *doctor) reachChecks() []check {
	var once sync.Once
	var answers []answer
	var err error
	ask := func(ctx context.Context) { once.Do(func() { answers, err = d.askBackends(ctx) }) }
	return []check{
		{"vips", d.vips},
		{"ports", d.ports},
		{"api-certificates", func(ctx context.Context) ([]finding, error) {
			ask(ctx)
			return d.apiCertificates(answers), err
		}},
		{"clocks", func(ctx context.Context) ([]finding, error) {
			ask(ctx)
			return d.clocks(answers), err
		}},
		{"mesh-certificates", d.meshCertificates},
	}
}

var errNoPort = errors.New("the agent that answers is older and does not tell its port")

// each calls f for all at the same time.
func each[T any](all []T, f func(T) error) error {
	var work sync.WaitGroup
	errs := make([]error, len(all))
	for i, one := range all {
		work.Go(func() { errs[i] = f(one) })
	}
	work.Wait()
	return errors.Join(errs...)
}

// reach connects, and closes the connection. It returns why that cannot be done, or why it
// was not found out: ctx has ended.
func reach(ctx context.Context, host string, port uint32) (cannot, err error) {
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	to := net.JoinHostPort(host, fmt.Sprint(port))
	conn, cannot := (&net.Dialer{}).DialContext(limited, "tcp", to)
	switch {
	case cannot == nil:
		_ = conn.Close() // nothing was sent
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w", to, ctx.Err())
	}
	return cannot, nil
}

// vips connects to every VIP that somebody has, at the proxies' ports.
func (d *doctor) vips(ctx context.Context) (all []finding, err error) {
	var mu sync.Mutex
	err = each(d.entries(), func(e entry) error {
		if len(e.vip.GetHolders()) == 0 {
			return nil // the mesh says so itself
		}
		cannot, err := reach(ctx, e.vip.GetAddress(), e.proxy.GetPort())
		if cannot != nil {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, finding{
				Code: "VIP_UNREACHABLE", Found: fmt.Sprintf("%s has %s, but port %d of it cannot be reached from here: %v", e.vip.GetOwner(), e.vip.GetAddress(), e.proxy.GetPort(), cannot),
				Why: "clients in the same place get no answer either",
				Fix: "let that port in on every node's firewall; where nothing answers at all, see that the address belongs to this segment (ip neigh)",
			})
		}
		return err
	})
	return all, err
}

// entry is a way to the API servers.
type entry struct {
	vip   *hameshv1.Vip
	proxy *hameshv1.Proxy
}

// entries are all ways that clients may be meant to go: a VIP leads to the proxy of its
// name, or where there is none, to any.
func (d *doctor) entries() (all []entry) {
	for _, v := range d.status.GetVips() {
		named := slices.ContainsFunc(d.status.GetProxies(), func(p *hameshv1.Proxy) bool { return p.GetName() == v.GetName() })
		for _, p := range d.status.GetProxies() {
			if !named || p.GetName() == v.GetName() {
				all = append(all, entry{v, p})
			}
		}
	}
	return all
}

// ports connects from this member to every other one.
func (d *doctor) ports(ctx context.Context) (all []finding, err error) {
	if d.self == "" {
		return nil, errors.New("only members have to reach each other's ports: run it on one")
	}
	if d.status.GetApiPort() == 0 {
		return nil, errNoPort
	}
	type port struct {
		node *hameshv1.Node
		port uint32
		of   string
	}
	var ports []port
	for _, n := range d.status.GetNodes() {
		if n.GetName() == d.self {
			continue
		}
		ports = append(ports, port{n, d.status.GetApiPort(), "the agents"})
		if p := d.status.GetStore().GetPeerPort(); p != 0 {
			ports = append(ports, port{n, p, "the store's members"})
		}
	}
	var mu sync.Mutex
	err = each(ports, func(p port) error {
		cannot, err := reach(ctx, p.node.GetAddress(), p.port)
		if cannot != nil {
			hint := "let it in on the firewall of " + p.node.GetName() + " and out on this one"
			if cause(cannot) == causeRefused {
				hint = "start hameshd there, with the same port in its configuration"
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, finding{
				Code: "PORT_UNREACHABLE", Node: p.node.GetName(), Found: fmt.Sprintf("%s cannot reach port %d of %s: %v", d.self, p.port, p.node.GetName(), cannot),
				Why: "that is where " + p.of + " speak to each other", Fix: hint,
			})
		}
		return err
	})
	slices.SortFunc(all, byText)
	return all, err
}

// answer is what one API server says of itself.
type answer struct {
	backend     *hameshv1.Backend
	certificate *x509.Certificate
	ahead       time.Duration // its clock before ours
	dated       bool          // whether it told the time
}

// askBackends asks every backend itself.
func (d *doctor) askBackends(ctx context.Context) (answers []answer, err error) {
	var mu sync.Mutex
	err = each(d.status.GetBackends(), func(b *hameshv1.Backend) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+b.GetAddress()+"/readyz", nil)
		if err != nil {
			return err
		}
		a := answer{backend: b}
		client := http.Client{Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		client.Transport = &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true, // whether the certificate is right is what is to be found out
			VerifyConnection: func(state tls.ConnectionState) error {
				a.certificate = state.PeerCertificates[0]
				return nil
			},
		}}
		asked := time.Now()
		// Any answer tells the time, that of a server that refuses whoever has no certificate too;
		// and one that wants to see it before it answers has shown its own first.
		response, err := client.Do(request)
		switch {
		case err == nil:
			defer response.Body.Close()
			now := time.Now()
			if date, err := http.ParseTime(response.Header.Get("Date")); err == nil {
				// Half a second on the average was cut off.
				a.ahead, a.dated = date.Add(500*time.Millisecond).Sub(asked.Add(now.Sub(asked)/2)), true
			}
		case a.certificate == nil:
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		answers = append(answers, a)
		return nil
	})
	slices.SortFunc(answers, func(a, b answer) int { return slices.Compare(a.order(), b.order()) })
	return answers, err
}

func (a answer) order() []string { return []string{a.backend.GetProxy(), a.backend.GetName()} }

// apiCertificates finds what clients that come by a VIP would refuse.
func (d *doctor) apiCertificates(answers []answer) (all []finding) {
	for _, a := range answers {
		who := fmt.Sprintf("the certificate of API server %s (%s)", a.backend.GetName(), a.backend.GetAddress())
		for _, e := range d.entries() {
			if e.proxy.GetName() == a.backend.GetProxy() && a.certificate.VerifyHostname(e.vip.GetAddress()) != nil {
				all = append(all, finding{
					Code: "CERTIFICATE_LACKS_VIP", Node: a.backend.GetNode(), Found: who + " is not for " + e.vip.GetAddress(),
					Why: "clients that come by the VIP refuse it: x509: certificate is valid for ..., not " + e.vip.GetAddress(),
					Fix: "add the VIP to apiServer.certSANs and renew: kubeadm init phase certs apiserver, after taking apiserver.crt and .key away",
				})
			}
		}
		if f, soon := d.expiry(who, a.certificate); soon {
			f.Node, f.Fix = a.backend.GetNode(), "renew it: kubeadm certs renew apiserver, then restart the API server"
			all = append(all, f)
		}
	}
	return all
}

// expiry finds a certificate that ends soon.
func (d *doctor) expiry(who string, certificate *x509.Certificate) (f finding, soon bool) {
	left := certificate.NotAfter.Sub(d.now())
	word := "ends"
	if left < 0 {
		word = "has ended"
	}
	return finding{
		Code: "CERTIFICATE_ENDS", Found: fmt.Sprintf("%s %s on %s", who, word, certificate.NotAfter.UTC().Format(time.DateOnly)),
		Why: "after that nobody who verifies it connects any more",
	}, left < expiresSoon
}

// clocks compares the clocks of the nodes, as their API servers tell them.
func (d *doctor) clocks(answers []answer) []finding {
	answers = slices.DeleteFunc(slices.Clone(answers), func(a answer) bool { return !a.dated })
	if len(answers) < 2 {
		return nil
	}
	order := func(a, b answer) int { return int(a.ahead - b.ahead) }
	first, last := slices.MaxFunc(answers, order), slices.MinFunc(answers, order)
	apart := first.ahead - last.ahead
	if apart < clocksApart {
		return nil
	}
	return []finding{{
		Code: "CLOCKS_DIFFER", Found: fmt.Sprintf("the clock of %s (%s) is about %s ahead of that of %s (%s)",
			first.backend.GetName(), first.backend.GetAddress(), apart.Round(time.Second), last.backend.GetName(), last.backend.GetAddress()),
		Why: "owners do not depend on it, but certificates and Kubernetes' own leases do, and events of several nodes are told in the wrong order",
		Fix: "let chrony or systemd-timesyncd run on every node",
	}}
}

// meshCertificates looks at the certificates of the agents, and at hactl's own.
func (d *doctor) meshCertificates(ctx context.Context) (all []finding, err error) {
	if d.cert != "" {
		text, err := os.ReadFile(d.cert)
		if err != nil {
			return nil, fmt.Errorf("reading the own certificate: %w", err)
		}
		if block, _ := pem.Decode(text); block != nil {
			if certificate, err := x509.ParseCertificate(block.Bytes); err == nil {
				if f, soon := d.expiry("the certificate "+d.cert, certificate); soon {
					f.Fix = "issue it again: hactl pki issue --force"
					all = append(all, f)
				}
			}
		}
	}
	if slices.ContainsFunc(d.status.GetProblems(), func(p *hameshv1.Problem) bool { return p.GetCode() == "TLS_INSECURE" }) {
		return all, nil // there are none
	}
	if d.status.GetApiPort() == 0 {
		return all, errNoPort
	}
	var mu sync.Mutex
	err = each(d.status.GetNodes(), func(n *hameshv1.Node) error {
		certificate, err := shown(ctx, net.JoinHostPort(n.GetAddress(), fmt.Sprint(d.status.GetApiPort())))
		if err != nil {
			return fmt.Errorf("%s: %w", n.GetName(), err)
		}
		if f, soon := d.expiry("the certificate of the agent of "+n.GetName(), certificate); soon {
			f.Node, f.Fix = n.GetName(), "issue it again: hactl pki issue --role agent --force, and copy it there; the agent reads it by itself"
			mu.Lock()
			defer mu.Unlock()
			all = append(all, f)
		}
		return nil
	})
	slices.SortFunc(all, byText)
	return all, err
}

// shown returns the certificate that a server shows before it asks for the client's.
func shown(ctx context.Context, address string) (certificate *x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{
		InsecureSkipVerify: true, // only its end is looked at
		NextProtos:         []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			certificate = state.PeerCertificates[0]
			return nil
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if certificate != nil {
		err = nil // that it wants one of ours is no matter here
	}
	if conn != nil {
		_ = conn.Close()
	}
	return certificate, err
}

func byText(a, b finding) int {
	return slices.Compare([]string{a.Node, a.Found}, []string{b.Node, b.Found})
}
