package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/hearsay"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/store"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// What the store keeps as an order's state.
const (
	nodeDrained     = "drained"
	backendDraining = "draining"
	backendDisabled = "disabled"
)

const (
	// requestLength is the longest request_id, in bytes: every poll of the store reads it.
	requestLength = 128
	// inForceWithin is how long the answer to an order waits until this member has applied
	// it, which takes a poll; the order is kept all the same.
	inForceWithin = time.Second
	// untoldFor is how long an order that the store has not answered for may turn out to be
	// kept: etcd gives up its proposals after seconds.
	untoldFor = time.Minute
)

// orders are what operators want of nodes and backends: kept in the store, so that they
// outlast every agent, and carried out by each member on its own, as far as they concern
// it. While the store is away those that were known stay in force.
type orders struct {
	agent  *Agent
	newest chan store.Orders // as last read from the store, not applied yet; room for one

	mu      sync.Mutex
	known   bool // the store was read
	inForce map[store.Subject]store.Order
	applied int64         // revision of inForce
	changed chan struct{} // closed and replaced when they were applied
	// untold are the events of orders given through this member, by request, until those are
	// known to be kept.
	untold map[string]*hameshv1.Event
}

func newOrders(a *Agent) *orders {
	return &orders{agent: a, newest: make(chan store.Orders, 1), changed: make(chan struct{}), untold: map[string]*hameshv1.Event{}}
}

// put takes what the store says, in place of what it said before. It does not block.
func (o *orders) put(now store.Orders) {
	select {
	case <-o.newest: // superseded
	default:
	}
	o.newest <- now // only the store puts something in, so there is room
}

// run applies orders until ctx ends.
func (o *orders) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-o.newest:
			o.apply(now)
		}
	}
}

// apply makes the orders true on this member.
func (o *orders) apply(now store.Orders) {
	o.mu.Lock()
	o.known, o.inForce = true, now.InForce
	o.mu.Unlock()
	for _, s := range o.agent.services {
		s.update(func(time.Duration) {
			for _, b := range s.cfg.Backends {
				s.view.SetOrder(b.Name, wanted(now.InForce, s.cfg.Name, b))
			}
		})
	}
	o.agent.judgeEligibility()
	o.mu.Lock()
	o.applied = now.Revision
	close(o.changed)
	o.changed = make(chan struct{})
	o.mu.Unlock()
	o.tellKept(now.Answered)
	o.agent.board.notify()
}

// tellKept tells of the requests that turn out to be kept.
func (o *orders) tellKept(kept func(request string) bool) {
	o.mu.Lock()
	var all []string
	for request := range o.untold {
		if kept(request) {
			all = append(all, request)
		}
	}
	o.mu.Unlock()
	for _, request := range all {
		o.tell(request)
	}
}

// tell records the event of a request that is kept, once.
func (o *orders) tell(request string) {
	if event := o.forget(request); event != nil {
		o.agent.events.record(event)
	}
}

// forget returns the event of a request that has not been told, which it then never is.
func (o *orders) forget(request string) *hameshv1.Event {
	o.mu.Lock()
	defer o.mu.Unlock()
	event := o.untold[request]
	delete(o.untold, request)
	return event
}

// of is what becomes of a backend by the orders in force.
func (o *orders) of(proxy string, b config.Backend) health.Order {
	o.mu.Lock()
	defer o.mu.Unlock()
	return wanted(o.inForce, proxy, b)
}

// wanted is what becomes of a backend by the orders about it and about its node.
func wanted(inForce map[store.Subject]store.Order, proxy string, b config.Backend) health.Order {
	switch inForce[store.Subject{Proxy: proxy, Backend: b.Name}].State {
	case backendDisabled:
		return health.Disable
	case backendDraining:
		return health.Drain
	}
	if b.Node != "" && inForce[store.Subject{Node: b.Node}].State == nodeDrained {
		return health.Drain
	}
	return health.Serve
}

// await returns when the orders of that revision have been applied here, or with false when
// it takes too long.
func (o *orders) await(ctx context.Context, revision int64) bool {
	ctx, cancel := context.WithTimeout(ctx, inForceWithin)
	defer cancel()
	for {
		o.mu.Lock()
		done, changed := o.applied >= revision, o.changed
		o.mu.Unlock()
		if done {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// drained says who has drained a node, in words; empty: nobody.
func (o *orders) drained(node string) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if order := o.inForce[store.Subject{Node: node}]; order.State == nodeDrained {
		return "drained by an operator (" + order.By + ")"
	}
	return ""
}

// backendOrder says who has ordered what of a backend, the order about its node aside.
func (o *orders) backendOrder(proxy, backend string) (by string, ordered bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	order, ordered := o.inForce[store.Subject{Proxy: proxy, Backend: backend}]
	return order.By, ordered
}

// unfit is why this node may not take a VIP as far as orders go; empty: no reason. Before
// they are known it may not: it could be a node that is drained.
func (o *orders) unfit() string {
	o.mu.Lock()
	known := o.known
	o.mu.Unlock()
	if !known {
		return "operators' orders have not been read yet"
	}
	return o.drained(o.agent.cfg.Node.Name)
}

// DrainNode implements server.ControlSink.
func (o *orders) DrainNode(ctx context.Context, r *hameshv1.DrainNodeRequest) (*hameshv1.DrainNodeResponse, error) {
	node := r.GetNode()
	if err := o.checkMember(node); err != nil {
		return nil, err
	}
	if response, err, given := elsewhere(ctx, o, r, hameshv1.ControlServiceClient.DrainNode); given {
		return response, err
	}
	subject := store.Subject{Node: node}
	changed, pending, err := o.give(ctx, r.GetRequestId(), "drain "+node, func(now store.Orders) (map[store.Subject]*store.Order, error) {
		if now.InForce[subject].State == nodeDrained {
			return nil, nil
		}
		if !r.GetForce() && !o.spare(ctx, now, node) {
			return nil, fmt.Errorf("drain %s: %w", node, server.ErrLastCandidate)
		}
		return map[store.Subject]*store.Order{subject: given(ctx, nodeDrained)}, nil
	}, &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_NODE_DRAINED, Peer: node,
		Message: node + " gives up its VIPs and takes none", Reason: "an operator's order"})
	return &hameshv1.DrainNodeResponse{Changed: changed, Pending: pending}, err
}

// UndrainNode implements server.ControlSink.
func (o *orders) UndrainNode(ctx context.Context, r *hameshv1.UndrainNodeRequest) (*hameshv1.UndrainNodeResponse, error) {
	node := r.GetNode()
	if err := o.checkMember(node); err != nil {
		return nil, err
	}
	if response, err, given := elsewhere(ctx, o, r, hameshv1.ControlServiceClient.UndrainNode); given {
		return response, err
	}
	subject := store.Subject{Node: node}
	changed, pending, err := o.give(ctx, r.GetRequestId(), "undrain "+node, func(now store.Orders) (map[store.Subject]*store.Order, error) {
		if _, ordered := now.InForce[subject]; !ordered {
			return nil, nil
		}
		return map[store.Subject]*store.Order{subject: nil}, nil
	}, &hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_NODE_UNDRAINED, Peer: node,
		Message: node + " may take VIPs again", Reason: "an operator's order"})
	return &hameshv1.UndrainNodeResponse{Changed: changed, Pending: pending}, err
}

var backendOrders = map[hameshv1.BackendOrder]struct {
	state, word string // state is empty where there is no order
	kind        hameshv1.EventKind
}{
	hameshv1.BackendOrder_BACKEND_ORDER_ACTIVE:   {"", "active", hameshv1.EventKind_EVENT_KIND_BACKEND_ACTIVE},
	hameshv1.BackendOrder_BACKEND_ORDER_DRAINING: {backendDraining, "draining", hameshv1.EventKind_EVENT_KIND_BACKEND_DRAINING},
	hameshv1.BackendOrder_BACKEND_ORDER_DISABLED: {backendDisabled, "disabled", hameshv1.EventKind_EVENT_KIND_BACKEND_DISABLED},
}

// SetBackendState implements server.ControlSink.
func (o *orders) SetBackendState(ctx context.Context, r *hameshv1.SetBackendStateRequest) (*hameshv1.SetBackendStateResponse, error) {
	want, ok := backendOrders[r.GetState()]
	if !ok {
		return nil, fmt.Errorf("%v: %w", r.GetState(), server.ErrStateInvalid)
	}
	services, err := o.find(r.GetProxy(), r.GetBackend())
	if err != nil {
		return nil, err
	}
	if response, err, given := elsewhere(ctx, o, r, hameshv1.ControlServiceClient.SetBackendState); given {
		return response, err
	}
	response := &hameshv1.SetBackendStateResponse{}
	for _, s := range services {
		response.Proxies = append(response.Proxies, s.cfg.Name)
	}
	what := fmt.Sprintf("make backend %s of %s %s", r.GetBackend(), strings.Join(response.Proxies, " and "), want.word)
	response.Changed, response.Pending, err = o.give(ctx, r.GetRequestId(), what, func(now store.Orders) (map[store.Subject]*store.Order, error) {
		writes := map[store.Subject]*store.Order{}
		for _, s := range services {
			subject := store.Subject{Proxy: s.cfg.Name, Backend: r.GetBackend()}
			switch was, ordered := now.InForce[subject]; {
			case want.state == "" && ordered:
				writes[subject] = nil
			case was.State == want.state:
			case want.state == backendDisabled && !r.GetForce() && !s.spare(now.InForce, r.GetBackend()):
				return nil, fmt.Errorf("disable backend %s of proxy %s: %w", r.GetBackend(), s.cfg.Name, server.ErrLastBackend)
			default:
				writes[subject] = given(ctx, want.state)
			}
		}
		return writes, nil
	}, &hameshv1.Event{Kind: want.kind, Proxy: strings.Join(response.Proxies, ","), Backend: r.GetBackend(),
		Message: "backend " + r.GetBackend() + " is " + want.word, Reason: "an operator's order"})
	return response, err
}

func given(ctx context.Context, state string) *store.Order {
	return &store.Order{State: state, By: orderer(ctx), At: time.Now().UTC().Truncate(time.Millisecond)}
}

// give has the store keep an order, waits until it is in force here, and records the
// event where something has changed by it; pending: that wait was in vain.
func (o *orders) give(ctx context.Context, request, what string, judge func(store.Orders) (map[store.Subject]*store.Order, error), event *hameshv1.Event) (changed, pending bool, err error) {
	if len(request) > requestLength {
		return false, false, fmt.Errorf("%d bytes, more than %d: %w", len(request), requestLength, server.ErrRequestID)
	}
	request = cmp.Or(request, uuid.NewString())
	event.By = orderer(ctx)
	revision, changed, err := o.agent.store.Give(ctx, store.Wish{
		Request: request, What: what,
		Judge: func(now store.Orders) (map[store.Subject]*store.Order, error) {
			writes, err := judge(now)
			o.forget(request)
			if err == nil && len(writes) > 0 {
				o.mu.Lock()
				o.untold[request] = event
				o.mu.Unlock()
			}
			return writes, err
		},
	})
	switch {
	case errors.Is(err, store.ErrUnavailable):
		// It may be kept all the same, and told by whoever sees that.
		time.AfterFunc(untoldFor, func() { o.forget(request) })
		return false, false, fmt.Errorf("%s: %w: %w", what, server.ErrStoreUnavailable, err)
	case errors.Is(err, store.ErrRequestReused):
		return false, false, fmt.Errorf("%s: %w: %w", what, server.ErrRequestID, err)
	case err != nil:
		return false, false, err
	}
	pending = !o.await(ctx, revision)
	switch {
	case changed && pending:
		o.agent.log.Warn("order kept, and not in force here yet: "+what, "caller", orderer(ctx))
	case changed:
		o.agent.log.Info("order in force: "+what, "caller", orderer(ctx))
	}
	o.tell(request)
	return changed, pending, nil
}

// checkMember refuses a node that is not in the configuration.
func (o *orders) checkMember(node string) error {
	if o.agent.hasMember(node) {
		return nil
	}
	var names []string
	for _, m := range o.agent.cfg.Members {
		names = append(names, m.Name)
	}
	return unknown(node, names, server.ErrNodeUnknown)
}

// find returns the services that have a backend of that name; proxy is one alone, or
// empty.
func (o *orders) find(proxy, backend string) (found []*service, err error) {
	var proxies, backends []string
	for _, s := range o.agent.services {
		proxies = append(proxies, s.cfg.Name)
		if proxy != "" && s.cfg.Name != proxy {
			continue
		}
		for _, b := range s.backends() {
			backends = append(backends, b.Name)
			if b.Name == backend {
				found = append(found, s)
			}
		}
	}
	switch {
	case proxy != "" && !slices.Contains(proxies, proxy):
		return nil, unknown(proxy, proxies, server.ErrProxyUnknown)
	case len(found) == 0:
		return nil, unknown(backend, backends, server.ErrBackendUnknown)
	}
	return found, nil
}

// unknown names what exists beside what was asked for.
func unknown(name string, exist []string, err error) error {
	slices.Sort(exist)
	return fmt.Errorf("%.100q: %w; there are: %s", name, err, cmp.Or(strings.Join(slices.Compact(exist), ", "), "none"))
}

// spare says whether another backend of the service is up, with those orders in force.
func (s *service) spare(inForce map[store.Subject]store.Order, backend string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range s.cfg.Backends {
		if b.Name != backend && s.statuses[i].State == health.Up && wanted(inForce, s.cfg.Name, b) == health.Serve {
			return true
		}
	}
	return false
}

// spare says whether another candidate may take the VIPs of a node, with those orders in
// force. A witness has none.
func (o *orders) spare(ctx context.Context, now store.Orders, node string) bool {
	view, ok := o.agent.loop.view(ctx)
	k := o.agent.words.view()
	return ok && (o.agent.role(k, node) == hameshv1.Role_ROLE_WITNESS || o.agent.hasSubstitute(view, k, now.InForce, node))
}

// hasSubstitute says whether another candidate than that node is eligible, by what all
// members know together, and heard by that node, which has to hand its VIPs over.
func (a *Agent) hasSubstitute(view ownership.View, k known, inForce map[store.Subject]store.Order, node string) bool {
	return slices.ContainsFunc(a.cfg.Members, func(m config.Member) bool {
		eligible := view.Eligible
		if m.Name != a.cfg.Node.Name {
			of := k.Of[m.Name]
			eligible = of.Known && of.Word != nil && of.Word.Says.GetReady() && of.Word.Says.GetEligible()
		}
		return m.Name != node && eligible && !deafTo(k, node, m.Name) && a.role(k, m.Name) == hameshv1.Role_ROLE_CANDIDATE &&
			inForce[store.Subject{Node: m.Name}].State != nodeDrained
	})
}

// deafTo says whether a member does not hear another one, as far as that is known.
func deafTo(k known, member, to string) bool {
	return slices.ContainsFunc(k.Links, func(l hearsay.Link) bool { return l.From == to && l.To == member && l.Lost })
}

// role is a member's, by its own word where there is one.
func (a *Agent) role(k known, member string) hameshv1.Role {
	role := a.cfg.Node.Role
	if member != a.cfg.Node.Name {
		if w := k.Of[member].Word; w != nil && w.Says.GetRole() != hameshv1.Role_ROLE_UNSPECIFIED {
			return w.Says.GetRole()
		}
		for _, m := range a.cfg.Members {
			if m.Name == member {
				role = m.Role
			}
		}
	}
	if role == config.Witness {
		return hameshv1.Role_ROLE_WITNESS
	}
	return hameshv1.Role_ROLE_CANDIDATE
}

// drainProblems says what is left to do, or wrong, about a node that is drained.
func (a *Agent) drainProblems(node string, view ownership.View, k known) (all []*hameshv1.Problem) {
	all = append(all, &hameshv1.Problem{
		Code: "NODE_DRAINED", Message: node + " takes no VIP: " + a.orders.drained(node), Fix: "hactl undrain " + node + " when it is fit again",
	})
	a.orders.mu.Lock()
	inForce := a.orders.inForce // which is not changed, but replaced
	a.orders.mu.Unlock()
	for _, v := range view.VIPs {
		if v.Record.Owner == node && !v.Record.Gone && !a.hasSubstitute(view, k, inForce, node) {
			all = append(all, &hameshv1.Problem{
				Code: "DRAINED_NODE_OWNS", Message: node + " is drained, but keeps " + v.Name + ": no other candidate may take it",
				Fix: "see why the other candidates are not eligible, or hactl undrain " + node,
			})
		}
	}
	return all
}

// keptConnections is how many connections a node still serves of VIPs that it gave away, by
// its newest word; where they have not been counted yet, at least one.
func (a *Agent) keptConnections(node string, h *hameshv1.Heartbeat) (n uint32) {
	add := func(keeps bool, kept uint32) {
		if keeps {
			n += max(kept, 1)
		}
	}
	if node == a.cfg.Node.Name {
		for _, v := range a.cfg.VIPs {
			keeps, kept, _ := a.handing.keeps(v.Name)
			add(keeps, uint32(kept))
		}
		return n
	}
	for _, v := range h.GetVips() {
		add(v.GetKeeps(), v.GetKeptConnections())
	}
	return n
}
