package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/health"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/parts"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// reload puts the configuration file into force again whenever that is wanted: all that
// has changed in it, or nothing.
type reload struct {
	agent   *Agent
	path    string
	wanted  <-chan os.Signal
	log     *logger
	inForce *config.Config // resolved; changed by run alone

	refused atomic.Pointer[[]*hameshv1.Problem] // why the file is not in force; nil: it is
}

// problems are why the file that was read last is not in force.
func (r *reload) problems() []*hameshv1.Problem {
	if r == nil || r.refused.Load() == nil {
		return nil
	}
	return *r.refused.Load()
}

// run reloads until ctx ends.
func (r *reload) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wanted:
			r.reload(ctx)
		}
	}
}

// reload reads the file, takes it on if that can be, and says what has come of it.
func (r *reload) reload(ctx context.Context) {
	defer r.agent.tellReloading()()
	newer, err := load(r.path, func(w string) { r.log.Warn("configuration: " + w) })
	var changes []config.Change
	if err == nil {
		changes, err = r.inForce.Changes(newer)
	}
	if err == nil {
		err = r.apply(ctx, newer)
	}
	switch {
	case ctx.Err() != nil: // the agent ends
		return
	case err != nil:
		r.refuse(err)
	default:
		r.inForce = newer
		r.refused.Store(nil)
		r.log.Info("the configuration was read again", "changes", len(changes))
		for _, c := range changes {
			r.log.Info("configuration: " + c.String())
		}
		r.agent.teller.reloaded(changes)
	}
	r.agent.board.notify()
}

// apply takes a configuration on that differs only in what may change. Whatever may fail
// comes before anything is changed.
func (r *reload) apply(ctx context.Context, newer *config.Config) error {
	a := r.agent
	if a.files != nil {
		if err := a.files.Reload(); err != nil {
			return err
		}
	}
	proxies, err := shareFiles(newer.Proxies)
	if err != nil {
		return err
	}
	plans := make([]*plan, len(a.services))
	for i, s := range a.services {
		cfg := proxies[slices.IndexFunc(proxies, func(p config.Proxy) bool { return p.Name == s.cfg.Name })]
		if plans[i], err = s.plan(cfg); err != nil {
			return fmt.Errorf("proxy %s: %w", s.cfg.Name, err)
		}
		plans[i].order = func(b config.Backend) health.Order { return a.orders.of(cfg.Name, b) }
	}
	for i, s := range a.services {
		if err := s.replace(ctx, plans[i]); err != nil {
			return fmt.Errorf("proxy %s: %w", s.cfg.Name, err)
		}
	}
	r.log.set(newer.Log)
	common := parts.Of(newer)
	a.parts.Store(&common)
	a.loop.post(ctx, ownership.Settings{Priority: newer.Node.Priority, VIPs: preferences(newer)})
	return nil
}

// refuse tells why nothing has changed, and keeps it for the status.
func (r *reload) refuse(err error) {
	var found config.Problems
	if !errors.As(err, &found) {
		found = config.Problems{{File: r.path, Message: err.Error(), Remedy: "mend what it names"}}
	}
	var problems []*hameshv1.Problem
	for _, p := range found {
		r.log.Error("the configuration is refused, and nothing has changed", "error", p)
		problems = append(problems, &hameshv1.Problem{
			Code: "CONFIG_REFUSED", Message: r.inForce.Node.Name + " goes on with the configuration that it had: " + p.Finding(),
			Fix: p.Remedy + "; then send hameshd SIGHUP (systemctl kill -s HUP hameshd)",
		})
	}
	r.refused.Store(&problems)
	r.agent.teller.refused(found)
}

// tellReloading tells the service manager that the agent reloads, and returns what tells
// that it is done (sd_notify(3), RELOADING=1). Before the agent is ready it would be taken
// for that.
func (a *Agent) tellReloading() (done func()) {
	if !a.joined.Load() {
		return func() {}
	}
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // fails for unknown clocks alone
	// No systemd, no notice.
	_, _ = daemon.SdNotify(false, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
	return func() { _, _ = daemon.SdNotify(false, daemon.SdNotifyReady) }
}
