//go:build linux

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/mdlayher/arp"

	"github.com/hamesh/hamesh/deploy/lab"
)

// What the design promises; a change of these is a change of the design.
const (
	// together is how long two kernels may have the address where no fault excuses it:
	// an agent killed alone leaves its guard, which takes the address off.
	together = 50 * time.Millisecond
	// expiry is what comes on top of a lease's TTL until a kernel has taken off the
	// address of an agent that was stopped, or killed with its guard.
	expiry = 500 * time.Millisecond
	// unmoved is for faults that must not move the VIP: a few samples.
	unmoved = 50 * time.Millisecond
	// planned is for faults that the owner answers with a hand-over.
	planned = 250 * time.Millisecond
	// restored is what a store that comes back may take on top, at most: its own
	// election (twice 1 s) and its clients' pause between attempts (1 s).
	restored = 3 * time.Second
)

// setting is what bounds depend on.
type setting struct {
	nodes    int
	external bool
	ttl      time.Duration // of a lease
	long     bool          // the run is long enough for what takes its time
}

// longRun is how long a run lasts, at least, in which every fault strikes twice and one
// node after the other is cut for long.
const longRun = 3 * time.Minute

// takeover is the longest time in which a mesh with a majority gets a new holder.
func (s setting) takeover() time.Duration {
	if s.external {
		return 1030 * time.Millisecond
	}
	return 2 * time.Second // the store may have to elect first
}

// kind is one sort of fault.
type kind struct {
	name        string
	least, most time.Duration // how long it lasts
	nodes       int           // how many it strikes
	store       storeKind
	// costs: the last of its nodes counts as lost to the majority while it lasts.
	costs bool
	cable bool // it cuts its node off from everything
	// steals: it has packets of clients go to somebody else for moments, whoever they are for.
	steals bool
	// parts are what it takes hold of, of its nodes and beyond: no two faults at once
	// may take hold of the same.
	parts func(nodes []int) []string
	bound func(setting) time.Duration // the longest time without a holder
	why   string                      // the reason for the bound
	// lingers is how long two kernels may have the address from its beginning on; nil:
	// no longer than ever.
	lingers func(s setting, length time.Duration) time.Duration
	begin   func(*lab.Mesh, []*lab.Node, time.Duration) (end func() error, err error)
}

// storeKind says which stores a kind is for, and whether it takes them away.
type storeKind int

const (
	anyStore storeKind = iota + 1
	embeddedAway
	externalAway
)

const (
	whyLost    = "a new holder, the store's election included"
	whyUnmoved = "nothing may move; a few samples"
	whyMove    = "a planned hand-over"
)

func takeover(s setting) time.Duration { return s.takeover() }
func stays(setting) time.Duration      { return unmoved }
func handedOver(setting) time.Duration { return planned }

// partsOf names the parts of every struck node.
func partsOf(of ...string) func([]int) []string {
	return func(nodes []int) (all []string) {
		for _, n := range nodes {
			for _, part := range of {
				all = append(all, fmt.Sprint(part, n))
			}
		}
		return all
	}
}

func whole(name string) func([]int) []string { return func([]int) []string { return []string{name} } }

const (
	second = time.Second
	milli  = time.Millisecond
)

var kinds = []kind{
	{
		name: "power cut", least: 500 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true,
		parts: func(nodes []int) []string { return append(partsOf("agent", "link", "api")(nodes), "ports") },
		bound: takeover, why: whyLost,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].PowerOn, n[0].PowerOff()
		},
	},
	{
		name: "unplugged", least: 300 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true, cable: true,
		parts: partsOf("link"), bound: takeover, why: whyLost,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			p := n[0].Port()
			return p.Mend, p.Cut()
		},
	},
	{
		name: "isolated", least: 200 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true, cable: true,
		parts: partsOf("link"), bound: takeover, why: whyLost,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			p := n[0].Port()
			return p.Rejoin, p.Isolate()
		},
	},
	{
		name: "deaf to all nodes", least: 200 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("link"), bound: takeover, why: whyLost,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return oneWay(m, others(m, n[0]), n)
		},
	},
	{
		name: "mute to all nodes", least: 200 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("link"), bound: takeover, why: whyLost,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return oneWay(m, n, others(m, n[0]))
		},
	},
	{
		name: "cut off from all nodes", least: 200 * milli, most: 4 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("link"), bound: takeover, why: whyLost,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Switch.Partition(lab.Frames{}, ports(n), ports(others(m, n[0])))
		},
	},
	{
		name: "two apart", least: 200 * milli, most: 4 * second, nodes: 2, store: anyStore, costs: true,
		parts: partsOf("link"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Switch.Partition(lab.Frames{}, ports(n[:1]), ports(n[1:]))
		},
	},
	{
		name: "two apart one way", least: 200 * milli, most: 4 * second, nodes: 2, store: anyStore, costs: true,
		parts: partsOf("link"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return oneWay(m, n[:1], n[1:])
		},
	},
	{
		name: "two agents apart", least: 200 * milli, most: 4 * second, nodes: 2, store: anyStore, costs: true,
		parts: partsOf("link"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Switch.Partition(lab.Frames{TCPPort: lab.MeshPort}, ports(n[:1]), ports(n[1:]))
		},
	},
	{
		name: "two members of the store apart", least: 200 * milli, most: 4 * second, nodes: 2, store: embeddedAway,
		parts: partsOf("link"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Switch.Partition(lab.Frames{TCPPort: lab.StorePort}, ports(n[:1]), ports(n[1:]))
		},
	},
	{
		name: "agent killed", least: 200 * milli, most: 3 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("agent"), bound: takeover, why: whyLost,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].StartAgent, n[0].KillAgent()
		},
	},
	{
		name: "agent and guard killed", least: 200 * milli, most: 3 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("agent"), bound: takeover, why: whyLost,
		lingers: func(s setting, _ time.Duration) time.Duration { return s.ttl + expiry },
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].StartAgent, n[0].KillAll()
		},
	},
	{
		name: "agent frozen", least: 200 * milli, most: 10 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("agent"), bound: takeover, why: whyLost,
		lingers: func(s setting, length time.Duration) time.Duration { return min(length, s.ttl) + expiry },
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].Thaw, n[0].Freeze()
		},
	},
	{
		name: "agent stopped in order", least: 200 * milli, most: 2 * second, nodes: 1, store: anyStore, costs: true,
		parts: partsOf("agent"), bound: handedOver, why: whyMove,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].StartAgent, n[0].StopAgent()
		},
	},
	{
		name: "store cut apart", least: 500 * milli, most: 6 * second, store: embeddedAway,
		parts: whole("ports"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, _ []*lab.Node, _ time.Duration) (func() error, error) { return m.StopStore() },
	},
	{
		name: "store frozen", least: 500 * milli, most: 6 * second, store: externalAway,
		parts: whole("store"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, _ []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Store.Start, m.Store.Stop()
		},
	},
	{
		name: "store killed", least: 500 * milli, most: 6 * second, store: externalAway,
		parts: whole("store"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, _ []*lab.Node, _ time.Duration) (func() error, error) {
			return m.Store.Start, m.Store.Kill()
		},
	},
	{
		name: "VIP deleted by hand", least: 100 * milli, most: 500 * milli, store: anyStore,
		parts: whole("vip"), bound: handedOver, why: "seen in netlink and put on again",
		begin: func(m *lab.Mesh, _ []*lab.Node, _ time.Duration) (func() error, error) {
			var errs []error
			for _, name := range m.Recorder.Now() {
				errs = append(errs, m.Node(name).DeleteAddress(m.VIP().Addr()))
			}
			return nothing, errors.Join(errs...)
		},
	},
	{
		name: "a stranger announces the VIP", least: 100 * milli, most: second, store: anyStore, steals: true,
		parts: whole("stranger"), bound: stays, why: whyUnmoved,
		begin: func(m *lab.Mesh, _ []*lab.Node, _ time.Duration) (func() error, error) {
			both := func() error {
				return errors.Join(m.Impersonate(arp.OperationRequest), m.Impersonate(arp.OperationReply))
			}
			return both, both()
		},
	},
	{
		name: "processors busy", least: second, most: 4 * second, store: anyStore,
		parts: whole("processors"), bound: takeover, why: "a starved holder may lapse and be replaced",
		begin: func(m *lab.Mesh, _ []*lab.Node, length time.Duration) (func() error, error) {
			return nothing, m.Burn(2, length)
		},
	},
	{
		name: "API server sick", least: 500 * milli, most: 4 * second, nodes: 1, store: anyStore,
		parts: partsOf("api"), bound: handedOver, why: whyMove,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].API.Well, n[0].API.Sick()
		},
	},
	{
		name: "API server hung", least: 500 * milli, most: 4 * second, nodes: 1, store: anyStore,
		parts: partsOf("api"), bound: handedOver, why: whyMove,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].API.Well, n[0].API.Hang()
		},
	},
	{
		name: "API server killed", least: 500 * milli, most: 4 * second, nodes: 1, store: anyStore,
		parts: partsOf("api"), bound: handedOver, why: whyMove,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			return n[0].API.Start, n[0].API.Kill()
		},
	},
	{
		name: "VIP moved", least: 100 * milli, most: 500 * milli, nodes: 1, store: anyStore,
		parts: whole("move"), bound: handedOver, why: whyMove,
		begin: func(_ *lab.Mesh, n []*lab.Node, _ time.Duration) (func() error, error) {
			if n[0].Host() == nil {
				return nothing, nil
			}
			// Among other faults it may be refused, and then changes nothing.
			_, _, _, err := n[0].Hactl("move-vip", "kube-api", "--to", n[0].Name)
			return nothing, err
		},
	},
}

func nothing() error { return nil }

func others(m *lab.Mesh, n *lab.Node) []*lab.Node {
	return slices.DeleteFunc(slices.Clone(m.Nodes), func(o *lab.Node) bool { return o == n })
}

// ports are those of the nodes that have power.
func ports(nodes []*lab.Node) (all []*lab.Port) {
	for _, n := range nodes {
		if p := n.Port(); p != nil {
			all = append(all, p)
		}
	}
	return all
}

// oneWay drops what goes from some nodes to others.
func oneWay(m *lab.Mesh, from, to []*lab.Node) (lift func() error, err error) {
	var lifts []func() error
	lift = func() error {
		var errs []error
		for _, l := range lifts {
			errs = append(errs, l())
		}
		return errors.Join(errs...)
	}
	for _, f := range ports(from) {
		for _, t := range ports(to) {
			l, err := m.Switch.Block(f, t, lab.Frames{})
			if err != nil {
				return nil, errors.Join(err, lift())
			}
			lifts = append(lifts, l)
		}
	}
	return lift, nil
}

// fault is one thing that is going to happen.
type fault struct {
	*kind
	at, length time.Duration // since the group's beginning; how long
	nodes      []int         // 0 is the holder at the group's beginning, then the others in order
}

// group is faults that overlap.
type group struct {
	faults []fault
	// vacant: there may be no holder until it has ended, for no majority, or no store
	// to take over with, is left.
	vacant bool
	quiet  bool // nothing follows until every window has ended

	hurry bool // the next group follows as soon as the mesh is healthy
	again bool // its nodes are those of the group before, whoever holds the VIP now
}

// planner draws groups of faults; the same seed draws the same ones. Like from a pack of
// cards: no kind comes again before every other one has come.
type planner struct {
	setting
	rng   *rand.Rand
	pack  []*kind
	count int
	queue []group // come before anything new
}

func newPlanner(s setting, seed uint64) *planner {
	return &planner{setting: s, rng: rand.New(rand.NewPCG(seed, 0))}
}

// shuffle makes a new pack of the kinds that this mesh can have.
func (p *planner) shuffle() {
	for i, k := range kinds {
		if k.nodes <= p.nodes && (k.store == anyStore || (k.store == externalAway) == p.external) {
			p.pack = append(p.pack, &kinds[i])
		}
	}
	p.rng.Shuffle(len(p.pack), func(i, j int) { p.pack[i], p.pack[j] = p.pack[j], p.pack[i] })
}

// spare is how many nodes can be lost with a majority left.
func (s setting) spare() int { return (s.nodes - 1) / 2 }

// next draws a group. In a long run each strikes twice, and now and then an owner is cut
// for long, and the next one once the first is back.
func (p *planner) next() group {
	if len(p.queue) == 0 {
		g := p.fresh()
		p.queue = []group{g}
		if p.long && p.count%6 == 5 {
			p.queue = p.oneAfterTheOther()
		} else if p.long {
			first, second := g, g
			first.hurry, first.quiet, second.again = true, false, true
			p.queue = []group{first, second}
		}
	}
	g := p.queue[0]
	p.queue = p.queue[1:]
	return g
}

// oneAfterTheOther cuts an owner for 10 to 90 s, and then the one that has taken over.
func (p *planner) oneAfterTheOther() []group {
	var able []*kind
	for i, k := range kinds {
		if k.cable {
			able = append(able, &kinds[i])
		}
	}
	k := able[p.rng.IntN(len(able))]
	long := 10*second + time.Duration(p.rng.Int64N(int64(80*second))).Truncate(milli)
	vacant := p.spare() == 0
	return []group{
		{faults: []fault{{kind: k, length: long, nodes: []int{0}}}, vacant: vacant, hurry: true},
		{faults: []fault{{kind: k, length: p.length(k), nodes: []int{0}}}, vacant: vacant, quiet: true},
	}
}

func (p *planner) fresh() group {
	p.count++
	g := group{quiet: p.count%3 == 0}
	if p.count%7 == 4 {
		return p.majority(g)
	}
	if len(p.pack) == 0 {
		p.shuffle()
	}
	want := 1 + p.rng.IntN(3)
	p.pack = slices.DeleteFunc(p.pack, func(k *kind) bool {
		if len(g.faults) == want {
			return false
		}
		f := p.draw(k)
		if len(g.faults) == 0 {
			f.at = 0
		}
		if !p.fits(g, f) {
			return false
		}
		g.faults = append(g.faults, f)
		return true
	})
	lost := slices.ContainsFunc(g.faults, func(f fault) bool { return f.costs })
	away := slices.ContainsFunc(g.faults, func(f fault) bool { return f.store != anyStore })
	g.vacant = lost && (away || p.spare() == 0)
	return g
}

// majority has one fault strike so many nodes at once that no majority is left.
func (p *planner) majority(g group) group {
	var able []*kind
	for i, k := range kinds {
		if k.costs && k.nodes == 1 {
			able = append(able, &kinds[i])
		}
	}
	k := able[p.rng.IntN(len(able))]
	length := p.length(k)
	for _, node := range p.rng.Perm(p.nodes)[:p.spare()+1] {
		g.faults = append(g.faults, fault{kind: k, length: length, nodes: []int{node}})
	}
	g.vacant = true
	return g
}

func (p *planner) draw(k *kind) fault {
	f := fault{kind: k, at: time.Duration(p.rng.Int64N(int64(2 * second))).Truncate(milli), length: p.length(k)}
	order := p.rng.Perm(p.nodes)
	if p.rng.IntN(2) == 0 { // the holder more often than not
		i := slices.Index(order, 0)
		order[0], order[i] = order[i], order[0]
	}
	f.nodes = order[:k.nodes]
	return f
}

func (p *planner) length(k *kind) time.Duration {
	return k.least + time.Duration(p.rng.Int64N(int64(k.most-k.least))).Truncate(milli)
}

// fits reports whether a fault can join a group: nothing else takes hold of the same
// parts, and a majority is left.
func (p *planner) fits(g group, f fault) bool {
	lost := make(map[int]bool)
	for _, o := range append(slices.Clone(g.faults), f) {
		if o.costs {
			// Of two apart, the rest is whole without either; not the holder, so that
			// what strikes the holder too counts twice.
			lost[slices.Max(o.nodes)] = true
		}
	}
	if len(lost) > max(1, p.spare()) {
		return false
	}
	taken := f.parts(f.nodes)
	return !slices.ContainsFunc(g.faults, func(o fault) bool {
		return slices.ContainsFunc(o.parts(o.nodes), func(part string) bool { return slices.Contains(taken, part) })
	})
}
