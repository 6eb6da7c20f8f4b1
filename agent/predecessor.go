package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// envSucceeds names the descriptor of the socket to the agent that is to be succeeded.
	envSucceeds = "HAMESH_SUCCEEDS"
	// passingFormat is that of the messages. It changes where an older or newer one would be
	// misunderstood, the numbers of proxy.Cause included; then only a restart upgrades.
	passingFormat = 1

	lookAgain  = 5 * time.Millisecond
	linkWithin = time.Second
)

// predecessor is the agent that has started this process to go on in its place; nil: none
// has. What this process starts itself knows nothing of it.
func predecessor() (*passing, error) {
	value := os.Getenv(envSucceeds)
	if value == "" {
		return nil, nil
	}
	if err := os.Unsetenv(envSucceeds); err != nil {
		return nil, err
	}
	fd, err := strconv.Atoi(value)
	if err != nil {
		return nil, fmt.Errorf("%s=%q is no descriptor", envSucceeds, value)
	}
	unix.CloseOnExec(fd)
	return newPassing(os.NewFile(uintptr(fd), "predecessor"))
}

// inherit says that this process is fit as far as it can tell, waits until the predecessor
// has nothing that may be here once only but the live state, and returns the inheritance.
func inherit(ctx context.Context, from *passing) (*Inheritance, error) {
	defer context.AfterFunc(ctx, func() { from.conn.Close() })()
	if err := from.send(word{Format: passingFormat, Version: Version}); err != nil {
		return nil, err
	}
	e := &Inheritance{}
	fds, err := from.receive(&e.provenance)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1+portCount {
		return nil, fmt.Errorf("%d descriptors were inherited, want %d", len(fds), 1+portCount)
	}
	e.lock, e.ports = os.NewFile(uintptr(fds[0]), "lock"), fds[1:]
	// Read all the time, so that the predecessor's end is noticed.
	received := make(chan *liveState, 1)
	var lose context.CancelCauseFunc
	e.lost, lose = context.WithCancelCause(context.Background())
	go func() {
		b, err := from.receiveLiveState()
		if err != nil {
			lose(fmt.Errorf("the agent that runs does not give way: %w", err))
			return
		}
		received <- b
	}()
	e.claim = func(ctx context.Context) (*liveState, error) {
		if err := from.send(word{}); err != nil {
			return nil, err
		}
		select {
		case b := <-received:
			return b, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	e.installed = func() error { return errors.Join(from.send(word{}), from.conn.Close()) }
	return e, nil
}

// receiveLiveState waits for all of it. Before the last message the predecessor may still go on.
func (p *passing) receiveLiveState() (b *liveState, err error) {
	b = &liveState{}
	if b.relays, err = p.receiveRelays(); err != nil {
		return nil, err
	}
	if err = p.send(word{}); err != nil {
		return nil, err
	}
	_, err = p.receive(&b.drains)
	return b, err
}

// regret tells the predecessor, if there is one, why this process does not take over.
func (p *passing) regret(err error) {
	if p != nil {
		_ = p.send(word{Error: err.Error()}) // fails where it is taken over, or has ended
	}
}
