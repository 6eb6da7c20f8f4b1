package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/metrics"
	"github.com/hamesh/hamesh/agent/probe"
	"github.com/hamesh/hamesh/agent/proxy"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// service is one proxy with what is known of its backends: its own checks, what other
// members report, who is dead. Whatever of that changes, the proxy is told at once.
type service struct {
	cfg     config.Proxy // of what another plan may change only Backends and HealthCheck are current; guarded by mu
	self    string
	proxy   *proxy.Proxy
	probes  []*probe.Probe // those that run, or are to run first
	plans   chan *plan     // to be put into force
	log     hclog.Logger
	metrics *metrics.Metrics
	// changed is called after the view or the own checks have changed.
	changed func()
	// reports is what this member's own checks say, for its heartbeats: no older than
	// a check, and as of now where a state has changed.
	reports atomic.Pointer[[]*hameshv1.BackendReport]

	mu       sync.Mutex
	view     *health.View
	statuses []health.Status
	reported map[string]map[string]*hameshv1.BackendReport // member → backend → its last report
	serving  bool
	blind    time.Time // since when others see a healthy API server and this node none; zero: not so
	blocked  string    // why the way through the proxy does not work; empty: it does
}

// blindFor is how long a node may see no healthy API server while others see one: when the
// first one comes up, not everybody sees it at once.
const blindFor = 2 * time.Second

// throughFall is how many checks through the proxy must fail in a row before this node
// counts as unfit: one backend that hangs costs as many as its own checks take to find it.
const throughFall = 3

// loopback is where the way through the proxy is checked from, and to.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func newService(cfg config.Proxy, self string, timing config.Timing, log hclog.Logger, m *metrics.Metrics, changed func()) (*service, error) {
	s := &service{
		cfg: cfg, self: self, log: log, metrics: m, changed: changed, plans: make(chan *plan),
		view:     health.NewView(health.Config{Self: self, Fresh: timing.SuspectAfter}),
		reported: map[string]map[string]*hameshv1.BackendReport{},
	}
	first, err := s.plan(cfg)
	if err != nil {
		return nil, err
	}
	if s.proxy, err = proxy.New(first.relay); err != nil {
		return nil, err
	}
	s.probes = first.probes
	s.view.SetBackends(first.viewed)
	s.statuses = s.view.Backends(0)
	s.report()
	return s, nil
}

// proxyConfig is what a proxy's configuration says about relaying, backends aside.
func proxyConfig(cfg config.Proxy) proxy.Config {
	return proxy.Config{
		Name: cfg.Name, Port: cfg.Port,
		OnDown:       map[config.OnDown]proxy.OnDown{config.Close: proxy.OnDownClose, config.Drain: proxy.OnDownDrain}[cfg.OnDown],
		DrainTimeout: cfg.DrainTimeout, LoadFactor: cfg.LoadFactor, SlowStart: cfg.SlowStart,
		Limits: proxy.Limits{Connections: cfg.Limits.Connections, PerClient: cfg.Limits.PerClient},
		ConnectionLog: map[config.ConnectionLog]proxy.ConnectionLog{
			config.LogOff: proxy.LogOff, config.LogErrors: proxy.LogErrors, config.LogAll: proxy.LogAll,
		}[cfg.ConnectionLog],
		Greeting: map[config.ProxyProtocol]proxy.Greeting{
			config.ProxyProtocolNone: proxy.GreetingNone, config.ProxyProtocolV2: proxy.GreetingV2,
		}[cfg.ProxyProtocol],
	}
}

// reservedFiles are the descriptors that are left to everything but clients' connections:
// the store, the members, the metrics, checks, pipes.
const reservedFiles = 512

// shareFiles limits the connections of each proxy whose configuration does not, to what
// there are descriptors for: two each. Go raises the soft limit to the hard one at start.
func shareFiles(proxies []config.Proxy) ([]config.Proxy, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("reading the limit of open files: %w", err)
	}
	shared := slices.Clone(proxies)
	for i := range shared {
		if shared[i].Limits.Connections == 0 {
			// 1<<21 stands for no limit.
			files := max(int(min(limit.Cur, 1<<21))-reservedFiles, reservedFiles)
			shared[i].Limits.Connections = files / 2 / len(shared)
		}
	}
	return shared, nil
}

var probeSchemes = map[config.Scheme]probe.Scheme{
	config.HTTPS: probe.HTTPS, config.HTTP: probe.HTTP, config.TCP: probe.TCP,
}

func (s *service) String() string { return "proxy " + s.cfg.Name }

// run checks and serves until ctx ends; a proxy that stops accepting ends it.
func (s *service) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.check(ctx) })
	group.Go(func() error {
		s.setServing(true)
		defer s.setServing(false)
		return s.proxy.Run(ctx)
	})
	return group.Wait()
}

// inherit goes on with what another agent relayed, and begins with what it knew.
func (s *service) inherit(r *relay) error {
	if r == nil {
		return fmt.Errorf("proxy %s was not inherited", s.cfg.Name)
	}
	s.update(func(at time.Duration) {
		for _, o := range r.own {
			s.view.Observe(at, o.Backend, health.Result{OK: o.State == health.Up, State: o.State, Reason: o.Reason, Refuses: o.Refuses})
		}
	})
	first, err := s.plan(s.cfg) // whose checks begin with that too
	if err != nil {
		return err
	}
	s.probes = first.probes
	return s.proxy.Adopt(r.handed)
}

func (s *service) setServing(on bool) {
	s.mu.Lock()
	s.serving = on
	s.mu.Unlock()
	s.changed()
}

func (s *service) throughResult(r health.Result) {
	blocked := ""
	// A proxy that is full is not broken, and its successor would be full as soon. Nor is one
	// that brings an answer, though it is not the one that was wanted.
	if r.State == health.Down && s.proxy.Full(loopback) == 0 {
		blocked = r.Reason
	}
	s.mu.Lock()
	changed := blocked != s.blocked
	s.blocked = blocked
	s.mu.Unlock()
	if changed {
		s.changed()
	}
}

// unfit is why a node should not take a VIP as far as this service goes; empty: no reason.
// A node that sees no healthy API server where others see one is cut off from them; where
// nobody sees one, as before the first API server is installed, that is no reason.
func (s *service) unfit() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	usable, seen := false, false
	for _, st := range s.statuses {
		// One that is draining serves where no other is up; its state does not say whether
		// it could.
		usable = usable || st.State == health.Up || (st.State == health.Draining && slices.Contains(st.SeenUpBy, s.self))
		seen = seen || (st.State != health.Disabled && len(st.SeenUpBy) > 0)
	}
	switch {
	case usable || !seen:
		s.blind = time.Time{}
	case s.blind.IsZero():
		s.blind = time.Now()
	}
	switch {
	case !s.serving:
		return "proxy " + s.cfg.Name + " does not accept connections"
	case seen && !usable && time.Since(s.blind) >= blindFor:
		return "proxy " + s.cfg.Name + " sees no healthy API server, and others do"
	case usable && s.blocked != "":
		return "a connection through proxy " + s.cfg.Name + " fails: " + s.blocked
	}
	return ""
}

// observe takes the result of an own check, and with it the view as time has made it:
// other members' reports go stale, and blindness becomes a reason, without anything
// happening.
func (s *service) observe(backend string, r health.Result) {
	s.update(func(at time.Duration) { s.view.Observe(at, backend, r) })
	s.mu.Lock()
	blind := !s.blind.IsZero()
	s.mu.Unlock()
	if blind {
		s.changed() // to be judged again
	}
}

// hear takes what another member's heartbeat reports on this proxy's backends.
func (s *service) hear(member string, all []*hameshv1.BackendReport) {
	var reports []health.Report
	last := map[string]*hameshv1.BackendReport{}
	for _, r := range all {
		if r.GetProxy() == s.cfg.Name {
			reports = append(reports, healthReport(r))
			last[r.GetBackend()] = r
		}
	}
	s.update(func(at time.Duration) {
		s.reported[member] = last
		s.view.Hear(at, member, reports)
	})
}

// setDead says which members have been given up, with when they were last heard.
func (s *service) setDead(dead map[string]time.Duration) {
	s.update(func(time.Duration) { s.view.SetDead(dead) })
}

// nodeLives takes a proof that a member's machine lives now. Where it comes just after the
// member was given up, connections have not been reset yet (proxy.SetBackends).
func (s *service) nodeLives(member string) {
	s.update(func(at time.Duration) { s.view.Prove(at, member) })
}

// update changes the view, and tells the proxy and the mesh what came of it.
func (s *service) update(change func(at time.Duration)) {
	s.mu.Lock()
	at := time.Duration(now())
	own := s.view.Own()
	change(at)
	statuses := s.view.Backends(at)
	moved := !slices.EqualFunc(statuses, s.statuses, func(a, b health.Status) bool {
		return a.Backend == b.Backend && a.State == b.State && a.Reason == b.Reason && slices.Equal(a.SeenUpBy, b.SeenUpBy) && a.Unheard == b.Unheard && a.Refuses == b.Refuses
	})
	told := !slices.Equal(own, s.view.Own())
	if moved {
		var warm []string
		for _, st := range statuses {
			i := slices.IndexFunc(s.statuses, func(was health.Status) bool { return was.Backend == st.Backend })
			if i >= 0 && s.statuses[i].State != st.State {
				s.log.Info("backend is "+st.State.String(), "backend", st.Backend, "reason", st.Reason)
				if s.statuses[i].Unheard {
					warm = append(warm, st.Backend)
				}
			}
		}
		s.statuses = statuses
		states := make(map[string]health.State, len(statuses))
		for _, st := range statuses {
			states[st.Backend] = relayed(st)
		}
		s.proxy.SetBackends(states, warm...)
	}
	s.report()
	s.mu.Unlock()
	if moved || told {
		s.changed()
	}
}

// relayed is what a backend's state means for its connections. One whose machine refuses new
// ones keeps those that it has, as one that is not ready: if it has ended, its kernel has
// reset them; if not, it is being stopped, and still answers what it was asked.
func relayed(st health.Status) health.State {
	if st.Refuses {
		return health.NotReady
	}
	return st.State
}

// report renews the reports; s.mu is held.
func (s *service) report() {
	var all []*hameshv1.BackendReport
	own := map[string]health.Report{}
	for _, r := range s.view.Own() {
		own[r.Backend] = r
	}
	for _, b := range s.proxy.Stats().Backends {
		r := own[b.Name]
		all = append(all, &hameshv1.BackendReport{
			Proxy: s.cfg.Name, Backend: b.Name, State: backendStates[r.State], Reason: r.Reason, Connections: uint32(b.Established),
			NotReady: r.State == health.NotReady, Refuses: r.Refuses,
		})
	}
	s.reports.Store(&all)
}

// look returns the backends, the common view of each, and the connections of all nodes per
// backend.
func (s *service) look(alive func(member string) bool) (backends []config.Backend, statuses []health.Status, connections map[string]uint32, serving bool) {
	stats := s.proxy.Stats()
	s.mu.Lock()
	defer s.mu.Unlock()
	connections = map[string]uint32{}
	for _, b := range stats.Backends {
		connections[b.Name] = uint32(b.Established)
	}
	for member, reports := range s.reported {
		if alive(member) {
			for name, r := range reports {
				connections[name] += r.GetConnections()
			}
		}
	}
	return s.cfg.Backends, slices.Clone(s.statuses), connections, s.serving
}

// certified says whether the checks show a certificate.
func (s *service) certified() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.HealthCheck.CertFile != ""
}
