package guard

import (
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/vip"
)

func TestOrders(t *testing.T) {
	sent := orders{
		Config: Config{
			Member: "cp-1", Boot: 1<<64 - 1,
			VIPs:   []vip.Address{{VIP: "kube-api", Addr: netip.MustParseAddr("fd77::100"), Interface: "eth0"}},
			Peers:  []Peer{{"cp-2", netip.MustParseAddrPort("[fd77::12]:7443")}},
			CAFile: "ca", CertFile: "cert", KeyFile: "key", Insecure: true, LogJSON: true,
			Lock: os.Stdin, Log: hclog.NewNullLogger(),
		},
		Agent: 42, LogLevel: "debug",
	}
	line, err := json.Marshal(sent)
	if err != nil {
		t.Fatal(err)
	}
	got, err := readOrders(strings.NewReader(string(line) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	sent.Lock, sent.Log = nil, nil // these stay with the agent
	if diff := cmp.Diff(sent, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
	for name, bad := range map[string]string{
		"nothing": "", "cut off": string(line), "half": string(line[:20]) + "\n", "not JSON": "guard\n",
	} {
		if o, err := readOrders(strings.NewReader(bad)); err == nil {
			t.Errorf("%s: got %v", name, o)
		}
	}
}
