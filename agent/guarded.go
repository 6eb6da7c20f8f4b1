package agent

import (
	"context"

	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// Withdrawn implements server.MeshPeer.
func (a *Agent) Withdrawn(ctx context.Context, from string, word *hameshv1.WithdrawnRequest) error {
	a.teller.withdrawn(from, word.GetBoot())
	a.loop.post(ctx, ownership.Withdrawn{Member: from, Boot: word.GetBoot(), VIPs: word.GetVips()})
	return ctx.Err() // it may have been dropped
}

// Flows implements server.MeshPeer.
func (a *Agent) Flows(from string, change *hameshv1.ShareFlowsRequest) { a.flows.hear(from, change) }
