package health

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Backend is one API server behind a proxy.
type Backend struct {
	Name    string
	Address netip.AddrPort // another one makes it another backend
	Node    string         // the member it runs on, whose own agent sees it first-hand; empty: none
}

// Report is what one member's own checks say about one backend.
type Report struct {
	Backend string
	State   State  // Up, NotReady or Down; anything else says nothing
	Reason  string // why it is not up
	Refuses bool   // as Result.Refuses
}

// Order is what an operator wants of a backend.
type Order int

// The zero Order is invalid.
const (
	_ Order = iota
	// Serve: as its health allows.
	Serve
	// Drain: no new connections.
	Drain
	// Disable: no connections.
	Disable
)

// Status is what the mesh's members together know of one backend, seen by one of them.
type Status struct {
	Backend  string
	State    State    // Up, NotReady, Down, Draining or Disabled
	Reason   string   // why it is not up, for people
	SeenUpBy []string // the members whose own checks see it up, sorted
	// Unheard: it is down for its node's silence alone; the API server itself has done nothing.
	Unheard bool
	// Refuses: it is down, but its machine answers for it, and so has ended or will end what
	// it had under way.
	Refuses bool
}

// Config says what a View looks at.
type Config struct {
	Self     string    // this member
	Backends []Backend // in the order in which they are to be shown
	// Fresh is how long another member's report counts after it was heard: a few
	// heartbeats.
	Fresh time.Duration
}

// View is the common view of the backends of one proxy. It is not safe for use by
// several goroutines at once.
type View struct {
	cfg    Config
	own    map[string]own
	heard  map[string]heard
	dead   map[string]time.Duration // when each was last heard
	proven map[string]time.Duration
	orders map[string]Order
}

type own struct {
	last Result
	// proof is when the last successful check was begun; so the backend's node was
	// alive after that.
	proof time.Duration
	// reason is that of the last failed check.
	reason string
}

type heard struct {
	at      time.Duration
	reports map[string]Report
}

// NewView returns a view that knows nothing yet.
func NewView(cfg Config) *View {
	return &View{
		cfg:    cfg,
		own:    map[string]own{},
		heard:  map[string]heard{},
		dead:   map[string]time.Duration{},
		proven: map[string]time.Duration{},
		orders: map[string]Order{},
	}
}

// SetBackends takes the place of Config.Backends. What is known and ordered of a backend
// that is there no more is forgotten.
func (v *View) SetBackends(backends []Backend) {
	for _, b := range v.cfg.Backends {
		if !slices.ContainsFunc(backends, func(kept Backend) bool { return kept.Name == b.Name && kept.Address == b.Address }) {
			delete(v.own, b.Name)
			delete(v.orders, b.Name)
		}
	}
	v.cfg.Backends = backends
}

// Observe takes the result of an own check that ended now.
func (v *View) Observe(now time.Duration, backend string, r Result) {
	o := v.own[backend]
	if r.OK {
		o.proof = now - r.Took
	} else {
		o.reason = r.Reason
	}
	o.last = r
	v.own[backend] = o
}

// Hear takes everything that another member says now; what it said before is void.
func (v *View) Hear(now time.Duration, member string, reports []Report) {
	h := heard{at: now, reports: make(map[string]Report, len(reports))}
	for _, r := range reports {
		h.reports[r.Backend] = r
	}
	v.heard[member] = h
}

// SetDead says which members are dead now, each with the time it was last heard. A backend on
// its node is down then, unless something has proved since that the node lives and only the
// agent is silent: a successful check that was begun later, or Prove.
func (v *View) SetDead(lastHeard map[string]time.Duration) { v.dead = maps.Clone(lastHeard) }

// Prove takes a proof that a member's node lives now, which is neither its agent's word nor a
// check.
func (v *View) Prove(now time.Duration, member string) { v.proven[member] = now }

// SetOrder takes an operator's order for a backend, in place of the one before.
func (v *View) SetOrder(backend string, order Order) { v.orders[backend] = order }

// Own returns what this member's checks say, for the other members.
func (v *View) Own() []Report {
	var reports []Report
	for _, b := range v.cfg.Backends {
		if o := v.own[b.Name]; o.last.State != Unknown {
			reports = append(reports, Report{Backend: b.Name, State: o.last.State, Reason: o.failing(), Refuses: o.last.Refuses})
		}
	}
	return reports
}

// Backends returns the view at one time, in the order of the configuration.
func (v *View) Backends(now time.Duration) []Status {
	all := make([]Status, len(v.cfg.Backends))
	for i, b := range v.cfg.Backends {
		all[i] = v.status(now, b)
	}
	return all
}

func (v *View) status(now time.Duration, b Backend) Status {
	s := Status{Backend: b.Name, SeenUpBy: v.seenUpBy(now, b.Name)}
	s.State, s.Reason = v.judge(now, b)
	switch order := v.orders[b.Name]; {
	case order == Disable:
		s.State, s.Reason = Disabled, "by an operator's order"
	case order == Drain && s.State == Up: // what is down serves nobody, whatever was ordered
		s.State, s.Reason = Draining, "by an operator's order"
	}
	s.Unheard = s.State == Down && v.lost(now, b) && v.unheard(b)
	s.Refuses = s.State == Down && v.refuses(now, b)
	return s
}

// judge weighs the evidence. The word of the backend's own node counts beside the own check because it
// sees a failing API server without the network between, and often earlier; others'
// words do not, since their failed checks may be due to their own network.
func (v *View) judge(now time.Duration, b Backend) (State, string) {
	o := v.own[b.Name]
	if v.lost(now, b) {
		return Down, "node " + b.Node + " is down"
	}
	if o.last.State == Down {
		return Down, o.failing()
	}
	firstHand := v.report(now, b.Node, b.Name)
	switch {
	case firstHand.State == Down:
		return Down, firstHand.Reason + " (seen by " + b.Node + ")"
	case o.last.State == NotReady:
		return NotReady, o.failing()
	case firstHand.State == NotReady:
		return NotReady, firstHand.Reason + " (seen by " + b.Node + ")"
	case firstHand.State == Up, o.last.State == Up:
		return Up, ""
	case o.reason != "":
		return Down, o.reason
	}
	return Down, "not checked yet"
}

// refuses reports whether all that says that a backend is down says so of a machine that
// answers.
func (v *View) refuses(now time.Duration, b Backend) bool {
	own, firstHand := v.own[b.Name].last, v.report(now, b.Node, b.Name)
	return !v.lost(now, b) && (own.State == Down || firstHand.State == Down) &&
		(own.State != Down || own.Refuses) && (firstHand.State != Down || firstHand.Refuses)
}

// renewed is for how long a failed check does not make a node that was proven to live a dead
// one: who lives refuses links several times in that time.
const renewed = 500 * time.Millisecond

// lost reports whether a backend is down with its node.
func (v *View) lost(now time.Duration, b Backend) bool {
	heard, dead := v.dead[b.Node]
	if !dead || b.Node == v.cfg.Self {
		return false
	}
	o, proven := v.own[b.Name], v.proven[b.Node]
	return max(o.proof, proven) <= heard || (!o.last.OK && now-proven > renewed)
}

// unheard reports whether nothing at all speaks against a backend that is lost.
func (v *View) unheard(b Backend) bool {
	o := v.own[b.Name]
	return o.last.OK && o.last.State == Up && !slices.Contains([]State{Down, NotReady}, v.heard[b.Node].reports[b.Name].State)
}

// report returns what another member says about a backend; zero: nothing that counts.
func (v *View) report(now time.Duration, member, backend string) Report {
	h, ok := v.heard[member]
	if !ok || member == v.cfg.Self || now-h.at > v.cfg.Fresh {
		return Report{}
	}
	return h.reports[backend]
}

func (v *View) seenUpBy(now time.Duration, backend string) []string {
	var members []string
	if v.own[backend].last.State == Up {
		members = append(members, v.cfg.Self)
	}
	for member := range v.heard {
		if v.report(now, member, backend).State == Up {
			members = append(members, member)
		}
	}
	slices.Sort(members)
	return members
}

// failing returns why the own check is down or not ready; empty where it is neither.
func (o own) failing() string {
	if o.last.State != Down && o.last.State != NotReady {
		return ""
	}
	return o.reason
}
