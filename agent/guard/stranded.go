package guard

import (
	"context"
	"net/netip"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/handover"
	"github.com/hamesh/hamesh/agent/vip"
)

// strandedAfter is how long an address has to be off until the connections that it was the
// local end of are ended: an agent puts one that somebody has deleted on again sooner.
const strandedAfter = 100 * time.Millisecond

// endStranded ends the connections of the VIPs that this node loses without handing them over,
// until ctx ends: its link was cut, or its agent is frozen. Programs on this node
// that use the VIP have it at both ends, and would wait for each other for as long as TCP does.
// An agent could be the one that is frozen, so it is the guard that looks. Other hosts' clients
// at the proxies' ports are the agent's business.
func endStranded(ctx context.Context, kernel *vip.Kernel, ports []uint16, log hclog.Logger) {
	due := map[netip.Addr]time.Time{}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	changes := kernel.Watch(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case c, ok := <-changes:
			switch {
			case !ok:
				return
			case c.Kind == vip.Disappeared:
				due[c.Addr] = time.Now().Add(strandedAfter)
			case c.Kind == vip.Appeared:
				delete(due, c.Addr)
			}
		case <-timer.C:
		}
		next := time.Hour
		for addr, at := range due {
			if left := time.Until(at); left > 0 {
				next = min(next, left)
				continue
			}
			delete(due, addr)
			endConnections(addr, ports, log)
		}
		timer.Reset(next)
	}
}

// endConnections ends the connections of one address, unless it is here, or kept.
func endConnections(addr netip.Addr, ports []uint16, log hclog.Logger) {
	n, err := handover.EndStranded(addr, ports...)
	switch {
	case err != nil:
		log.Warn("connections on this node may hang", "error", err)
	case n > 0:
		log.Info("ended connections whose local address has gone", "address", addr, "connections", n)
	}
}
