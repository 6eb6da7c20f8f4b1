package server_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hamesh/hamesh/cli"
	"github.com/hamesh/hamesh/cli/pki"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// TestHactl is hactl itself against a server, with the certificates it issues.
func TestHactl(t *testing.T) {
	ca, other := newAuthority(t, "prod"), newAuthority(t, "prod")
	a := newAgent()
	a.status.State = hameshv1.State_STATE_HEALTHY
	s := serve(t, a, server.Options{TLS: ca.issue("cp-1", pki.RoleAgent).Server()})
	for _, authority := range []authority{ca, other} {
		authority.issue("alice", pki.RoleOperator)
		authority.issue("grafana", pki.RoleViewer)
	}
	with := func(a authority, name string, args ...string) []string {
		file := func(name string) string { return filepath.Join(a.dir, name) }
		return append(args, "--endpoint", s.tcp, "--ca", file("ca.crt"), "--cert", file(name+".crt"), "--key", file(name+".key"))
	}
	for name, test := range map[string]struct {
		args []string
		exit int
		want string
	}{
		"viewer looks":      {with(ca, "grafana", "status"), 0, "HEALTHY"},
		"viewer moves":      {with(ca, "grafana", "move-vip", "kube-api"), 1, "ROLE_INSUFFICIENT"},
		"operator moves":    {with(ca, "alice", "move-vip", "kube-api"), 0, "unchanged"},
		"viewer reads":      {with(ca, "grafana", "events"), 0, "not answering"},
		"viewer drains":     {with(ca, "grafana", "drain", "cp-1"), 1, "ROLE_INSUFFICIENT"},
		"operator drains":   {with(ca, "alice", "drain", "cp-1"), 0, "cp-1 is drained"},
		"operator undrains": {with(ca, "alice", "undrain", "cp-1"), 0, "cp-1 may take VIPs"},
		"socket disables":   {[]string{"backend", "cp-2", "--state", "disabled", "--endpoint", s.socket}, 0, "cp-2 of proxy kube-api is disabled"},
		"socket moves":      {[]string{"move-vip", "kube-api", "--endpoint", s.socket}, 0, "unchanged"},
		"of another CA":     {with(other, "alice", "status"), 4, "belong to this mesh"},
		"no certificate":    {[]string{"status", "--endpoint", s.tcp}, 4, "may want TLS"},
		"then the next one": {append(with(other, "alice", "status"), "--endpoint", s.socket), 0, "HEALTHY"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if exit := cli.Run(t.Context(), test.args, strings.NewReader(""), &out, &out); exit != test.exit || !strings.Contains(out.String(), test.want) {
				t.Errorf("exit %d, want %d with %q:\n%s", exit, test.exit, test.want, &out)
			}
		})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	all := strings.Join(slices.Sorted(slices.Values(a.heard)), "\n")
	for _, want := range []string{"drain cp-1 by alice", "undrain cp-1 by alice", "cp-2 BACKEND_ORDER_DISABLED by ", fmt.Sprintf("uid %d", os.Getuid())} {
		if !strings.Contains(all, want) {
			t.Errorf("not heard: %q, but\n%s", want, all)
		}
	}
}
