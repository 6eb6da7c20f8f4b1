package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/credentials"

	"github.com/hamesh/hamesh/agent/announce"
	"github.com/hamesh/hamesh/agent/config"
	tlsfiles "github.com/hamesh/hamesh/agent/credentials"
	"github.com/hamesh/hamesh/agent/guard"
	"github.com/hamesh/hamesh/agent/handover"
	"github.com/hamesh/hamesh/agent/metrics"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/parts"
	"github.com/hamesh/hamesh/agent/peer"
	"github.com/hamesh/hamesh/agent/store"
	"github.com/hamesh/hamesh/agent/vip"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

// stamp is set when a release is linked (-ldflags -X).
var stamp string

// Version is the agent's: as it was linked, else as the module was built.
var Version = buildVersion()

func buildVersion() string {
	if stamp != "" {
		return stamp
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

const (
	// handOverWithin is how long a stopping agent tries to hand its VIPs over.
	handOverWithin = 5 * time.Second
	// aloneEvery is how often the only member of a mesh reads its store.
	aloneEvery = time.Second
	// keptBy is how long after a change of owner the one before keeps its connections at the
	// latest, if it does, or S where that is longer: see handing.patience, half of it.
	keptBy = 500 * time.Millisecond
	// changesKept is how many changes may wait for a slow log; more are not logged.
	changesKept = 1024
)

// Agent is one node's agent.
type Agent struct {
	cfg *config.Config // as at the start: only what takes a restart is still in force
	log hclog.Logger

	store     *store.Store
	managed   []vip.Address // the VIPs that this node may have
	kernel    *vip.Kernel
	guard     *guard.Guard // nil on a witness
	announcer *announce.Announcer
	keeper    *keeper
	segment   *segment
	handing   *handing
	flows     *flows
	loop      *loop
	links     map[string]*peer.Link
	services  []*service
	server    *server.Server
	moves     *moves
	orders    *orders
	events    *events
	teller    *teller
	board     *board
	hearing   *hearing
	reload    *reload               // nil: the configuration stays
	upgrade   *upgrade              // nil: the process stays
	files     *tlsfiles.Credentials // nil: insecure
	metrics   *metrics.Metrics
	boot      uint64
	parts     atomic.Pointer[parts.Parts] // of the configuration in force
	words     *words

	lock        *os.File // the node's
	ports       ports
	inheritance *Inheritance      // of the agent whose place this one takes; nil: it starts anew
	owns        bool              // what is done for connections of VIPs that moved away is this agent's doing
	departed    chan *Inheritance // what is left when another process, or another agent here, goes on
	// upgrading: this node takes no VIP.
	upgrading atomic.Bool

	ctx    context.Context // of every task
	cancel context.CancelCauseFunc
	group  *errgroup.Group
	// Of the tasks that act on the node or speak for it.
	stopActing  context.CancelFunc
	acting      context.Context
	actors      sync.WaitGroup
	acts        atomic.Bool        // they run
	stopTelling context.CancelFunc // ends the telling of events

	guarded, relieve, relieved chan struct{} // closed when the guard watches, is to leave, has left

	macs   atomic.Pointer[[][]byte] // of the VIPs' interfaces
	beatAt atomic.Int64             // when the loop last stepped, Unix nanoseconds
	joined atomic.Bool              // systemd has been told that it is ready

	carrierMu sync.Mutex
	noCarrier map[string]bool // interfaces known to have none

	silent   chan map[string]ownership.Instant // the newest, for the services
	stopped  chan struct{}                     // closed when everything has been handed over
	stopOnce sync.Once
	changes  chan ownership.Change
	closers  []func()
	// clean: every VIP has been handed over or released, and the kernel has none, so that
	// the guard may leave with this process. So it is until Run.
	clean bool
}

// New prepares the agent of a resolved configuration: it takes the node's lock, sweeps
// what an earlier run has left, and binds the proxies' ports; nothing runs yet. Close undoes
// it. With an inheritance it takes the place of the agent that has left it, instead.
func New(cfg *config.Config, from *Inheritance, log hclog.Logger) (_ *Agent, err error) {
	a := &Agent{
		cfg: cfg, log: log, board: newBoard(), links: map[string]*peer.Link{}, noCarrier: map[string]bool{},
		clean:       true,
		inheritance: from, owns: from == nil, departed: make(chan *Inheritance, 1),
		guarded: make(chan struct{}), relieve: make(chan struct{}), relieved: make(chan struct{}),
		hearing: &hearing{newest: map[string]*hameshv1.Heartbeat{}, wake: make(chan struct{}, 1)},
		silent:  make(chan map[string]ownership.Instant, 1), stopped: make(chan struct{}), changes: make(chan ownership.Change, changesKept),
	}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	if err := a.takeLock(); err != nil {
		return nil, err
	}
	boot, err := nextBoot(cfg.DataDir, time.Now())
	if err != nil {
		return nil, err
	}
	a.boot = boot
	common := parts.Of(cfg)
	a.parts.Store(&common)
	a.words = newWords(a)
	if err := a.openEvents(); err != nil {
		return nil, err
	}
	if err := a.openKernel(); err != nil {
		return nil, err
	}
	if from == nil { // else later, see watchOver
		if err := a.postGuard(); err != nil {
			return nil, err
		}
	}
	a.orders = newOrders(a)
	if err := a.openStore(boot); err != nil {
		return nil, err
	}
	a.metrics = metrics.New(Version, a.samples)
	proxies, err := shareFiles(cfg.Proxies)
	if err != nil {
		return nil, err
	}
	for _, p := range proxies {
		s, err := newService(p, cfg.Node.Name, cfg.Timing, log, a.metrics, a.serviceChanged)
		if err != nil {
			return nil, fmt.Errorf("proxy %s: %w", p.Name, err)
		}
		if from == nil {
			if err := s.proxy.Listen(); err != nil {
				return nil, fmt.Errorf("proxy %s: %w", p.Name, err)
			}
		}
		a.closers = append(a.closers, s.proxy.Close)
		a.services = append(a.services, s)
	}
	a.openFlows(boot)
	if from != nil {
		a.flows.boot = from.Flows
	}
	a.moves, a.segment = newMoves(a), newSegment(a)
	a.readMACs()
	a.loop = &loop{
		machine: ownership.New(a.ownershipConfig(boot), now()),
		inputs:  make(chan input),
		done:    make(chan struct{}),
		store:   a.store.Events(),
		beat:    func() { a.beatAt.Store(time.Now().UnixNano()) },
		effects: effects{
			hold: a.keeper.set, broadcast: a.broadcast, write: a.store.Write, progress: a.progress,
			silent: a.fellSilent, change: a.changed, announce: a.announcer.Refresh,
			probe: func(name string) {
				a.group.Go(func() error { a.segment.probe(a.ctx, name); return nil })
			},
			stopped: func() { a.stopOnce.Do(func() { close(a.stopped) }) },
		},
	}
	return a, a.openMesh()
}

// openKernel connects to netlink and sweeps: before the first heartbeat of this boot, so
// that others may take a newer boot id for proof that the older one holds nothing.
func (a *Agent) openKernel() (err error) {
	if a.cfg.Node.Role == config.Candidate {
		for _, v := range a.cfg.VIPs {
			a.managed = append(a.managed, vip.Address{VIP: v.Name, Addr: v.Address, Interface: v.Interface})
		}
	}
	if a.kernel, err = vip.Open(a.log.Named("vip"), a.managed); err != nil {
		return err
	}
	a.closers = append(a.closers, a.kernel.Close)
	if _, err := a.kernel.Sweep(); err != nil {
		return err
	}
	a.announcer = announce.New(a.log.Named("announce"), announce.Config{
		LeaseTTL: a.cfg.Timing.LeaseTTL, May: func(vip string) bool { return a.keeper.wants(vip) },
	})
	a.keeper = newKeeper(a.kernel, a.managed, a.cfg.Timing.LeaseTTL, a.log)
	var told sync.Map // VIP → ownership.AddressState
	a.keeper.report = func(s ownership.AddressState) {
		a.loop.post(a.ctx, s)
		if was, _ := told.Swap(s.VIP, s); was != s { // a renewal is no news
			a.board.notify()
		}
	}
	a.openHanding()
	a.keeper.take, a.keeper.give, a.keeper.held = a.handing.take, a.handing.give, a.handing.held
	a.keeper.announce = func(hold ownership.Hold) {
		v := a.vip(hold.VIP)
		a.announcer.Start(announce.Target{VIP: v.Name, Addr: v.Address, Interface: v.Interface}, hold.Epoch)
		a.flows.took(hold.VIP, hold.Gen)
	}
	a.keeper.silence = func(name string) {
		a.announcer.Stop(name)
		a.flows.gave(name)
	}
	return nil
}

func (a *Agent) openStore(boot uint64) (err error) {
	c := store.Config{
		Mesh: a.cfg.Mesh, Member: a.cfg.Node.Name, DataDir: a.cfg.DataDir, Boot: boot,
		Election: a.cfg.Timing.SuspectAfter * 5 / 8,
		LeaseTTL: a.cfg.Timing.LeaseTTL, Poll: a.timing().StorePoll(), Now: now, Log: a.log.Named("store"),
		OnOrders: a.orders.put,
	}
	for _, m := range a.cfg.Members {
		c.Members = append(c.Members, store.Member{Name: m.Name, Address: m.Address})
	}
	if e := a.cfg.Store.External; e != nil {
		c.External = &store.External{Endpoints: e.Endpoints, Prefix: e.Prefix}
		if e.TLS != nil {
			c.External.CAFile, c.External.CertFile, c.External.KeyFile = e.TLS.CAFile, e.TLS.CertFile, e.TLS.KeyFile
		}
	} else {
		e := a.cfg.Store.Embedded
		c.Embedded = &store.Embedded{ClientPort: int(e.ClientPort), PeerPort: int(e.PeerPort), Address: a.cfg.Node.Address}
		if !a.cfg.TLS.Insecure {
			c.TLS = &store.TLSFiles{CAFile: a.cfg.TLS.CAFile, CertFile: a.cfg.TLS.CertFile, KeyFile: a.cfg.TLS.KeyFile}
		}
	}
	a.store, err = store.Open(c)
	return err
}

// openMesh makes the server and the links to every other member.
func (a *Agent) openMesh() (err error) {
	client := func(string) credentials.TransportCredentials { return nil }
	options := server.Options{Mesh: a.cfg.Mesh, Node: a.cfg.Node.Name, Insecure: a.cfg.TLS.Insecure, Log: a.log.Named("server")}
	if !a.cfg.TLS.Insecure {
		a.files, err = tlsfiles.Open(a.cfg.TLS.CAFile, a.cfg.TLS.CertFile, a.cfg.TLS.KeyFile)
		if err != nil {
			return err
		}
		options.TLS, client = a.files.Server(), a.files.Client
	}
	for _, m := range a.cfg.Members {
		options.Members = append(options.Members, m.Name)
		if m.Name == a.cfg.Node.Name {
			continue
		}
		a.links[m.Name] = peer.New(peer.Config{
			Name: m.Name, Address: netip.AddrPortFrom(m.Address, a.cfg.API.Port), Credentials: client(m.Name),
			Silence: max(10*a.cfg.Timing.Heartbeat, time.Second), Log: a.log.Named("peer"),
			OnAck:     func(ack *hameshv1.ExchangeResponse, took time.Duration) { a.acked(m.Name, ack, took) },
			OnLinked:  func() { a.store.PathBack(m.Address) },
			OnRefused: func() { a.machineLives(m.Name) },
		})
	}
	control := struct {
		*moves
		*orders
		*crashes
	}{a.moves, a.orders, &crashes{agent: a}}
	a.server, err = server.New(options, a, a.events, control, a)
	return err
}

// timing is the protocol's. A mesh of one member has nobody to hear it, and nobody else
// writes what it reads: there the heartbeat only paces both.
func (a *Agent) timing() ownership.Timing {
	t := a.cfg.Timing
	if len(a.cfg.Members) == 1 {
		t.Heartbeat = max(t.Heartbeat, aloneEvery)
	}
	return ownership.Timing{Heartbeat: t.Heartbeat, HoldWindow: t.HoldWindow, SuspectAfter: t.SuspectAfter, LeaseTTL: t.LeaseTTL, Margin: t.Margin}
}

func (a *Agent) ownershipConfig(boot uint64) ownership.Config {
	c := ownership.Config{Self: a.cfg.Node.Name, Boot: boot, Timing: a.timing(), ExternalStore: a.cfg.Store.External != nil, Probe: true}
	for _, m := range a.cfg.Members {
		c.Members = append(c.Members, ownership.Member{Name: m.Name, Witness: m.Role == config.Witness, Priority: m.Priority})
	}
	c.VIPs = preferences(a.cfg)
	return c
}

// preferences are the VIPs, as far as ownership has to know.
func preferences(c *config.Config) (all []ownership.VIP) {
	for _, v := range c.VIPs {
		all = append(all, ownership.VIP{Name: v.Name, Preferred: v.Preferred, Preempt: v.Preempt})
	}
	return all
}

// Close lets go of what New has taken.
func (a *Agent) Close() {
	for _, c := range slices.Backward(a.closers) {
		c()
	}
	a.closers = nil
}

// Run works until ctx ends, then hands everything over, and returns nil. Any task that
// fails ends the rest. It returns errSucceeded when another process goes on in its place: then
// this one has to end, and nothing is to be closed before. When that came to nothing too late
// for this agent to go on, it returns what is left to go on with.
func (a *Agent) Run(ctx context.Context) (*Inheritance, error) {
	if err := a.listen(); err != nil {
		return nil, err
	}
	tasks, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	a.cancel = cancel
	a.group, a.ctx = errgroup.WithContext(tasks)
	a.task("store", a.store.Run)
	if err := a.succeed(); err != nil {
		cancel(err)
		return nil, errors.Join(err, a.group.Wait(), a.store.Close())
	}
	a.watchFlows()
	a.clean = false
	a.beatAt.Store(time.Now().UnixNano())
	a.start()
	a.tellBegun()

	var left *Inheritance
	select {
	case <-a.ctx.Done(): // a task has failed
	case <-ctx.Done():
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping) // no systemd, no notice
		a.clean = a.handOver()
	case left = <-a.departed:
		if left == nil {
			return nil, errSucceeded
		}
		a.cease(left)
	}
	cancel(nil)
	err := a.group.Wait()
	if left != nil {
		return a.depart(left, err)
	}
	return nil, errors.Join(err, a.leave())
}

// start starts every task that does not run already.
func (a *Agent) start() {
	a.acting, a.stopActing = context.WithCancel(a.ctx)
	a.acts.Store(true)
	a.act("ownership loop", a.loop.run)
	a.act(a.keeper.String(), a.keep)
	a.act("drains", func(ctx context.Context) error { return a.handing.run(ctx, a.ownerOf) })
	a.act("deaths", a.watchDeaths)
	a.task("guard", a.watchOver)
	a.task(a.announcer.String(), a.announcer.Run)
	a.task("server", func(ctx context.Context) error { return a.server.Serve(ctx, a.ports.api, a.ports.socket) })
	a.task("metrics", func(ctx context.Context) error { return serveHTTP(ctx, a.ports.metrics, a.observeHandler()) })
	a.task("kernel watch", a.watchKernel)
	if len(a.managed) > 0 {
		a.task("segment listener", a.segment.run)
	}
	a.task("journal", a.journal)
	a.task("hearing", func(ctx context.Context) error { return a.hearing.run(ctx, a.heard) })
	a.task("orders", a.orders.run)
	a.task("events", a.events.run)
	telling, stopTelling := context.WithCancel(a.ctx)
	a.stopTelling = stopTelling
	a.task("event teller", func(context.Context) error { return a.teller.watch(telling, a.Status, a.Changed) })
	if len(a.links) > 0 {
		a.task("flows", a.flows.run)
	}
	for member, l := range a.links {
		a.act("flows for "+member, func(ctx context.Context) error { return a.flows.share(ctx, l) })
		a.task("events of "+member, func(ctx context.Context) error { return a.events.follow(ctx, member, l) })
	}
	for _, s := range a.services {
		a.task(s.String(), s.run)
	}
	a.task("store steering", a.steerStore)
	a.task("readiness", a.tellReady)
	if a.reload != nil {
		a.task("reload", a.reload.run)
	}
	if a.upgrade != nil {
		a.task("upgrade", a.upgrade.run)
	}
}

// link starts the links to all other members.
func (a *Agent) link() {
	for _, l := range a.links {
		a.task(l.String(), l.Run)
	}
}

// keep keeps addresses once the guard is there.
func (a *Agent) keep(ctx context.Context) error {
	select {
	case <-a.guarded:
	case <-ctx.Done():
	}
	return a.keeper.run(ctx)
}

// act is task for what acts on the node or speaks for it: another agent does, as soon as
// these have ended.
func (a *Agent) act(name string, run func(context.Context) error) {
	a.actors.Add(1)
	a.task(name, func(context.Context) error {
		defer a.actors.Done()
		return run(a.acting)
	})
}

// task runs one long-lived part under the group; its error names it.
func (a *Agent) task(name string, run func(context.Context) error) {
	a.group.Go(func() error {
		err := run(a.ctx)
		a.log.Debug("task ended", "task", name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
}

// handOver gives every VIP to somebody else, while everything still runs, and says
// whether that came to its end.
func (a *Agent) handOver() bool {
	a.log.Info("stopping: handing over")
	a.events.record(&hameshv1.Event{Kind: hameshv1.EventKind_EVENT_KIND_AGENT_STOPPING, Message: "the agent of " + a.cfg.Node.Name + " was told to stop"})
	a.loop.post(a.ctx, ownership.Shutdown{})
	select {
	case <-a.stopped:
		return true
	case <-a.ctx.Done():
	case <-time.After(handOverWithin):
		a.log.Warn("nobody took everything over in time", "timeout", handOverWithin)
	}
	return false
}

// leave takes the last addresses off, then gives back the lease and stops the store.
func (a *Agent) leave() error {
	_, err := a.kernel.Sweep()
	a.clean = a.clean && err == nil
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := a.store.Revoke(ctx); err != nil {
			a.log.Debug("could not give the lease back; it will run out", "error", err)
		}
	}
	return errors.Join(err, a.store.Close())
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// tellReady tells systemd when the agent has joined, and feeds its watchdog for as long
// as the ownership loop steps.
func (a *Agent) tellReady(ctx context.Context) error {
	every := 100 * time.Millisecond
	limit, _ := daemon.SdWatchdogEnabled(false)
	// Where an agent goes on in another one's place, the watchdog waits already.
	ready, fed := false, a.inheritance != nil
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
		if !ready && len(a.ailments()) == 0 {
			ready = true
			a.log.Info("ready", "mesh", a.cfg.Mesh, "node", a.cfg.Node.Name, "version", Version)
			_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
			a.joined.Store(true)
			if limit == 0 {
				return nil
			}
			fed, every = true, limit/3
		}
		if fed && limit > 0 && time.Since(time.Unix(0, a.beatAt.Load())) < stuckAfter {
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
	}
}

// broadcast sends a heartbeat to every peer.
func (a *Agent) broadcast(b ownership.Heartbeat) {
	h := a.complete(toProto(b))
	a.metrics.Sent.Inc()
	a.words.sent.Store(h)
	for _, l := range a.links {
		l.Send(h)
	}
}

// complete adds to a heartbeat what is not the ownership protocol's.
func (a *Agent) complete(h *hameshv1.Heartbeat) *hameshv1.Heartbeat {
	h.Version, h.ConfigDigests = Version, a.parts.Load().Digests
	a.words.tell(h)
	h.Reason, h.Macs = *a.board.reason.Load(), *a.macs.Load()
	for _, v := range h.GetVips() {
		keeps, n, to := a.handing.keeps(v.GetName())
		v.Keeps, v.KeptConnections, v.ForwardsTo = keeps, uint32(n), to
		v.ForwardAddress = a.handing.arrivesAt(v.GetName())
	}
	for _, s := range a.services {
		h.Backends = append(h.Backends, *s.reports.Load()...)
	}
	return h
}

// Heartbeat implements server.MeshPeer.
func (a *Agent) Heartbeat(ctx context.Context, from string, h *hameshv1.Heartbeat) (*hameshv1.ExchangeResponse, error) {
	a.metrics.Received.WithLabelValues(from).Inc()
	reply, ok := a.loop.answer(ctx, ownership.HeartbeatReceived{Heartbeat: fromProto(h)})
	a.hearing.put(h)
	if !ok {
		return nil, ctx.Err() // an old heartbeat gets no ack
	}
	return &hameshv1.ExchangeResponse{Heartbeat: a.complete(toProto(reply)), AckBoot: reply.AckBoot, AckSequence: reply.AckSeq}, nil
}

// acked takes the ack of a heartbeat of ours.
func (a *Agent) acked(from string, ack *hameshv1.ExchangeResponse, took time.Duration) {
	if took > 0 {
		a.metrics.RTT.WithLabelValues(from).Observe(took.Seconds())
	}
	if ack.GetHeartbeat().GetMember() != from {
		a.log.Warn("an ack speaks for somebody else", "peer", from, "member", ack.GetHeartbeat().GetMember())
		return
	}
	a.loop.post(a.ctx, ownership.HeartbeatReceived{Heartbeat: ackFromProto(ack)})
	a.hearing.put(ack.GetHeartbeat())
}

// heard takes what a heartbeat says beside the ownership protocol.
func (a *Agent) heard(h *hameshv1.Heartbeat) {
	a.words.hear(h)
	if a.board.hear(h) {
		poke(a.flows.wake)
	}
	a.words.look()
	for _, s := range a.services {
		s.hear(h.GetMember(), h.GetBackends())
	}
}

// hearing takes what members' heartbeats say beside the ownership protocol, the newest of
// each, so that no ack waits for it: it may come to resetting thousands of connections.
type hearing struct {
	mu     sync.Mutex
	newest map[string]*hameshv1.Heartbeat
	wake   chan struct{} // one token
}

func (q *hearing) put(h *hameshv1.Heartbeat) {
	q.mu.Lock()
	q.newest[h.GetMember()] = h
	q.mu.Unlock()
	poke(q.wake)
}

func (q *hearing) run(ctx context.Context, take func(*hameshv1.Heartbeat)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-q.wake:
		}
		q.mu.Lock()
		all := q.newest
		q.newest = map[string]*hameshv1.Heartbeat{}
		q.mu.Unlock()
		for _, h := range all {
			take(h)
		}
	}
}

// fellSilent hears from the loop who is silent. The services are told elsewhere: they
// may take a moment to reset connections.
func (a *Agent) fellSilent(silent map[string]ownership.Instant) {
	a.words.setSilent(silent)
	select {
	case <-a.silent: // superseded
	default:
	}
	a.silent <- silent // only the loop puts something in, so there is room
}

// machineLives takes a proof that a member's machine lives now, other than its agent's word:
// no connection to an API server is to end because an agent is stopped, killed or restarted.
func (a *Agent) machineLives(member string) {
	for _, s := range a.services {
		s.nodeLives(member)
	}
}

// watchDeaths takes the backends of members that fell silent out, at the moment at which
// ownership gives them up, unless the agent alone is silent. An agent that goes on in another
// one's place first has to hear the members: what that one knew of them counts until then.
func (a *Agent) watchDeaths(ctx context.Context) error {
	var heardSoon <-chan time.Time
	if a.inheritance != nil {
		heardSoon = time.After(trustWithin)
	}
	var silent map[string]ownership.Instant
	for {
		select {
		case <-ctx.Done():
			return nil
		case silent = <-a.silent:
		case <-heardSoon:
			heardSoon = nil
		}
		dead := make(map[string]time.Duration, len(silent))
		lost := make(map[string]bool, len(silent))
		for member, at := range silent {
			if at == 0 && heardSoon != nil {
				continue
			}
			dead[member], lost[member] = time.Duration(at), true
		}
		a.board.mu.Lock()
		a.board.silent = lost
		a.board.mu.Unlock()
		for _, s := range a.services {
			s.setDead(dead)
		}
		for member := range lost { // may wait for the kernel
			a.handing.died(member, a.ownerOf)
		}
		poke(a.flows.wake)
		a.board.notify()
	}
}

// serviceChanged tells the mesh of a change in health.
func (a *Agent) serviceChanged() {
	if !a.acts.Load() {
		return // nobody listens yet
	}
	a.judgeEligibility()
	a.board.notify()
	a.loop.post(a.ctx, ownership.Nudge{})
}

// judgeEligibility says whether this node's data path would work if it had a VIP.
func (a *Agent) judgeEligibility() {
	reason := a.unfit()
	a.board.reason.Store(&reason)
	a.loop.post(a.ctx, ownership.Eligibility{Eligible: reason == "", Reason: reason})
}

// unfit is why this node may not take a VIP; empty: it may.
func (a *Agent) unfit() string {
	if a.cfg.Node.Role == config.Witness {
		return "witness"
	}
	if a.upgrading.Load() {
		return "an upgrade is under way"
	}
	if reason := a.orders.unfit(); reason != "" {
		return reason
	}
	select {
	case <-a.guarded: // no address is put on before
	default:
		return "its guard is being started"
	}
	a.carrierMu.Lock()
	defer a.carrierMu.Unlock()
	for _, v := range a.cfg.VIPs {
		if a.noCarrier[v.Interface] {
			return "no carrier on " + v.Interface
		}
	}
	for _, s := range a.services {
		if reason := s.unfit(); reason != "" {
			return reason
		}
	}
	return ""
}

// watchKernel mends what others do to the addresses, and announces again when a link
// comes back.
func (a *Agent) watchKernel(ctx context.Context) error {
	a.judgeEligibility() // a witness, or a node without proxies, may never hear of a change
	for c := range a.kernel.Watch(ctx) {
		if a.keeper.wants(c.VIP) {
			a.teller.address(c)
		}
		switch c.Kind {
		case vip.Disappeared:
			a.keeper.refresh() // puts it on again only where it is wanted
			a.announcer.Refresh(c.VIP)
		case vip.Appeared:
			a.keeper.refresh() // takes it off where it is not wanted
		case vip.CarrierUp, vip.CarrierDown:
			a.carrierMu.Lock()
			a.noCarrier[c.Interface] = c.Kind == vip.CarrierDown
			a.carrierMu.Unlock()
			a.readMACs()
			a.judgeEligibility()
			for _, v := range a.cfg.VIPs {
				if v.Interface == c.Interface && c.Kind == vip.CarrierUp {
					a.announcer.Refresh(v.Name)
				}
			}
		}
	}
	return nil
}

func (a *Agent) progress(p ownership.MoveProgress) {
	switch p.Phase {
	case ownership.Failed:
		a.metrics.Moves.WithLabelValues(p.VIP, "failed").Inc()
	case ownership.HeldByTarget:
		a.metrics.Moves.WithLabelValues(p.VIP, "done").Inc()
	}
	a.moves.progress(p)
}

// changed notes a change of ownership; the log, which may block, gets it elsewhere.
func (a *Agent) changed(c ownership.Change) {
	was, known := a.board.noteChange(c, time.Now())
	a.teller.owned(was, known, c)
	if was.owner == a.cfg.Node.Name && c.Owner != was.owner && len(a.managed) > 0 {
		a.group.Go(func() error { a.endStranded(c.VIP); return nil })
	}
	select {
	case a.changes <- c:
	default:
	}
}

// endStranded ends what connections this node still has by a VIP that another member has
// got without being given it: should the VIP come back before they have ended by themselves,
// a client's next connection from the same port would be taken for one of them, and hang.
func (a *Agent) endStranded(name string) {
	select {
	case <-a.ctx.Done():
		return
	case <-time.After(max(keptBy, a.cfg.Timing.SuspectAfter)): // one that is given away in order is kept by then
	}
	n, err := handover.EndStranded(a.vip(name).Address)
	switch {
	case err != nil:
		a.log.Warn("connections of a VIP that went elsewhere stay until they time out", "vip", name, "error", err)
	case n > 0:
		a.log.Info("ended connections of a VIP that went elsewhere", "vip", name, "connections", n)
	}
}

// journal writes changes of ownership to the log.
func (a *Agent) journal(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-a.changes:
			a.log.Info(c.Text, "vip", c.VIP, "owner", c.Owner, "epoch", c.Epoch, "right", c.Right)
		}
	}
}

func (a *Agent) vip(name string) config.VIP {
	i := slices.IndexFunc(a.cfg.VIPs, func(v config.VIP) bool { return v.Name == name })
	if i < 0 {
		return config.VIP{Name: name}
	}
	return a.cfg.VIPs[i]
}

func (a *Agent) hasVIP(name string) bool { return a.vip(name).Address.IsValid() }

func (a *Agent) hasMember(name string) bool {
	return slices.ContainsFunc(a.cfg.Members, func(m config.Member) bool { return m.Name == name })
}
