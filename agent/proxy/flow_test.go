package proxy

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// watched is a proxy whose connections to 127.0.0.1 are wanted.
func watched(t *testing.T, servers ...*server) (*Proxy, chan struct{}) {
	t.Helper()
	news := make(chan struct{}, 100)
	p := startWith(t, func(p *Proxy) {
		p.WatchFlows(FlowWatch{
			Local: func(a netip.Addr) bool { return a == netip.MustParseAddr("127.0.0.1") },
			News:  func() { news <- struct{}{} },
		})
	}, nil, servers...)
	return p, news
}

// Connections that come and go are told of, once each.
func TestFlows(t *testing.T) {
	p, _ := watched(t, three(t, echo)...)
	open := map[netip.AddrPort]bool{}
	take := func() {
		all, told := p.TakeFlows()
		for _, f := range all {
			if f.Open == open[f.Client] {
				t.Errorf("%v is told of twice: open %v", f.Client, f.Open)
			}
			open[f.Client] = f.Open
		}
		if told != nil {
			told()
		}
	}
	var conns []net.Conn
	for i := range 10 {
		conn := dial(t, p, client(i))
		mustName(t, conn)
		conns = append(conns, conn)
		take()
	}
	for _, c := range conns[:5] {
		c.Close()
	}
	eventually(t, "told of ten connections, five of which have gone", func() bool {
		take()
		for i, c := range conns {
			if open[netip.MustParseAddrPort(c.LocalAddr().String())] != (i >= 5) {
				return false
			}
		}
		return len(open) == 10
	})
}

// A client of a connection that others have not been told of gets nothing, until they have
// been, or for holdMost.
func TestFlowsHoldBack(t *testing.T) {
	p, news := watched(t, three(t, echo)...)
	answered := func(conn net.Conn) <-chan error {
		c := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(conn, make([]byte, 1))
			c <- err
		}()
		return c
	}
	began := time.Now()
	silent := answered(dial(t, p, client(0)))
	<-news
	if err := <-silent; err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < holdMost {
		t.Errorf("answered after %v, before anybody was told", took)
	}
	p.TakeFlows() // news of others come only after that
	// Told at once, most are answered at once.
	var took []time.Duration
	for i := range 9 {
		began := time.Now()
		next := answered(dial(t, p, client(i)))
		<-news
		_, told := p.TakeFlows()
		told()
		if err := <-next; err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	if slices.Sort(took); took[len(took)/2] >= holdMost {
		t.Errorf("answered after %v though told at once", took)
	}
}

// Those of other local addresses, and of clients with the very address, are nobody's business.
func TestFlowsOfOthers(t *testing.T) {
	p, news := watched(t, three(t, echo)...)
	mustName(t, dial(t, p, "127.0.0.1")) // connects to 127.0.0.1
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	conn, err := d.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), p.Port()).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustName(t, conn)
	if all, told := p.TakeFlows(); len(all) > 0 || told != nil || len(news) > 0 {
		t.Errorf("told of %v", all)
	}
}
