package store

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// external is an etcd that somebody else runs.
type external struct {
	c *clientv3.Client

	mu      sync.Mutex
	leader  string
	members []string
}

func newExternal(cfg Config) (engine, error) {
	x := cfg.External
	tlsConf, err := clientTLS(x.Endpoints, TLSFiles{CAFile: x.CAFile, CertFile: x.CertFile, KeyFile: x.KeyFile})
	if err != nil {
		return nil, fmt.Errorf("external store: %w", err)
	}
	c, err := dial(x.Endpoints, tlsConf, cfg)
	if err != nil {
		return nil, fmt.Errorf("external store: %w", err)
	}
	return &external{c: c}, nil
}

func clientTLS(endpoints []string, files TLSFiles) (*tls.Config, error) {
	info := transport.TLSInfo{CertFile: files.CertFile, KeyFile: files.KeyFile, TrustedCAFile: files.CAFile}
	for _, e := range endpoints {
		if strings.HasPrefix(e, "https://") {
			return info.ClientConfig()
		}
	}
	return nil, nil
}

// dial makes a client that sends every request once. Left to itself, etcd's client
// repeats even a transaction when the *server* reports a deadline or a cancellation
// while the caller's own context is still good (client/v3 retry_interceptor.go), and a
// repeated compare fails on what its first copy wrote. What gRPC repeats by itself are
// only requests that no server has seen.
func dial(endpoints []string, tlsConf *tls.Config, cfg Config) (*clientv3.Client, error) {
	log := &zapLog{log: cfg.Log.Named("etcd-client")}
	log.quiet.Store(true)
	return clientv3.New(clientv3.Config{
		Endpoints:            endpoints,
		TLS:                  tlsConf,
		MaxUnaryRetries:      1,
		DialKeepAliveTime:    10 * time.Second, // gRPC's least; a request in flight is noticed after the time-out
		DialKeepAliveTimeout: time.Second,
		Logger:               log.logger(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		})},
	})
}

func (x *external) client() *clientv3.Client { return x.c }

// renew does not use the client's KeepAliveOnce, which tries again without a pause, so
// that nobody could say when the answered request was sent.
func (x *external) renew(ctx context.Context, lease clientv3.LeaseID) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(x.c.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(lease)}); err != nil {
		return 0, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	return resp.TTL, nil
}

func (x *external) view() (string, []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.leader, append([]string(nil), x.members...)
}

func (x *external) newTerm() <-chan struct{} { return nil }

func (x *external) moveLeader(context.Context, string) error { return ErrNotEmbedded }

// run keeps the view fresh, which is for people only.
func (x *external) run(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		x.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (x *external) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	leader, members := "", []string(nil)
	// The client's own Status would dial one given endpoint, dead or alive.
	st, err := pb.NewMaintenanceClient(x.c.ActiveConnection()).Status(ctx, &pb.StatusRequest{})
	if err == nil {
		if list, err := x.c.MemberList(ctx); err == nil {
			for _, m := range list.Members {
				members = append(members, m.Name)
				if m.ID == st.Leader {
					leader = m.Name
				}
			}
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.leader = leader
	if members != nil {
		x.members = members
	}
}

func (x *external) close(context.Context) error { return x.c.Close() }
