package guard

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/vip"
)

const (
	// startWithin bounds the wait for a guard to be ready, on a machine short of CPU.
	startWithin = 10 * time.Second
	// leaveWithin bounds the wait for a guard that was told to leave.
	leaveWithin = 2 * time.Second
	// minPause and maxPause lie between the end of a guard and the start of the next: the
	// pause doubles, unless the last guard lived for longer than wellAfter.
	minPause, maxPause = 100 * time.Millisecond, 5 * time.Second
	wellAfter          = time.Minute
)

// The descriptors of a guard beside the standard three. The last one is only held:
// flock(2) binds a lock to the open file, so that it lasts until both have closed it.
const (
	ordersFD = 3 + iota
	readyFD
	lockFD // Config.Lock
)

// What goes over the pipes: the agent sends its orders and, later, perhaps leave; the
// guard says ready once.
const (
	ready byte = 'r'
	leave byte = 'l'
)

// Config is what a guard has to know beforehand.
type Config struct {
	Member string // the member whose agent this is
	Boot   uint64 // the agent's boot id
	// VIPs are all that the agent may ever put on; lifetimes are ignored.
	VIPs  []vip.Address
	Ports []uint16 // the proxies'
	Peers []Peer   // every other member
	// CAFile, CertFile and KeyFile are the agent's own identity, in PEM; none with Insecure.
	CAFile, CertFile, KeyFile string
	Insecure                  bool // no TLS; for a lab only
	LogJSON                   bool // the guard's own log, on standard error, is JSON

	// Lock is the node's lock, locked; the guard keeps it until it has taken the VIPs off.
	Lock *os.File `json:"-"`
	// Log is the agent's; its level is also that of the guard's own log.
	Log hclog.Logger `json:"-"`
}

// Peer is another member and where its agent serves gRPC.
type Peer struct {
	Name    string
	Address netip.AddrPort
}

// orders are what the guard gets, as one line of JSON.
type orders struct {
	Config
	Agent    int // process id
	LogLevel string
}

func readOrders(r io.Reader) (orders, error) {
	var o orders
	// It may read ahead: nothing follows before the agent has heard that we are ready.
	line, err := bufio.NewReader(r).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &o)
	}
	if err != nil {
		return orders{}, fmt.Errorf("read the agent's orders: %w", err)
	}
	return o, nil
}

// Guard is the agent's hold on its guard. Its methods are called one after the other.
type Guard struct {
	cfg     Config
	process *process // the last one
}

// process is one guard.
type process struct {
	cmd   *exec.Cmd
	pipe  *os.File // orders and commands
	since time.Time
	done  chan struct{} // closed when it has ended and err is set
	err   error
}

// Start starts a guard and returns when it watches, which takes some 10 ms; ctx ends the
// wait, never the guard. Only then may the first VIP be put on.
//
// Errors are those of fork and exec, and of a guard that could not do its work or was not
// ready within ten seconds; why, it says on standard error.
func Start(ctx context.Context, cfg Config) (*Guard, error) {
	g := &Guard{cfg: cfg}
	if err := g.start(ctx); err != nil {
		return nil, err
	}
	return g, nil
}

// String names the task.
func (g *Guard) String() string { return "guard" }

// Run starts another guard whenever one ends, until ctx ends, and then returns nil. The
// guard stays: only Stop, or the agent's end, ends it.
func (g *Guard) Run(ctx context.Context) error {
	pause := minPause
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.process.done:
		}
		if time.Since(g.process.since) > wellAfter {
			pause = minPause
		}
		g.cfg.Log.Warn("the guard has ended; another one is started", "error", g.process.err, "pause", pause)
		for started := false; !started; pause = min(2*pause, maxPause) {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			err := g.start(ctx)
			if started = err == nil; !started && ctx.Err() == nil {
				g.cfg.Log.Error("no guard: VIPs would stay for their lifetime after a crash", "error", err)
			}
		}
	}
}

// Stop tells the guard to leave without a word, and waits until it has; one that does not
// leave within two seconds is killed. It is for an agent that has itself withdrawn its VIPs
// and told the others, or has never put any on. After Run has returned.
func (g *Guard) Stop() {
	p := g.process
	defer p.pipe.Close()
	_, _ = p.pipe.Write([]byte{leave}) // fails where it has ended already
	select {
	case <-p.done:
	case <-time.After(leaveWithin):
		g.cfg.Log.Warn("the guard does not leave: killing it", "timeout", leaveWithin)
		p.kill()
	}
}

// start makes a new process the guard.
func (g *Guard) start(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start the guard: %w", err)
		}
	}()
	line, err := json.Marshal(orders{g.cfg, os.Getpid(), g.cfg.Log.GetLevel().String()})
	if err != nil {
		return err
	}
	ordersOut, ordersIn, err := os.Pipe()
	if err != nil {
		return err
	}
	readyOut, readyIn, err := os.Pipe()
	if err != nil {
		return errors.Join(err, ordersOut.Close(), ordersIn.Close())
	}
	defer readyOut.Close()

	// The magic link is to this very program, also after an upgrade has replaced its file.
	cmd := exec.Command("/proc/self/exe", "guard")
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ordersOut, readyIn, g.cfg.Lock}
	// Out of reach of what a terminal sends to the agent's process group and session.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	err = errors.Join(err, ordersOut.Close(), readyIn.Close())
	p := &process{cmd: cmd, pipe: ordersIn, since: time.Now(), done: make(chan struct{})}
	if cmd.Process == nil {
		return errors.Join(err, ordersIn.Close())
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	defer func() {
		if err != nil {
			p.kill()
			err = errors.Join(err, p.err, ordersIn.Close())
		}
	}()
	if err != nil {
		return err
	}

	deadline := time.Now().Add(startWithin)
	if err := errors.Join(ordersIn.SetWriteDeadline(deadline), readyOut.SetReadDeadline(deadline)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = errors.Join(ordersIn.SetWriteDeadline(time.Now()), readyOut.SetReadDeadline(time.Now())) // closed: done
	})
	defer stop()
	if _, err := ordersIn.Write(append(line, '\n')); err != nil {
		return err
	}
	if _, err := io.ReadFull(readyOut, make([]byte, 1)); err != nil {
		return fmt.Errorf("wait until it is ready: %w", err)
	}
	if err := ordersIn.SetWriteDeadline(time.Time{}); err != nil {
		return err
	}
	if g.process != nil {
		g.process.pipe.Close()
	}
	g.process = p
	return nil
}

// kill ends the process and waits until it has ended.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // fails where it has ended already
	<-p.done
}
