package agent

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hamesh/hamesh/agent/announce"
	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// foreignPause is the shortest time between two reports to the loop of the same kind,
	// about the same VIP, from the same address: a storm is told as a trickle.
	foreignPause = 50 * time.Millisecond
	// conflictShown is how long a conflict stays in the status after its last frame.
	conflictShown = 10 * time.Second
	// probeRetry is the pause after a probe that said nothing: no carrier, for one.
	probeRetry = 200 * time.Millisecond
)

// segment is what this node hears on the wire about its VIPs.
type segment struct {
	agent *Agent

	mu        sync.Mutex
	told      map[string]time.Time // VIP, kind and address → last report
	conflicts map[string]conflict  // VIP → newest
}

// conflict is a frame of somebody who should not speak for a VIP.
type conflict struct {
	mac, member string
	at          time.Time
}

func newSegment(a *Agent) *segment {
	return &segment{agent: a, told: map[string]time.Time{}, conflicts: map[string]conflict{}}
}

// run listens until ctx ends.
func (s *segment) run(ctx context.Context) error {
	listener := announce.NewListener(s.agent.log.Named("announce"), announce.ListenerConfig{
		Targets:   s.agent.targets(),
		OnForeign: func(f announce.Foreign) { s.heard(ctx, f) },
	})
	return listener.Run(ctx)
}

// heard takes one foreign frame.
func (s *segment) heard(ctx context.Context, f announce.Foreign) {
	if f.Kind == announce.Probing {
		return // whoever probes takes nothing yet; the holder's kernel answers
	}
	key, at := f.VIP+f.Kind.String()+f.MAC.String(), time.Now()
	member := s.agent.memberOf(f.MAC)
	s.mu.Lock()
	quiet := at.Sub(s.told[key]) < foreignPause
	if !quiet {
		if len(s.told) > 1000 {
			clear(s.told) // addresses that somebody makes up
		}
		s.told[key] = at
	}
	s.mu.Unlock()
	if quiet {
		return
	}
	s.agent.loop.post(ctx, ownership.Foreign{VIP: f.VIP, Member: member, Announcement: f.Kind == announce.Announcement})
	if view, ok := s.agent.loop.view(ctx); ok && s.contends(view, f.VIP, member) {
		s.mu.Lock()
		known := at.Sub(s.conflicts[f.VIP].at) < conflictShown
		s.conflicts[f.VIP] = conflict{mac: f.MAC.String(), member: member, at: at}
		s.mu.Unlock()
		if !known {
			s.agent.log.Warn("somebody else speaks for a VIP", "vip", f.VIP, "address", f.MAC.String(), "member", member, "kind", f.Kind.String())
			s.agent.board.notify()
		}
	}
}

// contends says whether a frame comes from somebody who should not speak for the VIP: a
// member, while this node holds the VIP by right; or a stranger, which nobody is called
// before every member has told its link-layer addresses.
func (s *segment) contends(view ownership.View, vip, member string) bool {
	if member == "" {
		return s.agent.knowsEveryMAC()
	}
	for _, v := range view.VIPs {
		if v.Name == vip {
			return v.Record.Owner == s.agent.cfg.Node.Name && v.Right != ownership.NoRight
		}
	}
	return false
}

// conflict returns the newest conflict about a VIP, if it is recent.
func (s *segment) conflict(vip string) (c conflict, recent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c = s.conflicts[vip]
	return c, time.Since(c.at) < conflictShown
}

// probe looks for the VIP on the segment and tells the loop, however long it takes until
// the segment can be asked.
func (s *segment) probe(ctx context.Context, name string) {
	a := s.agent
	v := a.vip(name)
	for {
		mac, err := announce.Probe(ctx, announce.Target{VIP: name, Addr: v.Address, Interface: v.Interface})
		switch {
		case ctx.Err() != nil:
			return
		case err == nil, errors.Is(err, announce.ErrPermission):
			// A member that probes or holds is no stranger: who of them may, the store decides.
			stranger := ""
			if len(mac) > 0 && a.memberOf(mac) == "" {
				stranger = mac.String()
			}
			a.loop.post(ctx, ownership.Probed{VIP: name, Stranger: stranger})
			return
		}
		a.log.Debug("could not probe for the address yet", "vip", name, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(probeRetry):
		}
	}
}

// targets are the VIPs of this node and where they belong.
func (a *Agent) targets() (all []announce.Target) {
	for _, m := range a.managed {
		all = append(all, announce.Target{VIP: m.VIP, Addr: m.Addr, Interface: m.Interface})
	}
	return all
}

// memberOf returns the member that announces VIPs from the link-layer address; empty: none.
func (a *Agent) memberOf(mac net.HardwareAddr) string {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	for name, h := range a.board.peers {
		for _, m := range h.GetMacs() {
			if bytes.Equal(m, mac) {
				return name
			}
		}
	}
	return ""
}

// knowsEveryMAC says whether every other member that may hold a VIP has told its
// link-layer addresses.
func (a *Agent) knowsEveryMAC() bool {
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	for _, m := range a.cfg.Members {
		h := a.board.peers[m.Name]
		if m.Name != a.cfg.Node.Name && (h == nil || (len(h.GetMacs()) == 0 && h.GetRole() != hameshv1.Role_ROLE_WITNESS)) {
			return false
		}
	}
	return true
}

// readMACs notes the link-layer addresses of the VIPs' interfaces, for the heartbeats.
func (a *Agent) readMACs() {
	var macs [][]byte
	seen := map[string]bool{}
	for _, m := range a.managed {
		if seen[m.Interface] {
			continue
		}
		seen[m.Interface] = true
		if i, err := net.InterfaceByName(m.Interface); err == nil { // it may come later
			macs = append(macs, i.HardwareAddr)
		}
	}
	a.macs.Store(&macs)
}
