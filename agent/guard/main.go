package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	grpccredentials "google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hamesh/hamesh/agent/credentials"
	"github.com/hamesh/hamesh/agent/handover"
	"github.com/hamesh/hamesh/agent/vip"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// withdrawWithin bounds the tries to take one VIP off; its lifetime does the rest.
	withdrawWithin = time.Second
	withdrawAgain  = 20 * time.Millisecond
	// tellWithin bounds the tries to tell one member.
	tellWithin = 3 * time.Second
	tellAgain  = 100 * time.Millisecond
	// connectWithin bounds one TCP connect: a lost SYN is repeated by the kernel only after
	// 1 s (RFC 6298, section 2).
	connectWithin = 400 * time.Millisecond
	// handshakeWithin bounds connect, TLS and the HTTP/2 preface together.
	handshakeWithin = 1500 * time.Millisecond
	// surviveAtMost bounds it all, so that nothing, a log that blocks for one, keeps the
	// next agent from the node's lock for good.
	surviveAtMost = 6 * time.Second

	gcPercent   = 20
	memoryLimit = 32 << 20 // bytes
)

// Exit statuses.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// Main is the guard: it watches its parent as the orders that it inherits say, and returns
// the exit status. It logs to stderr, and before the agent has ended only why it cannot watch
// and what connections it has ended. It takes no arguments and is of no use to a person.
func Main(args []string, stderr io.Writer) int {
	// Whoever stops a service tells all its processes; this one leaves when the agent says
	// so. A log that nobody reads any more is no reason to die either.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR2, syscall.SIGPIPE)
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)

	in := os.NewFile(ordersFD, "orders")
	defer in.Close()
	o, err := readOrders(in)
	if len(args) > 0 {
		err = fmt.Errorf("unexpected argument %q", args[0])
	}
	if err != nil {
		fmt.Fprintln(stderr, "hameshd guard: only hameshd itself starts it:", err)
		return exitUsage
	}
	log := hclog.New(&hclog.LoggerOptions{
		Name: "guard", Output: stderr, Level: hclog.LevelFromString(o.LogLevel), JSONFormat: o.LogJSON,
	})
	if err := stand(o, in, log); err != nil {
		log.Error("the guard fails", "error", err)
		return exitFailed
	}
	return exitOK
}

// stand prepares everything, watches, and acts when the agent has ended.
func stand(o orders, in *os.File, log hclog.Logger) error {
	kernel, err := vip.Open(log.Named("vip"), o.VIPs)
	if err != nil {
		return err
	}
	defer kernel.Close()
	client := func(string) grpccredentials.TransportCredentials { return insecure.NewCredentials() }
	if !o.Insecure {
		files, err := credentials.Open(o.CAFile, o.CertFile, o.KeyFile)
		if err != nil {
			return err
		}
		client = files.Client
	}
	ctx, cancel := context.WithCancel(context.Background())
	var stranded sync.WaitGroup
	stranded.Go(func() { endStranded(ctx, kernel, o.Ports, log) })
	defer stranded.Wait() // it uses the kernel
	defer cancel()
	end, err := watch(o.Agent, in, func() {
		out := os.NewFile(readyFD, "ready")
		_, _ = out.Write([]byte{ready}) // an agent that does not read it has ended, or kills us
		out.Close()
		debug.FreeOSMemory()
	})
	if err != nil || end == released {
		return err
	}

	time.AfterFunc(surviveAtMost, func() { os.Exit(exitFailed) })
	gone, err := withdraw(kernel, o.VIPs)
	// The next agent need not wait until the last member has heard: nothing is touched after
	// the sweep, and the word is dropped by whoever knows a newer boot.
	var swept sync.WaitGroup
	swept.Go(func() {
		sweepDrains(o, log)
		_ = syscall.Close(lockFD)
	})
	// Nothing is logged before the word is out, for that may block.
	untold := tell(o, client, &hameshv1.WithdrawnRequest{Member: o.Member, Boot: o.Boot, Vips: gone})
	swept.Wait()
	for _, v := range o.VIPs {
		endConnections(v.Addr, o.Ports, log)
	}
	log.Warn("the agent has ended: its VIPs were taken off", "vips", gone, "boot", o.Boot)
	if untold != nil {
		log.Warn("not everybody has heard it", "error", untold)
	}
	return err
}

// sweepDrains takes away what the agent had set up for connections that outlive a move:
// they have died with it.
func sweepDrains(o orders, log hclog.Logger) {
	config := handover.Config{Log: log}
	for _, v := range o.VIPs {
		config.Managed = append(config.Managed, handover.Address{VIP: v.VIP, Addr: v.Addr, Interface: v.Interface})
	}
	kernel, err := handover.Open(config)
	if errors.Is(err, handover.ErrUnsupported) {
		return // then the agent has set up nothing
	}
	if err == nil {
		err = kernel.Sweep()
		kernel.Close()
	}
	if err != nil {
		log.Warn("could not sweep the drains", "error", err)
	}
}

// ending is why a guard stops watching.
type ending int

const (
	_        ending = iota
	died            // the agent's process has ended
	released        // the agent has told the guard to leave
)

// withdraw takes every VIP off, and returns those that the kernel was seen not to have.
func withdraw(kernel *vip.Kernel, vips []vip.Address) (gone []string, err error) {
	errs := make([]error, len(vips))
	var all sync.WaitGroup
	for i, v := range vips {
		all.Go(func() {
			deadline := time.Now().Add(withdrawWithin)
			for {
				if errs[i] = kernel.Withdraw(v.Addr); errs[i] == nil || time.Now().After(deadline) {
					return
				}
				time.Sleep(withdrawAgain)
			}
		})
	}
	all.Wait()
	for i, v := range vips {
		if errs[i] == nil {
			gone = append(gone, v.VIP)
		}
	}
	return gone, errors.Join(errs...)
}

// tell gives every peer the word.
func tell(o orders, client func(string) grpccredentials.TransportCredentials, word *hameshv1.WithdrawnRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), tellWithin)
	defer cancel()
	errs := make([]error, len(o.Peers))
	var all sync.WaitGroup
	for i, p := range o.Peers {
		all.Go(func() {
			if err := tellOne(ctx, p, client(p.Name), word); err != nil {
				errs[i] = fmt.Errorf("tell %s: %w", p.Name, err)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// tellOne tries until the peer answers, be it by a refusal.
func tellOne(ctx context.Context, p Peer, creds grpccredentials.TransportCredentials, word *hameshv1.WithdrawnRequest) error {
	dialer := net.Dialer{Timeout: connectWithin}
	conn, err := grpc.NewClient("passthrough:///"+p.Address.String(),
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: tellAgain, Multiplier: 1, MaxDelay: tellAgain},
			MinConnectTimeout: handshakeWithin,
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	mesh := hameshv1.NewMeshServiceClient(conn)
	for {
		// Waiting for ready, so that the connection's own tries are the only ones.
		_, err := mesh.Withdrawn(ctx, word, grpc.WaitForReady(true))
		if status.Code(err) != codes.Unavailable {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(tellAgain):
		}
	}
}
