package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/parts"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// report is a status that is being made.
type report struct {
	*hameshv1.GetStatusResponse
	agent          *Agent
	view           ownership.View // what this member's own ears and store say
	known          known          // what all say together
	degraded, down bool
}

// Status implements server.StatusSource: the mesh as this member knows it, with what others
// know and it does not.
func (a *Agent) Status() *hameshv1.GetStatusResponse {
	ctx, cancel := context.WithTimeout(a.ctx, time.Second)
	defer cancel()
	view, _ := a.loop.view(ctx) // an agent that is stopping knows of nobody
	r := &report{
		GetStatusResponse: &hameshv1.GetStatusResponse{Mesh: a.cfg.Mesh, ReportedBy: a.cfg.Node.Name, ApiPort: uint32(a.cfg.API.Port)},
		agent:             a, view: view, known: a.words.view(),
	}
	others := byOthers(r.known)
	for i, v := range r.view.VIPs {
		r.view.VIPs[i] = together(v, others)
	}
	r.store()
	for _, p := range a.reload.problems() {
		r.problem(p.GetCode(), p.GetMessage(), p.GetFix())
	}
	r.configurations()
	for _, v := range r.view.VIPs {
		r.vip(v)
	}
	r.links()
	for _, m := range a.cfg.Members {
		r.node(m)
	}
	for _, svc := range a.services {
		r.service(svc)
	}
	switch {
	case r.down:
		r.State = hameshv1.State_STATE_DOWN
	case r.degraded:
		r.State = hameshv1.State_STATE_DEGRADED
	default:
		r.State = hameshv1.State_STATE_HEALTHY
	}
	if a.cfg.TLS.Insecure {
		r.problem("TLS_INSECURE", "members do not authenticate each other: anybody who reaches port "+fmt.Sprint(a.cfg.API.Port)+" can move VIPs", "hactl pki init and issue, then set tls in the configuration")
	}
	return r.GetStatusResponse
}

func (r *report) problem(code, message, fix string) {
	r.Problems = append(r.Problems, &hameshv1.Problem{Code: code, Message: message, Fix: fix})
	r.degraded = true
}

// self is the member that reports.
func (r *report) self() string { return r.ReportedBy }

// word is the newest heartbeat of another member that is known, however; nil: of none.
func (r *report) word(member string) *hameshv1.Heartbeat {
	if k := r.known.Of[member]; k.Known && k.Word != nil {
		return k.Word.Says
	}
	return nil
}

// awayFrom says whether the store does not answer a member, by its own word.
func (r *report) awayFrom(member string) bool {
	if member == r.self() {
		return !r.Store.Available
	}
	return r.word(member).GetStoreAway()
}

func (r *report) store() {
	a := r.agent
	stored := a.store.Status()
	r.Store = &hameshv1.Store{Kind: stored.Kind, Available: stored.Available, Leader: stored.Leader, Members: stored.Members}
	if e := a.cfg.Store.Embedded; e != nil {
		r.Store.PeerPort = uint32(e.PeerPort)
	}
	var away, answered []string
	for _, m := range a.cfg.Members {
		switch {
		case r.awayFrom(m.Name):
			away = append(away, m.Name)
		case m.Name == r.self() || r.word(m.Name) != nil:
			answered = append(answered, m.Name)
			r.Store.Leader = cmp.Or(r.Store.Leader, r.word(m.Name).GetStoreLeader())
		}
	}
	fix := "see that a majority of the store's members runs and can reach each other"
	if len(answered) > 0 {
		fix = "it answers " + strings.Join(answered, ", ") + ": see the network between " + strings.Join(away, ", ") + " and the store"
		if r.Store.PeerPort != 0 {
			fix += fmt.Sprintf("'s other members, TCP port %d in both directions", r.Store.PeerPort)
		}
	}
	if len(away) > 0 {
		r.problem("STORE_UNAVAILABLE", "the "+stored.Kind+" store does not answer "+strings.Join(away, ", ")+"; owners stay where they are", fix)
	}
}

// configurations compares those of all members that are known.
func (r *report) configurations() {
	own := r.agent.parts.Load()
	told := parts.Told{Member: r.self(), Version: Version, Digests: own.Digests, Texts: map[int]string{}}
	for i, text := range own.Texts {
		told.Texts[i] = text
	}
	all := []parts.Told{told}
	for _, m := range r.agent.cfg.Members {
		h := r.word(m.Name)
		if h == nil {
			continue
		}
		told := parts.Told{Member: m.Name, Version: h.GetVersion(), Digests: h.GetConfigDigests(), Texts: map[int]string{}}
		for _, p := range h.GetConfigParts() {
			told.Texts[int(p.GetPart())] = string(p.GetText())
		}
		all = append(all, told)
	}
	for _, d := range parts.Compare(all) {
		r.problem("CONFIGURATIONS_DIFFER", d.String(),
			"make those parts of /etc/hamesh/agent.yaml the same on every member, and put what was changed in force on each")
	}
}

func (r *report) vip(v ownership.VIPView) {
	a := r.agent
	a.board.mu.Lock()
	t := a.board.owners[v.Name]
	a.board.mu.Unlock()
	vip := &hameshv1.Vip{
		Name: v.Name, Address: a.vip(v.Name).Address.String(), Owner: v.Record.Owner, Epoch: v.Record.Epoch,
		Holders: v.Holders, Transitions: t.transitions, Reason: v.Record.Reason, Interface: a.vip(v.Name).Interface,
	}
	if v.Right != ownership.NoRight {
		vip.Right = rightToProto(v.Right).Enum()
	}
	if t.owner != "" && !t.since.IsZero() {
		vip.Since = timestamppb.New(t.since)
	}
	r.Vips = append(r.Vips, vip)
	switch {
	case len(v.Holders) == 0 && r.known.Alone:
		r.problem("VIP_NO_HOLDER", r.self()+" knows of no node that has "+v.Name+", since it hears no other member", "see why it hears nobody")
		r.down = true
	case len(v.Holders) == 0:
		r.problem("VIP_NO_HOLDER", "no node has "+v.Name, "see the reasons of the nodes; a majority of members must reach each other")
		r.down = true
	case len(v.Holders) > 1:
		r.problem("VIP_TWO_HOLDERS", fmt.Sprintf("%v all have %s", v.Holders, v.Name), "it ends by itself within the lease TTL; if it does not, stop hameshd on all but the owner")
	}
	if v.Stranger != "" {
		r.problem("VIP_IN_USE", v.Stranger+" has "+vip.Address+" already, so nobody takes "+v.Name, "take the address off that machine, or choose another one")
	}
	if c, recent := a.segment.conflict(v.Name); recent && (c.member == "" || c.member != v.Record.Owner) {
		r.problem("VIP_CONFLICT", fmt.Sprintf("%s (%s) speaks for %s on the segment", cmp.Or(c.member, "a stranger"), c.mac, v.Name), "find that machine and take the address off it; the owner defends it meanwhile")
	}
	if v.Right == ownership.Failsafe {
		r.problem("VIP_FAILSAFE", v.Name+" stays with "+v.Record.Owner+" by its peers' word, because the store does not answer it", "bring the store back")
	}
}

// links tells who hears whom, and which pairs have lost each other.
func (r *report) links() {
	a := r.agent
	addresses := map[string]string{}
	for _, m := range a.cfg.Members {
		addresses[m.Name] = m.Address.String()
	}
	for _, l := range r.known.Links {
		link := &hameshv1.Link{From: l.From, To: l.To, Lost: l.Lost, Unconnected: l.Unconnected}
		if l.Heard >= 0 {
			link.Heard = durationpb.New(l.Heard.Truncate(time.Millisecond))
		}
		if l.Told >= 0 {
			link.Told = durationpb.New(l.Told.Truncate(time.Millisecond))
		}
		r.Links = append(r.Links, link)
		if l.Unconnected {
			r.problem("LINK_ONE_WAY", fmt.Sprintf("%s hears %s, but cannot call it at %s, port %d", l.From, l.To, addresses[l.To], a.cfg.API.Port),
				"let members reach each other at that port in both directions, firewalls on the nodes included")
		}
	}
	ports := fmt.Sprintf("TCP port %d", a.cfg.API.Port)
	if e := a.cfg.Store.Embedded; e != nil {
		ports += fmt.Sprintf(" (and %d, the store's)", e.PeerPort)
	}
	for _, p := range r.known.Down {
		r.problem("LINK_DOWN", p.String(), fmt.Sprintf("see the network between %s (%s) and %s (%s): each has to reach %s of the other, firewalls on the nodes included",
			p.A, addresses[p.A], p.B, addresses[p.B], ports))
	}
	if r.known.Alone && len(a.cfg.Members) > 2 {
		r.problem("MEMBER_CUT_OFF", r.self()+" hears no other member: it is cut off from all of them, or they are all down",
			"see the network of "+r.self()+", and hactl status on another member")
	}
}

func (r *report) node(m config.Member) {
	a := r.agent
	k, h := r.known.Of[m.Name], r.word(m.Name)
	n := &hameshv1.Node{
		Name: m.Name, Address: m.Address.String(), Role: a.role(r.known, m.Name), State: hameshv1.NodeState_NODE_STATE_READY,
		StoreAway: r.awayFrom(m.Name), UnheardBy: k.Not,
	}
	ready := h.GetReady()
	if m.Name == r.self() {
		ready, n.Eligible, n.Reason, n.Version, n.Boot = r.view.Ready, r.view.Eligible, *a.board.reason.Load(), Version, a.boot
		n.ConfigDigests = parts.Words(a.parts.Load().Digests)
	} else {
		// Of one that is not known any more, its last word says what it was.
		last := h
		if last == nil {
			a.board.mu.Lock()
			last = a.board.peers[m.Name]
			a.board.mu.Unlock()
		}
		n.Eligible, n.Reason, n.Version, n.Boot = h.GetEligible(), last.GetReason(), last.GetVersion(), last.GetBoot()
		n.ConfigDigests = parts.Words(last.GetConfigDigests())
	}
	switch {
	case !k.Known:
		n.State, n.Reason = hameshv1.NodeState_NODE_STATE_DOWN, r.silence(m.Name)
	case !ready:
		n.State, n.Reason = hameshv1.NodeState_NODE_STATE_SUSPECT, "has not read the store yet"
	}
	if k.Known && !k.Heard {
		n.Reason = strings.TrimSuffix(k.Whose(r.self(), m.Name)+"; "+n.Reason, "; ")
	}
	drained := a.orders.drained(m.Name)
	if drained != "" {
		if n.State == hameshv1.NodeState_NODE_STATE_READY {
			n.State, n.Reason = hameshv1.NodeState_NODE_STATE_DRAINED, drained
		}
		for _, p := range a.drainProblems(m.Name, r.view, r.known) {
			r.problem(p.GetCode(), p.GetMessage(), p.GetFix())
		}
	}
	if n.State != hameshv1.NodeState_NODE_STATE_DOWN {
		n.KeptConnections = a.keptConnections(m.Name, h)
	}
	r.Nodes = append(r.Nodes, n)
	switch {
	case n.State == hameshv1.NodeState_NODE_STATE_DOWN:
		if !r.known.Alone || len(a.cfg.Members) == 2 { // else MEMBER_CUT_OFF says it
			r.problem("NODE_DOWN", m.Name+" is down: "+n.Reason, "start hameshd there, or see its network: no other member hears it")
		}
	case n.State == hameshv1.NodeState_NODE_STATE_SUSPECT:
		r.problem("NODE_NOT_READY", m.Name+" has not read the store yet", "see its log, and the store")
	case !n.Eligible && drained == "" && n.Role != hameshv1.Role_ROLE_WITNESS:
		reason := h.GetReason()
		if m.Name == r.self() {
			reason = n.Reason
		}
		r.problem("NODE_NOT_ELIGIBLE", m.Name+" may not take a VIP: "+reason, "mend what the reason names")
	}
}

// silence says since when nobody hears a member, as far as anybody says.
func (r *report) silence(member string) string {
	least := time.Duration(-1)
	for _, l := range r.known.Links {
		if l.From == member && l.Heard >= 0 && (least < 0 || l.Heard < least) {
			least = l.Heard
		}
	}
	if least < 0 {
		return "not heard yet"
	}
	return "not heard for " + least.Round(100*time.Millisecond).String()
}

func (r *report) service(svc *service) {
	a := r.agent
	r.Proxies = append(r.Proxies, &hameshv1.Proxy{Name: svc.cfg.Name, Port: uint32(svc.cfg.Port)})
	backends, statuses, connections, serving := svc.look(func(member string) bool { return r.known.Of[member].Heard })
	up, certified := 0, svc.certified()
	for i, st := range statuses {
		b := backends[i]
		o := r.opinions(svc, b)
		said := &hameshv1.Backend{
			Name: st.Backend, Address: b.Address.String(), State: backendStates[st.State], Reason: st.Reason,
			Connections: connections[st.Backend] + o.connections, SeenUpBy: o.up, SeenDownBy: o.down, Proxy: svc.cfg.Name, Node: b.Node,
			NotReady: st.State == health.NotReady,
		}
		r.Backends = append(r.Backends, said)
		disabled := said.State == hameshv1.BackendState_BACKEND_STATE_DISABLED
		if said.State == hameshv1.BackendState_BACKEND_STATE_UP || (!disabled && len(o.up) > 0 && said.State == hameshv1.BackendState_BACKEND_STATE_DOWN) {
			up++ // for some of the members at least
		}
		differ := !disabled && len(o.up) > 0 && len(o.down) > 0
		differ = a.board.lasting.look(svc.cfg.Name+"/"+st.Backend, differ, time.Now()) > viewsSettle
		switch {
		case differ:
			r.problem("BACKEND_VIEWS_DIFFER", o.String(b), o.fix(b))
		case said.State == hameshv1.BackendState_BACKEND_STATE_DOWN:
			fix := remedy(st, certified)
			if b.Node != "" && slices.ContainsFunc(a.cfg.Members, func(m config.Member) bool { return m.Name == b.Node }) && !r.known.Of[b.Node].Known {
				fix = "bring " + b.Node + " back"
			}
			r.problem("BACKEND_DOWN", fmt.Sprintf("API server %s (%s) is %s", st.Backend, b.Address, ailing(st)), fix)
		}
		if disabled || said.State == hameshv1.BackendState_BACKEND_STATE_DRAINING {
			if by, ordered := a.orders.backendOrder(svc.cfg.Name, st.Backend); ordered {
				r.problem("BACKEND_ORDERED", fmt.Sprintf("API server %s (%s) is %s by an operator's order (%s)", st.Backend, b.Address, st.State, by),
					"hactl backend "+st.Backend+" --state active when it is fit again")
			}
		}
	}
	if up == 0 {
		message, fix, grave := noBackend(svc.cfg.Name, statuses, certified)
		r.problem("NO_BACKEND", message, fix)
		r.down = r.down || grave
	}
	if !serving {
		r.problem("PROXY_NOT_SERVING", "proxy "+svc.cfg.Name+" does not accept connections on "+r.self(), "see the log")
	}
}
