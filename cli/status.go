package cli

import (
	"context"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// clearScreen moves the cursor home and erases what is below (ECMA-48 CUP, ED).
const clearScreen = "\x1b[H\x1b[J"

func (c *command) statusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show VIPs, nodes, backends, the store, and what is wrong",
		Long: `Show VIPs, nodes, backends, the store, and what is wrong, each with its fix.
Exits with 3 where the mesh is not healthy.

With --watch it goes on with every change, also when the member that answers goes away
and another endpoint answers; the exit status is that of the last state seen.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return c.watch(cmd.Context())
			}
			return c.status(cmd.Context())
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on with every change")
	return cmd
}

func (c *command) status(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	status, err := hameshv1.NewStatusServiceClient(conn).GetStatus(ctx, &hameshv1.GetStatusRequest{})
	if err != nil {
		return c.callFailure(ctx, err)
	}
	if err := c.show(status, status, single, ""); err != nil {
		return err
	}
	return verdict(status)
}

// watch follows the mesh from one endpoint after the other until ctx ends.
func (c *command) watch(ctx context.Context) error {
	var last *hameshv1.GetStatusResponse
	for {
		seen, err := c.follow(ctx)
		if seen != nil {
			last = seen
		}
		switch {
		case ctx.Err() != nil && last != nil:
			return verdict(last)
		case seen == nil:
			return err
		}
	}
}

// follow prints what one member says until that ends, and returns the last status.
func (c *command) follow(ctx context.Context) (*hameshv1.GetStatusResponse, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	changes, err := hameshv1.NewStatusServiceClient(conn).WatchStatus(ctx, &hameshv1.WatchStatusRequest{})
	if err != nil {
		return nil, c.callFailure(ctx, err)
	}
	before := ""
	if isTerminal(c.out) {
		before = clearScreen
	}
	var last *hameshv1.GetStatusResponse
	for {
		change, err := changes.Recv()
		if err != nil {
			return last, c.callFailure(ctx, err)
		}
		if last != nil && before == "" {
			before = "\n"
		}
		last = change.GetStatus()
		if err := c.show(change, last, stream, before); err != nil {
			return nil, err
		}
	}
}

// show prints status, as a table after before, or else as the message it came in.
func (c *command) show(message proto.Message, status *hameshv1.GetStatusResponse, layout layout, before string) error {
	if done, err := c.structured(message, layout); done {
		return err
	}
	v := view{
		now:    c.now(),
		wide:   c.output == "wide",
		colour: isTerminal(c.out) && os.Getenv("NO_COLOR") == "",
	}
	return c.print(before + v.status(status))
}

// verdict makes the exit status of a mesh's state.
func verdict(status *hameshv1.GetStatusResponse) error {
	if status.GetState() == hameshv1.State_STATE_HEALTHY {
		return nil
	}
	return &failure{status: exitDegraded}
}

// isTerminal reports whether w is a character device, which is what a terminal is.
func isTerminal(w any) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
