package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func (c *command) moveCommand() *cobra.Command {
	request := &hameshv1.MoveVipRequest{}
	var wait bool
	cmd := &cobra.Command{
		Use:   "move-vip NAME",
		Short: "Hand a VIP to another node",
		Long: `Hand a VIP to another node, and print each phase with the time since the order was
accepted. Without --wait it returns once the order is accepted; the move then goes on by
itself. A VIP that is where it should be already stays as it is: "unchanged".`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Vip = args[0]
			request.RequestId = uuid.NewString()
			return c.move(cmd.Context(), request, wait)
		},
	}
	cmd.Flags().StringVar(&request.To, "to", "", "node that shall own it; left out: the best other candidate")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until the new owner holds the address and has announced it")
	return cmd
}

func (c *command) move(ctx context.Context, request *hameshv1.MoveVipRequest, wait bool) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	phases, err := hameshv1.NewControlServiceClient(conn).MoveVip(ctx, request)
	if err != nil {
		return c.callFailure(ctx, err)
	}
	for {
		phase, err := phases.Recv()
		if errors.Is(err, io.EOF) {
			return &failure{status: exitFailed, what: "the agent stopped reporting the move before its end", hint: "see where the VIP is with hactl status"}
		}
		if err != nil {
			return c.callFailure(ctx, err)
		}
		if err := c.showPhase(phase); err != nil {
			return err
		}
		if !wait || !phase.GetChanged() || phase.GetPhase() == hameshv1.MovePhase_MOVE_PHASE_HELD {
			return nil
		}
	}
}

func (c *command) showPhase(phase *hameshv1.MoveVipResponse) error {
	if done, err := c.structured(phase, stream); done {
		return err
	}
	if !phase.GetChanged() {
		return c.print(fmt.Sprintf("unchanged: %s is on %s\n", phase.GetVip(), phase.GetTo()))
	}
	elapsed := phase.GetElapsed().AsDuration().Round(100 * time.Microsecond)
	line := fmt.Sprintf("%-9s %9s", word(phase.GetPhase().String(), "MOVE_PHASE_"), elapsed)
	switch phase.GetPhase() {
	case hameshv1.MovePhase_MOVE_PHASE_ACCEPTED:
		line += fmt.Sprintf("   %s from %s to %s", phase.GetVip(), phase.GetFrom(), phase.GetTo())
	case hameshv1.MovePhase_MOVE_PHASE_RECORDED:
		line += fmt.Sprintf("   epoch %d", phase.GetEpoch())
	case hameshv1.MovePhase_MOVE_PHASE_HELD:
		line += fmt.Sprintf("\nmoved %s from %s to %s in %s", phase.GetVip(), phase.GetFrom(), phase.GetTo(), elapsed)
	}
	return c.print(line + "\n")
}
