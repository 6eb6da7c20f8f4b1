package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	drillCountMost = 1000
	drillRateMost  = 200
	// A pause is longer than members need to notice a silent one, and shorter than servers
	// leave an idle connection alone (90 s, kube-apiserver).
	drillPauseLeast, drillPauseMost = 500 * time.Millisecond, time.Minute
	// lookEvery is the time between two looks at a mesh that recovers.
	lookEvery = 100 * time.Millisecond
)

// drill is one run of hactl drill.
type drill struct {
	*command
	vip    string
	count  int
	rate   int // new connections per second
	crash  bool
	yes    bool
	port   uint16 // 0: the proxy's
	pause  time.Duration
	within time.Duration

	conn     *grpc.ClientConn
	traffic  *traffic
	ordinary *ordinary
	report   drillReport
}

func (c *command) drillCommand() *cobra.Command {
	d := &drill{command: c}
	cmd := &cobra.Command{
		Use:   "drill VIP",
		Short: "Measure fail-over as a client sees it",
		Long: `Measure fail-over as a client sees it: hactl itself is the client. It opens new
connections to the VIP at a fixed rate, asks each for /readyz where HTTPS is spoken, keeps 10
established ones, and meanwhile moves the VIP to the next candidate, or with --crash makes
its owner's agent stop abruptly. At last the VIP goes back to where it was.

That client gives up after 2 s. Beside it are ordinary ones, as kubectl and the kubelet are:
10 one-shot requests per second and 5 kept HTTP/2 connections, which dial for 30 s, wait for
an answer as long as TCP does, and never try a request again. A table of its own says how
long they waited. They end 3 s after the drill: what still waits then is unfinished. Where no
HTTPS is spoken, the one-shots connect only, and no connection is kept.

Planned moves fail no connection, break none, and make no ordinary client wait more than
2 s: the exit status is 1 where one does. A crash breaks connections through the owner; the
exit status is 1 where its agent is not back and the mesh healthy in time.

Run it where clients are: connections of the candidates themselves do not outlive moves.
Nothing is touched unless the mesh is healthy. --timeout bounds each order.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d.vip = args[0]
			if err := d.check(); err != nil {
				return err
			}
			return d.do(cmd.Context())
		},
	}
	cmd.Flags().IntVar(&d.count, "count", 1, "how many times")
	cmd.Flags().BoolVar(&d.crash, "crash", false, "crash the owner's agent instead of moving in order")
	cmd.Flags().BoolVarP(&d.yes, "yes", "y", false, "crash without asking")
	cmd.Flags().Uint16Var(&d.port, "port", 0, "port on the VIP that clients use; left out: the proxy's")
	cmd.Flags().IntVar(&d.rate, "rate", 100, "new connections per second")
	cmd.Flags().DurationVar(&d.pause, "pause", 2*time.Second, "how long to watch before the first and after each move")
	cmd.Flags().DurationVar(&d.within, "within", time.Minute, "how long the mesh may take to be healthy again")
	return cmd
}

func (d *drill) check() error {
	switch {
	case d.count < 1 || d.count > drillCountMost:
		return fmt.Errorf("count %d is not between 1 and %d", d.count, drillCountMost)
	case d.rate < 1 || d.rate > drillRateMost:
		return fmt.Errorf("rate %d is not between 1 and %d", d.rate, drillRateMost)
	case d.pause < drillPauseLeast || d.pause > drillPauseMost:
		return fmt.Errorf("pause %s is not between %s and %s", d.pause, drillPauseLeast, drillPauseMost)
	case d.within <= 0:
		return fmt.Errorf("within %s is not positive", d.within)
	}
	return nil
}

// do checks, drills and reports.
func (d *drill) do(ctx context.Context) (err error) {
	if d.conn, err = d.connectWithin(ctx); err != nil {
		return err
	}
	defer func() { _ = d.conn.Close() }()
	status, err := d.look(ctx)
	if err != nil {
		return err
	}
	home, err := d.prepare(ctx, status)
	if err != nil {
		return err
	}
	if err := d.confirm(home); err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	clients.Go(func() { d.traffic.run(running) })
	clients.Go(func() { d.ordinary.run(running) })
	wrong := d.repeat(ctx, home)
	stop()
	clients.Wait()
	d.report.count(d.traffic.done)
	d.report.Summary.Late = d.traffic.late
	d.report.countOrdinary(d.ordinary.done, d.ordinary.late)
	d.report.conclude(wrong)
	if done, err := d.plain(d.report); err != nil {
		return err
	} else if !done {
		v := view{now: d.now(), wide: d.output == "wide", colour: isTerminal(d.out) && os.Getenv("NO_COLOR") == ""}
		if err := d.print(v.drill(&d.report)); err != nil {
			return err
		}
	}
	switch {
	case wrong != nil:
		return wrong
	case d.report.Verdict != "passed":
		return &failure{status: exitFailed, what: d.report.Reason, hint: "-o wide shows how; then hactl doctor, and hactl events"}
	}
	return nil
}

// prepare refuses what would not measure anything, or do harm, and finds out what clients
// do. It returns the owner.
func (d *drill) prepare(ctx context.Context, s *hameshv1.GetStatusResponse) (home string, err error) {
	refuse := func(hint, format string, args ...any) (string, error) {
		return "", &failure{status: exitFailed, what: fmt.Sprintf(format, args...) + ", so nothing was touched", hint: hint}
	}
	vip := findVIP(s, d.vip)
	switch {
	case vip == nil:
		return refuse("hactl status lists the VIPs", "no VIP %q is configured", d.vip)
	case s.GetState() != hameshv1.State_STATE_HEALTHY:
		return refuse("mend that first: hactl status", "the mesh is not healthy: %s", problemsOf(s))
	case next(s, vip.GetOwner()) == "":
		return refuse("hactl status says why no other node is eligible", "no other node than %s may take %s", vip.GetOwner(), d.vip)
	}
	if d.port == 0 {
		if d.port = proxyPort(s, d.vip); d.port == 0 {
			return refuse("say with --port where clients connect", "which of %d proxies clients of %s use is not clear", len(s.GetProxies()), d.vip)
		}
	}
	d.report = drillReport{
		Mesh: s.GetMesh(), VIP: d.vip, Address: net.JoinHostPort(vip.GetAddress(), fmt.Sprint(d.port)),
		Kind: "move", Speaks: "tcp", StartedAt: d.now().UTC().Truncate(time.Millisecond),
		Rate: d.rate, Phases: []drillPhase{},
	}
	if d.crash {
		d.report.Kind = "crash"
	}
	// A witness neither gives nor takes, so that it is a client as any other.
	if n := findNode(s, thisMember(s)); n.GetRole() == hameshv1.Role_ROLE_CANDIDATE {
		d.report.MeasuredOn = n.GetName()
	}
	d.traffic = &traffic{address: d.report.Address, every: time.Second / time.Duration(d.rate)}
	if err := d.traffic.probe(ctx); err != nil {
		return refuse("run it where clients are, or choose another --port", "%s does not answer: %v", d.report.Address, err)
	}
	if d.traffic.https {
		d.report.Speaks = "https"
	}
	d.ordinary = &ordinary{address: d.report.Address, https: d.traffic.https, grace: ordinaryGrace, atOnce: ordinaryAtOnce}
	return vip.GetOwner(), nil
}

// confirm asks before something is broken on purpose.
func (d *drill) confirm(owner string) error {
	if !d.crash || d.yes {
		return nil
	}
	if !isTerminal(d.in) {
		return errors.New("a crash is asked for, and there is no terminal to confirm it: give --yes")
	}
	question := fmt.Sprintf("Crash the agent that owns %s (now %s), %d times? Connections through it break. [y/N] ", d.vip, owner, d.count)
	if _, err := fmt.Fprint(d.err, question); err != nil {
		return &failure{status: exitFailed, what: "asking: " + err.Error()}
	}
	answer, _ := bufio.NewReader(d.in).ReadString('\n') // nothing is no
	if answer = strings.ToLower(strings.TrimSpace(answer)); answer != "y" && answer != "yes" {
		return &failure{status: exitFailed, what: "not confirmed", hint: "nothing was touched"}
	}
	return nil
}

// repeat runs all phases, and returns why it could not.
func (d *drill) repeat(ctx context.Context, home string) error {
	if err := sleep(ctx, d.pause); err != nil {
		return errDrillInterrupted
	}
	for range d.count {
		s, err := d.healthy(ctx, 0, "")
		if err != nil {
			return err
		}
		owner := findVIP(s, d.vip).GetOwner()
		phase := drillPhase{Kind: d.report.Kind, From: owner}
		if !d.crash {
			phase.To = next(s, owner)
		}
		if err := d.phase(ctx, phase, s); err != nil {
			return err
		}
	}
	s, err := d.healthy(ctx, 0, "")
	if err != nil {
		return err
	}
	if owner := findVIP(s, d.vip).GetOwner(); owner != home {
		return d.phase(ctx, drillPhase{Kind: "return", From: owner, To: home}, s)
	}
	return nil
}

// phase changes the owner once while streams are held.
func (d *drill) phase(ctx context.Context, p drillPhase, before *hameshv1.GetStatusResponse) error {
	held, err := d.traffic.keep(ctx)
	if err != nil {
		return &failure{status: exitFailed, what: err.Error(), hint: "see hactl status; the VIP is on " + p.From}
	}
	p.from = time.Now()
	if p.Kind == "crash" {
		err = d.crashOwner(ctx, &p, before)
	} else {
		err = d.handOver(ctx, &p)
	}
	if left := d.pause - time.Since(p.from); err == nil && sleep(ctx, max(left, 0)) != nil {
		err = errDrillInterrupted
	}
	p.to = time.Now()
	breaks, silence := held.release()
	p.Streams, p.Breaks, p.SilenceMs = drillStreams, breaks, ms(silence)
	for _, n := range breaks {
		p.Broken += n
	}
	d.report.Phases = append(d.report.Phases, p)
	if isTerminal(d.err) {
		fmt.Fprintf(d.err, "%d: %s from %s to %s\n", len(d.report.Phases), p.Kind, p.From, p.To)
	}
	return err
}

// handOver moves the VIP and waits until it is held.
func (d *drill) handOver(ctx context.Context, p *drillPhase) error {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	phases, err := hameshv1.NewControlServiceClient(d.conn).MoveVip(ctx,
		&hameshv1.MoveVipRequest{Vip: d.vip, To: p.To, RequestId: uuid.NewString()})
	if err != nil {
		return d.callFailure(ctx, err)
	}
	for {
		said, err := phases.Recv()
		if err != nil {
			return d.callFailure(ctx, err)
		}
		if said.GetPhase() == hameshv1.MovePhase_MOVE_PHASE_HELD {
			took := ms(said.GetElapsed().AsDuration())
			p.MoveMs, p.Epoch = &took, said.GetEpoch()
			return nil
		}
	}
}

// crashOwner crashes the owner's agent and waits until it is back.
func (d *drill) crashOwner(ctx context.Context, p *drillPhase, before *hameshv1.GetStatusResponse) error {
	boot := findNode(before, p.From).GetBoot()
	limited, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	_, err := hameshv1.NewControlServiceClient(d.conn).CrashAgent(limited,
		&hameshv1.CrashAgentRequest{Node: p.From, RequestId: uuid.NewString(), Confirm: true})
	if err != nil {
		return d.callFailure(limited, err)
	}
	s, err := d.healthy(ctx, boot, p.From)
	if err != nil {
		return err
	}
	took := ms(time.Since(p.from))
	p.HealthyMs, p.To, p.Epoch = &took, findVIP(s, d.vip).GetOwner(), findVIP(s, d.vip).GetEpoch()
	return nil
}

// healthy waits until the mesh is healthy; where a node is named, also until its agent has
// been started anew since that boot.
func (d *drill) healthy(ctx context.Context, boot uint64, node string) (*hameshv1.GetStatusResponse, error) {
	limit := time.Now().Add(d.within)
	for {
		s, err := d.look(ctx)
		wrong := ""
		switch {
		case ctx.Err() != nil:
			return nil, errDrillInterrupted
		case err != nil:
			wrong = err.Error()
		case node != "" && findNode(s, node).GetBoot() <= boot:
			wrong = "the agent of " + node + " has not come back"
		case s.GetState() != hameshv1.State_STATE_HEALTHY:
			wrong = "the mesh is not healthy: " + problemsOf(s)
		default:
			return s, nil
		}
		if time.Now().After(limit) {
			return nil, &failure{status: exitFailed, what: fmt.Sprintf("after %s %s", d.within, wrong), hint: "see hactl status, and the service manager of that node"}
		}
		if sleep(ctx, lookEvery) != nil {
			return nil, errDrillInterrupted
		}
	}
}

// look asks for the status, of another endpoint where the one that answered before is gone.
func (d *drill) look(ctx context.Context) (*hameshv1.GetStatusResponse, error) {
	limited, cancel := context.WithTimeout(ctx, min(d.timeout, answerTime))
	defer cancel()
	s, err := hameshv1.NewStatusServiceClient(d.conn).GetStatus(limited, &hameshv1.GetStatusRequest{})
	if err == nil {
		return s, nil
	}
	if conn, anew := d.connectWithin(ctx); anew == nil {
		_ = d.conn.Close()
		d.conn = conn
	}
	return nil, d.callFailure(limited, err)
}

func (d *drill) connectWithin(ctx context.Context) (*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	return d.connect(ctx)
}

var errDrillInterrupted = &failure{status: exitFailed, what: "interrupted", hint: "see where the VIP is with hactl status; hactl move-vip moves it"}

// sleep returns early, with an error, when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// next is the candidate after the owner, in turn, that may take a VIP now; empty: none.
func next(s *hameshv1.GetStatusResponse, owner string) string {
	nodes := s.GetNodes()
	at := slices.IndexFunc(nodes, func(n *hameshv1.Node) bool { return n.GetName() == owner })
	for i := range nodes {
		n := nodes[(at+1+i)%len(nodes)]
		if n.GetName() != owner && n.GetEligible() && n.GetState() == hameshv1.NodeState_NODE_STATE_READY {
			return n.GetName()
		}
	}
	return ""
}

// proxyPort is the port of the VIP's clients: of the proxy of its name, or of the only one.
func proxyPort(s *hameshv1.GetStatusResponse, vip string) uint16 {
	for _, p := range s.GetProxies() {
		if p.GetName() == vip || len(s.GetProxies()) == 1 {
			return uint16(p.GetPort())
		}
	}
	return 0
}

// thisMember is the member on which this process runs; empty: none.
func thisMember(s *hameshv1.GetStatusResponse) string {
	addresses, _ := net.InterfaceAddrs() // none is what nobody has
	for _, a := range addresses {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			for _, n := range s.GetNodes() {
				if n.GetAddress() == prefix.Addr().String() {
					return n.GetName()
				}
			}
		}
	}
	return ""
}

func findVIP(s *hameshv1.GetStatusResponse, name string) *hameshv1.Vip {
	for _, v := range s.GetVips() {
		if v.GetName() == name {
			return v
		}
	}
	return nil
}

func findNode(s *hameshv1.GetStatusResponse, name string) *hameshv1.Node {
	for _, n := range s.GetNodes() {
		if n.GetName() == name {
			return n
		}
	}
	return nil
}

// problemsOf lists what is wrong in one line.
func problemsOf(s *hameshv1.GetStatusResponse) string {
	var all []string
	for _, p := range s.GetProblems() {
		all = append(all, p.GetCode()+", "+p.GetMessage())
	}
	return strings.Join(all, "; ")
}
