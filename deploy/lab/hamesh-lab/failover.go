//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/deploy/lab"
)

const (
	askers   = 10
	askEvery = 50 * time.Millisecond // each asker
	steady   = 500 * time.Millisecond
	late     = time.Second      // after everybody was served again: what breaks once more is seen
	patience = 5 * time.Second  // of a client: what takes longer has failed
	overdue  = 3 * time.Second  // after the strike, at least: which ordinary clients hang is seen
	hopeless = 20 * time.Second // a trial in which somebody is not served for so long fails
)

// contender is one way to keep a VIP and what is behind it reachable.
type contender struct {
	name  string
	setUp func() (*lab.Mesh, error)
	// settled waits until all is as before any fault.
	settled func(*lab.Mesh) error
	kill    func(*lab.Node) error // the main processes, which may leave others behind
	killAll func(*lab.Node) error // everything on a node, at once
	restart func(*lab.Node) error
	move    func(m *lab.Mesh, owner *lab.Node) error // the VIP elsewhere, as an operator would
	// leader names the node on which the store's leader is; nil: there is none.
	leader func(*lab.Mesh) (string, error)
}

// scenario is what happens to the owner.
type scenario struct {
	name string
	// withLeader: the owner's node has the store's leader too; else it has not, where
	// there is such a thing.
	withLeader bool
	takes      bool // the owner's node from the others: what was connected through it is lost
	strike     func(c contender, m *lab.Mesh, owner *lab.Node) error
	mend       func(c contender, owner *lab.Node) error
}

func cut(_ contender, _ *lab.Mesh, n *lab.Node) error     { return n.Port().Cut() }
func mend(_ contender, n *lab.Node) error                 { return n.Port().Mend() }
func isolate(_ contender, _ *lab.Mesh, n *lab.Node) error { return n.Port().Isolate() }
func rejoin(_ contender, n *lab.Node) error               { return n.Port().Rejoin() }

var scenarios = []scenario{
	{name: "owner's cable pulled", takes: true, strike: cut, mend: mend},
	{name: "owner cut off, carrier stays", takes: true, strike: isolate, mend: rejoin},
	{name: "the same, with etcd's leader on it", withLeader: true, takes: true, strike: isolate, mend: rejoin},
	{
		name:   "owner's daemons killed (SIGKILL)",
		strike: func(c contender, _ *lab.Mesh, n *lab.Node) error { return c.kill(n) },
		mend:   func(c contender, n *lab.Node) error { return c.restart(n) },
	},
	{
		name:   "with all their children, at once",
		strike: func(c contender, _ *lab.Mesh, n *lab.Node) error { return c.killAll(n) },
		mend:   func(c contender, n *lab.Node) error { return c.restart(n) },
	},
	{
		name:   "planned move",
		strike: func(c contender, m *lab.Mesh, n *lab.Node) error { return c.move(m, n) },
		mend:   func(c contender, n *lab.Node) error { return c.restart(n) },
	},
}

// trial is what the clients saw of one strike.
type trial struct {
	worst, median time.Duration // the longest gap of the worst client, and of the one in the middle
	failed        int
	refused       int
	waits         lab.Waits // of ordinary clients, beside
}

// outcomes are the trials of one contender in one scenario.
type outcomes struct {
	contender, scenario string
	trials              []trial
	failure             error
}

func failoverCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	trials := flags.Int("trials", 10, "how often each thing is measured")
	profiles := []string{"default"}
	flags.Func("timing", "timing profiles: default (when left out), fast or default,fast", func(s string) error {
		profiles = strings.Split(s, ",")
		for _, p := range profiles {
			if ttls[p] == 0 {
				return fmt.Errorf("no profile %q", p)
			}
		}
		return nil
	})
	peers := flags.Bool("peers", false, "keepalived with HAProxy too, as Debian has them")
	file := flags.String("out", "", "write the table to this file too, as Markdown")
	err := flags.Parse(args)
	return func() error {
		var contenders []contender
		for _, p := range profiles {
			contenders = append(contenders, hamesh(p))
		}
		if *peers {
			others, err := peersOfDebian()
			if err != nil {
				return err
			}
			contenders = append(contenders, others...)
		}
		return failover(out, contenders, *trials, *file)
	}, err
}

func hamesh(timing string) contender {
	return contender{
		name:    "hamesh, " + timing + " timing",
		setUp:   func() (*lab.Mesh, error) { return lab.NewMesh(lab.Options{Timing: timing}) },
		settled: func(m *lab.Mesh) error { return m.WaitHealthy(ready) },
		kill:    (*lab.Node).KillAgent,
		killAll: (*lab.Node).KillAll,
		restart: (*lab.Node).StartAgent,
		move: func(m *lab.Mesh, owner *lab.Node) error {
			return ask(owner, "move-vip", "kube-api", "--wait")
		},
		leader: func(m *lab.Mesh) (string, error) {
			s, err := m.Nodes[0].Status()
			return s.GetStore().GetLeader(), err
		},
	}
}

// ask runs hactl and wants it to succeed.
func ask(n *lab.Node, args ...string) error {
	_, stderr, status, err := n.Hactl(args...)
	if err == nil && status != 0 {
		err = fmt.Errorf("hactl %s: exit status %d: %s", strings.Join(args, " "), status, stderr)
	}
	return err
}

// failover measures every contender in every scenario, one mesh after the other, and
// prints one table.
func failover(out io.Writer, contenders []contender, trials int, file string) error {
	var all []outcomes
	var errs []error
	for _, c := range contenders {
		results, err := measure(out, c, trials)
		all = append(all, results...)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
	}
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"what happens", "who", "trials", "worst client: median", "and worst", "middle client: median", "failed requests: median", "refused"})
	slices.SortStableFunc(all, func(a, b outcomes) int { return order(a.scenario) - order(b.scenario) })
	for _, o := range all {
		if o.failure != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", o.contender, o.scenario, o.failure))
		}
		if n := len(o.trials); n > 0 {
			t.AppendRow(table.Row{
				o.scenario, o.contender, n,
				round(middle(o.trials, func(t trial) time.Duration { return t.worst })),
				round(slices.MaxFunc(o.trials, func(a, b trial) int { return int(a.worst - b.worst) }).worst),
				round(middle(o.trials, func(t trial) time.Duration { return t.median })),
				middle(o.trials, func(t trial) int { return t.failed }),
				middle(o.trials, func(t trial) int { return t.refused }),
			})
		}
	}
	about := fmt.Sprintf("%d clients, each with a new connection and a request every %s: the longest time a client was without an answer, as it gives a request up after %s. "+
		"Three nodes in network namespaces, Linux %s, %d processors.", askers, askEvery, patience, kernelRelease(), runtime.NumCPU())
	p := patientTable("what happens")
	for _, o := range all {
		if len(o.trials) > 0 {
			worst := seen{Waits: lab.Waits{Errors: make(map[string]int)}}
			for _, t := range o.trials {
				worst.add(&seen{Waits: t.waits})
			}
			p.AppendRow(table.Row{o.scenario + ": " + o.contender, worst.Number, round(worst.Longest), counted(worst.Failed, worst.Errors), worst.Unfinished})
		}
	}
	fmt.Fprintf(out, "\n%s\n%s\n\n%s\n", about, t.Render(), p.Render())
	if file != "" {
		errs = append(errs, os.WriteFile(file, []byte("# Fail-over\n\n"+about+"\n\n"+t.RenderMarkdown()+"\n\n"+p.RenderMarkdown()+"\n"), 0o644))
	}
	return errors.Join(errs...)
}

func order(name string) int {
	return slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "of unknown release"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// middle is the median of one number of the trials.
func middle[N int | time.Duration](trials []trial, of func(trial) N) N {
	all := make([]N, len(trials))
	for i, t := range trials {
		all[i] = of(t)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// measure plays every scenario on one mesh.
func measure(out io.Writer, c contender, trials int) (all []outcomes, err error) {
	fmt.Fprintf(out, "%s …\n", c.name)
	m, err := c.setUp()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	for _, s := range scenarios {
		if s.withLeader && c.leader == nil {
			continue
		}
		o := outcomes{contender: c.name, scenario: s.name}
		for range trials {
			if o.failure = c.settled(m); o.failure != nil {
				break
			}
			t, err := c.try(m, s)
			if err != nil {
				o.failure = err
				break
			}
			o.trials = append(o.trials, t)
			fmt.Fprintf(out, "  %s: %s for the worst client, %s for the middle one, %d failed (%d refused); ordinary clients: %s\n",
				s.name, round(t.worst), round(t.median), t.failed, t.refused, &seen{Waits: t.waits})
		}
		all = append(all, o)
		if o.failure != nil {
			return all, nil // the mesh is in no state for more
		}
	}
	return all, nil
}

// try plays one scenario once.
func (c contender) try(m *lab.Mesh, s scenario) (t trial, err error) {
	run, err := m.Client.Start(lab.Load{
		Target: m.VIP(), Rate: askers * float64(time.Second/askEvery), From: m.Client.Sources[:askers],
		Timeout: patience,
	})
	if err != nil {
		return t, err
	}
	running := []*lab.Run{run}
	defer func() {
		for _, r := range running {
			_, e := r.Stop()
			err = errors.Join(err, e)
		}
	}()
	patient, err := m.Client.StartOrdinary(beside(m.VIP()))
	if err != nil {
		return t, err
	}
	running = append(running, patient)
	if err := lab.Await(hopeless, func() error { return connected(patient) }); err != nil {
		return t, err
	}
	time.Sleep(steady)
	owner, err := c.owner(m, s)
	if err != nil {
		return t, err
	}
	from := time.Now()
	if err := s.strike(c, m, owner); err != nil {
		return t, err
	}
	err = lab.Await(hopeless, func() error { return servedAgain(run.Samples(), m.Client.Sources[:askers], from, s) })
	if err == nil {
		time.Sleep(max(late, time.Until(from.Add(overdue))))
	}
	to := time.Now()
	running = nil
	waited, e := patient.Stop()
	err = errors.Join(err, e, s.mend(c, owner))
	samples, e := run.Stop()
	if err := errors.Join(err, e); err != nil {
		return t, err
	}
	fault := lab.Fault{At: from, Until: to}
	if s.takes {
		fault.Node = owner.Name
	}
	r := lab.Summarize(samples, from, to)
	var gaps []time.Duration
	for _, gap := range r.GapBySource {
		gaps = append(gaps, gap)
	}
	slices.Sort(gaps)
	return trial{worst: gaps[len(gaps)-1], median: gaps[len(gaps)/2], failed: r.Failed, refused: r.Errors["refused"],
		waits: lab.Judge(waited, []lab.Fault{fault}, holderOf(m.Recorder), mostWait)}, nil
}

// owner is who has the VIP; arranged so that the store's leader is there, or is not, as
// the scenario wants it.
func (c contender) owner(m *lab.Mesh, s scenario) (owner *lab.Node, err error) {
	err = lab.Await(ready, func() error {
		holders := m.Recorder.Now()
		if len(holders) != 1 {
			return fmt.Errorf("wait for one holder: there are %d %v", len(holders), holders)
		}
		owner = m.Node(holders[0])
		if c.leader == nil {
			return nil
		}
		if err := c.placed(m, s, owner); err != nil {
			return err
		}
		// What an arranging move has disturbed settles, and what has arranged itself
		// differently meanwhile is arranged anew.
		time.Sleep(steady)
		return c.placed(m, s, owner)
	})
	return owner, err
}

// placed returns nil if the store's leader is where the scenario wants it; else it moves
// the VIP to where the leader is, if that helps, and says what was wrong.
func (c contender) placed(m *lab.Mesh, s scenario, owner *lab.Node) error {
	leader, err := c.leader(m)
	if err != nil || leader == "" {
		return errors.Join(errors.New("the store has no leader"), err)
	}
	if (leader == owner.Name) == s.withLeader {
		return nil
	}
	if s.withLeader { // it is led away from the owner in a while; now it is there
		err = ask(owner, "move-vip", "kube-api", "--to", leader, "--wait")
	}
	return errors.Join(fmt.Errorf("%s owns the VIP, %s leads the store", owner.Name, leader), err)
}

// servedAgain reports whether every source has had an answer to a request that was due
// after the strike could be felt.
func servedAgain(samples []lab.Sample, sources []netip.Addr, struck time.Time, s scenario) error {
	served := make(map[netip.Addr]bool)
	for _, sample := range samples {
		if sample.Kind == lab.Request && sample.Error == "" && sample.Start.After(struck) {
			served[sample.Source] = true
		}
	}
	for _, source := range sources {
		if !served[source] {
			return fmt.Errorf("%s: %v gets no answer", s.name, source)
		}
	}
	return nil
}
