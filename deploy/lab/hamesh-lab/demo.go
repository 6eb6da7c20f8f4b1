//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/hamesh/hamesh/deploy/lab"
)

const (
	ready  = 30 * time.Second // for a mesh to become healthy, etcd's start included
	settle = 2 * time.Second  // after each step, so that what comes late is seen too
	outage = 8 * time.Second  // of the store: more than two lease TTLs

	// busy is the longest gap that a busy machine alone may cause.
	busy = 500 * time.Millisecond
)

// limits are what a step may cost a client at most.
type limits struct {
	gap    time.Duration // between two good answers
	failed int           // requests
	broken int           // streams
	moves  int           // changes of the holder; exactly so many
}

// step is one thing that happens to the mesh while a client measures.
type step struct {
	name   string
	do     func(*scene) error
	expect limits
	after  func(*scene) error // puts right, unmeasured, what do has broken; nil: nothing
	broken bool               // the mesh stays as it is, for the next step to put right
	loses  bool               // do takes a node or its API server away: scene.down
}

// outcome is what a step turned out to cost.
type outcome struct {
	step
	report  lab.Report
	waits   lab.Waits // of ordinary clients, beside
	holding lab.Holding
	failure error // of doing it
}

// scene is what the steps play on.
type scene struct {
	*lab.Mesh
	out  io.Writer
	down *lab.Node // the one that a step has broken
	undo func() error
}

const (
	requestRate = 100 // a second
	streams     = 20
)

var steps = []step{
	{
		name:   "nothing happens",
		do:     func(*scene) error { time.Sleep(settle); return nil },
		expect: limits{gap: busy},
	},
	{
		name:   "the VIP is moved",
		do:     (*scene).move,
		expect: limits{gap: busy, moves: 1},
	},
	{
		name:   "its owner loses power",
		do:     (*scene).cutPower,
		expect: limits{gap: 2 * time.Second, failed: 2 * requestRate, broken: streams, moves: 1},
		broken: true, loses: true,
	},
	{
		name:   "that node comes back",
		do:     (*scene).restorePower,
		expect: limits{gap: 500 * time.Millisecond, failed: requestRate / 2, broken: streams},
	},
	{
		name:   "the owner's agent is killed",
		do:     (*scene).killAgent,
		expect: limits{gap: time.Second, failed: requestRate, broken: streams, moves: 1},
		after:  func(s *scene) error { return s.down.StartAgent() },
		loses:  true,
	},
	{
		name:   "an API server is killed",
		do:     (*scene).killAPI,
		expect: limits{gap: 500 * time.Millisecond, failed: 2 * requestRate, broken: streams},
		after:  func(s *scene) error { return s.down.API.Start() },
		loses:  true,
	},
	{
		name:   fmt.Sprintf("the store stops for %s", outage),
		do:     (*scene).stopStore,
		expect: limits{gap: busy},
		after:  func(s *scene) error { return s.undo() },
	},
}

func (s *scene) move() error {
	stdout, stderr, status, err := s.Nodes[0].Hactl("move-vip", "kube-api", "--wait")
	if err != nil {
		return err
	}
	if status != 0 {
		return fmt.Errorf("hactl move-vip: exit status %d: %s", status, stderr)
	}
	fmt.Fprintf(s.out, "$ hactl move-vip kube-api --wait\n%s", stdout)
	return nil
}

// breakOwner does something bad to the owner and waits for another one.
func (s *scene) breakOwner(f func(*lab.Node) error) (err error) {
	if s.down, err = s.WaitOwner(ready); err != nil {
		return err
	}
	if err := f(s.down); err != nil {
		return err
	}
	return lab.Await(ready, func() error {
		owner, err := s.WaitOwner(0)
		if err == nil && owner == s.down {
			err = fmt.Errorf("%s is still the owner", owner.Name)
		}
		return err
	})
}

func (s *scene) cutPower() error  { return s.breakOwner((*lab.Node).PowerOff) }
func (s *scene) killAgent() error { return s.breakOwner((*lab.Node).KillAgent) }

func (s *scene) restorePower() error {
	if err := s.down.PowerOn(); err != nil {
		return err
	}
	return s.WaitHealthy(ready)
}

// killAPI takes the API server beside the owner: the VIP has no reason to move.
func (s *scene) killAPI() error {
	owner, err := s.WaitOwner(ready)
	if err != nil {
		return err
	}
	i := slices.Index(s.Nodes, owner)
	s.down = s.Nodes[(i+1)%len(s.Nodes)]
	return s.down.API.Kill()
}

func (s *scene) stopStore() (err error) {
	s.undo, err = s.StopStore()
	time.Sleep(outage)
	return err
}

// play does one step under load.
func (s *scene) play(st step) (o outcome) {
	o.step = st
	run, err := s.Client.Start(lab.Load{
		Target: s.VIP(), Rate: requestRate,
		Streams: streams, Interval: 50 * time.Millisecond, Silence: time.Second,
	})
	if err != nil {
		o.failure = err
		return o
	}
	patient, err := s.Client.StartOrdinary(beside(s.VIP()))
	if err != nil {
		_, e := run.Stop()
		o.failure = errors.Join(err, e)
		return o
	}
	o.failure = lab.Await(ready, func() error {
		if err := connected(patient); err != nil {
			return err
		}
		if r := lab.Summarize(run.Samples(), time.Time{}, time.Now()); r.Streams < streams || len(r.Backends) == 0 {
			return errors.New("wait for the client's streams")
		}
		return nil
	})
	from := time.Now()
	if o.failure == nil {
		o.failure = st.do(s)
	}
	time.Sleep(settle)
	to := time.Now()
	samples, err := run.Stop()
	waited, e := patient.Stop()
	o.failure = errors.Join(o.failure, err, e)
	o.report = lab.Summarize(samples, from, to)
	o.holding = s.Recorder.Between(from, to)
	fault := lab.Fault{At: from, Until: to}
	if st.loses && s.down != nil {
		fault.Node = s.down.Name
	}
	o.waits = lab.Judge(waited, []lab.Fault{fault}, holderOf(s.Recorder), mostWait)
	if st.after != nil && o.failure == nil {
		o.failure = st.after(s)
	}
	if !st.broken && o.failure == nil {
		o.failure = s.WaitHealthy(ready)
	}
	return o
}

// beside are the ordinary clients that run beside the impatient ones.
func beside(target netip.AddrPort) lab.Ordinary {
	return lab.Ordinary{Target: target, Calls: 20, Connections: 10, Watches: 10}
}

// connected returns nil once all that is held open beside is open.
func connected(run *lab.Run) error {
	all := beside(netip.AddrPort{})
	samples, err := run.UnderWay()
	open := 0
	for _, s := range samples {
		if s.Kind != lab.Call && s.Backend != "" {
			open++
		}
	}
	if want := all.Connections + all.Watches; err == nil && open < want {
		err = fmt.Errorf("wait for ordinary clients: %d of %d are connected", open, want)
	}
	return err
}

// complaints says in what the outcome is not as expected.
func (o outcome) complaints() []string {
	var all []string
	check := func(bad bool, format string, args ...any) {
		if bad {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	if o.failure != nil {
		return []string{o.failure.Error()}
	}
	moved := moves(o.holding)
	check(o.holding.Max > 1, "%d nodes held the VIP at once, for %s", o.holding.Max, round(o.holding.LongestSeveral))
	check(moved != o.expect.moves, "the holder changed %d times, not %d", moved, o.expect.moves)
	check(o.report.Gap > o.expect.gap, "a gap of %s, more than %s", round(o.report.Gap), o.expect.gap)
	check(o.report.Failed > o.expect.failed, "%d requests failed, more than %d: %v", o.report.Failed, o.expect.failed, o.report.Errors)
	if len(o.waits.Above) > 0 {
		check(true, "%d ordinary clients waited for more than %s: %s", len(o.waits.Above), mostWait, o.waits.Above[0])
	}
	check(o.report.Broken > o.expect.broken, "%d streams broke, more than %d: %v", o.report.Broken, o.expect.broken, o.report.Breaks)
	return all
}

// moves counts how often one node was the only holder after another one had been, an
// absence or both in between or not.
func moves(h lab.Holding) int {
	var sole []string
	for _, span := range h.Spans {
		if len(span.Holders) == 1 {
			sole = append(sole, span.Holders[0])
		}
	}
	return max(0, len(slices.Compact(sole))-1)
}

// demo plays every step on a fresh mesh, prints what each cost and returns an error if
// that is not as expected. At the end it calls linger before the mesh is closed.
func demo(out io.Writer, options lab.Options, linger func(*lab.Mesh)) (err error) {
	fmt.Fprintln(out, "starting a mesh in namespaces of its own …")
	mesh, err := lab.NewMesh(options)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, mesh.Close())
		fmt.Fprintln(out, "tidied up")
	}()
	if err := mesh.WaitHealthy(ready); err != nil {
		return err
	}
	s := &scene{Mesh: mesh, out: out}
	if err := s.showStatus(); err != nil {
		return err
	}
	var outcomes []outcome
	for i, st := range steps {
		fmt.Fprintf(out, "%d/%d  %s …\n", i+1, len(steps), st.name)
		o := s.play(st)
		outcomes = append(outcomes, o)
		if o.failure != nil {
			break // what follows would not mean what it says
		}
	}
	fmt.Fprintln(out)
	err = verdict(out, outcomes)
	if linger != nil {
		linger(mesh)
	}
	return err
}

func (s *scene) showStatus() error {
	stdout, stderr, _, err := s.Nodes[0].Hactl("status")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "\n$ hactl status\n%s%s\n", stdout, stderr)
	return err
}

// verdict prints the table and returns an error where an expectation was not met.
func verdict(out io.Writer, outcomes []outcome) error {
	t := table.NewWriter()
	t.SetOutputMirror(out)
	t.SetStyle(table.StyleLight)
	t.SetTitle("What a client saw, %d new connections a second and %d streams, and who held the VIP", requestRate, streams)
	t.AppendHeader(table.Row{"step", "longest gap", "failed", "of", "broken streams", "longest silence", "holders", "without", "moved", ""})
	var errs []error
	for _, o := range outcomes {
		mark := "as expected"
		if complaints := o.complaints(); len(complaints) > 0 {
			mark = "NOT as expected"
			errs = append(errs, fmt.Errorf("%s: %s", o.name, strings.Join(complaints, "; ")))
		}
		t.AppendRow(table.Row{
			o.name, round(o.report.Gap), counted(o.report.Failed, o.report.Errors), o.report.Requests,
			counted(o.report.Broken, o.report.Breaks), round(o.report.Silence),
			fmt.Sprintf("%d…%d", o.holding.Min, o.holding.Max), round(o.holding.LongestNone), moves(o.holding), mark,
		})
	}
	t.Render()
	p := patientTable("step")
	for _, o := range outcomes {
		p.AppendRow(table.Row{o.name, o.waits.Number, round(o.waits.Longest), counted(o.waits.Failed, o.waits.Errors), o.waits.Unfinished})
	}
	fmt.Fprintf(out, "\n%s\n", p.Render())
	return errors.Join(errs...)
}

// patientTable is one of what ordinary clients saw beside the impatient ones.
func patientTable(what string) table.Writer {
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.SetTitle("What ordinary clients saw, which wait as kubectl and client-go do")
	t.AppendHeader(table.Row{what, "calls and watches", "longest wait beyond the answer", "failed", "unfinished"})
	return t
}

// counted prints a number and what it is made of.
func counted(n int, causes map[string]int) string {
	if n == 0 {
		return "0"
	}
	var parts []string
	for _, cause := range slices.Sorted(maps.Keys(causes)) {
		parts = append(parts, fmt.Sprintf("%d %s", causes[cause], cause))
	}
	return fmt.Sprintf("%d (%s)", n, strings.Join(parts, ", "))
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// lookAround prints how to look into a mesh that is left running.
func lookAround(out io.Writer, m *lab.Mesh) {
	fmt.Fprintf(out, "\nThe mesh is left running; ^C ends it. From another terminal:\n")
	for _, n := range m.Nodes {
		fmt.Fprintf(out, "\n%s\n  a shell   %s\n  hactl     %s\n", n.Name, n.Shell("sh"), n.HactlShell("status"))
	}
}
