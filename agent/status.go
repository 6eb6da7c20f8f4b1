package agent

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// oneWayAfter is how long a member that is heard may be out of reach: longer than a few
// attempts to connect.
const oneWayAfter = 3 * time.Second

// board is what this member knows beside the ownership machine, and who waits for news.
type board struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change
	owners  map[string]tenure
	peers   map[string]*hameshv1.Heartbeat // the newest of each other member
	silent  map[string]bool                // members given up
	// next is whom a member forwarded unknown connections of a VIP to when it last was not
	// its holder; keys are MEMBER/VIP.
	next map[string]string

	reason atomic.Pointer[string] // why this node is not eligible; empty: it is
}

// tenure is the present ownership of a VIP as this agent has seen it come about.
type tenure struct {
	owner       string
	epoch       int64
	since       time.Time
	transitions uint32
}

func newBoard() *board {
	b := &board{changed: make(chan struct{}), owners: map[string]tenure{}, peers: map[string]*hameshv1.Heartbeat{}, next: map[string]string{}}
	starting := "starting"
	b.reason.Store(&starting)
	return b
}

// notify wakes everybody who watches the status.
func (b *board) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.changed = make(chan struct{})
}

// Changed implements server.StatusSource.
func (a *Agent) Changed() <-chan struct{} {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	return a.board.changed
}

// noteChange keeps count of owners, and returns what was known before, if anything was.
func (b *board) noteChange(c ownership.Change, at time.Time) (was tenure, known bool) {
	b.mu.Lock()
	was, known = b.owners[c.VIP]
	t := was
	if !known || c.Epoch != t.epoch || c.Owner != t.owner {
		if t.owner != "" && c.Owner != t.owner {
			t.transitions++
		}
		t.owner, t.epoch, t.since = c.Owner, c.Epoch, at
		b.owners[c.VIP] = t
	}
	b.mu.Unlock()
	b.notify()
	return was, known
}

// isSilent says whether a member has been given up.
func (b *board) isSilent(member string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.silent[member]
}

// hear keeps a peer's newest heartbeat, and wakes watchers where it says something new.
func (b *board) hear(h *hameshv1.Heartbeat) {
	b.mu.Lock()
	was := b.peers[h.GetMember()]
	if was != nil && (h.GetBoot() < was.GetBoot() || (h.GetBoot() == was.GetBoot() && h.GetSequence() < was.GetSequence())) {
		b.mu.Unlock()
		return
	}
	b.peers[h.GetMember()] = h
	for _, v := range h.GetVips() {
		if !v.GetHolds() {
			b.next[h.GetMember()+"/"+v.GetName()] = v.GetForwardsTo()
		}
	}
	b.mu.Unlock()
	if was == nil || was.GetReady() != h.GetReady() || was.GetEligible() != h.GetEligible() || was.GetReason() != h.GetReason() || holdsDiffer(was, h) {
		b.notify()
	}
}

func holdsDiffer(a, b *hameshv1.Heartbeat) bool {
	if len(a.GetVips()) != len(b.GetVips()) {
		return true
	}
	for i, v := range a.GetVips() {
		if w := b.GetVips()[i]; v.GetHeld() != w.GetHeld() || v.GetRight() != w.GetRight() {
			return true
		}
	}
	return false
}

// Status implements server.StatusSource: the mesh as this member sees it.
func (a *Agent) Status() *hameshv1.GetStatusResponse {
	s := &hameshv1.GetStatusResponse{Mesh: a.cfg.Mesh, ReportedBy: a.cfg.Node.Name, ApiPort: uint32(a.cfg.API.Port)}
	ctx, cancel := context.WithTimeout(a.ctx, time.Second)
	defer cancel()
	view, _ := a.loop.view(ctx) // an agent that is stopping knows of nobody
	a.board.mu.Lock()
	owners, beats := maps.Clone(a.board.owners), maps.Clone(a.board.peers)
	a.board.mu.Unlock()

	peers := map[string]ownership.PeerView{}
	for _, p := range view.Peers {
		peers[p.Name] = p
	}
	degraded, down := false, false
	problem := func(code, message, fix string) {
		s.Problems = append(s.Problems, &hameshv1.Problem{Code: code, Message: message, Fix: fix})
		degraded = true
	}

	stored := a.store.Status()
	s.Store = &hameshv1.Store{Kind: stored.Kind, Available: stored.Available, Leader: stored.Leader, Members: stored.Members}
	if e := a.cfg.Store.Embedded; e != nil {
		s.Store.PeerPort = uint32(e.PeerPort)
	}
	if !stored.Available {
		problem("STORE_UNAVAILABLE", "the "+stored.Kind+" store does not answer "+a.cfg.Node.Name+"; owners stay where they are",
			"see that a majority of the store's members runs and can reach each other")
	}

	for _, p := range a.reload.problems() {
		problem(p.GetCode(), p.GetMessage(), p.GetFix())
	}

	for _, v := range view.VIPs {
		t := owners[v.Name]
		vip := &hameshv1.Vip{
			Name: v.Name, Address: a.vip(v.Name).Address.String(), Owner: v.Record.Owner, Epoch: v.Record.Epoch,
			Holders: v.Holders, Transitions: t.transitions, Reason: v.Record.Reason, Interface: a.vip(v.Name).Interface,
		}
		if v.Right != ownership.NoRight {
			r := rightToProto(v.Right)
			vip.Right = &r
		}
		if t.owner != "" && !t.since.IsZero() {
			vip.Since = timestamppb.New(t.since)
		}
		s.Vips = append(s.Vips, vip)
		switch {
		case len(v.Holders) == 0:
			problem("VIP_NO_HOLDER", "no node has "+v.Name, "see the reasons of the nodes; a majority of members must reach each other")
			down = true
		case len(v.Holders) > 1:
			problem("VIP_TWO_HOLDERS", fmt.Sprintf("%v all have %s", v.Holders, v.Name), "it ends by itself within the lease TTL; if it does not, stop hameshd on all but the owner")
		}
		if v.Stranger != "" {
			problem("VIP_IN_USE", v.Stranger+" has "+vip.Address+" already, so nobody takes "+v.Name, "take the address off that machine, or choose another one")
		}
		if c, recent := a.segment.conflict(v.Name); recent && (c.member == "" || c.member != v.Record.Owner) {
			who := "a stranger"
			if c.member != "" {
				who = c.member
			}
			problem("VIP_CONFLICT", fmt.Sprintf("%s (%s) speaks for %s on the segment", who, c.mac, v.Name), "find that machine and take the address off it; the owner defends it meanwhile")
		}
		if v.Right == ownership.Failsafe {
			problem("VIP_FAILSAFE", v.Name+" stays with "+v.Record.Owner+" by its peers' word, because the store does not answer it", "bring the store back")
		}
	}

	for _, m := range a.cfg.Members {
		n := &hameshv1.Node{Name: m.Name, Address: m.Address.String(), Role: hameshv1.Role_ROLE_CANDIDATE}
		if m.Role == config.Witness {
			n.Role = hameshv1.Role_ROLE_WITNESS
		}
		if m.Name == a.cfg.Node.Name {
			n.State, n.Eligible, n.Reason, n.Version = hameshv1.NodeState_NODE_STATE_READY, view.Eligible, *a.board.reason.Load(), Version
			n.Boot, n.ConfigDigests = a.boot, digestWords(*a.digests.Load())
			if !view.Ready {
				n.State, n.Reason = hameshv1.NodeState_NODE_STATE_SUSPECT, "has not read the store yet"
			}
		} else {
			p, h := peers[m.Name], beats[m.Name]
			n.Eligible, n.Reason, n.Version = p.Heard && p.Eligible, h.GetReason(), h.GetVersion()
			n.Boot, n.ConfigDigests = h.GetBoot(), digestWords(h.GetConfigDigests())
			if h != nil {
				n.Role = h.GetRole()
			}
			switch {
			case !p.Heard:
				n.State, n.Reason = hameshv1.NodeState_NODE_STATE_DOWN, "not heard yet"
				if h != nil {
					n.Reason = "not heard for " + p.Silence.Round(100*time.Millisecond).String()
				}
			case !p.Ready:
				n.State, n.Reason = hameshv1.NodeState_NODE_STATE_SUSPECT, "has not read the store yet"
			default:
				n.State = hameshv1.NodeState_NODE_STATE_READY
			}
			if p.Heard && a.links[m.Name].Lost() > oneWayAfter {
				problem("LINK_ONE_WAY", fmt.Sprintf("%s hears %s, but cannot call it at %s, port %d", a.cfg.Node.Name, m.Name, m.Address, a.cfg.API.Port),
					"let members reach each other at that port in both directions, firewalls on the nodes included")
			}
		}
		drained := a.orders.drained(m.Name)
		if drained != "" {
			if n.State == hameshv1.NodeState_NODE_STATE_READY {
				n.State, n.Reason = hameshv1.NodeState_NODE_STATE_DRAINED, drained
			}
			for _, p := range a.drainProblems(m.Name, view) {
				problem(p.GetCode(), p.GetMessage(), p.GetFix())
			}
		}
		if n.State != hameshv1.NodeState_NODE_STATE_DOWN {
			n.KeptConnections = a.keptConnections(m.Name)
		}
		s.Nodes = append(s.Nodes, n)
		switch {
		case n.State == hameshv1.NodeState_NODE_STATE_DOWN:
			problem("NODE_DOWN", m.Name+" is down: "+n.Reason, "start hameshd there, or see the network between "+a.cfg.Node.Name+" and "+m.Name)
		case n.State == hameshv1.NodeState_NODE_STATE_SUSPECT:
			problem("NODE_NOT_READY", m.Name+" "+n.Reason, "see its log, and the store")
		case !n.Eligible && drained == "" && n.Role != hameshv1.Role_ROLE_WITNESS:
			problem("NODE_NOT_ELIGIBLE", m.Name+" may not take a VIP: "+n.Reason, "mend what the reason names")
		}
	}

	for _, svc := range a.services {
		s.Proxies = append(s.Proxies, &hameshv1.Proxy{Name: svc.cfg.Name, Port: uint32(svc.cfg.Port)})
		backends, statuses, connections, serving := svc.look(func(member string) bool { return peers[member].Heard })
		up, certified := 0, svc.certified()
		for i, st := range statuses {
			b := backends[i]
			s.Backends = append(s.Backends, &hameshv1.Backend{
				Name: st.Backend, Address: b.Address.String(), State: backendStates[st.State], Reason: st.Reason,
				Connections: connections[st.Backend], SeenUpBy: st.SeenUpBy, Proxy: svc.cfg.Name, Node: b.Node,
				NotReady: st.State == health.NotReady,
			})
			switch s.Backends[len(s.Backends)-1].State {
			case hameshv1.BackendState_BACKEND_STATE_UP:
				up++
			case hameshv1.BackendState_BACKEND_STATE_DRAINING, hameshv1.BackendState_BACKEND_STATE_DISABLED:
				if by, ordered := a.orders.backendOrder(svc.cfg.Name, st.Backend); ordered {
					problem("BACKEND_ORDERED", fmt.Sprintf("API server %s (%s) is %s by an operator's order (%s)", st.Backend, b.Address, st.State, by),
						"hactl backend "+st.Backend+" --state active when it is fit again")
				}
			case hameshv1.BackendState_BACKEND_STATE_DOWN:
				fix := remedy(st, certified)
				if b.Node != "" && b.Node != a.cfg.Node.Name && !peers[b.Node].Heard {
					fix = "bring " + b.Node + " back"
				}
				problem("BACKEND_DOWN", fmt.Sprintf("API server %s (%s) is %s", st.Backend, b.Address, ailing(st)), fix)
			}
		}
		if up == 0 {
			message, fix, grave := noBackend(svc.cfg.Name, statuses, certified)
			problem("NO_BACKEND", message, fix)
			down = down || grave
		}
		if !serving {
			problem("PROXY_NOT_SERVING", "proxy "+svc.cfg.Name+" does not accept connections on "+a.cfg.Node.Name, "see the log")
		}
	}

	switch {
	case down:
		s.State = hameshv1.State_STATE_DOWN
	case degraded:
		s.State = hameshv1.State_STATE_DEGRADED
	default:
		s.State = hameshv1.State_STATE_HEALTHY
	}
	if a.cfg.TLS.Insecure {
		problem("TLS_INSECURE", "members do not authenticate each other: anybody who reaches port "+fmt.Sprint(a.cfg.API.Port)+" can move VIPs", "hactl pki init and issue, then set tls in the configuration")
	}
	return s
}
