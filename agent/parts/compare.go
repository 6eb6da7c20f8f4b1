package parts

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Told is what one member says about its configuration.
type Told struct {
	Member  string
	Version string
	Digests []byte
	Texts   map[int]string // of those parts that it has told in words
}

// Difference is one part that is not the same everywhere.
type Difference struct {
	Part   string
	Most   []string // the members that have it as most have
	Others []string // members that have it otherwise, all alike
	Values []Value  // what differs; empty: not known in words
}

// Value is one value that is not the same. An empty one is left out.
type Value struct{ Path, Most, Others string }

// Compare finds what is different between members of the same version; others may count
// their digests differently. Whatever order the members come in, the result is the same.
func Compare(all []Told) (found []Difference) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Told) int { return cmp.Compare(a.Member, b.Member) })
	versions := map[string][]Told{}
	for _, t := range all {
		if len(t.Digests) == len(Names)*DigestLength {
			versions[t.Version] = append(versions[t.Version], t)
		}
	}
	for _, version := range slices.Sorted(maps.Keys(versions)) {
		for i := range Names {
			found = append(found, compare(i, versions[version])...)
		}
	}
	return found
}

// compare finds who has one part otherwise than most members.
func compare(part int, all []Told) (found []Difference) {
	groups := map[string][]Told{}
	var order []string
	for _, t := range all {
		d := string(t.Digests[part*DigestLength : (part+1)*DigestLength])
		if groups[d] == nil {
			order = append(order, d)
		}
		groups[d] = append(groups[d], t)
	}
	// Stable: where two groups are as large, the one with the first name is what most have.
	slices.SortStableFunc(order, func(a, b string) int { return len(groups[b]) - len(groups[a]) })
	text := func(group []Told) string {
		for _, t := range group {
			if t.Texts[part] != "" {
				return t.Texts[part]
			}
		}
		return ""
	}
	names := func(group []Told) (names []string) {
		for _, t := range group {
			names = append(names, t.Member)
		}
		return names
	}
	for _, d := range order[min(1, len(order)):] {
		found = append(found, Difference{
			Part: Names[part], Most: names(groups[order[0]]), Others: names(groups[d]),
			Values: Diff(text(groups[order[0]]), text(groups[d])),
		})
	}
	return found
}

// most is how many values of one difference are named.
const most = 4

// String says it for people.
func (d Difference) String() string {
	m, o := strings.Join(d.Most, ", "), strings.Join(d.Others, ", ")
	if len(d.Values) == 0 {
		return fmt.Sprintf("the configurations of %s and of %s differ in: %s", m, o, d.Part)
	}
	var values []string
	for _, v := range d.Values[:min(most, len(d.Values))] {
		values = append(values, fmt.Sprintf("%s: %s on %s, %s on %s", v.Path, cmp.Or(v.Most, "left out"), m, cmp.Or(v.Others, "left out"), o))
	}
	if more := len(d.Values) - most; more > 0 {
		values = append(values, fmt.Sprintf("and %d more", more))
	}
	return "configurations differ: " + strings.Join(values, "; ")
}

// Diff lists what is different between two JSON values, by paths such as
// proxies.kube-api.port. Of values that are there on one side alone the whole is named. It
// returns nothing where one of them is no JSON.
func Diff(a, b string) (all []Value) {
	var x, y any
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		return nil
	}
	var walk func(path string, x, y any)
	walk = func(path string, x, y any) {
		mx, xIsMap := x.(map[string]any)
		my, yIsMap := y.(map[string]any)
		if !xIsMap || !yIsMap {
			if vx, vy := write(x), write(y); vx != vy {
				all = append(all, Value{path, vx, vy})
			}
			return
		}
		keys := maps.Clone(mx)
		maps.Copy(keys, my)
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			walk(strings.TrimPrefix(path+"."+key, "."), mx[key], my[key])
		}
	}
	walk("", x, y)
	return all
}

// write is a value as it is shown: a string as it is, anything else as JSON.
func write(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	}
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v) // never: it came from JSON
	}
	const long = 120
	if len(text) > long {
		return string(text[:long]) + "…"
	}
	return string(text)
}
