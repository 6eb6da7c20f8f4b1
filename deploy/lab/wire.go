//go:build linux

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// probeEvery is how often the wire is asked who has the VIP.
	probeEvery = 20 * time.Millisecond
	// probeSources is how many addresses the questions come from in turn, so that an
	// answer tells which question it answers.
	probeSources = 16
)

var (
	firstProbe   = netip.MustParseAddr("10.77.2.1")
	strangerHome = netip.MustParseAddr("10.77.3.1")
	broadcast    = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// Frame is an ARP frame in which somebody speaks as the VIP.
type Frame struct {
	At        time.Time
	Speaker   string // the node whose MAC it came from, or that MAC
	Operation arp.Operation
	Announced bool // sender and target address are the same: RFC 5227 section 3
}

// Double is one ARP request for the VIP that several MACs answered.
type Double struct {
	At       time.Time // of the request
	Speakers []string  // in the order of their answers
}

// Wire is what the wire says of the VIP: every frame that speaks as the VIP and reaches
// the client's host, and who answers an ARP request sent every 20 ms. The requests come
// from a host of their own, so that their answers teach the client nothing.
type Wire struct {
	mesh     *Mesh
	prober   *station
	listener *arp.Client
	quit     chan struct{}
	work     sync.WaitGroup

	mu      sync.Mutex
	frames  []Frame
	probes  [probeSources]probe
	doubles []Double
}

// probe is the newest request from one source.
type probe struct {
	at       time.Time
	speakers []string
	double   int // 1 + index in doubles; 0: one speaker at most
}

// WatchWire begins to listen and to ask, on a segment with IPv4. It ends with the mesh.
func (m *Mesh) WatchWire() (*Wire, error) {
	prober, err := newStation(m, "prober", firstProbe)
	if err != nil {
		return nil, fmt.Errorf("watch the wire: %w", err)
	}
	w := &Wire{mesh: m, prober: prober, quit: make(chan struct{})}
	if w.listener, err = listenARP(m.Client.Host); err != nil {
		return nil, errors.Join(fmt.Errorf("watch the wire: %w", err), prober.close())
	}
	m.stations = append(m.stations, w)
	w.work.Go(w.listen)
	w.work.Go(w.hear)
	w.work.Go(w.ask)
	return w, nil
}

func (w *Wire) close() error {
	close(w.quit)
	err := errors.Join(w.listener.Close(), w.prober.close()) // which ends the readers
	w.work.Wait()
	return err
}

func (w *Wire) closed() bool {
	select {
	case <-w.quit:
		return true
	default:
		return false
	}
}

// speaker names the node that has a MAC.
func (w *Wire) speaker(mac net.HardwareAddr) string {
	for _, n := range w.mesh.Nodes {
		if bytes.Equal(n.mac(), mac) {
			return n.Name
		}
	}
	return mac.String()
}

func (w *Wire) listen() {
	for {
		p, frame, err := w.listener.Read()
		if w.closed() {
			return
		}
		if err != nil || p.SenderIP != vip {
			continue // a frame that is no ARP is no news of the VIP
		}
		f := Frame{time.Now(), w.speaker(frame.Source), p.Operation, p.SenderIP == p.TargetIP}
		w.mu.Lock()
		w.frames = append(w.frames, f)
		w.mu.Unlock()
	}
}

func (w *Wire) ask() {
	ticker := time.NewTicker(probeEvery)
	defer ticker.Stop()
	for source := 0; ; source = (source + 1) % probeSources {
		select {
		case <-ticker.C:
		case <-w.quit:
			return
		}
		w.mu.Lock()
		w.probes[source] = probe{at: time.Now()}
		w.mu.Unlock()
		_ = w.prober.say(arp.OperationRequest, nth(firstProbe, source), vip) // a probe lost is none answered
	}
}

// nth is the address that many after a.
func nth(a netip.Addr, n int) netip.Addr {
	for range n {
		a = a.Next()
	}
	return a
}

func (w *Wire) hear() {
	for {
		p, frame, err := w.prober.arp.Read()
		if w.closed() {
			return
		}
		if err != nil || p.SenderIP != vip || p.Operation != arp.OperationReply {
			continue
		}
		for source := range probeSources {
			if p.TargetIP == nth(firstProbe, source) {
				w.answered(source, w.speaker(frame.Source))
			}
		}
	}
}

func (w *Wire) answered(source int, speaker string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := &w.probes[source]
	if slices.Contains(p.speakers, speaker) {
		return
	}
	p.speakers = append(p.speakers, speaker)
	if len(p.speakers) < 2 {
		return
	}
	if p.double == 0 {
		w.doubles = append(w.doubles, Double{At: p.at})
		p.double = len(w.doubles)
	}
	w.doubles[p.double-1].Speakers = slices.Clone(p.speakers)
}

// Frames are those from one time to another.
func (w *Wire) Frames(from, to time.Time) []Frame {
	w.mu.Lock()
	defer w.mu.Unlock()
	return within(w.frames, from, to, func(f Frame) time.Time { return f.At })
}

// Doubles are the requests from one time to another that several answered.
func (w *Wire) Doubles(from, to time.Time) []Double {
	w.mu.Lock()
	defer w.mu.Unlock()
	return within(w.doubles, from, to, func(d Double) time.Time { return d.At })
}

func within[T any](all []T, from, to time.Time, at func(T) time.Time) (some []T) {
	for _, x := range all {
		if t := at(x); !t.Before(from) && !t.After(to) {
			some = append(some, x)
		}
	}
	return some
}

// Impersonate has a host that is no part of the mesh announce the VIP at its own MAC by
// one frame, a gratuitous ARP request or reply. Calls are one after the other.
func (m *Mesh) Impersonate(form arp.Operation) (err error) {
	if m.stranger == nil {
		if m.stranger, err = newStation(m, "stranger", strangerHome); err != nil {
			return fmt.Errorf("attach a stranger: %w", err)
		}
		m.stations = append(m.stations, m.stranger)
	}
	return m.stranger.say(form, vip, vip)
}

// station is a host that speaks ARP by itself.
type station struct {
	host *Host
	port *Port
	arp  *arp.Client
}

func newStation(m *Mesh, name string, address netip.Addr) (*station, error) {
	host, err := NewHost(name)
	if err != nil {
		return nil, err
	}
	s := &station{host: host}
	if s.port, err = m.Switch.Attach(host, hostInterface, netip.PrefixFrom(address, subnetBits)); err == nil {
		err = s.port.awaitUp()
	}
	if err == nil {
		s.arp, err = listenARP(host)
	}
	if err != nil {
		return nil, errors.Join(err, host.Close())
	}
	return s, nil
}

// awaitUp waits until both ends of the cable are up: Linux notices a carrier up to a
// second late (net/core/link_watch.c), and drops what is sent before.
func (p *Port) awaitUp() error {
	return Await(patience, func() error {
		for _, end := range []struct {
			links *netlink.Handle
			name  string
		}{{p.Host.links, p.Interface}, {p.sw.links, p.name}} {
			link, err := end.links.LinkByName(end.name)
			if err != nil {
				return fmt.Errorf("find %s: %w", end.name, err)
			}
			if state := link.Attrs().OperState; state != netlink.OperUp {
				return fmt.Errorf("wait for %s: it is %s", end.name, state)
			}
		}
		return nil
	})
}

// listenARP opens a raw socket for ARP on the host's interface.
func listenARP(h *Host) (c *arp.Client, err error) {
	err = h.Do(func() error {
		ifi, err := net.InterfaceByName(hostInterface)
		if err != nil {
			return err
		}
		conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ARP, nil)
		if err != nil {
			return err
		}
		if c, err = arp.New(ifi, conn); err != nil {
			return errors.Join(err, conn.Close())
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listen to ARP on %s: %w", h.Name, err)
	}
	return c, nil
}

func (s *station) say(op arp.Operation, sender, target netip.Addr) error {
	p, err := arp.NewPacket(op, s.port.MAC, sender, broadcast, target)
	if err == nil {
		err = s.arp.WriteTo(p, broadcast)
	}
	if err != nil {
		return fmt.Errorf("send ARP from %s: %w", s.host.Name, err)
	}
	return nil
}

func (s *station) close() error { return errors.Join(s.arp.Close(), s.host.Close()) }
