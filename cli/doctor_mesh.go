package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// configurationsDiffer is the code of members' configurations that differ, in the status and
// here.
const configurationsDiffer = "CONFIGURATIONS_DIFFER"

// whys say why the problems that agents report matter.
var whys = map[string]string{
	"STORE_UNAVAILABLE":    "owners stay where they are, but nobody can take over from one that fails",
	"VIP_NO_HOLDER":        "clients of the address get no answer",
	"VIP_TWO_HOLDERS":      "clients of the address reach one node or the other, and lose their connections",
	"VIP_IN_USE":           "two machines with one address serve nobody reliably",
	"VIP_CONFLICT":         "neighbours learn the wrong machine, and send their packets there",
	"VIP_FAILSAFE":         "if the owner fails too, nobody can take over before the store is back",
	"NODE_DOWN":            "it can take over nothing, and the next loss may cost the majority",
	"NODE_NOT_READY":       "it neither confirms owners nor takes over",
	"NODE_NOT_ELIGIBLE":    "it takes over nothing",
	"NODE_DRAINED":         "it takes over nothing",
	"DRAINED_NODE_OWNS":    "stopping it takes the address away for a moment",
	"BACKEND_ORDERED":      "fewer API servers serve the clients",
	"BACKEND_DOWN":         "fewer API servers serve the clients",
	"NO_BACKEND":           "clients get no answer",
	"PROXY_NOT_SERVING":    "clients would get no answer if the address came to that node",
	"TLS_INSECURE":         "who controls the address controls what clients believe to be the API server",
	"LINK_DOWN":            "neither of the two can hand a VIP to the other one, and another such loss may cost the majority",
	"MEMBER_CUT_OFF":       "it can hold and take over nothing, and what it knows of the others is old",
	"BACKEND_VIEWS_DIFFER": "clients get there through some nodes only: which server they have changes when the address moves",
	configurationsDiffer:   "the promise that one node at most holds an address rests on members that agree on members and timing",
	"LINK_ONE_WAY":         "one more path that fails, and the two do not hear each other at all",
}

// parts are what Node.config_digests are of, in their order.
var parts = []string{"members", "vips", "proxies", "timing", "store", "api and tls"}

// meshChecks are of what the status says.
func (d *doctor) meshChecks() []check {
	return []check{
		{"status", d.problems},
		{"versions", d.versions},
		{"configurations", d.configurations},
		{"redundancy", d.redundancy},
	}
}

// problems are those that the mesh sees itself.
func (d *doctor) problems(context.Context) (all []finding, _ error) {
	for _, p := range d.status.GetProblems() {
		all = append(all, finding{Code: p.GetCode(), Found: p.GetMessage(), Why: whys[p.GetCode()], Fix: p.GetFix()})
	}
	return all, nil
}

func (d *doctor) versions(context.Context) ([]finding, error) {
	nodes := map[string][]string{}
	var versions []string
	for _, n := range d.status.GetNodes() {
		if v := n.GetVersion(); v != "" {
			if nodes[v] == nil {
				versions = append(versions, v)
			}
			nodes[v] = append(nodes[v], n.GetName())
		}
	}
	if len(versions) < 2 {
		return nil, d.unheard()
	}
	var found []string
	for _, v := range versions {
		found = append(found, strings.Join(nodes[v], ", ")+": "+v)
	}
	return []finding{{
		Code: "VERSIONS_DIFFER", Found: "members run different versions: " + strings.Join(found, "; "),
		Why: "that is meant for the time of an update; what a later version adds is missing until all have it",
		Fix: "update the others too, one after the other, each with hactl drain first",
	}}, d.unheard()
}

// unheard says of which members nothing is known.
func (d *doctor) unheard() error {
	var names []string
	for _, n := range d.status.GetNodes() {
		if n.GetBoot() == 0 {
			names = append(names, n.GetName())
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("nothing was heard of %s", strings.Join(names, ", "))
}

// configurations compares the members' configurations with that of the one that answers,
// where that one, being older, does not do it itself.
func (d *doctor) configurations(context.Context) (all []finding, _ error) {
	if slices.ContainsFunc(d.status.GetProblems(), func(p *hameshv1.Problem) bool { return p.GetCode() == configurationsDiffer }) {
		return nil, d.unheard()
	}
	own := findNode(d.status, d.status.GetReportedBy())
	for _, n := range d.status.GetNodes() {
		theirs := n.GetConfigDigests()
		if n.GetVersion() != own.GetVersion() || len(theirs) != len(parts) || len(own.GetConfigDigests()) != len(parts) {
			continue // not heard, or of a version that counts differently
		}
		var differ []string
		for i, part := range parts {
			if theirs[i] != own.GetConfigDigests()[i] {
				differ = append(differ, part)
			}
		}
		if len(differ) > 0 {
			all = append(all, finding{
				Code: configurationsDiffer, Node: n.GetName(),
				Found: fmt.Sprintf("the configurations of %s and %s differ in: %s", n.GetName(), own.GetName(), strings.Join(differ, ", ")),
				Why:   whys[configurationsDiffer],
				Fix:   "make those parts of /etc/hamesh/agent.yaml the same on both; what was changed has to be put in force on each",
			})
		}
	}
	return all, d.unheard()
}

// redundancy finds what no single loss would survive.
func (d *doctor) redundancy(context.Context) (all []finding, _ error) {
	nodes, embedded := d.status.GetNodes(), d.status.GetStore().GetKind() == "embedded"
	candidates := 0
	for _, n := range nodes {
		if n.GetRole() == hameshv1.Role_ROLE_CANDIDATE {
			candidates++
		}
	}
	switch {
	case candidates < 2:
		all = append(all, finding{
			Code: "ONE_CANDIDATE", Found: fmt.Sprintf("%d of %d members may own a VIP", candidates, len(nodes)),
			Why: "nobody can take over when it fails", Fix: "add a candidate to the configuration of every member",
		})
	case embedded && len(nodes) == 2:
		all = append(all, finding{
			Code: "TWO_MEMBERS", Found: "the mesh has two members and an embedded store",
			Why: "when one fails, the other is no majority: the address stays where it is, or goes",
			Fix: "add a third member; one with role: witness never owns a VIP and needs little",
		})
	case embedded && len(nodes)%2 == 0:
		all = append(all, finding{
			Code: "EVEN_MEMBERS", Found: fmt.Sprintf("the mesh has %d members and an embedded store", len(nodes)),
			Why: fmt.Sprintf("it survives no more losses than one of %d, and each further member can fail", len(nodes)-1),
			Fix: "add a witness, or leave one out",
		})
	}
	for _, p := range d.status.GetProxies() {
		backends := slices.DeleteFunc(slices.Clone(d.status.GetBackends()), func(b *hameshv1.Backend) bool { return b.GetProxy() != p.GetName() })
		if len(backends) == 1 {
			all = append(all, finding{
				Code: "ONE_BACKEND", Found: "proxy " + p.GetName() + " has one backend, " + backends[0].GetName(),
				Why: "the address outlives a node, but what is behind it does not", Fix: "add the API servers of the other nodes to its backends",
			})
		}
	}
	return all, nil
}
