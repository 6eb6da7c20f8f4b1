package parts

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hamesh/hamesh/agent/config"
)

func TestDiff(t *testing.T) {
	for name, c := range map[string]struct {
		a, b string
		want []Value
	}{
		"nothing":      {`{"a":1}`, `{"a":1}`, nil},
		"a value":      {`{"t":{"hold":"300ms","beat":1}}`, `{"t":{"hold":"200ms","beat":1}}`, []Value{{"t.hold", "300ms", "200ms"}}},
		"left out":     {`{"a":{"x":true}}`, `{"a":{}}`, []Value{{"a.x", "true", ""}}},
		"a whole":      {`{"a":{}}`, `{"a":{"b":{"c":1}}}`, []Value{{"a.b", "", `{"c":1}`}}},
		"a list":       {`{"p":["x"]}`, `{"p":["x","y"]}`, []Value{{"p", `["x"]`, `["x","y"]`}}},
		"two, sorted":  {`{"b":1,"a":1}`, `{"b":2,"a":2}`, []Value{{"a", "1", "2"}, {"b", "1", "2"}}},
		"another type": {`{"a":{"b":1}}`, `{"a":"b"}`, []Value{{"a", `{"b":1}`, "b"}}},
		"no JSON":      {`{"a":1}`, ``, nil},
	} {
		if got := Diff(c.a, c.b); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestCompare(t *testing.T) {
	told := func(member, version string, change func(*config.Config), inWords bool) Told {
		c, err := config.Parse("agent.yaml", config.Example())
		if err != nil {
			t.Fatal(err)
		}
		change(c)
		p := Of(c)
		said := Told{Member: member, Version: version, Digests: p.Digests, Texts: map[int]string{}}
		for i, text := range p.Texts {
			if inWords {
				said.Texts[i] = text
			}
		}
		return said
	}
	same := func(*config.Config) {}
	slow := func(c *config.Config) { c.Timing.HoldWindow = 200 * time.Millisecond }
	for name, c := range map[string]struct {
		all  []Told
		want []string
	}{
		"nothing": {[]Told{told("cp-1", "v1", same, true), told("cp-2", "v1", same, false)}, nil},
		"one of three": {[]Told{told("cp-1", "v1", slow, true), told("cp-3", "v1", same, false), told("cp-2", "v1", same, true)},
			[]string{"configurations differ: timing.holdWindow: 300ms on cp-2, cp-3, 200ms on cp-1"}},
		"one of two": {[]Told{told("cp-2", "v1", slow, true), told("cp-1", "v1", same, true)},
			[]string{"configurations differ: timing.holdWindow: 300ms on cp-1, 200ms on cp-2"}},
		"not in words": {[]Told{told("cp-1", "v1", same, true), told("cp-2", "v1", slow, false)},
			[]string{"the configurations of cp-1 and of cp-2 differ in: timing"}},
		"another version": {[]Told{told("cp-1", "v1", same, true), told("cp-2", "v2", slow, true)}, nil},
		"a VIP and a proxy": {[]Told{told("cp-1", "v1", same, true), told("cp-2", "v1", func(c *config.Config) {
			c.VIPs[0].Preferred, c.Proxies[0].Port = []string{"cp-9"}, 9999
		}, true)}, []string{"vips." + firstVIP(t) + ".preferred", ".port: "}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, d := range Compare(c.all) {
				got = append(got, d.String())
			}
			if !slices.EqualFunc(got, c.want, strings.Contains) {
				t.Errorf("%q, want %q", got, c.want)
			}
			slices.Reverse(c.all)
			again := Compare(c.all)
			for i, d := range again {
				if d.String() != got[i] {
					t.Errorf("in another order %q, not %q", d, got[i])
				}
			}
		})
	}
}

// firstVIP is the name of the example's first VIP.
func firstVIP(t *testing.T) string {
	c, err := config.Parse("agent.yaml", config.Example())
	if err != nil {
		t.Fatal(err)
	}
	return c.VIPs[0].Name
}

// A part as it is told has the file's keys, and values as people write them.
func TestTexts(t *testing.T) {
	c, err := config.Parse("agent.yaml", config.Example())
	if err != nil {
		t.Fatal(err)
	}
	texts := Of(c).Texts
	for i, want := range []string{`"members":{"cp-1":"`, `"preferred":[`, `"healthCheck":{`, `"heartbeat":"100ms"`, `"peerPort":7480`, `"port":7443`} {
		if !strings.Contains(texts[i], want) {
			t.Errorf("%s: no %s in %s", Names[i], want, texts[i])
		}
	}
}
