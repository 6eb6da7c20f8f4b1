package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hamesh/hamesh/agent/peer"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

const (
	// eventsKept is how many events of each member are remembered.
	eventsKept = 1000
	// eventsWaiting is how many may wait for a slow disk; when there are more, the file is
	// written anew.
	eventsWaiting = 256
	// eventText is how many bytes each text of an event has at most: what it says comes from
	// callers and other programs, and every member keeps it and tells it to the others.
	eventText = 512
	// followPause is the pause before a member is asked again for its events.
	followPause = 250 * time.Millisecond
)

// events is what this member remembers of the mesh: the last events of its own, which
// outlast a restart in a file, and those of every other member, which it follows. So any
// member tells the whole story, also what a member saw that is gone now.
type events struct {
	self   string
	file   string
	silent func(member string) bool // it has been given up: its stream only has not ended yet
	log    hclog.Logger
	// unwritten are events of this member on their way to the file.
	unwritten chan *hameshv1.Event

	mu       sync.Mutex
	of       map[string][]*hameshv1.Event // member → its events, oldest first
	last     time.Time                    // of the newest one of this member
	late     int                          // events for which there was no room in unwritten
	followed map[string]bool              // other member → it tells its events now
	changed  chan struct{}                // closed and replaced at each event
}

// newEvents reads what an earlier run of this member has left. A damaged line, as one that
// was being written when the power was cut, is left out.
func newEvents(dataDir, self string, members []string, silent func(member string) bool, log hclog.Logger) (*events, error) {
	e := &events{
		self: self, file: filepath.Join(dataDir, "events"), silent: silent, log: log, unwritten: make(chan *hameshv1.Event, eventsWaiting),
		of: map[string][]*hameshv1.Event{}, followed: map[string]bool{}, changed: make(chan struct{}),
	}
	for _, m := range members {
		if m != self {
			e.followed[m] = false
		}
	}
	b, err := os.ReadFile(e.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the events of earlier runs: %w", err)
	}
	for line := range bytes.Lines(b) {
		var event hameshv1.Event
		if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, &event) != nil {
			continue
		}
		if at, node, err := server.ParseEventID(event.GetId()); err == nil && node == self && at.After(e.last) {
			e.last = at
			shorten(&event)
			e.add(&event)
		}
	}
	return e, nil
}

// record remembers an event of this member that happens now, and gives it its id. It does
// not block.
func (e *events) record(event *hameshv1.Event) {
	shorten(event)
	e.mu.Lock()
	at := time.Now()
	// Ids grow, also where the wall clock goes back, or is too coarse.
	e.last = time.Unix(0, max(at.UnixNano(), e.last.UnixNano()+1))
	event.Id, event.Node, event.Time = server.EventID(e.last, e.self), e.self, timestamppb.New(at)
	e.add(event)
	select {
	case e.unwritten <- event:
	default:
		e.late++
	}
	e.mu.Unlock()
}

// shorten cuts the texts of an event to what may be kept and told. Texts must be UTF-8
// throughout, or the event cannot be encoded.
func shorten(event *hameshv1.Event) {
	for _, text := range []*string{&event.Vip, &event.Proxy, &event.Backend, &event.Peer, &event.By, &event.Message, &event.Reason} {
		*text = strings.ToValidUTF8((*text)[:min(len(*text), eventText)], "")
	}
}

// add remembers an event; e.mu is held, or e is not shared yet.
func (e *events) add(event *hameshv1.Event) {
	all := append(e.of[event.GetNode()], event)
	e.of[event.GetNode()] = all[max(0, len(all)-eventsKept):]
	close(e.changed)
	e.changed = make(chan struct{})
}

// Events implements server.EventSource.
func (e *events) Events(wanted server.EventSelection) (found []*hameshv1.Event, unanswered []string) {
	found, unanswered = e.find(wanted)
	slices.SortFunc(found, func(a, b *hameshv1.Event) int { return strings.Compare(a.GetId(), b.GetId()) })
	slices.Sort(unanswered)
	return found, unanswered
}

// find is Events without an order: the ownership loop, which records events, does not wait
// for sorting.
func (e *events) find(wanted server.EventSelection) (found []*hameshv1.Event, unanswered []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	since := ""
	if !wanted.Since.IsZero() && wanted.Since.UnixNano() > 0 {
		since = server.EventID(wanted.Since, "")
	}
	for node, all := range e.of {
		if wanted.OwnOnly && node != e.self {
			continue
		}
		after, seen := wanted.After[node]
		for _, event := range all {
			if id := event.GetId(); (seen && id > after) || (!seen && id >= since) {
				found = append(found, event)
			}
		}
	}
	for member, followed := range e.followed {
		if !wanted.OwnOnly && (!followed || e.silent(member)) {
			unanswered = append(unanswered, member)
		}
	}
	return found, unanswered
}

// EventsChanged implements server.EventSource.
func (e *events) EventsChanged() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.changed
}

// run writes this member's events to the file until ctx ends. A disk that fails costs
// what would have outlasted a restart, no more.
func (e *events) run(ctx context.Context) error {
	lines := eventsKept // so that the first write begins with what is known
	for {
		var event *hameshv1.Event
		select {
		case event = <-e.unwritten:
		default:
			select {
			case event = <-e.unwritten:
			case <-ctx.Done(): // and nothing is left
				return nil
			}
		}
		e.mu.Lock()
		late := e.late
		e.late = 0
		e.mu.Unlock()
		if late > 0 {
			e.log.Warn("the disk is slower than events come: writing the newest ones anew", "events", late)
			lines = eventsKept
		}
		var err error
		if lines++; lines > eventsKept {
			lines, err = e.rewrite()
		} else {
			err = e.append(event)
		}
		if err != nil {
			e.log.Warn("an event will not outlast a restart", "error", err)
		}
	}
}

// rewrite writes the newest half of what is remembered, so that the file may grow again by
// as much, and returns how many events that is.
func (e *events) rewrite() (lines int, err error) {
	e.mu.Lock()
	own := slices.Clone(e.of[e.self])
	e.mu.Unlock()
	own = own[max(0, len(own)-eventsKept/2):]
	var b bytes.Buffer
	for _, event := range own {
		line, err := protojson.Marshal(event)
		if err != nil {
			return 0, fmt.Errorf("encode an event: %w", err)
		}
		b.Write(append(line, '\n'))
	}
	if err := renameio.WriteFile(e.file, b.Bytes(), 0o600); err != nil {
		return 0, fmt.Errorf("write the events: %w", err)
	}
	return len(own), nil
}

func (e *events) append(event *hameshv1.Event) error {
	line, err := protojson.Marshal(event)
	if err != nil {
		return fmt.Errorf("encode an event: %w", err)
	}
	f, err := os.OpenFile(e.file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write an event: %w", err)
	}
	_, err = f.Write(append(line, '\n'))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write an event: %w", err)
	}
	return nil
}

// follow learns the events of another member until ctx ends.
func (e *events) follow(ctx context.Context, member string, link *peer.Link) error {
	last := ""
	for ctx.Err() == nil {
		err := e.listen(ctx, member, link, &last)
		e.setFollowed(member, false)
		e.log.Trace("events of a member do not come", "peer", member, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(followPause):
		}
	}
	return nil
}

var errNoLink = errors.New("no link")

// listen adds the events of another member that come after the last one, until it fails.
func (e *events) listen(ctx context.Context, member string, link *peer.Link, last *string) error {
	client, ok := link.Status()
	if !ok {
		return errNoLink
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	request := &hameshv1.WatchEventsRequest{OwnOnly: true}
	if *last != "" {
		request.After = []string{*last}
	}
	stream, err := client.WatchEvents(ctx, request)
	if err != nil {
		return err
	}
	if _, err := stream.Header(); err != nil { // comes when it has told what it knows
		return err
	}
	e.setFollowed(member, true)
	for {
		news, err := stream.Recv()
		if err != nil {
			return err
		}
		event := news.GetEvent()
		if event.GetNode() != member || event.GetId() <= *last {
			return fmt.Errorf("event %s of %q out of turn", event.GetId(), event.GetNode())
		}
		*last = event.GetId()
		e.mu.Lock()
		e.add(event)
		e.mu.Unlock()
	}
}

func (e *events) setFollowed(member string, followed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.followed[member] = followed
}

// openEvents reads what is remembered, and prepares telling what is new.
func (a *Agent) openEvents() (err error) {
	var members []string
	for _, m := range a.cfg.Members {
		members = append(members, m.Name)
	}
	a.events, err = newEvents(a.cfg.DataDir, a.cfg.Node.Name, members, a.board.isSilent, a.log.Named("events"))
	if err == nil {
		a.teller = newTeller(a.cfg.Node.Name, a.events.record)
	}
	return err
}
