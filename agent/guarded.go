package agent

import (
	"context"
	"net/netip"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/guard"
	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// Withdrawn implements server.MeshPeer.
func (a *Agent) Withdrawn(ctx context.Context, from string, word *hameshv1.WithdrawnRequest) error {
	a.teller.withdrawn(from, word.GetBoot())
	a.loop.post(ctx, ownership.Withdrawn{Member: from, Boot: word.GetBoot(), VIPs: word.GetVips()})
	a.machineLives(from)
	return ctx.Err() // it may have been dropped
}

// Flows implements server.MeshPeer.
func (a *Agent) Flows(from string, change *hameshv1.ShareFlowsRequest) { a.flows.hear(from, change) }

// Recall implements server.MeshPeer.
func (a *Agent) Recall(member string) []*hameshv1.ShareFlowsRequest { return a.flows.recalled(member) }

// postGuard starts the process that takes the VIPs off should this one be killed. It
// knows every VIP before one is put on. A witness, which never has one, needs none.
func (a *Agent) postGuard() (err error) {
	if len(a.managed) == 0 {
		return nil
	}
	c := guard.Config{
		Member: a.cfg.Node.Name, Boot: a.boot, VIPs: a.managed, Insecure: a.cfg.TLS.Insecure,
		CAFile: a.cfg.TLS.CAFile, CertFile: a.cfg.TLS.CertFile, KeyFile: a.cfg.TLS.KeyFile,
		LogJSON: a.cfg.Log.Format == config.JSON, Lock: a.lock, Log: a.log.Named("guard"),
	}
	for _, p := range a.cfg.Proxies {
		c.Ports = append(c.Ports, p.Port)
	}
	for _, m := range a.cfg.Members {
		if m.Name != a.cfg.Node.Name {
			c.Peers = append(c.Peers, guard.Peer{Name: m.Name, Address: netip.AddrPortFrom(m.Address, a.cfg.API.Port)})
		}
	}
	if a.guard, err = guard.Start(context.Background(), c); err != nil {
		return err
	}
	a.closers = append(a.closers, func() {
		// Where something is left to do, the guard stays: it sweeps again when this
		// process has ended, and tells the members, who would otherwise wait S.
		if a.clean && a.guard != nil {
			a.guard.Stop()
		}
	})
	return nil
}

// watchOver keeps a guard posted until ctx ends, or it is relieved. An agent that takes
// another one's place posts its own only now: had it ended before, a guard's word would have
// silenced the other, and its sweep broken the connections.
func (a *Agent) watchOver(ctx context.Context) error {
	if a.guard == nil {
		if err := a.postGuard(); err != nil {
			return err
		}
	}
	close(a.guarded)
	a.judgeEligibility()
	if a.guard == nil {
		return nil
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-a.relieve:
			stop()
		case <-ctx.Done():
		}
	}()
	err := a.guard.Run(ctx)
	select {
	case <-a.relieve:
		a.guard.Stop()
		a.guard = nil
		close(a.relieved)
	default:
	}
	return err
}

// dismiss has the guard leave, for there is nothing to take off, and what is kept for
// connections goes on.
func (a *Agent) dismiss() {
	if len(a.managed) == 0 {
		return
	}
	close(a.relieve)
	select {
	case <-a.relieved:
	case <-a.ctx.Done():
	}
}
