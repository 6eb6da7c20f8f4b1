package agent

import (
	"errors"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/config"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

func TestMayCrash(t *testing.T) {
	node := func(name string, eligible bool) *hameshv1.Node {
		return &hameshv1.Node{Name: name, State: hameshv1.NodeState_NODE_STATE_READY, Eligible: eligible}
	}
	well := &hameshv1.GetStatusResponse{
		State: hameshv1.State_STATE_HEALTHY,
		Vips:  []*hameshv1.Vip{{Name: "kube-api", Owner: "cp-1"}},
		Nodes: []*hameshv1.Node{node("cp-1", true), node("cp-2", true), node("w", false)},
	}
	for name, test := range map[string]struct {
		node   string
		change func(*hameshv1.GetStatusResponse)
		want   error
	}{
		"the owner":             {"cp-1", func(*hameshv1.GetStatusResponse) {}, nil},
		"another candidate":     {"cp-2", func(*hameshv1.GetStatusResponse) {}, nil},
		"a witness":             {"w", func(*hameshv1.GetStatusResponse) {}, nil},
		"not healthy":           {"cp-1", func(s *hameshv1.GetStatusResponse) { s.State = hameshv1.State_STATE_DEGRADED }, server.ErrNotHealthy},
		"nobody to take it":     {"cp-1", func(s *hameshv1.GetStatusResponse) { s.Nodes[1].Eligible = false }, server.ErrNoOtherCandidate},
		"nobody has to take it": {"cp-2", func(s *hameshv1.GetStatusResponse) { s.Nodes[0].Eligible = false }, nil},
		"of two":                {"cp-1", func(s *hameshv1.GetStatusResponse) { s.Nodes = s.Nodes[:2] }, server.ErrNoMajority},
		"of four, one is down": {"cp-1", func(s *hameshv1.GetStatusResponse) {
			s.Nodes = append(s.Nodes, &hameshv1.Node{Name: "x", State: hameshv1.NodeState_NODE_STATE_DOWN})
		}, server.ErrNoMajority},
	} {
		t.Run(name, func(t *testing.T) {
			s := proto.CloneOf(well)
			test.change(s)
			if err := mayCrash(s, test.node); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}

func TestCrashed(t *testing.T) {
	s := &hameshv1.GetStatusResponse{Nodes: []*hameshv1.Node{{Name: "cp-1", Boot: 7}, {Name: "cp-2"}}}
	for claim, want := range map[string]bool{"cp-1 6": true, "cp-1 7": false, "cp-2 6": false, "cp-9 6": false, "cp-1": false, "": false} {
		if got := crashed(s, claim); got != want {
			t.Errorf("%q: %v", claim, got)
		}
	}
}

// TestConfigDigests checks which part each change of the example shows in, if any.
func TestConfigDigests(t *testing.T) {
	parts := []string{"members", "vips", "proxies", "timing", "store", "ports"}
	parse := func() *config.Config {
		c, err := config.Parse("agent.yaml", config.Example())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := digestWords(configDigests(parse()))
	if len(before) != len(parts) {
		t.Fatalf("%d digests, want %d", len(before), len(parts))
	}
	for name, test := range map[string]struct {
		change func(*config.Config)
		want   []string
	}{
		"nothing":                    {func(*config.Config) {}, nil},
		"another node of it":         {func(c *config.Config) { c.Node.Name, c.Node.Priority = "x", 7 }, nil},
		"the order of the members":   {func(c *config.Config) { slices.Reverse(c.Members) }, nil},
		"the order of the backends":  {func(c *config.Config) { slices.Reverse(c.Proxies[0].Backends) }, nil},
		"an interface":               {func(c *config.Config) { c.VIPs[0].Interface = "bond0" }, nil},
		"a file":                     {func(c *config.Config) { c.Proxies[0].HealthCheck.CAFile = "/x" }, nil},
		"a role":                     {func(c *config.Config) { c.Members[1].Role = config.Witness }, nil},
		"one member less":            {func(c *config.Config) { c.Members = c.Members[1:] }, []string{"members"}},
		"the name of the mesh":       {func(c *config.Config) { c.Mesh = "x" }, []string{"members"}},
		"who is preferred":           {func(c *config.Config) { c.VIPs[0].Preferred = []string{"cp-2"} }, []string{"vips"}},
		"a backend":                  {func(c *config.Config) { c.Proxies[0].Backends = c.Proxies[0].Backends[1:] }, []string{"proxies"}},
		"the same values by profile": {func(c *config.Config) { c.Timing.Profile = config.ProfileFast }, nil},
		"timing":                     {func(c *config.Config) { c.Timing.SuspectAfter *= 2 }, []string{"timing"}},
		"etcd's port":                {func(c *config.Config) { c.Store.Embedded.PeerPort++ }, []string{"store"}},
		"the port and a VIP's owner": {func(c *config.Config) { c.API.Port++; c.VIPs[0].Preempt = !c.VIPs[0].Preempt }, []string{"vips", "ports"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := parse()
			test.change(c)
			var differ []string
			for i, d := range digestWords(configDigests(c)) {
				if d != before[i] {
					differ = append(differ, parts[i])
				}
			}
			if !slices.Equal(differ, test.want) {
				t.Errorf("differ: %v, want %v", differ, test.want)
			}
		})
	}
}
