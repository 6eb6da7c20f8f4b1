package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// rememberMoves is how long a request_id is remembered after its move has ended, and
// maxMoves how many are at most.
const (
	// passedOn is the gRPC metadata key that marks an order passed on by another member;
	// such a one is not passed on again.
	passedOn = "hamesh-passed-on"

	rememberMoves = time.Hour
	maxMoves      = 1000
)

// moves answers orders to move VIPs: it gives them to the loop where this member owns
// the VIP, and passes them on to the owner where it does not. Each order is remembered
// by its request_id, so that repeating one repeats nothing.
type moves struct {
	agent *Agent

	mu     sync.Mutex
	byID   map[string]*order
	byNum  map[uint64]*order // those given to the loop
	nextID uint64
}

// order is one move and what has been told of it so far.
type order struct {
	request  *hameshv1.MoveVipRequest
	passedOn bool   // by another member
	by       string // who wants it
	begun    time.Time
	ended    time.Time // zero: not yet

	told    []*hameshv1.MoveVipResponse
	err     error
	changed chan struct{} // closed and replaced at each change
}

func newMoves(a *Agent) *moves {
	return &moves{agent: a, byID: map[string]*order{}, byNum: map[uint64]*order{}}
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
	o, err := m.take(request, server.Caller(ctx), isPassedOn(ctx))
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

// isPassedOn says whether another member has passed an order on. Who is none has its order
// told and passed on as anybody else's, whatever it sets.
func isPassedOn(ctx context.Context) bool {
	incoming, _ := metadata.FromIncomingContext(ctx)
	return server.ByAgent(ctx) && len(incoming.Get(passedOn)) > 0
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
func (m *moves) take(request *hameshv1.MoveVipRequest, by string, passedOn bool) (*order, error) {
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
	o := &order{request: request, by: by, passedOn: passedOn, begun: time.Now(), changed: make(chan struct{})}
	m.byID[id] = o
	m.agent.group.Go(func() error {
		m.begin(m.agent.ctx, o)
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

// begin finds the owner and hands it the order.
func (m *moves) begin(ctx context.Context, o *order) {
	a, name, to := m.agent, o.request.GetVip(), o.request.GetTo()
	if !o.passedOn { // else told by the member that was asked
		a.teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_REQUESTED, o, "")
	}
	view, ok := a.loop.view(ctx)
	if !ok {
		m.end(o, fmt.Errorf("this agent is stopping: %w", server.ErrMoveFailed))
		return
	}
	var owner ownership.VIPView
	for _, v := range view.VIPs {
		if v.Name == name {
			owner = v
		}
	}
	switch {
	case owner.Record.Owner == "" || owner.Record.Gone:
		m.end(o, fmt.Errorf("%q: %w", name, server.ErrNoOwner))
	case owner.Record.Request == o.request.GetRequestId():
		// Done before, and told by a member that is gone, or has forgotten.
		m.tell(o, &hameshv1.MoveVipResponse{
			Phase: hameshv1.MovePhase_MOVE_PHASE_HELD, Vip: name, To: owner.Record.Owner, Changed: true,
			Elapsed: durationpb.New(0), Epoch: owner.Record.Epoch,
		})
		m.end(o, nil)
	case owner.Record.Owner == to:
		m.tell(o, &hameshv1.MoveVipResponse{
			Phase: hameshv1.MovePhase_MOVE_PHASE_HELD, Vip: name, From: to, To: to,
			Elapsed: durationpb.New(0), Epoch: owner.Record.Epoch,
		})
		m.end(o, nil)
	case owner.Record.Owner == a.cfg.Node.Name:
		m.mu.Lock()
		m.nextID++
		id := m.nextID
		m.byNum[id] = o
		m.mu.Unlock()
		a.loop.post(ctx, ownership.MoveOrder{ID: id, Request: o.request.GetRequestId(), VIP: name, To: to})
	case o.passedOn:
		// Whoever passed it on thinks that this is the owner: it is changing just now.
		m.end(o, fmt.Errorf("%q is with %s by now: %w", name, owner.Record.Owner, server.ErrNoOwner))
	default:
		m.end(o, m.passOn(ctx, o, owner.Record.Owner))
	}
}

// passOn lets the owner do it, and repeats what it says.
func (m *moves) passOn(ctx context.Context, o *order, owner string) error {
	link := m.agent.links[owner]
	if link == nil {
		return fmt.Errorf("%s is not in the configuration of %s: %w", owner, m.agent.cfg.Node.Name, server.ErrOwnerUnreachable)
	}
	client, ok := link.Control()
	if !ok {
		return fmt.Errorf("%s: %w", owner, server.ErrOwnerUnreachable)
	}
	stream, err := client.MoveVip(metadata.AppendToOutgoingContext(ctx, passedOn, m.agent.cfg.Node.Name), o.request)
	if err != nil {
		return lost(owner, err)
	}
	for {
		said, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return lost(owner, err)
		}
		m.tell(o, said)
	}
}

// lost tells a member's answer from the loss of the connection to it, which is an answer of
// nobody: the move may go on.
func lost(owner string, err error) error {
	if s, ok := status.FromError(err); ok && len(s.Details()) > 0 {
		return err
	}
	return fmt.Errorf("%s may still be moving it: %w: %w", owner, err, server.ErrOwnerUnreachable)
}

// progress takes a phase from the loop. It does not block.
func (m *moves) progress(p ownership.MoveProgress) {
	m.mu.Lock()
	o := m.byNum[p.ID]
	m.mu.Unlock()
	if o == nil {
		return
	}
	if p.Phase == ownership.Failed {
		m.end(o, fmt.Errorf("move %s to %s: %w", p.VIP, p.To, refusals[p.Err]))
	} else {
		said := &hameshv1.MoveVipResponse{
			Phase: phases[p.Phase], Vip: p.VIP, From: p.From, To: p.To, Changed: true, Epoch: p.Epoch,
			Elapsed: durationpb.New(time.Since(o.begun)),
		}
		m.tell(o, said)
		if p.Phase == ownership.Accepted {
			// The machine takes an order only where the target says, in a heartbeat no
			// older than S, that it is ready and its data path works.
			ready := proto.CloneOf(said)
			ready.Phase = hameshv1.MovePhase_MOVE_PHASE_READY
			m.tell(o, ready)
		}
		if p.Phase != ownership.HeldByTarget {
			return
		}
		m.end(o, nil)
	}
	m.mu.Lock()
	delete(m.byNum, p.ID)
	m.mu.Unlock()
}

func (m *moves) tell(o *order, said *hameshv1.MoveVipResponse) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o.told = append(o.told, said)
	close(o.changed)
	o.changed = make(chan struct{})
}

func (m *moves) end(o *order, err error) {
	if err != nil && !o.passedOn {
		m.agent.teller.move(hameshv1.EventKind_EVENT_KIND_MOVE_FAILED, o, err.Error())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	o.err, o.ended = err, time.Now()
	close(o.changed)
	o.changed = make(chan struct{})
}
