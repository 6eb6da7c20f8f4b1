package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
	"go.yaml.in/yaml/v3"
)

func good(t testing.TB) string {
	t.Helper()
	data, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// edited replaces the one place where old stands in the good configuration.
func edited(t testing.TB, old, replacement string) string {
	t.Helper()
	text := good(t)
	if n := strings.Count(text, old); n != 1 {
		t.Fatalf("%q stands %d times in the good configuration", old, n)
	}
	return strings.Replace(text, old, replacement, 1)
}

// compare leaves out where the keys stood.
var compare = cmp.Options{
	cmpopts.IgnoreUnexported(Config{}),
	cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}),
}

// TestRefused makes one edit to the good configuration and wants exactly one problem.
func TestRefused(t *testing.T) {
	lots := strings.Repeat("x", 100)
	tests := []struct {
		name     string
		old, new string
		line     int
		key      string
		says     string // in the message or the remedy
	}{
		// The shape of the document.
		{"unknown key", "mesh: prod", "mesh: prod\nnodes: 3", 4, "nodes", "did you mean node?"},
		{"unknown key, other case", "dataDir:", "datadir:", 11, "datadir", "did you mean dataDir?"},
		{"unknown key, none near", "mesh: prod", "mesh: prod\nfrobnicate: 3", 4, "frobnicate", "known here: apiVersion, kind"},
		{"unknown inner key", "scheme: https", "schema: https", 31, "proxies[0].healthCheck.schema", "did you mean scheme?"},
		{"unknown key in a list", "node: cp-2}", "nodes: cp-2}", 29, "proxies[0].backends[1].nodes", "did you mean node?"},
		{"unknown key with a newline", "mesh: prod", "mesh: prod\n\"a\\nb\": 3", 4, `"a\nb"`, "not a known key"},
		{"repeated key", "mesh: prod", "mesh: prod\nkind: Agent", 4, "kind", "first on line 2"},
		{"repeated inner key", "preempt: false", "preempt: false\n    address: 10.77.0.101", 24, "vips[0].address", "first on line 20"},
		{"mapping as a key", "mesh: prod", "mesh: prod\n? {a: b}\n: c", 4, "", "a mapping as a key"},
		{"list for a mapping", "api: {port: 7443, socket: /run/hamesh/hameshd.sock}", "api: [7443]", 14, "api", "a mapping with the keys port, socket"},
		{"mapping for a list", "preferred: [cp-1]", "preferred: {cp-1: 1}", 22, "vips[0].preferred", "give a list"},
		{"text for a list", "preferred: [cp-1]", "preferred: cp-1", 22, "vips[0].preferred", "give a list"},
		{"tagged mapping", "log: {level", "log: !thing {level", 35, "log", "a mapping"},
		{"number for text", "mesh: prod", "mesh: 7", 3, "mesh", `the number "7"`},
		{"nothing for text", "mesh: prod", "mesh:", 3, "mesh", "is empty"},
		{"empty text", "mesh: prod", `mesh: ""`, 3, "mesh", "is empty"},
		{"control character", "dataDir: /var/lib/hamesh", `dataDir: "/var/\x07"`, 11, "dataDir", "control characters"},
		{"text for a boolean", "preempt: false", "preempt: no", 23, "vips[0].preempt", "true or false"},
		{"text for a number", "port: 16443", `port: "16443"`, 26, "proxies[0].port", "whole number from 1 to 65535"},
		{"octal number", "port: 16443", "port: 016443", 26, "proxies[0].port", "out of range"},
		{"fraction for a number", "port: 16443", "port: 1.5", 26, "proxies[0].port", "whole number"},
		{"alias", "interface: eth0", "interface: &eth eth0\n  - {name: b, address: 10.77.0.101, interface: *eth}\n  - name: c\n    address: 10.77.0.102", 22, "vips[1].interface", "aliases are not supported"},
		{"merge key", "log: {level: info, format: text}", "log: {<<: {level: info}}", 35, "log.<<", "not a known key"},
		{"second document", "log: {level: info, format: text}", "log: {level: info, format: text}\n---\nkind: Agent", 36, "", "more than one document"},
		{"tab", "  name: cp-1\n", "\tname: cp-1\n", 5, "", "with spaces, not with tabs"},
		{"bad indentation", "    interface: eth0", "     interface: eth0", 21, "", "is not YAML"},
		{"unclosed bracket", "preferred: [cp-1]", "preferred: [cp-1", 22, "", "is not YAML"},
		{"unclosed quote", "mesh: prod", `mesh: "prod`, 3, "", "is not YAML"},
		{"unknown alias", "mesh: prod", "mesh: *prod", 3, "", "unknown anchor"},
		{"not UTF-8", "mesh: prod", "mesh: pr\xf6d", 3, "", "UTF-8"},
		{"zero byte", "mesh: prod", "mesh: pr\x00d", 3, "", "control characters"},

		// Head and names.
		{"apiVersion", "apiVersion: hamesh/v1", "apiVersion: hamesh/v2", 1, "apiVersion", "write hamesh/v1"},
		{"apiVersion missing", "apiVersion: hamesh/v1\n", "", 1, "apiVersion", "is missing"},
		{"kind", "kind: Agent", "kind: agent", 2, "kind", "write Agent"},
		{"mesh missing", "mesh: prod\n", "", 1, "mesh", "is missing"},
		{"mesh no label", "mesh: prod", "mesh: Prod_1", 3, "mesh", "not a DNS label"},
		{"mesh too long", "mesh: prod", "mesh: " + lots, 3, "mesh", "not a DNS label"},
		{"VIP no label", "  - name: kube-api\n    address", "  - name: kube.api\n    address", 19, "vips[0].name", "not a DNS label"},

		// Node and members.
		{"node missing", "node:\n  name: cp-1\n  address: 10.77.0.11\n", "", 1, "node", "say which member this is"},
		{"node address missing", "  address: 10.77.0.11\n", "", 4, "node.address", "is missing"},
		{"not a member", "  name: cp-1\n", "  name: cp-9\n", 5, "node.name", "give one of cp-1, cp-2, cp-3"},
		{"another address", "  address: 10.77.0.11\n", "  address: 10.77.0.19\n", 6, "node.address", "not the address of member cp-1, 10.77.0.11"},
		{"another role", "  name: cp-1\n  address: 10.77.0.11\n", "  name: cp-3\n  address: 10.77.0.13\n  role: candidate\n", 7, "node.role", "is candidate, and in members[2] witness"},
		{"unknown role", "role: witness", "role: arbiter", 10, "members[2].role", "one of candidate, witness"},
		{"another priority", "  address: 10.77.0.11\nmembers:\n  - {", "  address: 10.77.0.11\n  priority: 5\nmembers:\n  - {priority: 7, ", 7, "node.priority", "is 5, and in members[0] 7"},
		{"priority", "{name: cp-2, address: 10.77.0.12}", "{name: cp-2, address: 10.77.0.12, priority: 256}", 9, "members[1].priority", "from 1 to 255"},
		{"members empty", "members:\n  - {name: cp-1, address: 10.77.0.11}\n  - {name: cp-2, address: 10.77.0.12}\n  - {name: cp-3, address: 10.77.0.13, role: witness}\n", "members: []\n", 7, "members", "is empty"},
		{"member twice", "{name: cp-2, address: 10.77.0.12}", "{name: cp-2, address: 10.77.0.12}\n  - {name: cp-2, address: 10.77.0.14}", 10, "members[2].name", `"cp-2" is also members[1].name`},
		{"member address twice", "{name: cp-2, address: 10.77.0.12}", "{name: cp-2, address: 10.77.0.11}", 9, "members[1].address", `"10.77.0.11" is also members[0].address`},
		{"member of another family", "address: 10.77.0.13", "address: fd00:77::13", 10, "members[2].address", "one family"},
		{"member on loopback", "address: 10.77.0.13", "address: 127.0.0.1", 10, "members[2].address", "loopback"},
		{"member address a name", "address: 10.77.0.13", "address: cp-3.example", 10, "members[2].address", "not an IP address"},
		{"member address with port", "address: 10.77.0.13", `address: "10.77.0.13:7443"`, 10, "members[2].address", "leave the port out: 10.77.0.13"},

		// Store, API, TLS.
		{"relative dataDir", "dataDir: /var/lib/hamesh", "dataDir: var/lib", 11, "dataDir", "relative path"},
		{"embedded and external", "peerPort: 7480}", "peerPort: 7480}\n  external: {endpoints: [http://10.0.0.5:2379]}", 12, "store", "both embedded and external"},
		{"no endpoints", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {prefix: /x}", 13, "store.external.endpoints", "is missing"},
		{"endpoints empty", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: []}", 13, "store.external.endpoints", "is empty"},
		{"endpoint without scheme", "embedded: {clientPort: 7479, peerPort: 7480}", `external: {endpoints: ["10.0.0.5:2379"]}`, 13, "store.external.endpoints[0]", "not the URL"},
		{"endpoint with path", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://10.0.0.5:2379/]}", 13, "store.external.endpoints[0]", "not the URL"},
		{"endpoint without port", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://10.0.0.5]}", 13, "store.external.endpoints[0]", "not the URL"},
		{"endpoint twice", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://e:1, http://e:1]}", 13, "store.external.endpoints[1]", "is also store.external.endpoints[0]"},
		{"https without files", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [https://e:1]}", 13, "store.external.tls", "is missing, and the endpoints are https"},
		{"http with files", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://e:1], tls: {caFile: /a, certFile: /b, keyFile: /c}}", 13, "store.external.endpoints", "is http, and tls has files"},
		{"http and https", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://e:1, https://e:2]}", 13, "store.external.endpoints", "both http and https"},
		{"etcd key missing", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [https://e:1], tls: {caFile: /a, certFile: /b}}", 13, "store.external.tls.keyFile", "is missing"},
		{"prefix", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://e:1], prefix: hamesh/}", 13, "store.external.prefix", "begin each part with one slash"},
		{"store behind a VIP", "embedded: {clientPort: 7479, peerPort: 7480}", "external: {endpoints: [http://10.77.0.100:1]}", 13, "store.external.endpoints[0]", "nor reach the store without it"},
		{"integer by tag alone", "clientPort: 7479", `clientPort: !!int "7\n9"`, 13, "store.embedded.clientPort", "out of range"},
		{"eight embedded members", "{name: cp-2, address: 10.77.0.12}", "{name: cp-2, address: 10.77.0.12}" + moreMembers(5), 7, "members", "are 8, more than the 7"},
		{"relative socket", "socket: /run/hamesh/hameshd.sock", "socket: hameshd.sock", 14, "api.socket", "relative path"},
		{"long socket", "socket: /run/hamesh/hameshd.sock", "socket: /run/" + lots + "/so", 14, "api.socket", "has 108 bytes"},
		{"port 0", "port: 7443", "port: 0", 14, "api.port", "from 1 to 65535"},
		{"port 65536", "port: 7443", "port: 65536", 14, "api.port", "from 1 to 65535"},
		{"tls missing", "tls: {caFile: /pki/ca.crt, certFile: /pki/cp-1.crt, keyFile: /pki/cp-1.key}\n", "", 1, "tls", "or insecure: true in a lab"},
		{"tls empty", "tls: {caFile: /pki/ca.crt, certFile: /pki/cp-1.crt, keyFile: /pki/cp-1.key}\n", "tls:\n", 15, "tls", "is empty"},
		{"tls key missing", ", keyFile: /pki/cp-1.key}", "}", 15, "tls.keyFile", "give all of caFile"},
		{"insecure with files", "tls: {caFile", "tls: {insecure: true, caFile", 15, "tls", "insecure and has files"},
		{"metrics without port", `listen: "127.0.0.1:7444"`, "listen: 127.0.0.1", 34, "metrics.listen", "such as 127.0.0.1:7444"},
		{"log level", "level: info", "level: verbose", 35, "log.level", "one of info, trace"},
		{"log format", "format: text", "format: xml", 35, "log.format", "one of text, json"},

		// Timing.
		{"profile", "profile: default", "profile: slow", 17, "timing.profile", "one of default, fast"},
		{"bare number", "profile: default", "heartbeat: 100", 17, "timing.heartbeat", "has no unit"},
		{"bare number as text", "profile: default", `heartbeat: "100"`, 17, "timing.heartbeat", "with its unit"},
		{"negative", "profile: default", "heartbeat: -1s", 17, "timing.heartbeat", "out of range"},
		{"window below two heartbeats", "profile: default", "heartbeat: 151ms", 17, "timing.heartbeat", "less than two heartbeats of 151ms"},
		{"suspicion too short", "profile: default", "suspectAfter: 399ms", 17, "timing.suspectAfter", "make suspectAfter at least 400ms"},
		{"suspicion too short, fast", "profile: default", "profile: fast\n  holdWindow: 38ms", 18, "timing.holdWindow", "at least 61ms"},
		{"lease of half seconds", "profile: default", "leaseTTL: 2500ms", 17, "timing.leaseTTL", "whole number of seconds"},
		{"lease too short", "profile: default", "leaseTTL: 1s", 17, "timing.leaseTTL", "from 2s"},
		{"lease below suspicion", "profile: default", "suspectAfter: 3s", 17, "timing.suspectAfter", "make leaseTTL longer"},

		// VIPs.
		{"VIP is a node", "address: 10.77.0.100", "address: 10.77.0.12", 20, "vips[0].address", "address of a node, members[1]"},
		{"VIP with prefix", "address: 10.77.0.100", "address: 10.77.0.100/24", 20, "vips[0].address", "leave the prefix length out: 10.77.0.100"},
		{"VIP unspecified", "address: 10.77.0.100", "address: 0.0.0.0", 20, "vips[0].address", "unspecified"},
		{"VIP loopback", "address: 10.77.0.100", "address: 127.0.0.9", 20, "vips[0].address", "loopback"},
		{"VIP multicast", "address: 10.77.0.100", "address: 224.0.0.18", 20, "vips[0].address", "multicast"},
		{"VIP broadcast", "address: 10.77.0.100", "address: 255.255.255.255", 20, "vips[0].address", "broadcast"},
		{"VIP mapped", "address: 10.77.0.100", `address: "::ffff:10.77.0.100"`, 20, "vips[0].address", "write 10.77.0.100"},
		{"VIP link-local", "address: 10.77.0.100", "address: fe80::100", 20, "vips[0].address", "link-local"},
		{"VIP with zone", "address: 10.77.0.100", "address: fd00::100%eth0", 20, "vips[0].address", "link-local"},
		{"VIP name twice", "preempt: false", "preempt: false\n  - {name: kube-api, address: 10.77.0.101}", 24, "vips[1].name", "is also vips[0].name"},
		{"VIP address twice", "preempt: false", "preempt: false\n  - {name: b, address: 10.77.0.100}", 24, "vips[1].address", "is also vips[0].address"},
		{"VIP address missing", "    address: 10.77.0.100\n", "", 19, "vips[0].address", "is missing"},
		{"interface too long", "interface: eth0", "interface: interface-number-0", 21, "vips[0].interface", "not the name of an interface"},
		{"preferred unknown", "preferred: [cp-1]", "preferred: [cp-7]", 22, "vips[0].preferred[0]", "not a member"},
		{"preferred witness", "preferred: [cp-1]", "preferred: [cp-3]", 22, "vips[0].preferred[0]", "is a witness"},
		{"preferred twice", "preferred: [cp-1]", "preferred: [cp-1, cp-1]", 22, "vips[0].preferred[1]", "is also vips[0].preferred[0]"},
		{"preempt for nobody", "preferred: [cp-1]\n    preempt: false", "preempt: true", 22, "vips[0].preempt", "no node is preferred"},

		// Proxies.
		{"proxy twice", "onDown: close", "onDown: close\n  - {name: kube-api, port: 16444, backends: [{name: a, address: \"10.0.0.1:6443\"}]}", 34, "proxies[1].name", "is also proxies[0].name"},
		{"proxy port twice", "onDown: close", "onDown: close\n  - {name: b, port: 16443, backends: [{name: a, address: \"10.0.0.1:6443\"}]}", 34, "proxies[1].port", "also that of proxies[0].port"},
		{"proxy port missing", "    port: 16443\n", "", 25, "proxies[0].port", "is missing"},
		{"proxy on api port", "port: 16443", "port: 7443", 26, "proxies[0].port", "also that of api.port"},
		{"proxy on metrics port", "port: 16443", "port: 7444", 26, "proxies[0].port", "also that of metrics.listen"},
		{"proxy on etcd client port", "port: 16443", "port: 7479", 26, "proxies[0].port", "also that of store.embedded.clientPort"},
		{"proxy on etcd peer port", "port: 16443", "port: 7480", 26, "proxies[0].port", "also that of store.embedded.peerPort"},
		{"etcd ports alike", "peerPort: 7480", "peerPort: 7479", 13, "store.embedded.peerPort", "also that of store.embedded.clientPort"},
		{"api on a default port", "store:\n  embedded: {clientPort: 7479, peerPort: 7480}\napi: {port: 7443", "api: {port: 7480", 12, "api.port", "also that of store.embedded.peerPort"},
		{"no backends", "    backends:\n      - {name: cp-1, address: \"10.77.0.11:6443\", node: cp-1}\n      - {name: cp-2, address: \"10.77.0.12:6443\", node: cp-2}\n", "", 25, "proxies[0].backends", "is missing"},
		{"backend without port", `"10.77.0.12:6443"`, "10.77.0.12", 29, "proxies[0].backends[1].address", "such as 10.77.0.11:6443"},
		{"backend a name", `"10.77.0.12:6443"`, "cp-2:6443", 29, "proxies[0].backends[1].address", "not an IP address and port"},
		{"backend a number", `"10.77.0.12:6443"`, "6443", 29, "proxies[0].backends[1].address", `the number "6443"`},
		{"backend unspecified", `"10.77.0.12:6443"`, "0.0.0.0:6443", 29, "proxies[0].backends[1].address", "unspecified"},
		{"backend is VIP on proxy port", `"10.77.0.12:6443"`, `"10.77.0.100:16443"`, 29, "proxies[0].backends[1].address", "VIP kube-api on the port of proxy"},
		{"backend is node on proxy port", `"10.77.0.12:6443"`, `"10.77.0.13:16443"`, 29, "proxies[0].backends[1].address", "node cp-3 on the port of proxy"},
		{"backend is loopback on proxy port", `"10.77.0.12:6443"`, `"[::1]:16443"`, 29, "proxies[0].backends[1].address", "in a circle"},
		{"backend twice", "{name: cp-2, address: \"10.77", "{name: cp-1, address: \"10.77", 29, "proxies[0].backends[1].name", "is also proxies[0].backends[0].name"},
		{"backend address twice", `"10.77.0.12:6443"`, `"10.77.0.11:6443"`, 29, "proxies[0].backends[1].address", "is also proxies[0].backends[0].address"},
		{"backend on an unknown node", "node: cp-2", "node: cp-8", 29, "proxies[0].backends[1].node", "not a member"},
		{"scheme", "scheme: https", "scheme: grpc", 31, "proxies[0].healthCheck.scheme", "one of https, http, tcp"},
		{"timeout beyond interval", "interval: 500ms", "timeout: 600ms", 32, "proxies[0].healthCheck.timeout", "longer than the interval, 500ms"},
		{"fall", "interval: 500ms", "fall: 0", 32, "proxies[0].healthCheck.fall", "from 1 to 10"},
		{"rise", "interval: 500ms", "rise: 11", 32, "proxies[0].healthCheck.rise", "from 1 to 10"},
		{"path without slash", "interval: 500ms", "path: readyz", 32, "proxies[0].healthCheck.path", "begin it with a slash"},
		{"path with space", "interval: 500ms", "path: /ready z", 32, "proxies[0].healthCheck.path", "not the path of a request"},
		{"caFile with http", "scheme: https", "scheme: http\n      caFile: /ca", 32, "proxies[0].healthCheck.caFile", "no use with the scheme http"},
		{"path with tcp", "scheme: https", "scheme: tcp\n      path: /readyz", 32, "proxies[0].healthCheck.path", "no use with the scheme tcp"},
		{"keyFile missing", "scheme: https", "scheme: https\n      certFile: /c", 30, "proxies[0].healthCheck.keyFile", "is missing, and certFile is given"},
		{"certFile with tcp", "scheme: https", "scheme: tcp\n      certFile: /c\n      keyFile: /k", 32, "proxies[0].healthCheck.certFile", "no use with the scheme tcp"},
		{"drainTimeout", "onDown: close", "drainTimeout: 100ms", 33, "proxies[0].drainTimeout", "is out of range"},
		{"slowStart", "onDown: close", "slowStart: 11m", 33, "proxies[0].slowStart", "is out of range"},
		{"loadFactor too low", "onDown: close", "balance: {loadFactor: 1}", 33, "proxies[0].balance.loadFactor", "from 1.1 to 10, or off"},
		{"loadFactor no number", "onDown: close", "balance: {loadFactor: .nan}", 33, "proxies[0].balance.loadFactor", "is out of range"},
		{"loadFactor a word", "onDown: close", "balance: {loadFactor: much}", 33, "proxies[0].balance.loadFactor", "from 1.1 to 10, or off"},
		{"limit", "onDown: close", "limits: {connections: -1}", 33, "proxies[0].limits.connections", "is out of range"},
		{"connectionLog", "onDown: close", "connectionLog: some", 33, "proxies[0].connectionLog", "one of off, errors, all"},
		{"proxyProtocol", "onDown: close", "proxyProtocol: v1", 33, "proxies[0].proxyProtocol", "one of none, v2"},
		{"weight", "node: cp-2}", "weight: 257}", 29, "proxies[0].backends[1].weight", "is out of range"},
		{"onDown", "onDown: close", "onDown: reset", 33, "proxies[0].onDown", "one of close, drain"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse("agent.yaml", []byte(edited(t, test.old, test.new)))
			var problems Problems
			if !errors.As(err, &problems) {
				t.Fatalf("Parse returned %v, want problems", err)
			}
			p := problems[0]
			if len(problems) != 1 || p.Line != test.line || p.Key != test.key || !strings.Contains(p.Message+"; "+p.Remedy, test.says) {
				t.Errorf("got\n%v\nwant one problem\nagent.yaml:%d: %s: …%s…", err, test.line, test.key, test.says)
			}
			if p.Message == "" || p.Remedy == "" || strings.ContainsAny(p.Error(), "\n\r") {
				t.Errorf("not one line with a message and a remedy: %q", p.Error())
			}
		})
	}
}

func moreMembers(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "\n  - {name: more-%d, address: 10.77.0.%d}", i, 20+i)
	}
	return b.String()
}

// TestRefusedWhole has texts that are no edit of the good configuration.
func TestRefusedWhole(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", "", "a.yaml:1: is empty; start with apiVersion: hamesh/v1"},
		{"comment alone", "# nothing\n", "a.yaml:1: is empty; start with apiVersion: hamesh/v1"},
		{"null", "~\n", "a.yaml:1: is empty; start with apiVersion: hamesh/v1"},
		{"null on no line", "---", "a.yaml:1: is empty; start with apiVersion: hamesh/v1"},
		{"list", "- a\n", "a.yaml:1: is a list; give a mapping with the keys"},
		{"too large", "mesh: " + strings.Repeat("x", maxSize), "a.yaml: is larger than 1048576 bytes"},
		{
			"alias bomb", "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmesh: *c\n",
			"a.yaml:4: mesh: is an alias; give the value itself",
		},
		{"self-reference", "mesh: &m [*m]\n", "a.yaml:1: mesh: is a list; give a DNS label"},
		{
			"no candidate", strings.Replace(least, "address: \"fd00:77::1\"}", "address: \"fd00:77::1\", role: witness}", 1),
			"a.yaml:6: members: has no candidate, so nobody could own a VIP; make at least one member a candidate",
		},
		{"error before many lines", "\n[" + strings.Repeat(strings.Repeat(" ", 30)+"\n", 250), "a.yaml:2: is not YAML"},
		{"deep nesting", strings.Repeat("[", 20000), "a.yaml:1: is not YAML"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse("a.yaml", []byte(test.text))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Parse returned %v, want %q", err, test.want)
			}
		})
	}
}

func TestAllProblemsAtOnceInOrder(t *testing.T) {
	text := strings.NewReplacer(
		"mesh: prod", "mesh: PROD",
		"role: witness", "role: 3",
		"port: 7443", "port: 99999",
		"preempt: false", "preempt: maybe",
		"onDown: close", "onDwn: close",
	).Replace(good(t))
	_, err := Parse("/etc/hamesh/agent.yaml", []byte(text))
	const want = `/etc/hamesh/agent.yaml:3: mesh: "PROD" is not a DNS label; give a DNS label: lower-case letters, digits and inner hyphens, at most 63
/etc/hamesh/agent.yaml:10: members[2].role: is the number "3"; give one of candidate, witness, in quotes where it looks like something else
/etc/hamesh/agent.yaml:14: api.port: "99999" is out of range; give a whole number from 1 to 65535
/etc/hamesh/agent.yaml:23: vips[0].preempt: is the text "maybe"; give true or false
/etc/hamesh/agent.yaml:33: proxies[0].onDwn: is not a known key; did you mean onDown?`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

const least = `
apiVersion: hamesh/v1
kind: Agent
mesh: lab
node: {name: a, address: "fd00:77::1"}
members: [{name: a, address: "fd00:77::1"}]
tls: {insecure: true}
proxies: [{name: p, port: 16443, backends: [{name: a, address: "[fd00:77::1]:6443"}]}]
`

func TestDefaults(t *testing.T) {
	got, err := Parse("agent.yaml", []byte(least))
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("fd00:77::1")
	want := &Config{
		Mesh:    "lab",
		Node:    Node{Name: "a", Address: a, Role: Candidate, Priority: 100},
		Members: []Member{{Name: "a", Address: a, Role: Candidate, Priority: 100}},
		DataDir: "/var/lib/hamesh",
		Store:   Store{Embedded: &Embedded{ClientPort: 7479, PeerPort: 7480}},
		API:     API{Port: 7443, Socket: "/run/hamesh/hameshd.sock"},
		TLS:     TLS{Insecure: true},
		Timing: Timing{
			Profile: ProfileDefault, Heartbeat: 100 * time.Millisecond, HoldWindow: 300 * time.Millisecond,
			SuspectAfter: 400 * time.Millisecond, LeaseTTL: 3 * time.Second, Margin: 93 * time.Millisecond,
		},
		Proxies: []Proxy{{
			Name: "p", Port: 16443, OnDown: Close, DrainTimeout: 15 * time.Minute,
			LoadFactor: 1.5, SlowStart: 10 * time.Second, ConnectionLog: LogOff, ProxyProtocol: ProxyProtocolNone,
			Backends: []Backend{{Name: "a", Address: netip.AddrPortFrom(a, 6443), Weight: 1}},
			HealthCheck: HealthCheck{
				Scheme: HTTPS, Path: "/readyz", Interval: 500 * time.Millisecond,
				Timeout: 400 * time.Millisecond, Fall: 2, Rise: 2,
			},
		}},
		Metrics: Metrics{Listen: netip.MustParseAddrPort("127.0.0.1:7444")},
		Log:     Log{Level: hclog.Info, Format: Text},
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestAccepted makes one edit to the good configuration and looks at what came of it.
func TestAccepted(t *testing.T) {
	const embedded = "embedded: {clientPort: 7479, peerPort: 7480}"
	tests := []struct {
		name     string
		old, new string
		got      func(*Config) any
		want     any
	}{
		{"as it is", "mesh: prod", "mesh: prod", func(c *Config) any { return c.Members[2] },
			Member{"cp-3", netip.MustParseAddr("10.77.0.13"), Witness, 100}},
		{"node fills its member", "  name: cp-1\n", "  name: cp-1\n  priority: 7\n", func(c *Config) any { return c.Members[0].Priority }, 7},
		{"member fills the node", "name: cp-1, address: 10.77.0.11", "name: cp-1, priority: 8, address: 10.77.0.11", func(c *Config) any { return c.Node.Priority }, 8},
		{"fast", "profile: default", "profile: fast", func(c *Config) any { return c.Timing }, Timing{
			ProfileFast, 12 * time.Millisecond, 36 * time.Millisecond, 60 * time.Millisecond, 2 * time.Second, 22 * time.Millisecond}},
		{"one value over the profile", "profile: default", "profile: fast\n  suspectAfter: 0.1s", func(c *Config) any { return c.Timing }, Timing{
			ProfileFast, 12 * time.Millisecond, 36 * time.Millisecond, 100 * time.Millisecond, 2 * time.Second, 22 * time.Millisecond}},
		{"external, plain", embedded, "external: {endpoints: [http://10.0.0.5:2379]}", func(c *Config) any { return c.Store },
			Store{External: &External{Endpoints: []string{"http://10.0.0.5:2379"}, Prefix: "/hamesh"}}},
		{"external, TLS, relative paths", embedded, `external: {endpoints: ["https://[fd00::5]:2379"], prefix: /a/b, tls: {caFile: ca, certFile: c/t, keyFile: /k}}`,
			func(c *Config) any { return c.Store }, Store{External: &External{
				Endpoints: []string{"https://[fd00::5]:2379"}, Prefix: "/a/b", TLS: &TLSFiles{"/etc/hamesh/ca", "/etc/hamesh/c/t", "/k"}}}},
		{"store without a kind", embedded, "{}", func(c *Config) any { return *c.Store.Embedded }, Embedded{7479, 7480}},
		{"shorter interval, shorter timeout", "interval: 500ms", "interval: 100ms", func(c *Config) any { return c.Proxies[0].HealthCheck.Timeout }, 80 * time.Millisecond},
		{"no bound", "onDown: close", "balance: {loadFactor: off}", func(c *Config) any { return c.Proxies[0].LoadFactor }, 0.0},
		{"bound", "onDown: close", "balance: {loadFactor: 1.25}", func(c *Config) any { return c.Proxies[0].LoadFactor }, 1.25},
		{"no slow start", "onDown: close", "slowStart: 0s", func(c *Config) any { return c.Proxies[0].SlowStart }, time.Duration(0)},
		{"log", "onDown: close", "connectionLog: errors", func(c *Config) any { return c.Proxies[0].ConnectionLog }, LogErrors},
		{"no log", "onDown: close", "connectionLog: off", func(c *Config) any { return c.Proxies[0].ConnectionLog }, LogOff},
		{"limits", "onDown: close", "limits: {connections: 500, perClient: 20}", func(c *Config) any { return c.Proxies[0].Limits }, Limits{500, 20}},
		{"PROXY protocol", "onDown: close", "proxyProtocol: v2", func(c *Config) any { return c.Proxies[0].ProxyProtocol }, ProxyProtocolV2},
		{"weight", "node: cp-2}", "weight: 256}", func(c *Config) any { return c.Proxies[0].Backends[1].Weight }, 256},
		{"certificate for the backends", "scheme: https", "scheme: https\n      certFile: c\n      keyFile: /k", func(c *Config) any {
			return []string{c.Proxies[0].HealthCheck.CertFile, c.Proxies[0].HealthCheck.KeyFile}
		}, []string{"/etc/hamesh/c", "/k"}},
		{"tcp check", "scheme: https", "scheme: tcp", func(c *Config) any { return c.Proxies[0].HealthCheck.Path }, ""},
		{"path with query", "interval: 500ms", "path: /readyz?exclude=etcd", func(c *Config) any { return c.Proxies[0].HealthCheck.Path }, "/readyz?exclude=etcd"},
		{"backend elsewhere than its node", `"10.77.0.12:6443"`, `"192.0.2.12:6443"`, func(c *Config) any { return c.Proxies[0].Backends[1].Node }, "cp-2"},
		{"backend on loopback", `"10.77.0.11:6443"`, `"127.0.0.1:6443"`, func(c *Config) any { return c.Proxies[0].Backends[0].Address.String() }, "127.0.0.1:6443"},
		{"IPv6 VIP beside IPv4 members", "address: 10.77.0.100", "address: fd00:77::100", func(c *Config) any { return c.VIPs[0].Address.String() }, "fd00:77::100"},
		{"preempt", "preempt: false", "preempt: true", func(c *Config) any { return c.VIPs[0].Preempt }, true},
		{"metrics for all", "127.0.0.1:7444", "[::]:7444", func(c *Config) any { return c.Metrics.Listen.String() }, "[::]:7444"},
		{"log", "{level: info, format: text}", "{level: trace, format: json}", func(c *Config) any { return c.Log }, Log{hclog.Trace, JSON}},
		{"longest socket", "/run/hamesh/hameshd.sock", "/run/" + strings.Repeat("x", 102), func(c *Config) any { return len(c.API.Socket) }, 107},
		{"anchor without alias", "mesh: prod", "mesh: &m prod", func(c *Config) any { return c.Mesh }, "prod"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, err := Parse("/etc/hamesh/agent.yaml", []byte(edited(t, test.old, test.new)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, test.got(c), compare); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestExample(t *testing.T) {
	c, err := Parse("agent.yaml", Example())
	if err != nil {
		t.Fatal(err)
	}
	if c.Mesh != "prod" || len(c.Members) != 3 || c.VIPs[0].Interface != "eth0" || c.TLS.KeyFile != "/etc/hamesh/pki/cp-1.key" {
		t.Errorf("the example has other values: %+v", c)
	}
	Example()[0] = 'X'
	if Example()[0] == 'X' {
		t.Error("the example can be changed by its caller")
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load of no file returned %v", err)
	}
	if err := os.WriteFile(path, Example(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(path, maxSize+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.HasPrefix(err.Error(), path+": is larger than") {
		t.Errorf("Load of a large file returned %v", err)
	}
}

func TestEdits(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want int
	}{{"node", "node", 0}, {"node", "nodes", 1}, {"mehs", "mesh", 2}, {"", "ab", 2}, {"tsl", "tls", 2}, {"kitten", "sitting", 3}} {
		if got := edits(test.a, test.b); got != test.want {
			t.Errorf("edits(%q, %q) = %d, want %d", test.a, test.b, got, test.want)
		}
	}
}

// FuzzParse wants no panic, problems that are each one line with a place in the file,
// and whatever is accepted to be accepted with the same values after it was laid out anew.
func FuzzParse(f *testing.F) {
	f.Add([]byte(good(f)))
	f.Add(Example())
	f.Add([]byte("a: &a [*a]\n<<: *a\n"))
	f.Add([]byte("%YAML 1.1\n---\n!!map {? x : y}\n..."))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("agent.yaml", data)
		if err != nil {
			var problems Problems
			if !errors.As(err, &problems) || len(problems) == 0 {
				t.Fatalf("not problems: %v", err)
			}
			lines := strings.Count(string(data), "\n") + strings.Count(string(data), "\r") + strings.Count(string(data), "\u0085") +
				strings.Count(string(data), "\u2028") + strings.Count(string(data), "\u2029") + 1
			for _, p := range problems {
				if p.Message == "" || p.Remedy == "" || p.Line < 1 || p.Line > lines || strings.Contains(p.Error(), "\n") {
					t.Fatalf("bad problem %#v in %d lines", p, lines)
				}
			}
			return
		}
		var value any
		if err := yaml.Unmarshal(data, &value); err != nil {
			t.Fatalf("accepted, but the library does not: %v", err)
		}
		again, err := yaml.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		c2, err := Parse("agent.yaml", again)
		if err != nil {
			t.Fatalf("accepted, but not when laid out anew:\n%s\n%v", again, err)
		}
		if diff := cmp.Diff(c, c2, compare); diff != "" {
			t.Fatalf("-as given +laid out anew\n%s", diff)
		}
	})
}

func host(interfaces ...Interface) Host { return Host{Interfaces: interfaces} }

func nic(name string, addrs ...string) Interface {
	i := Interface{Name: name, Up: true, Loopback: name == "lo"}
	for _, a := range addrs {
		i.Addrs = append(i.Addrs, netip.MustParsePrefix(a))
	}
	return i
}

func TestResolve(t *testing.T) {
	lo := nic("lo", "127.0.0.1/8", "::1/128")
	eth0 := nic("eth0", "10.77.0.11/24", "fe80::1/64")
	const left = "    interface: eth0\n"
	tests := []struct {
		name      string
		old, new  string
		host      Host
		iface     string
		err, warn string // fragments; empty: none
	}{
		{"named", "mesh: prod", "mesh: prod", host(lo, eth0), "eth0", "", ""},
		{"left out", left, "", host(lo, nic("eth1", "192.0.2.1/24"), eth0), "eth0", "", ""},
		{"left out, IPv6", "address: 10.77.0.100\n" + left, "address: fd00:77::100\n", host(eth0, nic("eth1", "fd00:77::1/64")), "eth1", "", ""},
		{"left out, VIP still there", left, "", host(eth0, nic("eth1", "10.77.0.100/32")), "eth0", "", ""},
		{"left out, none", left, "", host(lo, nic("eth0", "10.77.0.11/32"), nic("eth1")), "", "agent.yaml:19: vips[0].interface: is left out, and no interface has a subnet with 10.77.0.100; set it to one of eth0, eth1", ""},
		{"left out, several", left, "", host(eth0, nic("br0", "10.77.0.12/16")), "", "set it to one of eth0, br0", ""},
		{"named, missing", "interface: eth0", "interface: eth9", host(lo, eth0), "eth9", `agent.yaml:21: vips[0].interface: "eth9" is not an interface of this host that could announce a VIP; set it to one of eth0`, ""},
		{"named, loopback", "interface: eth0", "interface: lo", host(lo, eth0), "lo", "could announce a VIP", ""},
		{"named, other subnet", "interface: eth0", "interface: eth1", host(eth0, nic("eth1", "192.0.2.1/24")), "eth1", "", "agent.yaml:21: vips[0].interface: no subnet of eth1 has 10.77.0.100"},
		{"named, down", "mesh: prod", "mesh: prod", host(Interface{Name: "eth0", Addrs: eth0.Addrs}), "eth0", "", "eth0 is down; set it up"},
		{"witness", "  name: cp-1\n  address: 10.77.0.11\n", "  name: cp-3\n  address: 10.77.0.13\n", host(nic("eth5", "10.77.0.13/32")), "eth0", "", ""},
		{"another host", left, "", host(lo, nic("eth0", "10.77.0.12/24")), "", "not the host of this configuration: agent.yaml:6: node.address: no interface of this host has 10.77.0.11", ""},
		{"even members", "  - {name: cp-3", "  - {name: cp-4, address: 10.77.0.14}\n  - {name: cp-3", host(eth0), "eth0", "", "agent.yaml:7: members: 4 members survive no more losses than 3"},
		{"insecure", "{caFile: /pki/ca.crt, certFile: /pki/cp-1.crt, keyFile: /pki/cp-1.key}", "{insecure: true}", host(eth0), "eth0", "", "agent.yaml:15: tls.insecure: whoever"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, err := Parse("agent.yaml", []byte(edited(t, test.old, test.new)))
			if err != nil {
				t.Fatal(err)
			}
			warnings, err := c.Resolve(test.host)
			if got := fmt.Sprint(err); test.err == "" && err != nil || !strings.Contains(got, test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			if errors.Is(err, ErrNotThisHost) != (test.name == "another host") {
				t.Errorf("error %v is ErrNotThisHost: %t", err, errors.Is(err, ErrNotThisHost))
			}
			var problems Problems
			if err != nil && !errors.As(err, &problems) {
				t.Errorf("error %v has no problems", err)
			}
			if test.warn == "" && len(warnings) > 0 || test.warn != "" && !slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, test.warn) }) {
				t.Errorf("warnings %q, want %q", warnings, test.warn)
			}
			if c.VIPs[0].Interface != test.iface {
				t.Errorf("interface %q, want %q", c.VIPs[0].Interface, test.iface)
			}
		})
	}
}

func TestTwoMembersWarn(t *testing.T) {
	c, err := Parse("agent.yaml", []byte(edited(t, "  - {name: cp-3, address: 10.77.0.13, role: witness}\n", "")))
	if err != nil {
		t.Fatal(err)
	}
	warnings, err := c.Resolve(Host{})
	if !errors.Is(err, ErrNotThisHost) {
		t.Errorf("error %v", err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "add a witness") {
		t.Errorf("warnings %q", warnings)
	}
}

func TestThisHost(t *testing.T) {
	h, err := ThisHost()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range h.Interfaces {
		for _, a := range i.Addrs {
			if !a.IsValid() || a.Addr().Is4In6() {
				t.Errorf("%s has the address %v", i.Name, a)
			}
		}
	}
}
