package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/ownership"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// envFirst is set for an agent whose parent is the first process of a container.
	envFirst = "HAMESH_FIRST"

	// fitWithin is how long a new process may take to read its configuration and say so,
	// takeWithin how long until it has everything to go on, the store's start included, and
	// installWithin how long it may take over what clients wait for.
	fitWithin     = 5 * time.Second
	takeWithin    = 10 * time.Second
	installWithin = 3 * time.Second
)

// errSucceeded is why an agent ends that goes on in another process.
var errSucceeded = errors.New("another process has taken over")

// upgrade has a new process go on in place of this one, with the program that its file
// contains then, whenever that is wanted.
type upgrade struct {
	agent   *Agent
	program string // its file
	wanted  <-chan os.Signal
	log     hclog.Logger
}

// program is the file of the running program, by the name by which it was started, if it
// has that name still: where it is a link, the link may lead elsewhere next time.
func program() (string, error) {
	if path, err := exec.LookPath(os.Args[0]); err == nil {
		named, err := os.Stat(path)
		own, ownErr := os.Stat("/proc/self/exe")
		if err == nil && ownErr == nil && os.SameFile(named, own) {
			return filepath.Abs(path)
		}
	}
	return os.Executable()
}

// run upgrades until ctx ends, or there is nothing left to do here.
func (u *upgrade) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-u.wanted:
		}
		left, err := u.upgrade(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if left == nil && err != nil {
			u.agent.refuseUpgrade(err)
			continue
		}
		if left != nil {
			left.refused = err
		}
		u.agent.departed <- left // has room for one
		return nil
	}
}

// upgrade returns nothing when another process goes on. With an error, that did not
// come to pass: then what is left, if anything, has to go on in this process.
func (u *upgrade) upgrade(ctx context.Context) (left *Inheritance, err error) {
	a := u.agent
	u.log.Info("an upgrade is wanted", "program", u.program)
	a.events.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_UPGRADE_BEGUN, Message: "the agent of " + a.cfg.Node.Name + " is upgraded", Reason: "SIGUSR2",
	})
	if os.Getenv(envFirst) != "" {
		return nil, errors.New("in a container the agent ends with its first process: replace the container")
	}
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, errors.New("whoever has started this process would take its end for the agent's, as no systemd unit of Type=notify is told of the next one: restart it")
	}
	defer a.tellReloading()()
	s, err := startSuccessor(u.program)
	if err != nil {
		return nil, err
	}
	s.spare = context.AfterFunc(ctx, s.kill)
	defer s.spare()
	defer func() {
		if err != nil {
			s.discard()
		}
	}()
	version, err := s.fit()
	if err != nil {
		return nil, err
	}
	if err := a.giveAway(ctx); err != nil {
		return nil, err
	}
	u.log.Info("nothing is held here: another process goes on", "process", s.cmd.Process.Pid, "version", version)
	if left, err = a.retire(ctx); err != nil {
		return left, err
	}
	frozen, err := a.pass(s, left)
	if err != nil {
		return left, err
	}
	u.log.Info("another process has taken over", "process", s.cmd.Process.Pid, "version", version, "frozen", frozen)
	_, _ = daemon.SdNotify(false, fmt.Sprintf("MAINPID=%d\n%s", s.cmd.Process.Pid, daemon.SdNotifyReady))
	return nil, nil
}

// giveAway has somebody else take every VIP that is here, if there is somebody. With an
// error, everything is as it was.
func (a *Agent) giveAway(ctx context.Context) error {
	view, ok := a.loop.view(ctx)
	switch {
	case !ok:
		return context.Cause(ctx)
	case !view.StoreAnswers:
		return errors.New("the store does not answer, so no VIP could be moved away, or back")
	}
	a.setUpgrading(true)
	others := slices.ContainsFunc(a.cfg.Members, func(m config.Member) bool {
		return m.Name != a.cfg.Node.Name && m.Role == config.Candidate
	})
	if !others {
		return nil
	}
	var here []string
	for deadline := time.Now().Add(handOverWithin); time.Now().Before(deadline); {
		if view, ok = a.loop.view(ctx); !ok {
			return context.Cause(ctx)
		}
		here = nil
		for _, v := range view.VIPs {
			if v.Record.Owner == a.cfg.Node.Name || slices.Contains(v.Holders, a.cfg.Node.Name) {
				here = append(here, v.Name)
			}
		}
		if len(here) == 0 {
			return nil
		}
		if err := a.pause(lookAgain); err != nil {
			return err
		}
	}
	a.setUpgrading(false)
	return fmt.Errorf("nobody has taken %s over in %v", strings.Join(here, ", "), handOverWithin)
}

func (a *Agent) setUpgrading(on bool) {
	a.upgrading.Store(on)
	a.judgeEligibility()
}

// retire ends what must not be in two processes, heartbeats, votes and connections aside,
// and returns what is left.
func (a *Agent) retire(ctx context.Context) (left *Inheritance, err error) {
	left = &Inheritance{provenance: provenanceOf(a.cfg), lock: a.lock}
	left.Flows = a.flows.boot
	if left.ports, err = a.ports.duplicate(); err != nil {
		a.setUpgrading(false)
		return nil, err
	}
	a.loop.post(ctx, ownership.Shutdown{})
	select {
	case <-a.stopped:
	case <-time.After(handOverWithin):
		return left, fmt.Errorf("not everything was given up in %v", handOverWithin)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	a.dismiss()
	a.stopTelling() // what is seen without a store is no news
	return left, a.store.Close()
}

// pass gives everything to the successor, and returns for how long connections stood still.
func (a *Agent) pass(s *successor, left *Inheritance) (frozen time.Duration, err error) {
	err = s.within(installWithin, func() error {
		return s.send(left.provenance, append([]int{int(left.lock.Fd())}, left.ports...)...)
	})
	if err == nil {
		_, err = s.hear(takeWithin)
	}
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	left.live = &liveState{relays: a.freeze()}
	err = s.within(installWithin, func() error { return s.sendRelays(left.live.relays) })
	if err == nil {
		_, err = s.hear(installWithin)
	}
	if err != nil {
		return 0, err
	}
	left.live.drains = a.rest()
	s.spare()
	if err := s.within(installWithin, func() error { return s.send(left.live.drains) }); err != nil {
		return 0, err
	}
	// From here on connections are the successor's, whatever becomes of it.
	left.given = true
	_, err = s.hear(installWithin)
	return time.Since(begun), err
}

// refuseUpgrade tells why this process goes on.
func (a *Agent) refuseUpgrade(err error) {
	a.log.Error("the upgrade is refused: this process goes on", "error", err)
	a.events.record(&hameshv1.Event{
		Kind: hameshv1.EventKind_EVENT_KIND_UPGRADE_REFUSED, Reason: err.Error(),
		Message: "the agent of " + a.cfg.Node.Name + " goes on with version " + Version,
	})
}
