package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// drainTimeout is how long drain --wait waits unless told otherwise: agents keep
// connections of a VIP that has moved for a quarter of an hour at most.
const drainTimeout = 20 * time.Minute

// drainGrace is how long drain --wait waits for connections to end by themselves once nothing
// else is left, unless told otherwise: requests under way end in that time, and what is left
// then is kept by its clients.
const drainGrace = 30 * time.Second

func (c *command) drainCommand() *cobra.Command {
	var wait bool
	var grace time.Duration
	request := &hameshv1.DrainNodeRequest{}
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Make a node give up its VIPs and take none",
		Long: `Make a node give up its VIPs and take none, and keep new connections off its API
server; established connections go on. The order is kept in the store: it outlasts every
restart, and hactl undrain takes it back.

With --wait it prints what is left until nothing is: no VIP, no connection through the
node that it kept when its VIPs moved, none to its API server, by the word of every
member: it does not end while one is not heard. Clients that speak HTTP/2, as those of
Kubernetes do, keep their connection for ever; so what is left --grace after the VIPs
have gone, or at the time-out, is no failure if no new connections came meanwhile: those
break once, when the agent or the API server stops, and their clients reconnect at once.
The time-out is then 20m unless given; a VIP that is left at its end, or a member that is
not heard, is a failure. Then, or when the command is interrupted, the order stays in force.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Node = args[0]
			request.RequestId = uuid.NewString()
			if wait && !cmd.Flags().Changed("timeout") {
				c.timeout = drainTimeout
			}
			if grace < 0 {
				return fmt.Errorf("--grace %s is negative", grace)
			}
			return c.drain(cmd.Context(), request, wait, grace)
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the node holds no VIP and serves no connection but those that clients keep")
	cmd.Flags().DurationVar(&grace, "grace", drainGrace, "with --wait: how long connections may take to end by themselves once no VIP is left; 0s: do not wait for them")
	cmd.Flags().BoolVar(&request.Force, "force", false, "even where no other node may take its VIPs now: it keeps them until one may")
	return cmd
}

func (c *command) undrainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "undrain NODE",
		Short: "Let a drained node take VIPs again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			request := &hameshv1.UndrainNodeRequest{Node: args[0], RequestId: uuid.NewString()}
			return c.order(cmd.Context(), func(ctx context.Context, control hameshv1.ControlServiceClient) (ordered, string, error) {
				response, err := control.UndrainNode(ctx, request)
				return response, request.GetNode() + " may take VIPs", err
			})
		},
	}
}

var backendStates = map[string]hameshv1.BackendOrder{
	"active":   hameshv1.BackendOrder_BACKEND_ORDER_ACTIVE,
	"draining": hameshv1.BackendOrder_BACKEND_ORDER_DRAINING,
	"disabled": hameshv1.BackendOrder_BACKEND_ORDER_DISABLED,
}

func (c *command) backendCommand() *cobra.Command {
	states := []string{"active", "draining", "disabled"}
	request := &hameshv1.SetBackendStateRequest{}
	var state string
	cmd := &cobra.Command{
		Use:   "backend NAME --state active|draining|disabled",
		Short: "Take an API server out of service, or back in",
		Long: `Take an API server out of service, or back in. The order is kept in the store: it
outlasts every restart.

  active    it serves as its health allows; this takes an earlier order back
  draining  it gets no new connections while another one is up; old ones go on
  disabled  it gets no connections, whatever happens; old ones are reset`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var known bool
			if request.State, known = backendStates[state]; !known {
				return fmt.Errorf("state %q is none of %s", state, strings.Join(states, ", "))
			}
			request.Backend = args[0]
			request.RequestId = uuid.NewString()
			return c.order(cmd.Context(), func(ctx context.Context, control hameshv1.ControlServiceClient) (ordered, string, error) {
				response, err := control.SetBackendState(ctx, request)
				return response, fmt.Sprintf("%s of proxy %s is %s", request.GetBackend(), strings.Join(response.GetProxies(), ", "), state), err
			})
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "active, draining or disabled")
	cmd.Flags().StringVar(&request.Proxy, "proxy", "", "proxy that it belongs to; left out: every one that has a backend of that name")
	cmd.Flags().BoolVar(&request.Force, "force", false, "disable it even where no other one is up")
	// Neither can fail: the flag has just been defined.
	_ = cmd.MarkFlagRequired("state")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(states, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// ordered is the answer to an order.
type ordered interface {
	proto.Message
	GetChanged() bool
	GetPending() bool
}

// order gives one order and prints the answer; give also says what is so now.
func (c *command) order(ctx context.Context, give func(context.Context, hameshv1.ControlServiceClient) (ordered, string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	response, now, err := give(ctx, hameshv1.NewControlServiceClient(conn))
	if err != nil {
		return c.callFailure(ctx, err)
	}
	return c.showOrder(response, now)
}

func (c *command) showOrder(response ordered, now string) error {
	if done, err := c.structured(response, stream); done {
		return err
	}
	if !response.GetChanged() {
		now = "unchanged: " + now
	}
	if response.GetPending() {
		now += "\nthat is kept, but the member that was asked has not read it back yet: see hactl status"
	}
	return c.print(now + "\n")
}

func (c *command) drain(ctx context.Context, request *hameshv1.DrainNodeRequest, wait bool, grace time.Duration) error {
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.connect(limited)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	response, err := hameshv1.NewControlServiceClient(conn).DrainNode(limited, request)
	if err != nil {
		return c.callFailure(limited, err)
	}
	if err := c.showOrder(response, request.GetNode()+" is drained: it takes no VIP and no new connections to its API server"); err != nil || !wait {
		return err
	}
	w := &drainWatch{command: c, node: request.GetNode(), grace: grace, begun: c.now()}
	for {
		err = w.watch(limited, conn)
		if status.Code(err) != codes.Unavailable || limited.Err() != nil {
			break
		}
		// The member that was asked has gone, perhaps to be rebooted: another one knows too.
		_ = conn.Close()
		if conn, err = c.connect(limited); err != nil {
			return inForce(request.GetNode(), err)
		}
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		err = errors.New("interrupted")
	case limited.Err() != nil, status.Code(err) == codes.DeadlineExceeded: // by the agent's clock
		if w.mayEnd() {
			return w.end(c.timeout)
		}
		err = fmt.Errorf("not done within %s, %s", c.timeout, w.left)
		if w.left.bearable() {
			err = fmt.Errorf("%w; new connections still come", err)
		}
	default:
		return c.failureOf(limited, err)
	}
	return inForce(request.GetNode(), err)
}

// inForce is the end of a wait that did not see the end of the drain.
func inForce(node string, err error) error {
	return &failure{status: exitFailed, what: err.Error() + "; the order stays in force", hint: "hactl undrain " + node + " takes it back"}
}

// drainWatch is one wait for the end of a drain.
type drainWatch struct {
	*command
	node  string
	grace time.Duration
	begun time.Time

	seen bool // whether anything has been seen of it
	left remains
	// came: connections are left that came less than the grace ago.
	came bool
}

// watch prints what is left on the node until nothing is, or for the grace only connections
// were, and no new ones came.
func (w *drainWatch) watch(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := hameshv1.NewStatusServiceClient(conn).WatchStatus(ctx, &hameshv1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	type news struct {
		change *hameshv1.WatchStatusResponse
		err    error
	}
	changes := make(chan news)
	go func() {
		for {
			change, err := stream.Recv()
			select {
			case changes <- news{change, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	var patience <-chan time.Time // nil: more than connections is left
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-patience:
			w.came = false
			return w.end(w.grace)
		case n := <-changes:
			if n.err != nil {
				return n.err
			}
			before, known := w.left, w.seen
			w.left, w.seen = whatIsLeft(n.change.GetStatus(), w.node), true
			if !known || w.left.String() != before.String() {
				if err := w.show(n.change); err != nil {
					return err
				}
			}
			switch {
			case w.left.String() == "":
				return nil
			case !w.left.bearable():
				patience, w.came = nil, false
			case known && before.bearable() && w.left.connections() > before.connections():
				patience, w.came = time.After(w.grace), true
			case patience == nil:
				patience = time.After(w.grace)
			}
		}
	}
}

// show prints what is left.
func (w *drainWatch) show(change *hameshv1.WatchStatusResponse) error {
	if done, err := w.structured(change, stream); done || err != nil {
		return err
	}
	line := w.left.String()
	if line == "" {
		line = "nothing is left: " + w.node + " may be stopped"
	}
	return w.line(line)
}

func (w *drainWatch) line(text string) error {
	return w.print(fmt.Sprintf("%9s   %s\n", w.now().Sub(w.begun).Round(100*time.Millisecond), text))
}

// mayEnd reports whether only connections are left that clients keep.
func (w *drainWatch) mayEnd() bool { return w.seen && w.left.bearable() && !w.came }

// end says what it means that connections are left after some time.
func (w *drainWatch) end(after time.Duration) error {
	if w.output == "json" || w.output == "yaml" {
		return nil // whoever reads that knows from the last status
	}
	return w.line(fmt.Sprintf("still there after %s, and kept by their clients, as HTTP/2 clients do: %d connections. They break once, when\n%12sthe agent or the API server of %s stops, and their clients reconnect at once: %s may be stopped",
		after, w.left.connections(), "", w.node, w.node))
}

// remains are what keeps a node from being stopped without anybody's noticing.
type remains struct {
	vips    []string
	through uint32 // connections through the node that it has kept
	to      uint32 // and those to its API servers
	unheard []string
}

// bearable reports whether there is nothing but connections.
func (r remains) bearable() bool { return len(r.vips) == 0 && len(r.unheard) == 0 }

func (r remains) connections() uint32 { return r.through + r.to }

// String says what is left; empty: nothing.
func (r remains) String() string {
	all := slices.Clone(r.vips)
	if r.through > 0 {
		all = append(all, fmt.Sprintf("%d connections through it", r.through))
	}
	if r.to > 0 {
		all = append(all, fmt.Sprintf("%d connections to its API server", r.to))
	}
	var lines []string
	if len(all) > 0 {
		lines = append(lines, "left: "+strings.Join(all, ", "))
	}
	if len(r.unheard) > 0 {
		lines = append(lines, "not heard: "+strings.Join(r.unheard, ", "))
	}
	return strings.Join(lines, "; ")
}

// whatIsLeft finds what is left on a node. A member that is not heard may hold a VIP or serve
// connections that the one that reports does not know of, and one that has just started knows
// of nothing.
func whatIsLeft(s *hameshv1.GetStatusResponse, node string) (r remains) {
	stays := ""
	if slices.ContainsFunc(s.GetProblems(), func(p *hameshv1.Problem) bool { return p.GetCode() == "DRAINED_NODE_OWNS" }) {
		stays = " (no other node may take it: hactl status)"
	}
	for _, v := range s.GetVips() {
		if slices.Contains(v.GetHolders(), node) || v.GetOwner() == node {
			r.vips = append(r.vips, "VIP "+v.GetName()+stays)
		}
	}
	for _, n := range s.GetNodes() {
		if n.GetName() == node {
			r.through = n.GetKeptConnections()
		}
		if state := n.GetState(); state == hameshv1.NodeState_NODE_STATE_DOWN || state == hameshv1.NodeState_NODE_STATE_SUSPECT {
			r.unheard = append(r.unheard, n.GetName())
		}
	}
	for _, b := range s.GetBackends() {
		if b.GetNode() == node {
			r.to += b.GetConnections()
		}
	}
	return r
}
