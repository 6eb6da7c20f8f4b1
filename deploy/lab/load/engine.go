//go:build linux

package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

const roleGenerator = "load-generator"

func init() {
	lab.Role(roleGenerator, func(args []string) int {
		if err := serveGenerator(args); err != nil {
			return fatal(err)
		}
		return 0
	})
}

func serveGenerator(args []string) error {
	var ends Ends
	if len(args) != 1 {
		return errors.New("want one argument, the ends of the load")
	}
	if err := json.Unmarshal([]byte(args[0]), &ends); err != nil {
		return fmt.Errorf("read the ends of the load: %w", err)
	}
	// Without it the kernel wakes this thread, and it alone, up to 50 µs late (prctl(2),
	// PR_SET_TIMERSLACK).
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set the timer slack: %w", err)
	}
	e, err := newEngine(ends)
	if err != nil {
		return err
	}
	return serve(os.Stdin, os.Stdout, e.do)
}

// grace is how long answers are waited for after the last request was due.
const grace = 3 * time.Second

var errNoAnswer = errors.New("no answer")

// engine makes the load, on one thread.
type engine struct {
	epoll    *epoll
	targets  []unix.Sockaddr
	sources  []unix.Sockaddr
	dialled  int
	stream   int // the file that uploads are made of
	conns    []conn
	held     []int // descriptors
	lost     int
	requests [frame]byte
	buf      [16 * frame]byte
}

// use is what a connection is for.
type use int

const (
	_        use = iota
	short        // one request
	opening      // will be held
	held         // is held
	download     // stream
	upload       // stream
)

// conn is one connection, by its descriptor.
type conn struct {
	use      use
	asked    bool          // short: the request is sent
	due      time.Duration // short: since the start of the load
	place    int           // held: which of those held
	got      int           // held: bytes of answers
	nth      int           // held: which one of this load's connections it is
	answered int           // held: answers to the requests of this load
}

func newEngine(ends Ends) (e *engine, err error) {
	e = &engine{}
	if e.epoll, err = newEpoll(); err != nil {
		return nil, err
	}
	if e.stream, err = endless(); err != nil {
		return nil, err
	}
	for _, t := range ends.Targets {
		e.targets = append(e.targets, sockaddr(t))
	}
	for a := ends.From; len(e.sources) < ends.Sources; a = a.Next() {
		e.sources = append(e.sources, sockaddr(netip.AddrPortFrom(a, 0)))
	}
	e.requests[0] = opAnswer
	return e, nil
}

func (e *engine) do(o order) (any, error) {
	switch {
	case o.Churn != nil:
		return e.churn(*o.Churn)
	case o.Hold != nil:
		return e.hold(*o.Hold)
	case o.Ask != nil:
		return e.ask(*o.Ask)
	case o.Stream != nil:
		return e.streams(*o.Stream)
	}
	return nil, errors.New("an empty order")
}

// dial begins a connection; how that ends, an event says.
func (e *engine) dial(c conn, events uint32) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	i := e.dialled
	e.dialled++
	err = errors.Join(
		// Else each address would have but one connection a port, whoever it is to (ip(7)).
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.Bind(fd, e.sources[i%len(e.sources)]),
	)
	if err == nil {
		err = unix.Connect(fd, e.targets[i%len(e.targets)])
	}
	if err == nil || errors.Is(err, unix.EINPROGRESS) {
		err = e.epoll.add(fd, events)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	for fd >= len(e.conns) {
		e.conns = append(e.conns, make([]conn, 4096)...)
	}
	e.conns[fd] = c
	return fd, nil
}

func (e *engine) close(fd int) {
	_ = unix.Close(fd) // what it says is of the connection, which has ended
	e.conns[fd] = conn{}
}

// schedule is when each of a load's requests is due, since its start: a Poisson process,
// always the same one.
func schedule(rate float64, span time.Duration) []time.Duration {
	random := rand.New(rand.NewPCG(1, 1))
	var all []time.Duration
	for at := 0.0; ; {
		at += random.ExpFloat64() / rate
		due := time.Duration(at * float64(time.Second))
		if due >= span {
			return all
		}
		all = append(all, due)
	}
}

// tally gathers what came of requests.
type tally struct {
	took   []time.Duration
	failed map[string]int
}

func (t *tally) fail(err error) {
	if t.failed == nil {
		t.failed = make(map[string]int)
	}
	t.failed[err.Error()]++
}

func (t *tally) latency() Latency {
	l := Latency{Good: len(t.took), Failed: t.failed}
	if n := len(t.took); n > 0 {
		slices.Sort(t.took)
		l.P50, l.P99, l.Max = t.took[n/2], t.took[n*99/100], t.took[n-1]
	}
	return l
}

// outcome returns the error that a connection has ended with.
func outcome(fd int) error {
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
		return unix.Errno(errno)
	}
	return errors.New("closed")
}
