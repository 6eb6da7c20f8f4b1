package agent

import (
	"context"
	"slices"
	"time"

	"github.com/hamesh/hamesh/agent/hearsay"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// steerEvery is how often the place of etcd's leader is looked at.
	steerEvery = time.Second
	// steerPause is how long it is left alone after it was moved: an election and some.
	steerPause = 10 * time.Second
)

// steerStore keeps the embedded store's leader off the nodes that own a VIP: when both
// are lost at once, taking over waits for etcd's election. A witness is the best place,
// because it never owns. A drained node, which may be about to go, does not keep it either. Nor
// does a node that has lost a member which another one hears: etcd would not answer there.
func (a *Agent) steerStore(ctx context.Context) error {
	if a.cfg.Store.Embedded == nil || len(a.cfg.Members) < 3 {
		return nil
	}
	wait, before := steerEvery, ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = steerEvery
		if a.store.Status().Leader != a.cfg.Node.Name {
			continue // only the leader can hand over
		}
		to := a.betterLeader(ctx)
		if to == "" || to != before { // what is so for a moment alone moves nothing
			before = to
			continue
		}
		before = ""
		bounded, cancel := context.WithTimeout(ctx, steerPause)
		err := a.store.MoveLeader(bounded, to)
		cancel()
		wait = steerPause
		if err != nil {
			a.log.Debug("could not move the store's leader off this node", "peer", to, "error", err)
			continue
		}
		a.log.Info("moved the store's leader off this node", "peer", to)
	}
}

// betterLeader is the member that should lead etcd in this one's place; empty: none.
func (a *Agent) betterLeader(ctx context.Context) string {
	view, ok := a.loop.view(ctx)
	if !ok {
		return ""
	}
	owners := map[string]bool{}
	for _, v := range view.VIPs {
		if !v.Record.Gone {
			owners[v.Record.Owner] = true
		}
	}
	drained := func(name string) bool { return a.orders.drained(name) != "" }
	k := a.words.view()
	unfit := func(name string) bool { return owners[name] || drained(name) }
	if to := hearsMore(a.cfg.Node.Name, k, unfit); to != "" {
		return to
	}
	if !owners[a.cfg.Node.Name] && !drained(a.cfg.Node.Name) {
		return ""
	}
	best := ""
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	for _, p := range view.Peers {
		if !p.Heard || !p.Ready || unfit(p.Name) || misses(k, p.Name) {
			continue
		}
		if best == "" || a.board.peers[p.Name].GetRole() == hameshv1.Role_ROLE_WITNESS {
			best = p.Name
		}
	}
	return best
}

// misses says whether a member does not hear another one that somebody hears, by its own word
// to this member, or this one's own ears.
func misses(k known, member string) bool {
	return slices.ContainsFunc(k.Down, func(p hearsay.Pair) bool {
		return k.Of[member].Heard && ((p.A == member && p.ADeaf) || (p.B == member && p.BDeaf))
	})
}

// hearsMore is a member that hears all whom anybody hears, where this one does not; empty:
// there is none, or no need. One that is unfit to lead in the long run is better than none.
func hearsMore(self string, k known, unfit func(name string) bool) string {
	if !misses(k, self) {
		return ""
	}
	best := ""
	for name, of := range k.Of {
		if name == self || !of.Heard || of.Word == nil || !of.Word.Says.GetReady() || of.Word.Says.GetStoreAway() || misses(k, name) {
			continue
		}
		if best == "" || (unfit(best) && !unfit(name)) || (unfit(best) == unfit(name) && name < best) {
			best = name
		}
	}
	return best
}
