package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// connectWithin bounds one TCP connect. A SYN that is lost is repeated by the kernel
	// only after 1 s (RFC 6298, section 2); a new connect repeats it sooner.
	connectWithin = 400 * time.Millisecond
	// firstAckWithin bounds connect, TLS handshake and the first ack together, on a
	// machine that is short of CPU.
	firstAckWithin = 3 * time.Second
	// minPause and maxPause lie between two attempts, and once lies before the first one
	// after a session: another process may have taken the place of the one that ended it.
	minPause, maxPause = 50 * time.Millisecond, 250 * time.Millisecond
	once               = 10 * time.Millisecond
	// window is how many bytes may be under way before the other side must have read some.
	window = 1 << 20
)

// Config says whom to call, and how.
type Config struct {
	Name    string         // the member called
	Address netip.AddrPort // where its agent serves gRPC
	// Credentials authenticate both sides; nil: none, in a lab.
	Credentials credentials.TransportCredentials
	// Silence is how long a session may go without an ack before it is given up: its TCP
	// connection may be deep in back-off when the path works again, a new one is not.
	Silence time.Duration
	// OnAck gets each ack with the time its heartbeat took there and back. It is called
	// by one goroutine at a time.
	OnAck func(ack *hameshv1.ExchangeResponse, took time.Duration)
	// OnLinked is called when a session begins: its first heartbeat was answered.
	OnLinked func()
	// OnRefused is called when the member's kernel answers that nobody listens: its machine
	// lives, its agent does not.
	OnRefused func()
	Log       hclog.Logger
}

// Link carries heartbeats to one member. Its methods may be called by several
// goroutines, Run only once.
type Link struct {
	cfg    Config
	newest atomic.Pointer[hameshv1.Heartbeat]
	fresh  chan struct{} // one token: newest has not been sent yet

	mu     sync.Mutex
	conn   *grpc.ClientConn // of the present session; nil: none
	lost   time.Time        // since when there is none
	linked chan struct{}    // closed while there is one
}

// New returns a link that does nothing until Run.
func New(cfg Config) *Link {
	return &Link{cfg: cfg, fresh: make(chan struct{}, 1), lost: time.Now(), linked: make(chan struct{})}
}

// String names the task.
func (l *Link) String() string { return "link to " + l.cfg.Name }

// Send makes the heartbeat the next one to be sent, in place of one that is still
// waiting. It never blocks.
func (l *Link) Send(h *hameshv1.Heartbeat) {
	l.newest.Store(h)
	select {
	case l.fresh <- struct{}{}:
	default:
	}
}

// Control returns a client for the member's ControlService over the present session;
// false while there is none.
func (l *Link) Control() (hameshv1.ControlServiceClient, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, false
	}
	return hameshv1.NewControlServiceClient(l.conn), true
}

// AwaitMesh waits for a session and returns a client for the member's MeshService over it;
// false: ctx has ended before.
func (l *Link) AwaitMesh(ctx context.Context) (hameshv1.MeshServiceClient, bool) {
	for {
		l.mu.Lock()
		conn, linked := l.conn, l.linked
		l.mu.Unlock()
		if conn != nil {
			return hameshv1.NewMeshServiceClient(conn), ctx.Err() == nil
		}
		select {
		case <-ctx.Done():
			return nil, false
		case <-linked:
		}
	}
}

// Status returns a client for the member's StatusService over the present session; false
// while there is none.
func (l *Link) Status() (hameshv1.StatusServiceClient, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, false
	}
	return hameshv1.NewStatusServiceClient(l.conn), true
}

// Run keeps one session after another until ctx ends, and then returns nil.
func (l *Link) Run(ctx context.Context) error {
	reachable := true // so that the first failure is told
	for ctx.Err() == nil {
		acked, err := l.session(ctx)
		if ctx.Err() != nil {
			break
		}
		if acked || reachable {
			l.cfg.Log.Info("lost the link", "peer", l.cfg.Name, "error", err)
		}
		reachable = acked
		pause := once
		if !acked {
			pause = minPause + rand.N(maxPause-minPause)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

// session connects and carries heartbeats until something fails; it says whether any was
// answered.
func (l *Link) session(ctx context.Context) (acked bool, err error) {
	creds := l.cfg.Credentials
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	dialer := net.Dialer{Timeout: connectWithin}
	conn, err := grpc.NewClient("passthrough:///"+l.cfg.Address.String(),
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, "tcp", address)
			if errors.Is(err, syscall.ECONNREFUSED) {
				l.cfg.OnRefused()
			}
			return c, err
		}),
		// To find the best window gRPC sends a ping along with what it receives, which
		// doubles the packets of heartbeats.
		grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(window))
	if err != nil {
		return false, fmt.Errorf("make a client: %w", err)
	}
	defer conn.Close()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(firstAckWithin, func() { cancel(fmt.Errorf("no ack for too long")) })
	defer watchdog.Stop()

	stream, err := hameshv1.NewMeshServiceClient(conn).Exchange(ctx)
	if err != nil {
		return false, fmt.Errorf("open the stream: %w", err)
	}
	l.setConn(conn)
	defer l.setConn(nil)

	var sent sentTimes
	var answered atomic.Bool
	go func() { // ends with the stream, which ends with ctx
		for {
			ack, err := stream.Recv()
			if err != nil {
				cancel(err)
				return
			}
			if !answered.Swap(true) {
				l.cfg.Log.Info("linked", "peer", l.cfg.Name)
				l.cfg.OnLinked()
			}
			watchdog.Reset(l.cfg.Silence)
			l.cfg.OnAck(ack, sent.since(ack.GetAckSequence()))
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return answered.Load(), context.Cause(ctx)
		case <-l.fresh:
		}
		h := l.newest.Load()
		sent.note(h.GetSequence())
		if err := stream.Send(&hameshv1.ExchangeRequest{Heartbeat: h}); err != nil {
			return answered.Load(), fmt.Errorf("send a heartbeat: %w", err)
		}
	}
}

func (l *Link) setConn(conn *grpc.ClientConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn, l.lost = conn, time.Now()
	if conn != nil {
		close(l.linked)
	} else {
		l.linked = make(chan struct{})
	}
}

// Lost returns for how long there has been no session; 0 while there is one.
func (l *Link) Lost() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		return 0
	}
	return time.Since(l.lost)
}

// sentTimes remembers when the last heartbeats left.
type sentTimes struct {
	mu   sync.Mutex
	ring [64]struct {
		seq uint64
		at  time.Time
	}
}

func (s *sentTimes) note(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &s.ring[seq%uint64(len(s.ring))]
	e.seq, e.at = seq, time.Now()
}

// since returns the time since the heartbeat left; 0: not known any more.
func (s *sentTimes) since(seq uint64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.ring[seq%uint64(len(s.ring))]; e.seq == seq {
		return time.Since(e.at)
	}
	return 0
}
