package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

const (
	// rememberMoves is how long a request_id is remembered after its move has ended, and
	// maxMoves how many are at most.
	rememberMoves = time.Hour
	maxMoves      = 1000
	// routesFor is how long somebody is looked for who takes an order: longer than a fail-over,
	// which gives the VIP another owner.
	routesFor = 2 * time.Second
	// moveLook is how often the end of a move is looked for, and moveSlack how much longer
	// than its owner is waited for it.
	moveLook  = 100 * time.Millisecond
	moveSlack = 2 * time.Second
)

// moves answers orders to move VIPs: it gives them to the loop where this member owns
// the VIP, and passes them on to the owner where it does not, by way of another member where
// there is no link to it. Whatever becomes of that, the record of the VIP tells the outcome.
// Each order is remembered by its request_id, so that repeating one repeats nothing.
type moves struct {
	agent *Agent

	mu     sync.Mutex
	byID   map[string]*order
	byNum  map[uint64]*attempt // those given to the loop
	nextID uint64
}

// order is one move and what has been told of it so far.
type order struct {
	request *hameshv1.MoveVipRequest
	by      string   // who wants it
	visited []string // the members that have passed it on; none: it was asked for here
	begun   time.Time
	ended   time.Time // zero: not yet

	told    []*hameshv1.MoveVipResponse
	err     error
	changed chan struct{} // closed and replaced at each change
}

// attempt is an order that the loop has, for this time.
type attempt struct {
	order *order
	last  chan ownership.MoveProgress // gets the last phase; room for one
}

func newMoves(a *Agent) *moves {
	return &moves{agent: a, byID: map[string]*order{}, byNum: map[uint64]*attempt{}}
}

// refusals maps what the ownership machine says to what the API says.
var refusals = map[ownership.Refusal]error{
	ownership.UnknownVIP:    server.ErrVIPUnknown,
	ownership.UnknownMember: server.ErrNodeUnknown,
	ownership.NotOwner:      server.ErrNoOwner,
	ownership.NotEligible:   server.ErrNodeNotEligible,
	ownership.NoCandidate:   server.ErrNoOtherCandidate,
	ownership.Busy:          server.ErrMoveInProgress,
	ownership.StoreSilent:   server.ErrStoreUnavailable,
	ownership.Superseded:    server.ErrMoveFailed,
}

// MoveVip implements server.ControlSink.
func (m *moves) MoveVip(ctx context.Context, request *hameshv1.MoveVipRequest, send func(*hameshv1.MoveVipResponse) error) error {
	if err := m.check(request); err != nil {
		return err
	}
	o, err := m.take(request, server.Caller(ctx), visited(ctx))
	if err != nil {
		return err
	}
	for sent := 0; ; {
		m.mu.Lock()
		told, err, changed, ended := o.told, o.err, o.changed, !o.ended.IsZero()
		m.mu.Unlock()
		for ; sent < len(told); sent++ {
			if err := send(told[sent]); err != nil {
				return err
			}
		}
		if ended {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// check refuses what names nothing that there is, before it is remembered and told.
func (m *moves) check(r *hameshv1.MoveVipRequest) error {
	if n := len(r.GetRequestId()); n > requestLength {
		return fmt.Errorf("%d bytes, more than %d: %w", n, requestLength, server.ErrRequestID)
	}
	if !m.agent.hasVIP(r.GetVip()) {
		return fmt.Errorf("%.100q: %w", r.GetVip(), server.ErrVIPUnknown)
	}
	if to := r.GetTo(); to != "" && !m.agent.hasMember(to) {
		return fmt.Errorf("%.100q: %w", to, server.ErrNodeUnknown)
	}
	return nil
}

// take finds the order of a repeated request, or begins a new one.
func (m *moves) take(request *hameshv1.MoveVipRequest, by string, visited []string) (*order, error) {
	id := request.GetRequestId()
	if id == "" {
		id = uuid.NewString()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if o := m.byID[id]; o != nil {
		if o.request.GetVip() != request.GetVip() || o.request.GetTo() != request.GetTo() {
			return nil, fmt.Errorf("request_id %q was used for moving %q to %q: %w",
				id, o.request.GetVip(), o.request.GetTo(), server.ErrMoveFailed)
		}
		return o, nil
	}
	m.forget()
	request = proto.CloneOf(request)
	request.RequestId = id
	o := &order{request: request, by: by, visited: visited, begun: time.Now(), changed: make(chan struct{})}
	m.byID[id] = o
	m.agent.group.Go(func() error {
		if len(visited) == 0 { // else told by the member that was asked
			m.agent.teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED, o, "")
		}
		m.end(o, m.pursue(m.agent.ctx, o))
		return nil
	})
	return o, nil
}

// forget drops what ended long ago, and the oldest ones over the limit.
func (m *moves) forget() {
	for len(m.byID) > 0 {
		var oldest string
		for id, o := range m.byID {
			if !o.ended.IsZero() && (oldest == "" || o.ended.Before(m.byID[oldest].ended)) {
				oldest = id
			}
		}
		if oldest == "" || (time.Since(m.byID[oldest].ended) < rememberMoves && len(m.byID) < maxMoves) {
			return
		}
		delete(m.byID, oldest)
	}
}

// pursue sees to it that an order is carried out, and returns when it is known how that has
// ended. Who passes an order on for another member tries once: that one tries again.
func (m *moves) pursue(ctx context.Context, o *order) error {
	for ; ; time.Sleep(moveLook) {
		v, ok := m.agent.togetherNow(ctx, o.request.GetVip())
		if !ok {
			return fmt.Errorf("this agent is stopping: %w", server.ErrMoveFailed)
		}
		if v.Record.Request == o.request.GetRequestId() {
			return m.outcome(ctx, o) // done before, and told by a member that is gone or has forgotten
		}
		err := m.attempt(ctx, o, v)
		if err == nil {
			return nil
		}
		// Whatever was said: where the record is the order's, it is carried out.
		patience := time.Duration(0)
		if lost(err) || server.Is(err, server.ErrMoveFailed) {
			patience = m.agent.cfg.Timing.SuspectAfter + detour*m.agent.cfg.Timing.Heartbeat
		}
		if m.recorded(ctx, o, patience) {
			return m.outcome(ctx, o)
		}
		// The owner changes just now, or cannot be reached just now. One that had the order
		// when it was lost may still be at it.
		again := time.Since(o.begun) < routesFor && (server.Is(err, server.ErrOwnerUnreachable) || server.Is(err, errElsewhere))
		again = again || (lost(err) && time.Since(o.begun) < m.bound())
		if !again || len(o.visited) > 0 || ctx.Err() != nil {
			return err
		}
	}
}

// bound is how long the end of a move is waited for: its owner gives it up earlier.
func (m *moves) bound() time.Duration { return 2*m.agent.cfg.Timing.LeaseTTL + moveSlack }

// attempt has the owner of a VIP move it.
func (m *moves) attempt(ctx context.Context, o *order, v ownership.VIPView) error {
	a, to, owner := m.agent, o.request.GetTo(), v.Record.Owner
	switch {
	case v.Record.Gone && len(v.Holders) > 0: // it keeps the address by its peers' word
		return fmt.Errorf("%s has %q, and cannot give it away: %w to %s", v.Holders[0], v.Name, server.ErrStoreUnavailable, v.Holders[0])
	case owner == "" || v.Record.Gone:
		return fmt.Errorf("%q: %w", v.Name, server.ErrNoOwner)
	case owner == to:
		m.tell(o, &hameshv1.MoveVipResponse{
			Phase: hameshv1.MovePhase_MOVE_PHASE_HELD, Vip: v.Name, From: to, To: to,
			Elapsed: durationpb.New(0), Epoch: v.Record.Epoch,
		})
		return nil
	case owner == a.cfg.Node.Name:
		return m.give(ctx, o)
	case slices.Contains(o.visited, owner):
		return fmt.Errorf("%q is with %s by now: %w", v.Name, owner, errElsewhere)
	}
	return m.passOn(ctx, o, owner)
}

// give has the loop carry an order out, and returns how that went. A target that takes the
// VIP and is not heard here is seen by others.
func (m *moves) give(ctx context.Context, o *order) error {
	m.mu.Lock()
	m.nextID++
	id, mine := m.nextID, &attempt{order: o, last: make(chan ownership.MoveProgress, 1)}
	m.byNum[id] = mine
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.byNum, id)
	}()
	m.agent.loop.post(ctx, ownership.MoveOrder{ID: id, Request: o.request.GetRequestId(), VIP: o.request.GetVip(), To: o.request.GetTo()})
	look := time.NewTicker(moveLook)
	defer look.Stop()
	for {
		select {
		case p := <-mine.last:
			if p.Phase == ownership.Failed {
				return m.refusal(p)
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("this agent is stopping: %w", server.ErrMoveFailed)
		case <-look.C:
			if v, ok := m.agent.togetherNow(ctx, o.request.GetVip()); ok && m.done(o, v) {
				return m.outcome(ctx, o)
			}
		}
	}
}

// done says whether the record is an order's, and its new owner alone has the address.
func (m *moves) done(o *order, v ownership.VIPView) bool {
	return v.Record.Request == o.request.GetRequestId() && slices.Equal(v.Holders, []string{v.Record.Owner})
}

// recorded says whether the record turns out to be an order's within some time.
func (m *moves) recorded(ctx context.Context, o *order, patience time.Duration) bool {
	for until := time.Now().Add(patience); ; time.Sleep(moveLook) {
		v, ok := m.agent.togetherNow(ctx, o.request.GetVip())
		if !ok || v.Record.Request == o.request.GetRequestId() {
			return ok
		}
		if time.Now().After(until) {
			return false
		}
	}
}

// outcome waits until the new owner that an order has made has the address, and says so.
func (m *moves) outcome(ctx context.Context, o *order) error {
	for ; ; time.Sleep(moveLook) {
		v, ok := m.agent.togetherNow(ctx, o.request.GetVip())
		switch {
		case !ok:
			return fmt.Errorf("this agent is stopping: %w", server.ErrMoveFailed)
		case v.Record.Request != o.request.GetRequestId():
			return fmt.Errorf("%q has gone on to %q: %w", v.Name, v.Record.Owner, server.ErrMoveFailed)
		case slices.Contains(v.Holders, v.Record.Owner):
			m.tell(o, &hameshv1.MoveVipResponse{
				Phase: hameshv1.MovePhase_MOVE_PHASE_HELD, Vip: v.Name, From: m.giver(o), To: v.Record.Owner, Changed: true,
				Elapsed: durationpb.New(time.Since(o.begun)), Epoch: v.Record.Epoch,
			})
			return nil
		case time.Since(o.begun) > m.bound():
			return fmt.Errorf("%s owns %q now, but is not known to have the address: %w", v.Record.Owner, v.Name, server.ErrMoveFailed)
		}
	}
}

// giver is who gives the VIP away, as far as it has been told.
func (m *moves) giver(o *order) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, said := range o.told {
		if said.GetFrom() != "" {
			return said.GetFrom()
		}
	}
	return ""
}

// passOn lets the owner do it, and repeats what it says.
func (m *moves) passOn(ctx context.Context, o *order, owner string) error {
	route, client, ok := m.agent.route(owner, o.visited)
	if !ok {
		return fmt.Errorf("%s: %w", owner, server.ErrOwnerUnreachable)
	}
	stream, err := client.MoveVip(passingOn(ctx, o.visited, m.agent.cfg.Node.Name), o.request)
	if err != nil {
		return lostOn(route, err)
	}
	for {
		said, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return lostOn(route, err)
		}
		m.tell(o, said)
	}
}

// progress takes a phase from the loop. It does not block.
func (m *moves) progress(p ownership.MoveProgress) {
	m.mu.Lock()
	to := m.byNum[p.ID]
	m.mu.Unlock()
	if to == nil {
		return // nobody waits any more
	}
	if p.Phase != ownership.Failed {
		said := &hameshv1.MoveVipResponse{
			Phase: phases[p.Phase], Vip: p.VIP, From: p.From, To: p.To, Changed: true, Epoch: p.Epoch,
			Elapsed: durationpb.New(time.Since(to.order.begun)),
		}
		m.tell(to.order, said)
		if p.Phase == ownership.Accepted {
			// The machine takes an order only where the target says, in a heartbeat no
			// older than S, that it is ready and its data path works.
			ready := proto.CloneOf(said)
			ready.Phase = hameshv1.MovePhase_MOVE_PHASE_READY
			m.tell(to.order, ready)
		}
		if p.Phase != ownership.HeldByTarget {
			return
		}
	}
	select {
	case to.last <- p:
	default: // a last phase comes once
	}
}

// refusal says why the loop does not move a VIP, and between whom something is wrong.
func (m *moves) refusal(p ownership.MoveProgress) error {
	self := m.agent.cfg.Node.Name
	err := fmt.Errorf("move %s to %s: %w", p.VIP, p.To, refusals[p.Err])
	switch of := m.agent.words.view().Of[p.To]; {
	case p.Err == ownership.StoreSilent:
		return fmt.Errorf("%w to %s, which has it", err, self)
	case p.Err == ownership.NotEligible && of.Known && !of.Heard:
		return fmt.Errorf("%w: %s", err, of.Whose(self, p.To))
	}
	return err
}

// tell adds a phase to what is told of an order, unless it was told before: an order that is
// asked for again on another way is reported from its beginning.
func (m *moves) tell(o *order, said *hameshv1.MoveVipResponse) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(o.told); !o.ended.IsZero() || (n > 0 && o.told[n-1].GetPhase() >= said.GetPhase()) {
		return
	}
	o.told = append(o.told, said)
	close(o.changed)
	o.changed = make(chan struct{})
}

func (m *moves) end(o *order, err error) {
	if err != nil && len(o.visited) == 0 {
		m.agent.teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_FAILED, o, err.Error())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	o.err, o.ended = err, time.Now()
	if len(o.visited) > 0 && (server.Is(err, server.ErrNoOwner) || server.Is(err, server.ErrOwnerUnreachable)) {
		delete(m.byID, o.request.GetRequestId()) // nothing was done, and it may come again
	}
	close(o.changed)
	o.changed = make(chan struct{})
}
