package parts

import (
	"slices"
	"testing"

	"github.com/hamesh/hamesh/agent/config"
)

// TestDigests checks which part each change of the example shows in, if any.
func TestDigests(t *testing.T) {
	names := []string{"members", "vips", "proxies", "timing", "store", "ports"}
	parse := func() *config.Config {
		c, err := config.Parse("agent.yaml", config.Example())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := Words(Of(parse()).Digests)
	if len(before) != len(names) {
		t.Fatalf("%d digests, want %d", len(before), len(names))
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
			for i, d := range Words(Of(c).Digests) {
				if d != before[i] {
					differ = append(differ, names[i])
				}
			}
			if !slices.Equal(differ, test.want) {
				t.Errorf("differ: %v, want %v", differ, test.want)
			}
		})
	}
}
