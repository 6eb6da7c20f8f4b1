package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/deploy"
)

// elsewhere is a configuration with nothing in its usual place.
const elsewhere = `apiVersion: hamesh/v1
kind: Agent
mesh: lab
node: {name: cp-1, address: "fd77::1"}
members: [{name: cp-1, address: "fd77::1"}]
dataDir: /srv/hamesh/data
store: {external: {endpoints: ["https://[fd77::9]:2379"], tls: {caFile: /etc/etcd/ca.crt, certFile: /etc/etcd/c.crt, keyFile: /etc/etcd/c.key}}}
api: {socket: /srv/hamesh/data/hameshd.sock}
tls: {caFile: pki/ca.crt, certFile: pki/cp-1.crt, keyFile: /etc/hamesh-keys/cp-1.key}
vips: [{name: kube-api, address: "fd77::100"}]
proxies:
  - name: kube-api
    port: 443
    backends: [{name: cp-1, address: "[fd77::1]:6443", node: cp-1}]
    healthCheck: {caFile: /etc/kubernetes/pki/ca.crt}
metrics: {listen: "[::]:7555"}
`

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestManifest(t *testing.T) {
	example, odd := writeConfig(t, string(config.Example())), writeConfig(t, elsewhere)
	for name, args := range map[string][]string{
		"systemd-elsewhere":    {"systemd", "--config", odd, "--installed-as", "/etc/mesh/lab/agent.yaml"},
		"static-pod-elsewhere": {"static-pod", "--config", odd, "--installed-as", "/srv/hamesh/agent.yaml", "--image", "images.example:5000/hameshd@sha256:0123"},
	} {
		t.Run(name, func(t *testing.T) {
			exit, out, errs := hactl(t.Context(), append([]string{"manifest"}, args...)...)
			if exit != exitDone || errs != "" {
				t.Fatalf("exit %d, stderr %q", exit, errs)
			}
			golden(t, "manifest-"+name, out)
		})
	}
	// What lies in deploy is what hactl prints for the example configuration.
	usual := []string{"manifest", "--config", example, "--installed-as", usualConfig}
	if exit, out, errs := hactl(t.Context(), append(usual, "systemd")...); exit != exitDone || out != deploy.Unit {
		t.Errorf("exit %d, stderr %q, deploy/hameshd.service (-want +got):\n%s", exit, errs, cmp.Diff(deploy.Unit, out))
	}
	exit, out, errs := hactl(t.Context(), append(usual, "static-pod", "--image", "hameshd:v1")...)
	if exit != exitDone {
		t.Fatalf("exit %d, stderr %q", exit, errs)
	}
	file := filepath.Join("..", "deploy", "static-pod.yaml")
	if *update {
		if err := os.WriteFile(file, []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites):\n%s", file, diff)
	}
}

func TestManifestRefuses(t *testing.T) {
	good := string(config.Example())
	edited := func(was, is string) string {
		if !strings.Contains(good, was) {
			t.Fatalf("%q is not in the example", was)
		}
		return writeConfig(t, strings.Replace(good, was, is, 1))
	}
	for _, test := range []struct {
		name string
		args []string
		exit int
		want string
	}{
		{"no command", nil, exitUsage, "static-pod or systemd"},
		{"no image", []string{"static-pod"}, exitUsage, `"image" not set`},
		{"a bad image", []string{"static-pod", "--config", edited("prod", "lab"), "--image", "a b"}, exitUsage, `image "a b" is no name`},
		{"no file", []string{"systemd", "--config", filepath.Join(t.TempDir(), "none")}, exitFailed, "name one with --config"},
		{"a bad file", []string{"systemd", "--config", edited("mesh: prod", "mehs: prod")}, exitUsage, "and 1 more, see hameshd validate"},
		{"relative", []string{"systemd", "--config", edited("prod", "lab"), "--installed-as", "agent.yaml"}, exitUsage, "relative path"},
		{"a path to quote", []string{"systemd", "--config", edited("dataDir: /var/lib/hamesh", `dataDir: "/var/lib/ha mesh"`)}, exitFailed, "choose a plain path"},
		{"hidden", []string{"systemd", "--config", edited("/etc/hamesh/pki/ca.crt", "/root/pki/ca.crt"), "--installed-as", usualConfig}, exitFailed, "/root/pki is hidden"},
	} {
		t.Run(test.name, func(t *testing.T) {
			exit, out, errs := hactl(t.Context(), append([]string{"manifest"}, test.args...)...)
			if exit != test.exit || out != "" || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 {
				t.Errorf("exit %d, want %d; stdout %q, stderr %q, want one line with %q", exit, test.exit, out, errs, test.want)
			}
		})
	}
}
