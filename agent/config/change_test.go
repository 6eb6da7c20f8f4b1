package config

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestChanges(t *testing.T) {
	tests := []struct {
		name    string
		old     string
		new     string
		changes []string
		refused []string // where and which, of the changes that take a restart
	}{
		{"nothing", "mesh: prod", "mesh: prod", nil, nil},
		{"a default is written out", "onDown: close", "onDown: close\n    drainTimeout: 15m", nil, nil},
		{"the order of a list", `      - {name: cp-1, address: "10.77.0.11:6443", node: cp-1}
      - {name: cp-2, address: "10.77.0.12:6443", node: cp-2}`, `      - {name: cp-2, address: "10.77.0.12:6443", node: cp-2}
      - {name: cp-1, address: "10.77.0.11:6443", node: cp-1}`, nil, nil},
		{"log", "log: {level: info, format: text}", "log: {level: debug, format: json}",
			[]string{"log.level: is debug, was info", "log.format: is json, was text"}, nil},
		{"a backend is added", "node: cp-2}", "node: cp-2}\n      - {name: new, address: \"10.77.0.14:6443\", weight: 2}",
			[]string{"proxies[0].backends[2]: new is added"}, nil},
		{"a backend is removed", "      - {name: cp-2, address: \"10.77.0.12:6443\", node: cp-2}\n", "",
			[]string{"proxies[0].backends: cp-2 is removed"}, nil},
		{"a backend gets another name", "{name: cp-2, address: \"10.77.0.12:6443\"", "{name: other, address: \"10.77.0.12:6443\"",
			[]string{"proxies[0].backends[1]: other is added", "proxies[0].backends: cp-2 is removed"}, nil},
		{"a backend changes", "\"10.77.0.12:6443\", node: cp-2}", "\"10.77.0.12:6444\", weight: 3}",
			[]string{
				"proxies[0].backends[1].address: is 10.77.0.12:6444, was 10.77.0.12:6443",
				"proxies[0].backends[1].node: is left out, was cp-2",
				"proxies[0].backends[1].weight: is 3, was 1",
			}, nil},
		{"checks", "interval: 500ms", "interval: 1s", []string{"proxies[0].healthCheck.interval: is 1s, was 500ms"}, nil},
		{"onDown", "onDown: close", "onDown: drain", []string{"proxies[0].onDown: is drain, was close"}, nil},
		{"balance", "onDown: close", "balance: {loadFactor: off}", []string{"proxies[0].balance.loadFactor: is 0, was 1.5"}, nil},
		{"limits", "onDown: close", "limits: {perClient: 5}", []string{"proxies[0].limits.perClient: is 5, was 0"}, nil},
		{"connectionLog", "onDown: close", "connectionLog: all", []string{"proxies[0].connectionLog: is all, was off"}, nil},
		{"preferences", "preferred: [cp-1]\n    preempt: false", "preferred: [cp-2, cp-1]\n    preempt: true",
			[]string{"vips[0].preferred: is cp-2, cp-1, was cp-1", "vips[0].preempt: is true, was false"}, nil},
		{"priority", "  name: cp-1\n", "  name: cp-1\n  priority: 101\n", []string{"node.priority: is 101, was 100"}, nil},

		{"mesh", "mesh: prod", "mesh: other", []string{"mesh: is other, was prod"}, []string{"3: mesh"}},
		{"data", "dataDir: /var/lib/hamesh", "dataDir: /srv", []string{"dataDir: is /srv, was /var/lib/hamesh"}, []string{"11: dataDir"}},
		{"another node", "name: cp-1\n  address: 10.77.0.11\n", "name: cp-2\n  address: 10.77.0.12\n",
			[]string{"node.name: is cp-2, was cp-1"}, []string{"5: node.name"}},
		{"a member is removed", "{name: cp-3, address", "{name: b, address",
			[]string{"members[2]: b is added", "members: cp-3 is removed"}, []string{"7: members", "10: members[2]"}},
		{"the store", "store:\n  embedded: {clientPort: 7479, peerPort: 7480}", "store:\n  embedded: {clientPort: 7479, peerPort: 7481}",
			[]string{"store.embedded.peerPort: is 7481, was 7480"}, []string{"13: store.embedded.peerPort"}},
		{"a VIP is added", "vips:\n", "vips:\n  - {name: second, address: 10.77.0.101, interface: eth0}\n",
			[]string{"vips[0]: second is added"}, []string{"19: vips[0]"}},
		{"a VIP's address", "address: 10.77.0.100", "address: 10.77.0.101",
			[]string{"vips[0].address: is 10.77.0.101, was 10.77.0.100"}, []string{"20: vips[0].address"}},
		{"a proxy's port", "port: 16443", "port: 16444", []string{"proxies[0].port: is 16444, was 16443"}, []string{"26: proxies[0].port"}},
		{"a proxy gets another name", "proxies:\n  - name: kube-api", "proxies:\n  - name: other",
			[]string{"proxies[0]: other is added", "proxies: kube-api is removed"}, []string{"24: proxies", "25: proxies[0]"}},
		{"metrics", `listen: "127.0.0.1:7444"`, `listen: "127.0.0.1:7445"`,
			[]string{"metrics.listen: is 127.0.0.1:7445, was 127.0.0.1:7444"}, []string{"34: metrics.listen"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			was, err := Parse("agent.yaml", []byte(good(t)))
			if err != nil {
				t.Fatal(err)
			}
			is, err := Parse("agent.yaml", []byte(edited(t, test.old, test.new)))
			if err != nil {
				t.Fatal(err)
			}
			changes, err := was.Changes(is)
			var got []string
			for _, c := range changes {
				got = append(got, c.String())
			}
			if !slices.Equal(got, test.changes) {
				t.Errorf("changes\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(test.changes, "\n\t"))
			}
			var problems Problems
			if err != nil && !errors.As(err, &problems) {
				t.Fatalf("%v is no Problems", err)
			}
			var refused []string
			for _, p := range problems {
				refused = append(refused, fmt.Sprintf("%d: %s", p.Line, p.Key))
				if !strings.Contains(p.Remedy, "restart the agent to change it") {
					t.Errorf("%v", p)
				}
			}
			if !slices.Equal(refused, test.refused) {
				t.Errorf("refused %q, want %q", refused, test.refused)
			}
		})
	}
}

// TestChangesMissNothing changes every single value of a configuration in turn.
func TestChangesMissNothing(t *testing.T) {
	unseen := []string{
		"Timing.Margin",                              // the profile's
		"Node.Address", "Node.Role", "Node.Priority", // agree with Members
	}
	for _, text := range []string{
		good(t),
		edited(t, "  embedded: {clientPort: 7479, peerPort: 7480}", `  external:
    endpoints: ["https://10.0.0.5:2379"]
    tls: {caFile: /a, certFile: /b, keyFile: /c}`),
	} {
		for changed, done := 0, false; !done; changed++ {
			was, err := Parse("agent.yaml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			is, err := Parse("agent.yaml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			n, name := 0, ""
			visit(reflect.ValueOf(is).Elem(), "", func(path string, leaf reflect.Value) {
				if n == changed {
					name = path
					alter(t, leaf)
				}
				n++
			})
			done = changed >= n-1
			if changes, _ := was.Changes(is); len(changes) == 0 && !slices.Contains(unseen, name) {
				t.Errorf("%s is different, and nobody says so", name)
			}
		}
	}
}

// visit calls see for each value of a configuration.
func visit(v reflect.Value, path string, see func(string, reflect.Value)) {
	switch {
	case v.Type().PkgPath() == "net/netip":
		see(path, v)
	case v.Kind() == reflect.Pointer && !v.IsNil():
		visit(v.Elem(), path, see)
	case v.Kind() == reflect.Slice:
		for i := range v.Len() {
			visit(v.Index(i), fmt.Sprintf("%s[%d]", path, i), see)
		}
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				visit(v.Field(i), strings.TrimPrefix(path+"."+f.Name, "."), see)
			}
		}
	case v.Kind() != reflect.Pointer:
		see(path, v)
	}
}

func alter(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.MustParseAddr("192.0.2.1")))
		return
	case netip.AddrPort:
		v.Set(reflect.ValueOf(netip.MustParseAddrPort("192.0.2.1:1")))
		return
	}
	switch {
	case v.CanInt():
		v.SetInt(v.Int() + 1)
	case v.CanUint():
		v.SetUint(v.Uint() + 1)
	case v.CanFloat():
		v.SetFloat(v.Float() + 1)
	case v.Kind() == reflect.String:
		v.SetString(v.String() + "x")
	case v.Kind() == reflect.Bool:
		v.SetBool(!v.Bool())
	default:
		t.Fatalf("a value of the type %v", v.Type())
	}
}
