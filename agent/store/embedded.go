package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/wal"
)

func init() {
	// etcd preallocates each segment of its log, 64 MB by default: more than a mesh,
	// with its few small keys, will have in all of them.
	wal.SegmentSizeBytes = 8 << 20
}

// embedded is an etcd member in this process.
type embedded struct {
	etcd *embed.Etcd
	c    *clientv3.Client // in process, no socket; it repeats nothing
	cfg  Config
	log  *zapLog
	died <-chan string
}

// newEmbedded starts the member without waiting for the others, but for the short look
// around that a member without data takes. joined says that this member has been in the
// mesh before, whatever its data directory holds.
func newEmbedded(ctx context.Context, cfg Config, joined bool) (engine, error) {
	dir := filepath.Join(cfg.DataDir, "etcd")
	member := filepath.Join(dir, "member")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded store: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded store: %w", err)
	}
	died := make(chan string, 1)
	ec := etcdConfig(cfg, dir)
	log := &zapLog{log: cfg.Log.Named("etcd"), died: func(reason string) {
		select {
		case died <- reason:
		default:
		}
	}}
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(log.logger())

	hasData := wal.Exist(filepath.Join(member, "wal"))
	if !hasData {
		// What an attempt that failed before its log was made has left would stop this one.
		if err := os.RemoveAll(member); err != nil {
			return nil, fmt.Errorf("embedded store: %w", err)
		}
		initial, err := rejoin(ctx, cfg, joined)
		if err != nil {
			return nil, err
		}
		if initial != "" {
			ec.InitialCluster, ec.ClusterState = initial, embed.ClusterStateFlagExisting
		}
	}

	etcd, err := startEtcd(ctx, ec, died)
	if err != nil {
		var netErr *net.OpError
		if hasData && ctx.Err() == nil && !errors.As(err, &netErr) {
			return nil, fmt.Errorf("%w: %s: %w; move it away and restart the agent: the member then joins again with the others' data",
				ErrDataDir, dir, err)
		}
		return nil, fmt.Errorf("starting etcd: %w", err)
	}
	return &embedded{etcd: etcd, c: v3client.New(etcd.Server), cfg: cfg, log: log, died: died}, nil
}

// startEtcd gives etcd a goroutine of its own, which etcd may end or make panic, and
// time to finish what it cannot be interrupted in.
func startEtcd(ctx context.Context, ec *embed.Config, died <-chan string) (*embed.Etcd, error) {
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	done := make(chan result, 1)
	go func() {
		r := result{err: errors.New("etcd gave up")}
		defer func() {
			if p := recover(); p != nil {
				r.err = fmt.Errorf("etcd panicked: %v", p)
			}
			done <- r
		}()
		r.etcd, r.err = embed.StartEtcd(ec)
	}()
	var r result
	select {
	case r = <-done:
	case <-ctx.Done():
		select {
		case r = <-done:
		case <-time.After(closeTimeout):
		}
		if r.etcd != nil {
			r.etcd.Close()
		}
		return nil, ctx.Err()
	}
	if r.err != nil {
		select {
		case reason := <-died:
			r.err = fmt.Errorf("%w: %s", r.err, reason)
		default:
		}
	}
	return r.etcd, r.err
}

// electionOf is etcd's election time-out: as short as the mesh's own suspicion, within
// what etcd bears on a busy machine. A single member elects itself, once.
func electionOf(cfg Config) time.Duration {
	if len(cfg.Members) == 1 {
		return time.Second
	}
	return min(max(cfg.Election, 50*time.Millisecond), time.Second)
}

func etcdConfig(cfg Config, dir string) *embed.Config {
	e := cfg.Embedded
	ec := embed.NewConfig()
	ec.Name = cfg.Member
	ec.Dir = dir

	// The least lease TTL etcd grants is ceil(1.5 × election): no more than 2 s, the
	// smallest there is. Where the owner of a VIP and etcd's leader die at once, taking
	// over waits for this, drawn by etcd from one to two elections.
	ec.ElectionMs = uint(electionOf(cfg).Milliseconds())
	// Each tick wakes every member, and the leader sends heartbeats with it. etcd takes no
	// fewer than five an election.
	ec.TickMs = ec.ElectionMs / 5
	// What is written is on disk in the log before it counts; etcd's tables may follow later.
	ec.BackendBatchInterval = time.Second
	ec.PreVote = true
	ec.StrictReconfigCheck = true

	// The mesh writes some keys, over and over: keep little history.
	ec.AutoCompactionMode = embed.CompactorModePeriodic
	ec.AutoCompactionRetention = "10m"
	ec.SnapshotCount = 5000
	ec.SnapshotCatchUpEntries = 1000
	ec.MaxSnapFiles = 2
	ec.MaxWalFiles = 3
	ec.QuotaBackendBytes = 256 << 20
	ec.EnableGRPCGateway = false

	peer := []url.URL{peerURL(cfg, e.Address)}
	client := []url.URL{clientURL(cfg, e.Address)}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = peer, peer
	ec.ListenClientUrls, ec.AdvertiseClientUrls = client, client
	if !e.Address.IsLoopback() {
		ec.ListenClientUrls = append(client[:1:1], clientURL(cfg, netip.AddrFrom4([4]byte{127, 0, 0, 1})))
	}
	var initial []string
	for _, m := range cfg.Members {
		u := peerURL(cfg, m.Address)
		initial = append(initial, m.Name+"="+u.String())
	}
	ec.InitialCluster = strings.Join(initial, ",")
	ec.InitialClusterToken = "hamesh-" + cfg.Mesh
	ec.ClusterState = embed.ClusterStateFlagNew

	if cfg.TLS != nil {
		info := transport.TLSInfo{
			CertFile:       cfg.TLS.CertFile,
			KeyFile:        cfg.TLS.KeyFile,
			TrustedCAFile:  cfg.TLS.CAFile,
			ClientCertAuth: true,
			// The name decides, not the address it comes from: a node has several.
			SkipClientSANVerify: true,
		}
		for _, m := range cfg.Members {
			info.AllowedCNs = append(info.AllowedCNs, m.Name)
		}
		ec.ClientTLSInfo, ec.PeerTLSInfo = info, info
	}
	return ec
}

func peerURL(cfg Config, a netip.Addr) url.URL   { return etcdURL(cfg, a, cfg.Embedded.PeerPort) }
func clientURL(cfg Config, a netip.Addr) url.URL { return etcdURL(cfg, a, cfg.Embedded.ClientPort) }

func etcdURL(cfg Config, a netip.Addr, port int) url.URL {
	scheme := "http"
	if cfg.TLS != nil {
		scheme = "https"
	}
	return url.URL{Scheme: scheme, Host: net.JoinHostPort(a.String(), strconv.Itoa(port))}
}

// embeddedTLS is what this member shows to others' client ports.
func embeddedTLS(cfg Config) (*tls.Config, error) {
	if cfg.TLS == nil {
		return nil, nil
	}
	info := transport.TLSInfo{CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, TrustedCAFile: cfg.TLS.CAFile}
	return info.ClientConfig()
}

func (e *embedded) client() *clientv3.Client { return e.c }

// renew has its own goroutine because etcd looks at ctx only between some of its steps.
func (e *embedded) renew(ctx context.Context, id clientv3.LeaseID) (int64, error) {
	type result struct {
		ttl int64
		err error
	}
	done := make(chan result, 1)
	go func() {
		ttl, err := e.etcd.Server.LeaseRenew(ctx, lease.LeaseID(id))
		done <- result{ttl, err}
	}()
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case r := <-done:
		if errors.Is(r.err, lease.ErrLeaseNotFound) {
			return 0, nil
		}
		return r.ttl, r.err
	}
}

func (e *embedded) view() (leader string, members []string) {
	lead := e.etcd.Server.Leader()
	for _, m := range e.etcd.Server.Cluster().Members() {
		name := m.Name
		if name == "" { // added, never started
			name = memberAt(e.cfg, m.PeerURLs)
		}
		members = append(members, name)
		if m.ID == lead {
			leader = name
		}
	}
	return leader, members
}

func (e *embedded) newTerm() <-chan struct{} { return e.etcd.Server.FirstCommitInTermNotify() }

func (e *embedded) moveLeader(ctx context.Context, to string) error {
	s := e.etcd.Server
	if s.Leader() != s.MemberID() {
		return ErrNotStoreLeader
	}
	for _, m := range s.Cluster().Members() {
		if m.Name == to {
			return s.MoveLeader(ctx, uint64(s.MemberID()), uint64(m.ID))
		}
	}
	return fmt.Errorf("no such member: %s", to)
}

func (e *embedded) run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case reason := <-e.died:
		return fmt.Errorf("etcd gave up: %s", reason)
	case err := <-e.etcd.Err():
		return fmt.Errorf("etcd ended: %w", err)
	case <-e.etcd.Server.StopNotify():
		// etcd stops by itself for one reason: the others say that it was removed.
		return fmt.Errorf("%w: if this is unwanted, delete %s and restart the agent: it then joins again with the others' data",
			ErrRemoved, e.etcd.Config().Dir)
	}
}

func (e *embedded) close(ctx context.Context) error {
	e.log.quiet.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.etcd.Close()
	}()
	// A leader first hands over, which takes long when nobody is there to take it.
	patience := time.AfterFunc(closeTimeout/2, func() { go e.etcd.Server.HardStop() })
	defer patience.Stop()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("etcd still shutting down: %w", ctx.Err())
	}
}

// rejoin is asked by a member without data whether the mesh begins with it. It returns
// "" if so. A member that the running others do not know is added. Otherwise the data was lost, and with it this member's word to the
// others about what it has stored: coming back under the old id could lose what the
// mesh has committed. So it has the others, if a quorum of them answers, forget the old
// member and add a new one, and returns the initial cluster to start with.
func rejoin(ctx context.Context, cfg Config, joined bool) (string, error) {
	self := peerURL(cfg, cfg.Embedded.Address)
	lost := joined
	var others []string
	for _, m := range cfg.Members {
		if m.Name != cfg.Member {
			u := clientURL(cfg, m.Address)
			others = append(others, u.String())
		}
	}
	if len(others) == 0 {
		if joined {
			return "", fmt.Errorf("%w: the data in %s is lost and there is no other member; to begin anew, delete %s",
				ErrForeignStore, filepath.Join(cfg.DataDir, "etcd"), identityFile(cfg.DataDir))
		}
		return "", nil
	}

	tlsConf, err := embeddedTLS(cfg)
	if err != nil {
		return "", fmt.Errorf("embedded store: %w", err)
	}
	// Each member is asked for itself: one of them may know what others do not yet.
	var answering *clientv3.Client
	var members *clientv3.MemberListResponse
	for _, o := range others {
		c, err := dial([]string{o}, tlsConf, cfg)
		if err != nil {
			return "", fmt.Errorf("embedded store: %w", err)
		}
		defer c.Close()
		one, cancel := context.WithTimeout(ctx, requestTimeout)
		if local, err := c.MemberList(one, clientv3.WithSerializable()); err == nil {
			m := find(local.Members, self.String())
			// Only a member that has run before is known with its client address, or
			// without a name: an attempt to join again got so far.
			lost = lost || m != nil && (m.Name == "" || len(m.ClientURLs) > 0)
			if lost || m == nil {
				if whole, err := c.MemberList(one); err == nil {
					answering, members = c, whole
					lost = lost || find(whole.Members, self.String()) == nil
				}
			}
		}
		cancel()
	}
	if !lost {
		return "", nil
	}
	if answering == nil {
		return "", fmt.Errorf("embedded store: the data in %s is lost and no quorum of the other members answers; "+
			"if all members lost theirs, delete %s on each to begin anew", filepath.Join(cfg.DataDir, "etcd"), identityFile(cfg.DataDir))
	}

	cfg.Log.Error("the others' embedded store goes on without this member, or its data is lost: joining anew", "directory", filepath.Join(cfg.DataDir, "etcd"))
	one, cancel := context.WithTimeout(ctx, 3*requestTimeout)
	defer cancel()
	if old := find(members.Members, self.String()); old != nil {
		if _, err := answering.MemberRemove(one, old.ID); err != nil {
			return "", fmt.Errorf("embedded store: removing the old member: %w", err)
		}
		cfg.Log.Warn("removed the old member from the embedded store", "member", cfg.Member, "id", types.ID(old.ID).String())
	}
	added, err := answering.MemberAdd(one, []string{self.String()})
	if err != nil {
		return "", fmt.Errorf("embedded store: adding the member anew: %w", err)
	}
	cfg.Log.Warn("added the member to the embedded store anew", "member", cfg.Member, "id", types.ID(added.Member.ID).String())
	var initial []string
	for _, m := range added.Members {
		name := m.Name
		if name == "" {
			name = memberAt(cfg, m.PeerURLs)
		}
		for _, u := range m.PeerURLs {
			initial = append(initial, name+"="+u)
		}
	}
	return strings.Join(initial, ","), nil
}

func find(members []*pb.Member, peer string) *pb.Member {
	for _, m := range members {
		for _, u := range m.PeerURLs {
			if u == peer {
				return m
			}
		}
	}
	return nil
}

// memberAt is the configured name of the member with one of these peer URLs.
func memberAt(cfg Config, peers []string) string {
	for _, m := range cfg.Members {
		own := peerURL(cfg, m.Address)
		for _, p := range peers {
			if p == own.String() {
				return m.Name
			}
		}
	}
	return strings.Join(peers, " ")
}
