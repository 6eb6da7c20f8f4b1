package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

const (
	// passedOn is the gRPC metadata key that marks an order passed on by other members, each
	// of which it names: it is not passed on to any of them again.
	passedOn = "hamesh-passed-on"
	// orderedBy names who has given such an order.
	orderedBy = "hamesh-ordered-by"
)

// errElsewhere is the answer to who takes this member for the owner, or knows the owner
// better: ownership is changing.
var errElsewhere = fmt.Errorf("the owner has changed: %w", server.ErrNoOwner)

// errLost marks the loss of a connection to who has an order, which is an answer of nobody.
var errLost = errors.New("the connection was lost")

// visited are the members that have passed an order on. Who is none has its order told and
// passed on as anybody else's, whatever it sets.
func visited(ctx context.Context) []string {
	incoming, _ := metadata.FromIncomingContext(ctx)
	if !server.ByAgent(ctx) {
		return nil
	}
	return incoming.Get(passedOn)
}

// orderer is who has given an order, here or to a member that has passed it on.
func orderer(ctx context.Context) string {
	if len(visited(ctx)) > 0 {
		incoming, _ := metadata.FromIncomingContext(ctx)
		if by := incoming.Get(orderedBy); len(by) > 0 {
			return cmp.Or(by[0], server.Caller(ctx))
		}
	}
	return server.Caller(ctx)
}

// passingOn is the context with which an order is passed on.
func passingOn(ctx context.Context, visited []string, self string) context.Context {
	for _, member := range append(slices.Clone(visited), self) {
		ctx = metadata.AppendToOutgoingContext(ctx, passedOn, member)
	}
	return ctx
}

// lostOn tells a member's answer from the loss of the connection to it: the order may be
// carried out all the same.
func lostOn(member string, err error) error {
	if answered(err) {
		return err
	}
	return fmt.Errorf("%s may still be moving it: %w: %w: %w", member, errLost, err, server.ErrOwnerUnreachable)
}

func lost(err error) bool { return errors.Is(err, errLost) }

// route finds who takes an order to a member: that one itself, else another one that hears
// it, or that hears somebody who does, and has not had the order yet.
func (a *Agent) route(to string, visited []string) (member string, client hameshv1.ControlServiceClient, ok bool) {
	k := a.words.view()
	ways := append([]string{to}, k.Of[to].By...)
	for _, m := range a.cfg.Members {
		if k.Of[m.Name].Heard {
			ways = append(ways, m.Name)
		}
	}
	for _, member := range ways {
		if link := a.links[member]; link != nil && !slices.Contains(visited, member) {
			if client, ok := link.Control(); ok {
				return member, client, true
			}
		}
	}
	return "", nil, false
}

// togetherNow is what all members together know of a VIP; false while this agent is stopping.
func (a *Agent) togetherNow(ctx context.Context, name string) (ownership.VIPView, bool) {
	view, ok := a.loop.view(ctx)
	for _, v := range view.VIPs {
		if v.Name == name {
			return together(v, byOthers(a.words.view())), ok
		}
	}
	return ownership.VIPView{}, false
}

// answers finds a member whose store answers it, where this one's does not: an order that the
// store keeps may be given through any member.
func (o *orders) answers(ctx context.Context) (client hameshv1.ControlServiceClient, through context.Context, ok bool) {
	a := o.agent
	if a.store.Status().Available || len(visited(ctx)) > 0 {
		return nil, nil, false
	}
	k := a.words.view()
	for _, m := range a.cfg.Members {
		of := k.Of[m.Name]
		if link := a.links[m.Name]; link != nil && of.Heard && of.Word != nil && of.Word.Says.GetReady() && !of.Word.Says.GetStoreAway() {
			if client, ok := link.Control(); ok {
				through = metadata.AppendToOutgoingContext(passingOn(ctx, nil, a.cfg.Node.Name), orderedBy, orderer(ctx))
				return client, through, true
			}
		}
	}
	return nil, nil, false
}

// elsewhere gives an order to a member whose store answers, where this one's does not; false:
// nobody has taken it.
func elsewhere[Q, A any](ctx context.Context, o *orders, r Q, give func(hameshv1.ControlServiceClient, context.Context, Q, ...grpc.CallOption) (A, error)) (response A, err error, given bool) {
	client, through, ok := o.answers(ctx)
	if !ok {
		return response, nil, false
	}
	response, err = give(client, through, r)
	return response, err, err == nil || answered(err)
}

// answered says whether an error is a member's answer, and not the loss of the connection.
func answered(err error) bool {
	s, ok := status.FromError(err)
	return ok && len(s.Details()) > 0
}
