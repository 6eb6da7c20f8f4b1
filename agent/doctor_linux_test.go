package agent_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

// deafen makes a node drop what comes from an address to one of its TCP ports, as a
// firewall with a wrong rule does.
func deafen(t *testing.T, n *lab.Node, from netip.Addr, port uint16) {
	t.Helper()
	address := from.As4()
	if err := n.Host().Do(func() error {
		var c nftables.Conn
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "firewall"})
		chain := c.AddChain(&nftables.Chain{
			Name: "input", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
		})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}, // source (RFC 791)
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: address[:]},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, // destination
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
		return c.Flush()
	}); err != nil {
		t.Fatal(err)
	}
}

// doctor runs hactl doctor on a node and returns the codes of what it finds, in order and
// once each.
func doctor(n *lab.Node) (codes []string, err error) {
	stdout, stderr, status, err := n.Hactl("doctor", "-o", "json")
	if err != nil {
		return nil, err
	}
	var report struct {
		RanOn    string
		Findings []struct{ Code, Found string }
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil {
		return nil, fmt.Errorf("exit status %d: %w\n%s%s", status, err, stdout, stderr)
	}
	for _, f := range report.Findings {
		// Those of the stand-ins are for days only.
		if f.Code != "CERTIFICATE_ENDS" || !strings.HasPrefix(f.Found, "the certificate of API server ") {
			codes = append(codes, f.Code)
		}
	}
	if (status == 3) != (len(report.Findings) > 0) || report.RanOn != n.Name {
		return nil, fmt.Errorf("exit status %d, on %q:\n%s%s", status, report.RanOn, stdout, stderr)
	}
	slices.Sort(codes)
	return slices.Compact(codes), nil
}

// TestDoctor checks that a sound mesh is left in peace, and that what is wrong with a
// network and with one member's configuration is found.
func TestDoctor(t *testing.T) {
	m := newMesh(t, lab.Options{Edit: func(node string, config map[string]any) {
		if node == "cp-3" { // otherwise it is the same to the mesh
			slices.Reverse(config["members"].([]any))
			config["log"] = map[string]any{"level": "info"}
		}
	}})
	owner(t, m)
	healthy(t, m)
	finds := func(n *lab.Node, want ...string) {
		t.Helper()
		if err := lab.Await(20*time.Second, func() error {
			got, err := doctor(n)
			if err == nil && !slices.Equal(got, want) {
				err = fmt.Errorf("hactl doctor on %s finds %v, want %v", n.Name, got, want)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	for _, n := range m.Nodes {
		finds(n)
	}
	a, b := m.Nodes[0], m.Nodes[1]
	deafen(t, b, a.Address, 7443)
	finds(a, "LINK_ONE_WAY", "PORT_UNREACHABLE")
	finds(b, "LINK_ONE_WAY")
}

// TestConfigurationsDiffer checks that every member says what is different in the timing of
// one, and that the doctor finds it once, whichever is asked.
func TestConfigurationsDiffer(t *testing.T) {
	m := newMesh(t, lab.Options{Edit: func(node string, config map[string]any) {
		if node == "cp-2" {
			config["timing"].(map[string]any)["holdWindow"] = "250ms"
		}
	}})
	owner(t, m)
	const want = "CONFIGURATIONS_DIFFER: configurations differ: timing.holdWindow: 300ms on cp-1, cp-3, 250ms on cp-2"
	if err := lab.Await(20*time.Second, func() error {
		all, err := statuses(m)
		for _, s := range all {
			if got := problemsOf(s, "CONFIGURATIONS_DIFFER"); !slices.Equal(got, []string{want}) {
				err = fmt.Errorf("%s says %q, want %q", s.GetReportedBy(), got, want)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, n := range m.Nodes {
		if err := lab.Await(10*time.Second, func() error {
			got, err := doctor(n)
			if err == nil && !slices.Equal(got, []string{"CONFIGURATIONS_DIFFER"}) {
				err = fmt.Errorf("%s: %v", n.Name, got)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
}
