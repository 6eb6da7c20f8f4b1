package agent

import (
	"net"
	"net/netip"
)

// lookArrival notes where this node takes what is forwarded. That may change: it is looked
// up whenever the VIP comes here, so that the next owner knows it before it goes, and while
// something is kept.
func (h *handing) lookArrival(vip string, v *handed) {
	told := h.arrival(vip).AsSlice()
	v.arrival.Store(&told)
}

// arrivesAt is that address for heartbeats, empty where others know it. It does not block.
func (h *handing) arrivesAt(vip string) []byte { return *h.vips[vip].arrival.Load() }

// arrival is where this node takes packets of connections with a VIP that is of another IP
// version than the members' addresses: an address on the VIP's interface that is no VIP,
// rather one of the VIP's subnet. It is not valid for a VIP of the same version, and where
// there is none. A link-local address would not do: others may know several such links.
func (a *Agent) arrival(vip string) (found netip.Addr) {
	v := a.vip(vip)
	if v.Address.Is4() == a.cfg.Node.Address.Is4() {
		return found
	}
	i, err := net.InterfaceByName(v.Interface)
	if err != nil {
		return found // it may come later
	}
	all, err := i.Addrs()
	if err != nil {
		return found
	}
	vips := map[netip.Addr]bool{}
	for _, v := range a.cfg.VIPs {
		vips[v.Address] = true
	}
	for _, x := range all {
		p, err := netip.ParsePrefix(x.String())
		switch {
		case err != nil, p.Addr().Is4() != v.Address.Is4(), !p.Addr().IsGlobalUnicast(), vips[p.Addr()]:
		case p.Contains(v.Address):
			return p.Addr()
		case !found.IsValid():
			found = p.Addr()
		}
	}
	return found
}

// forwardTarget is where a member takes such packets, as it has told, or where members
// reach it.
func (a *Agent) forwardTarget(vip, member string) netip.Addr {
	addr := a.vip(vip).Address
	for _, m := range a.cfg.Members {
		if m.Name == member && m.Address.Is4() == addr.Is4() {
			return m.Address
		}
	}
	a.board.mu.Lock()
	defer a.board.mu.Unlock()
	for _, v := range a.board.peers[member].GetVips() {
		if v.GetName() == vip {
			told, _ := netip.AddrFromSlice(v.GetForwardAddress())
			if told.Is4() == addr.Is4() {
				return told
			}
		}
	}
	return netip.Addr{}
}
