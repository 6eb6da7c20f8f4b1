package proxy

import (
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// ownAddresses are those of this host. They are looked up now and then, since a VIP comes
// and goes, and not for each connection, since the kernel may take its time to answer.
type ownAddresses struct {
	known atomic.Pointer[map[netip.Addr]bool]
}

// ownEvery is how old the knowledge of this host's addresses may be.
const ownEvery = time.Second

func (o *ownAddresses) has(addr netip.Addr) bool {
	if addr.IsLoopback() || addr.IsUnspecified() {
		return true
	}
	known := o.known.Load()
	return known != nil && (*known)[addr]
}

func (o *ownAddresses) refresh() {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return // what was known stands
	}
	known := make(map[netip.Addr]bool, len(all))
	for _, a := range all {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			known[prefix.Addr()] = true
		}
	}
	o.known.Store(&known)
}

// watch keeps the knowledge fresh, as long as it is needed, until stop is called.
func (o *ownAddresses) watch(needed func() bool) (stop func()) {
	if needed() {
		o.refresh()
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(ownEvery)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if needed() {
					o.refresh()
				}
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}
