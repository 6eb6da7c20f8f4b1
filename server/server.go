package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	maxMessage = 4 << 20 // bytes
	// stopGrace is how long calls may still run once the server is told to stop.
	stopGrace = 250 * time.Millisecond
	// watchInterval is the shortest time between two messages of one WatchStatus.
	watchInterval = 50 * time.Millisecond
	// watchLook is how often a watcher looks for what nobody reports, such as the number of
	// connections.
	watchLook = time.Second
	// window is how many bytes a caller may have under way before some were read.
	window = 1 << 20
)

// StatusSource knows the mesh as this member sees it.
type StatusSource interface {
	// Status returns the present status; the caller does not change it.
	Status() *hameshv1.GetStatusResponse
	// Changed returns a channel that is closed at the next change of the status.
	Changed() <-chan struct{}
}

// ControlSink carries operators' orders out. [Caller] of a call's context is who gives
// the order. Errors: those of this package, or a gRPC status that another agent sent.
type ControlSink interface {
	// MoveVip moves a VIP and calls send once a phase, from the calling goroutine. An
	// order that was accepted goes on when ctx ends or send fails: the caller may have
	// left without waiting for the end.
	MoveVip(ctx context.Context, request *hameshv1.MoveVipRequest, send func(*hameshv1.MoveVipResponse) error) error
	// DrainNode, UndrainNode and SetBackendState return once the order is kept.
	DrainNode(context.Context, *hameshv1.DrainNodeRequest) (*hameshv1.DrainNodeResponse, error)
	UndrainNode(context.Context, *hameshv1.UndrainNodeRequest) (*hameshv1.UndrainNodeResponse, error)
	SetBackendState(context.Context, *hameshv1.SetBackendStateRequest) (*hameshv1.SetBackendStateResponse, error)
	// CrashAgent returns once the agent is about to crash.
	CrashAgent(context.Context, *hameshv1.CrashAgentRequest) (*hameshv1.CrashAgentResponse, error)
}

// MeshPeer hears what other members say.
type MeshPeer interface {
	// Heartbeat takes one heartbeat of the member from, whose name the server has checked,
	// and returns the ack; nil: it deserves none. Heartbeats of one stream come in order, one at a time; several
	// members' come at the same time.
	Heartbeat(ctx context.Context, from string, heartbeat *hameshv1.Heartbeat) (*hameshv1.ExchangeResponse, error)
	// Withdrawn takes the word of the guard of the member from, whose name the server has
	// checked. It is called at any time, and again for the same word. An error makes the
	// guard try again for a while where its code is Unavailable.
	Withdrawn(ctx context.Context, from string, word *hameshv1.WithdrawnRequest) error
	// Flows takes what the member from, whose name the server has checked, says of its
	// connections. Those of one stream come in order, one at a time.
	Flows(from string, change *hameshv1.ShareFlowsRequest)
	// Recall returns what a member has said of its connections.
	Recall(member string) []*hameshv1.ShareFlowsRequest
}

// Options says whom the server serves.
type Options struct {
	Mesh    string   // name of the mesh, which certificates must carry
	Node    string   // name of the member that this server speaks for
	Members []string // names of all members, Node included
	// TLS authenticates callers on TCP and must verify their certificates; nil only with
	// Insecure.
	TLS credentials.TransportCredentials
	// Insecure lets everybody on TCP call everything under any name. For a lab only.
	Insecure bool
	Log      hclog.Logger
	// Interceptors run before the server's own, so that they see every call's final
	// status; metrics, for one.
	UnaryInterceptors  []grpc.UnaryServerInterceptor
	StreamInterceptors []grpc.StreamServerInterceptor
}

// Server answers gRPC calls for one member.
type Server struct {
	hameshv1.UnimplementedStatusServiceServer
	hameshv1.UnimplementedControlServiceServer
	hameshv1.UnimplementedMeshServiceServer

	mesh     string
	peers    []string
	insecure bool
	log      hclog.Logger

	status  StatusSource
	events  EventSource
	control ControlSink
	peer    MeshPeer

	grpc     *grpc.Server
	health   *health.Server
	stopping chan struct{}
}

// New returns a server that does not serve yet. It fails where neither TLS nor Insecure
// is given, or both.
func New(options Options, status StatusSource, events EventSource, control ControlSink, mesh MeshPeer) (*Server, error) {
	tcp := options.TLS
	switch {
	case options.Insecure && tcp != nil:
		return nil, errors.New("making the gRPC server: both TLS and insecure are wanted")
	case !options.Insecure && tcp == nil:
		return nil, errors.New("making the gRPC server: neither TLS nor insecure is wanted")
	case options.Insecure:
		tcp = insecure.NewCredentials()
	}
	s := &Server{
		mesh:     options.Mesh,
		peers:    slices.DeleteFunc(slices.Clone(options.Members), func(m string) bool { return m == options.Node }),
		insecure: options.Insecure,
		log:      options.Log,
		status:   status,
		events:   events,
		control:  control,
		peer:     mesh,
		health:   health.NewServer(),
		stopping: make(chan struct{}),
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(byListener{tcp}),
		grpc.ChainUnaryInterceptor(append(slices.Clone(options.UnaryInterceptors), s.interceptUnary)...),
		grpc.ChainStreamInterceptor(append(slices.Clone(options.StreamInterceptors), s.interceptStream)...),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		// A window that gRPC finds out for itself costs a ping for each heartbeat.
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	hameshv1.RegisterStatusServiceServer(s.grpc, s)
	hameshv1.RegisterControlServiceServer(s.grpc, s)
	hameshv1.RegisterMeshServiceServer(s.grpc, s)
	healthv1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	return s, nil
}

// Serve answers calls on all listeners until ctx ends or one listener fails; then it lets
// calls finish for a quarter of a second and cuts the rest off. It closes the listeners, and returns
// nil when ctx ended it. A server serves once.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, listener := range listeners {
		group.Go(func() error {
			if err := s.grpc.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				return fmt.Errorf("serving gRPC on %s: %w", listener.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		s.shutdown()
		return nil
	})
	return group.Wait()
}

func (s *Server) shutdown() {
	close(s.stopping)
	s.health.Shutdown()
	cut := time.AfterFunc(stopGrace, s.grpc.Stop)
	defer cut.Stop()
	s.grpc.GracefulStop()
}

func (s *Server) interceptUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (response any, err error) {
	defer func() { err = s.answer(recover(), err) }()
	id, err := s.authorize(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handle(withIdentity(ctx, id), request)
}

func (s *Server) interceptStream(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer func() { err = s.answer(recover(), err) }()
	id, err := s.authorize(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return handle(service, identifiedStream{stream, withIdentity(stream.Context(), id)})
}

// answer makes a call's error from what it returned or panicked with.
func (s *Server) answer(panicked any, err error) error {
	if panicked != nil {
		s.log.Error("a call panicked", "error", panicked, "stack", string(debug.Stack()))
		err = errPanic
	}
	return statusError(err)
}

// identifiedStream is a stream whose context knows who calls.
type identifiedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s identifiedStream) Context() context.Context { return s.ctx }
