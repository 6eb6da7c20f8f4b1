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

func (c *command) drainCommand() *cobra.Command {
	var wait bool
	request := &hameshv1.DrainNodeRequest{}
	cmd := &cobra.Command{
		Use:   "drain NODE",
		Short: "Make a node give up its VIPs and take none",
		Long: `Make a node give up its VIPs and take none, and keep new connections off its API
server; established connections go on. The order is kept in the store: it outlasts every
restart, and hactl undrain takes it back.

With --wait it prints what is left until nothing is: no VIP, no connection through the
node that it kept when its VIPs moved, none to its API server, by the word of every
member: it does not end while one is not heard. The time-out is then 20m
unless given; when it ends, or the command is interrupted, the order stays in force.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Node = args[0]
			request.RequestId = uuid.NewString()
			if wait && !cmd.Flags().Changed("timeout") {
				c.timeout = drainTimeout
			}
			return c.drain(cmd.Context(), request, wait)
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the node holds no VIP and serves no connection")
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

func (c *command) drain(ctx context.Context, request *hameshv1.DrainNodeRequest, wait bool) error {
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
	var left string
	for {
		left, err = c.watchDrain(limited, conn, request.GetNode())
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
		err = fmt.Errorf("not done within %s, %s", c.timeout, left)
	default:
		return c.failureOf(limited, err)
	}
	return inForce(request.GetNode(), err)
}

// inForce is the end of a wait that did not see the end of the drain.
func inForce(node string, err error) error {
	return &failure{status: exitFailed, what: err.Error() + "; the order stays in force", hint: "hactl undrain " + node + " takes it back"}
}

// watchDrain prints what is left on a node until nothing is, and returns what was left
// when it failed.
func (c *command) watchDrain(ctx context.Context, conn *grpc.ClientConn, node string) (left string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes, err := hameshv1.NewStatusServiceClient(conn).WatchStatus(ctx, &hameshv1.WatchStatusRequest{})
	if err != nil {
		return left, err
	}
	begun := c.now()
	for first := true; ; first = false {
		change, err := changes.Recv()
		if err != nil {
			return left, err
		}
		now := whatIsLeft(change.GetStatus(), node)
		if now == left && !first {
			continue
		}
		left = now
		if done, err := c.structured(change, stream); err != nil {
			return left, err
		} else if !done {
			line := left
			if line == "" {
				line = "nothing is left: " + node + " may be stopped"
			}
			if err := c.print(fmt.Sprintf("%9s   %s\n", c.now().Sub(begun).Round(100*time.Millisecond), line)); err != nil {
				return left, err
			}
		}
		if left == "" {
			return left, nil
		}
	}
}

// whatIsLeft says what keeps a node from being stopped without anybody's noticing; empty:
// nothing does. A member that is not heard may hold a VIP or serve connections that the
// one that reports does not know of, and one that has just started knows of nothing.
func whatIsLeft(s *hameshv1.GetStatusResponse, node string) string {
	stays := ""
	if slices.ContainsFunc(s.GetProblems(), func(p *hameshv1.Problem) bool { return p.GetCode() == "DRAINED_NODE_OWNS" }) {
		stays = " (no other node may take it: hactl status)"
	}
	var all []string
	for _, v := range s.GetVips() {
		if slices.Contains(v.GetHolders(), node) || v.GetOwner() == node {
			all = append(all, "VIP "+v.GetName()+stays)
		}
	}
	var unheard []string
	for _, n := range s.GetNodes() {
		if kept := n.GetKeptConnections(); n.GetName() == node && kept > 0 {
			all = append(all, fmt.Sprintf("%d connections through it", kept))
		}
		if state := n.GetState(); state == hameshv1.NodeState_NODE_STATE_DOWN || state == hameshv1.NodeState_NODE_STATE_SUSPECT {
			unheard = append(unheard, n.GetName())
		}
	}
	connections := uint32(0)
	for _, b := range s.GetBackends() {
		if b.GetNode() == node {
			connections += b.GetConnections()
		}
	}
	if connections > 0 {
		all = append(all, fmt.Sprintf("%d connections to its API server", connections))
	}
	var lines []string
	if len(all) > 0 {
		lines = append(lines, "left: "+strings.Join(all, ", "))
	}
	if len(unheard) > 0 {
		lines = append(lines, "not heard: "+strings.Join(unheard, ", "))
	}
	return strings.Join(lines, "; ")
}
