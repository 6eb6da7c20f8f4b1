package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/hamesh/hamesh/agent/ownership"
)

// Errors that end Run. Each comes wrapped in a message that says what to do.
var (
	// ErrOlderBoot: the store knows a newer boot of this member, so this process is
	// not, or no longer, the one that speaks for it.
	ErrOlderBoot = errors.New("a newer boot of this member is recorded")
	// ErrForeignStore: the store belongs to another mesh, was wiped, or went back in
	// time (restored from a backup).
	ErrForeignStore = errors.New("the store is not the one this member knows")
	// ErrRemoved: the embedded member was removed from the etcd cluster for good.
	ErrRemoved = errors.New("this member was removed from the embedded store")
	// ErrDataDir: the embedded member's data directory cannot be used.
	ErrDataDir = errors.New("the embedded store's data directory is unusable")
)

// Errors of MoveLeader.
var (
	// ErrNotEmbedded: the store is external; its leader is not ours to move.
	ErrNotEmbedded = errors.New("the store is not embedded, or not started yet")
	// ErrNotStoreLeader: only the etcd leader can hand over, and it is another member.
	ErrNotStoreLeader = errors.New("this member is not the embedded store's leader")
)

// Member is one member of the mesh as configured.
type Member struct {
	Name    string
	Address netip.Addr
}

// Embedded says how to run etcd inside the agent. Every member uses the same ports.
type Embedded struct {
	ClientPort, PeerPort int        // 1..65535
	Address              netip.Addr // this node's own address, listened on
}

// External says how to reach an etcd that somebody else runs.
type External struct {
	Endpoints                 []string // URLs; https needs no files where the system's roots will do
	Prefix                    string   // empty: /hamesh
	CAFile, CertFile, KeyFile string   // PEM; empty: not used
}

// TLSFiles are PEM files for mutual TLS between the embedded members. The certificate's
// common name must be the member's name: members let in nobody else.
type TLSFiles struct {
	CAFile, CertFile, KeyFile string
}

// Config is what a Store needs. Exactly one of Embedded and External is set.
type Config struct {
	Mesh    string
	Member  string   // this member's name
	Members []Member // every member, this one included
	DataDir string   // etcd's data goes to DataDir/etcd, what is known of the mesh to DataDir/identity

	Embedded *Embedded
	External *External
	TLS      *TLSFiles // embedded: nil means no TLS at all

	Boot     uint64        // this start's boot id: higher than that of every earlier start
	Election time.Duration // embedded: etcd's election time-out, taken into 50 ms to 1 s; a single member's is 1 s
	LeaseTTL time.Duration // rounded up to whole seconds; embedded etcd grants no less than 1 s
	Poll     time.Duration // time between reads of all records, at least 50 ms; an order given here is read at once

	// OnOrders gets the operators' orders when they are first read, before any event says
	// that the store was read, and after each change. It must not block, nor call the
	// Store. Nil: nobody wants them.
	OnOrders func(Orders)

	Now func() ownership.Instant
	Log hclog.Logger
}

// Status is what the store is known to be now.
type Status struct {
	Kind      string   // "embedded" or "external"
	Available bool     // a poll was answered within the last 4·Poll
	Leader    string   // name of the etcd leader as last heard; empty: none known
	Members   []string // names of the etcd members, sorted
}

const (
	defaultPrefix  = "/hamesh"
	minPoll        = 50 * time.Millisecond
	requestTimeout = time.Second
	// closeTimeout is longer than etcd waits for a request under way where members are dead:
	// 5.5 s (server/config, ReqTimeout).
	closeTimeout = 6 * time.Second
	// lateAnswer is how long a write may stay unanswered once all that was proposed before
	// it is committed or lost: the rest of its way is within this process.
	lateAnswer = 5 * time.Millisecond
	maxWrites  = 16
	maxPolls   = 2
)

// engine is one running way to an etcd.
type engine interface {
	client() *clientv3.Client
	// renew extends the lease by one request, never repeated. A TTL ≤ 0 says that the
	// store knows no such lease.
	renew(ctx context.Context, lease clientv3.LeaseID) (ttl int64, err error)
	view() (leader string, members []string)
	moveLeader(ctx context.Context, to string) error
	// newTerm ends, when read, with the first commit under a new leader: what had been
	// proposed under the one before is committed by then, or lost. nil: cannot be known.
	newTerm() <-chan struct{}
	// run returns when ctx ends, or with the reason when the engine ended by itself.
	run(ctx context.Context) error
	close(ctx context.Context) error
}

// Store is one member's access to the mesh's store. Its methods may be called by
// several goroutines, Run only once.
type Store struct {
	cfg    Config
	keys   keys
	log    hclog.Logger
	events *queue
	writes chan struct{}   // one token for each transaction under way
	due    chan struct{}   // one token: poll now
	back   chan netip.Addr // members that can be reached again

	life context.Context // ends with Close
	end  context.CancelFunc
	work sync.WaitGroup // Run and the writes

	mu       sync.Mutex
	engine   engine // nil: not started
	ready    bool   // the boot key is written: writes may go out
	bootSent bool
	lease    clientv3.LeaseID
	known    identity // as persisted, its revision as last seen
	answered ownership.Instant
	answers  bool              // answered is valid
	polled   ownership.Instant // SentAt of the newest snapshot delivered
	ordered  int64             // revision of the orders that were told last; -1: none
}

// Open checks the configuration and prepares a Store. It does not wait for anything:
// etcd is started, or connected to, by Run.
func Open(cfg Config) (*Store, error) {
	cfg, err := cfg.checked()
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	known, err := loadIdentity(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	prefix := defaultPrefix
	if cfg.External != nil && cfg.External.Prefix != "" {
		prefix = cfg.External.Prefix
	}
	s := &Store{
		cfg:    cfg,
		keys:   keys(strings.TrimRight(prefix, "/") + "/" + cfg.Mesh + "/"),
		log:    cfg.Log,
		events: newQueue(),
		writes: make(chan struct{}, maxWrites), due: make(chan struct{}, 1),
		back:  make(chan netip.Addr, backlog),
		known: known, ordered: -1,
	}
	s.life, s.end = context.WithCancel(context.Background())
	return s, nil
}

func (cfg Config) checked() (Config, error) {
	if (cfg.Embedded == nil) == (cfg.External == nil) {
		return cfg, errors.New("need exactly one of embedded and external")
	}
	names := []string{cfg.Mesh, cfg.Member}
	var self *Member
	for i, m := range cfg.Members {
		names = append(names, m.Name)
		if m.Name == cfg.Member {
			self = &cfg.Members[i]
		}
	}
	for _, n := range names {
		if n == "" || strings.ContainsAny(n, "/,= ") {
			return cfg, fmt.Errorf("name %q is empty or contains one of \"/,= \"", n)
		}
	}
	if self == nil {
		return cfg, fmt.Errorf("member %q is not among the members", cfg.Member)
	}
	if e := cfg.Embedded; e != nil && (e.Address != self.Address || e.ClientPort <= 0 || e.PeerPort <= 0) {
		return cfg, fmt.Errorf("embedded store needs both ports and the address by which members know %s, %s", cfg.Member, self.Address)
	}
	if e := cfg.External; e != nil && len(e.Endpoints) == 0 {
		return cfg, errors.New("external store needs endpoints")
	}
	if cfg.DataDir == "" || cfg.Boot == 0 || cfg.LeaseTTL <= 0 || cfg.Now == nil {
		return cfg, errors.New("need a data directory, a boot id, a lease TTL and a clock")
	}
	cfg.Poll = max(cfg.Poll, minPoll)
	if cfg.OnOrders == nil {
		cfg.OnOrders = func(Orders) {}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	return cfg, nil
}

// Events delivers what the store says, in order. The channel is never closed. A slow
// reader misses superseded snapshots and nothing else.
func (s *Store) Events() <-chan ownership.Event { return s.events.out }

// Run starts or connects to etcd, writes this boot's key, keeps a lease and polls. No
// failure of etcd ends it. It returns nil when ctx ends or the Store is closed, and else
// one of ErrOlderBoot, ErrForeignStore, ErrRemoved, ErrDataDir. Writes and Revoke work
// on after its return, until Close.
func (s *Store) Run(ctx context.Context) error {
	if !s.begin() {
		return nil
	}
	defer s.work.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()

	for {
		eng, err := s.start(ctx)
		if err == nil {
			s.setEngine(eng)
			err = s.serve(ctx, eng)
		}
		if ctx.Err() != nil {
			return nil
		}
		if fatal(err) {
			return fmt.Errorf("running the store: %w", err)
		}
		s.log.Error("store ended by itself, starting it again", "error", err)
		s.setEngine(nil)
		if err := closeEngine(eng); err != nil {
			// The old one may still hold its files and ports: a second one beside it
			// would only wait for them.
			s.log.Error("store stays unavailable until the agent restarts", "error", err)
			<-ctx.Done()
			return nil
		}
	}
}

func fatal(err error) bool {
	for _, f := range []error{ErrOlderBoot, ErrForeignStore, ErrRemoved, ErrDataDir} {
		if errors.Is(err, f) {
			return true
		}
	}
	return false
}

// start makes an engine, again and again until it succeeds, ctx ends, or the reason for
// failing will not go away.
func (s *Store) start(ctx context.Context) (engine, error) {
	var eng engine
	err := retry(ctx, s.log.With("while", "starting the store"), func() (err error) {
		if s.cfg.External != nil {
			eng, err = newExternal(s.cfg)
		} else {
			eng, err = newEmbedded(ctx, s.cfg, s.identity().ID != "")
		}
		return err
	})
	return eng, err
}

// serve returns when ctx ends, the engine does, or going on would be wrong.
func (s *Store) serve(ctx context.Context, eng engine) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return eng.run(ctx) })
	if e := s.cfg.Embedded; e != nil && len(s.cfg.Members) > 1 {
		g.Go(func() error { return s.unstick(ctx, uint16(e.PeerPort)) })
	}
	g.Go(func() error {
		if err := s.introduce(ctx, eng.client()); err != nil {
			return err
		}
		g.Go(func() error { return s.keepLease(ctx, eng) })
		g.Go(func() error { return s.keepIdentity(ctx) })
		return s.poll(ctx, eng.client(), g)
	})
	return g.Wait()
}

// begin counts one more user of the engine, unless the Store is closed.
func (s *Store) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Err() != nil {
		return false
	}
	s.work.Add(1)
	return true
}

func (s *Store) setEngine(eng engine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.engine = eng
	s.ready = false
	s.answers = false
}

func (s *Store) current() engine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.engine
}

// Status says what is known now; it asks nobody.
func (s *Store) Status() Status {
	st := Status{Kind: "embedded"}
	if s.cfg.External != nil {
		st.Kind = "external"
	}
	if eng := s.current(); eng != nil {
		st.Available = s.available()
		st.Leader, st.Members = eng.view()
		slices.Sort(st.Members)
	}
	return st
}

func (s *Store) available() bool {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers && now.Sub(s.answered) <= 4*s.cfg.Poll
}

// MoveLeader hands etcd's leadership to the member of that name. ErrNotEmbedded with an
// external store, ErrNotStoreLeader where another member leads.
func (s *Store) MoveLeader(ctx context.Context, to string) error {
	eng := s.current()
	if eng == nil {
		return ErrNotEmbedded
	}
	if err := eng.moveLeader(ctx, to); err != nil {
		return fmt.Errorf("moving the store's leader to %s: %w", to, err)
	}
	return nil
}

// Revoke gives back the lease of this boot, and with it every record that hangs on it.
// Call it once Run has returned: a running Run takes a new lease.
func (s *Store) Revoke(ctx context.Context) error {
	s.mu.Lock()
	eng, lease := s.engine, s.lease
	s.mu.Unlock()
	if eng == nil || lease == clientv3.NoLease {
		return nil
	}
	if _, err := eng.client().Revoke(ctx, lease); err != nil {
		return fmt.Errorf("revoking lease %x: %w", int64(lease), err)
	}
	return nil
}

// Close ends Run and stops etcd. It takes 5 s at most; the error says what was left
// behind then.
func (s *Store) Close() error {
	s.mu.Lock()
	s.end()
	s.mu.Unlock()
	s.work.Wait()
	s.events.close()
	eng := s.current()
	s.setEngine(nil)
	return closeEngine(eng)
}

func closeEngine(eng engine) error {
	if eng == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := eng.close(ctx); err != nil {
		return fmt.Errorf("closing the store: %w", err)
	}
	return nil
}
