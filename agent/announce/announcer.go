package announce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ErrPermission is returned where the kernel refuses for want of a capability.
var ErrPermission = errors.New("not permitted, CAP_NET_RAW is needed")

// Target is a VIP and where it is announced.
type Target struct {
	VIP       string // its name
	Addr      netip.Addr
	Interface string
}

// First is the first announcement that went out after a Start.
type First struct {
	VIP   string
	Epoch int64
	After time.Duration // since Start was called
}

// Config is what an Announcer needs to know.
type Config struct {
	// LeaseTTL is the store's lease TTL, which is also how long a dead owner's kernel
	// keeps the address and answers for it: one announcement follows soon after.
	LeaseTTL time.Duration
	// May, if not nil, says whether a VIP may be announced at this moment, from Run's
	// goroutine: a process that goes on after it was frozen sends what is due before anybody
	// has told it that it has lost the VIP, and neighbours would believe it for 10 s.
	May func(vip string) bool
	// Announced, if not nil, is called for each Start once its first announcement is
	// out, from Run's goroutine: it must not block.
	Announced func(First)
}

// Stats counts what was sent for one VIP since its Start. An announcement to IPv4
// neighbours is two frames and counts once.
type Stats struct {
	Sent   uint64
	Failed uint64
	Err    error // of the last attempt; nil if it succeeded
}

const (
	// every is the interval for as long as a VIP is held. A neighbour that has missed
	// all before, or learned wrong since, is healed by it.
	every = 10 * time.Second
	// refreshGap is the least time from an announcement to the next that Refresh asks
	// for, so that two nodes that contradict each other do not fill the segment.
	refreshGap = 200 * time.Millisecond
	// afterLockTime is past the time for which Linux holds on to a neighbour that it has
	// learned just now: 1 s, sysctl net.ipv4.neigh.*.locktime (arp(7)). Linux since 4.14
	// makes an exception for gratuitous ARP (net/ipv4/arp.c, arp_process); older kernels
	// and other systems do not.
	afterLockTime = 1100 * time.Millisecond
)

// beats are the times of the announcements after Start.
func (c Config) beats() []time.Duration {
	const ms = time.Millisecond
	return []time.Duration{0, 20 * ms, 100 * ms, 300 * ms, afterLockTime, 2 * afterLockTime, c.LeaseTTL + 100*ms}
}

// wire sends announcements. Only Run's goroutine uses it.
type wire interface {
	// announce sends one announcement, and takes no more than some tens of milliseconds.
	announce(Target) error
	close()
}

// Announcer announces VIPs. Its methods may be called at the same time, and none waits
// for the network.
type Announcer struct {
	log    hclog.Logger
	config Config
	open   func() (wire, error)
	wake   chan struct{}

	mu    sync.Mutex // never held while sending
	tasks map[string]*task
}

// task is one VIP being announced.
type task struct {
	target    Target
	epoch     int64
	started   time.Time
	refreshed time.Time // last Refresh; zero: none
	next      time.Time
	last      time.Time // last attempt; zero: none
	stats     Stats
}

// New makes an Announcer. It sends nothing until Run runs.
func New(log hclog.Logger, config Config) *Announcer {
	return &Announcer{
		log: log, config: config, open: openWire,
		wake:  make(chan struct{}, 1),
		tasks: make(map[string]*task),
	}
}

// String names the task.
func (a *Announcer) String() string { return "announcer" }

// Start begins to announce the VIP: at once, then in a burst of beats up to LeaseTTL +
// 100 ms, and then every 10 s. Starting again with the same target and epoch changes
// nothing; with another one the burst begins anew.
func (a *Announcer) Start(target Target, epoch int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t := a.tasks[target.VIP]; t != nil && t.target == target && t.epoch == epoch {
		return
	}
	now := time.Now()
	a.tasks[target.VIP] = &task{target: target, epoch: epoch, started: now, next: now}
	a.poke()
}

// Stop ends announcing the VIP. An announcement being sent at this moment may still go
// out, and none after it.
func (a *Announcer) Stop(vip string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.tasks, vip)
}

// Refresh announces the VIP at once and once more 1.1 s later: its interface has come up
// again, or somebody else has claimed it. It waits until 200 ms have passed since the
// announcement before. A VIP that is not being announced is ignored.
func (a *Announcer) Refresh(vip string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tasks[vip]
	if t == nil {
		return
	}
	now := time.Now()
	t.refreshed = now
	if soon := t.last.Add(refreshGap); soon.After(now) {
		now = soon
	}
	if now.Before(t.next) {
		t.next = now
		a.poke()
	}
}

// Stats returns what was sent for the VIP; false if it is not being announced.
func (a *Announcer) Stats(vip string) (Stats, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tasks[vip]
	if t == nil {
		return Stats{}, false
	}
	return t.stats, true
}

func (a *Announcer) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Run sends what is due until ctx ends, and then returns nil. All sockets are opened in
// the network namespace of the thread it runs on. What fails is tried again at the next
// beat; only where no netlink socket can be opened does Run return an error.
func (a *Announcer) Run(ctx context.Context) error {
	w, err := a.open()
	if err != nil {
		return fmt.Errorf("open the announcer's sockets: %w", err)
	}
	defer w.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		case <-timer.C:
		}
		for _, t := range a.due() {
			a.announce(w, t)
		}
		timer.Reset(a.pause())
	}
}

// due returns the tasks whose time has come.
func (a *Announcer) due() []*task {
	a.mu.Lock()
	defer a.mu.Unlock()
	var due []*task
	now := time.Now()
	for _, t := range a.tasks {
		if !t.next.After(now) {
			due = append(due, t)
		}
	}
	return due
}

// pause returns the time until the next task is due; Start and Refresh cut it short.
func (a *Announcer) pause() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	pause := every
	for _, t := range a.tasks {
		pause = min(pause, time.Until(t.next))
	}
	return pause
}

func (a *Announcer) announce(w wire, t *task) {
	may := a.config.May == nil || a.config.May(t.target.VIP) // which may lock what Start is called with
	a.mu.Lock()
	current := a.tasks[t.target.VIP] == t
	if !may {
		t.next = a.config.after(t, time.Now())
	}
	a.mu.Unlock()
	if !current || !may {
		return
	}
	err := w.announce(t.target)
	now := time.Now()

	a.mu.Lock()
	before := t.stats
	t.last, t.stats.Err = now, err
	if err == nil {
		t.stats.Sent++
	} else {
		t.stats.Failed++
	}
	t.next = a.config.after(t, now)
	first := First{t.target.VIP, t.epoch, now.Sub(t.started)}
	a.mu.Unlock()

	log := a.log.With("vip", t.target.VIP, "interface", t.target.Interface, "epoch", t.epoch)
	switch {
	case err != nil && before.Err == nil:
		log.Warn("announcing fails, trying again at the next beat", "error", err)
	case err == nil && before.Sent == 0:
		log.Info("announced", "address", t.target.Addr, "after", first.After)
		if a.config.Announced != nil {
			a.config.Announced(first)
		}
	case err == nil && before.Err != nil:
		log.Info("announcing works again", "failed", before.Failed)
	}
}

// after returns the first beat of the task after now. Beats that were slept through are
// not made up for: one late announcement says all that they would have said.
func (c Config) after(t *task, now time.Time) time.Time {
	next := now.Add(every)
	consider := func(beat time.Time) {
		if beat.After(now) && beat.Before(next) {
			next = beat
		}
	}
	for _, d := range c.beats() {
		consider(t.started.Add(d))
	}
	if !t.refreshed.IsZero() {
		consider(t.refreshed.Add(afterLockTime))
	}
	return next
}
