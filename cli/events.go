package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

func (c *command) eventsCommand() *cobra.Command {
	var follow bool
	var since time.Duration
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show who owned what when, and why",
		Long: `Show who owned what when, and why: what the members remember of their last 1,000
events each, in the order of time. Every member knows those of the others.

With --follow it goes on with each new event, also when the member that answers goes
away and another endpoint answers: none is missed, and none comes twice.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if since < 0 {
				return fmt.Errorf("since %s is negative", since)
			}
			var from *timestamppb.Timestamp
			if since > 0 {
				from = timestamppb.New(c.now().Add(-since))
			}
			if follow {
				return c.followEvents(cmd.Context(), from)
			}
			return c.listEvents(cmd.Context(), from)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with each new event")
	cmd.Flags().DurationVar(&since, "since", 0, "only events of this last time, 1h for one; left out: all that are remembered")
	return cmd
}

func (c *command) listEvents(ctx context.Context, since *timestamppb.Timestamp) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	response, err := hameshv1.NewStatusServiceClient(conn).ListEvents(ctx, &hameshv1.ListEventsRequest{Since: since})
	if err != nil {
		return c.callFailure(ctx, err)
	}
	if done, err := c.structured(response, single); done {
		return err
	}
	table := newRows(c.eventHeader()...)
	for _, event := range response.GetEvents() {
		table.add(c.eventCells(event)...)
	}
	text := "no events\n"
	if len(response.GetEvents()) > 0 {
		text = table.render() + "\n"
	}
	if missing := response.GetUnanswered(); len(missing) > 0 {
		text += "\nnot answering, so that newer events may be missing: " + strings.Join(missing, ", ") + "\n"
	}
	return c.print(text)
}

// followPause is the pause before the endpoints are tried again.
const followPause = 200 * time.Millisecond

// followEvents prints events from one endpoint after the other until ctx ends, or nobody
// has answered for the time-out.
func (c *command) followEvents(ctx context.Context, since *timestamppb.Timestamp) error {
	last := map[string]string{} // node → the id of its event that was printed last
	var answered time.Time
	for {
		conn, err := c.connect(ctx)
		if err == nil {
			err = c.moreEvents(ctx, conn, since, last)
			_ = conn.Close()
			if status.Code(err) != codes.Unavailable && !errors.Is(err, io.EOF) && ctx.Err() == nil {
				return c.failureOf(ctx, err)
			}
			answered = time.Now()
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case time.Since(answered) > c.timeout:
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(followPause):
		}
	}
}

// moreEvents prints what one member tells until that ends, and notes what it was.
func (c *command) moreEvents(ctx context.Context, conn *grpc.ClientConn, since *timestamppb.Timestamp, last map[string]string) error {
	news, err := hameshv1.NewStatusServiceClient(conn).WatchEvents(ctx, &hameshv1.WatchEventsRequest{
		After: slices.Sorted(maps.Values(last)), Since: since,
	})
	if err != nil {
		return err
	}
	for {
		message, err := news.Recv()
		if err != nil {
			return err
		}
		done, err := c.structured(message, stream)
		if !done {
			text := line(c.eventCells(message.GetEvent()))
			if len(last) == 0 {
				text = line(c.eventHeader()) + text
			}
			err = c.print(text)
		}
		if err != nil {
			return err
		}
		last[message.GetEvent().GetNode()] = message.GetEvent().GetId()
	}
}

func (c *command) eventHeader() []string {
	header := []string{"TIME", "NODE", "EVENT", "OBJECT", "WHY"}
	if c.output == "wide" {
		header = append(header, "EPOCH", "BY", "MESSAGE", "ID")
	}
	return header
}

func (c *command) eventCells(e *hameshv1.Event) []string {
	layout := time.DateTime
	if c.output == "wide" {
		layout = "2006-01-02T15:04:05.000Z07:00"
	}
	why := cmp.Or(e.GetReason(), e.GetMessage())
	if e.GetBy() != "" {
		why += " (" + e.GetBy() + ")"
	}
	cells := []string{
		e.GetTime().AsTime().In(c.now().Location()).Format(layout), e.GetNode(),
		strings.ReplaceAll(word(e.GetKind().String(), "EVENT_KIND_"), "_", "-"), object(e), why,
	}
	if c.output == "wide" {
		epoch := ""
		if e.GetEpoch() != 0 {
			epoch = fmt.Sprint(e.GetEpoch())
		}
		cells = append(cells, epoch, e.GetBy(), e.GetMessage(), e.GetId())
	}
	return cells
}

// object names what an event is about.
func object(e *hameshv1.Event) string {
	switch {
	case e.GetVip() != "":
		return "vip/" + e.GetVip()
	case e.GetBackend() != "":
		return "backend/" + e.GetBackend()
	case e.GetPeer() != "":
		return "node/" + e.GetPeer()
	}
	return "node/" + e.GetNode()
}

// line is a row of a table whose other rows are not known yet.
func line(cells []string) string {
	widths := []int{19, 8, 18, 20}
	var out strings.Builder
	for i, cell := range cells {
		width := 0
		if i < len(widths) {
			width = widths[i]
		}
		fmt.Fprintf(&out, "%-*s   ", width, cmp.Or(cell, "-"))
	}
	return strings.TrimRight(out.String(), " ") + "\n"
}
