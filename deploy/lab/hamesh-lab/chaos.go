//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/hamesh/hamesh/deploy/lab"
)

const (
	chaosRate = 50 // new connections a second
	aftermath = 5 * time.Second
	recovery  = 15 * time.Second // until the mesh has to be healthy again
	calm      = 1500 * time.Millisecond
)

// ttls are the profiles' lease TTLs.
var ttls = map[string]time.Duration{"default": 3 * time.Second, "fast": 2 * time.Second}

// struck is a fault that has happened.
type struck struct {
	fault
	group        int
	began, ended time.Time
	names        []string
}

func (s struck) String() string {
	if len(s.names) == 0 {
		return s.name
	}
	return strings.Join(s.names, " and ") + ": " + s.name
}

// window reports whether what happens at that time may be this fault's doing.
func (s struck) window(at time.Time) bool {
	return !at.Before(s.began) && !at.After(s.ended.Add(aftermath))
}

// chaosOptions are the command's flags.
type chaosOptions struct {
	lab.Options
	duration time.Duration
	seed     uint64
	logs     string // a directory for the agents' logs; empty: they are not kept
}

// storm is a run of random faults.
type storm struct {
	*lab.Mesh
	setting
	out   io.Writer
	wire  *lab.Wire
	start time.Time

	order  []*lab.Node // of the last group: by rank
	groups []group
	ends   []time.Time // of the groups
	faults []struck
	sick   []string // breaches seen while it ran
}

// chaos strikes a fresh mesh with random faults while clients connect, prints what they
// cost and returns an error where the mesh broke a promise.
func chaos(out io.Writer, o chaosOptions) (err error) {
	mesh, err := lab.NewMesh(o.Options)
	if err != nil {
		return err
	}
	defer func() {
		if o.logs != "" {
			err = errors.Join(err, keepLogs(mesh, o.logs))
		}
		err = errors.Join(err, mesh.Close())
	}()
	if err := mesh.WaitHealthy(ready); err != nil {
		return err
	}
	s := &storm{Mesh: mesh, out: out, setting: setting{len(mesh.Nodes), o.ExternalStore, ttls[o.Timing], o.duration > longRun}}
	if s.wire, err = mesh.WatchWire(); err != nil {
		return err
	}
	run, err := mesh.Client.Start(lab.Load{Target: mesh.VIP(), Rate: chaosRate})
	if err != nil {
		return err
	}
	patient, err := mesh.Client.StartOrdinary(lab.Ordinary{Target: mesh.VIP(), Calls: 20, Connections: 10, Slow: 4, Watches: 10})
	if err != nil {
		_, e := run.Stop()
		return errors.Join(err, e)
	}
	s.start = time.Now()
	time.Sleep(calm)
	failure := s.rage(newPlanner(s.setting, o.seed), o.duration)
	end := time.Now()
	failure = errors.Join(failure, s.findDead(patient))
	samples, err := run.Stop()
	waited, e := patient.Stop()
	if err := errors.Join(failure, err, e); err != nil {
		return err
	}
	return s.verdict(samples, waited, end)
}

// findDead finds watches that wait at the end for a connection which no node has. By
// themselves they would not tell for a long time, as they are silent.
func (s *storm) findDead(patient *lab.Run) error {
	samples, err := patient.UnderWay()
	if err != nil {
		return err
	}
	for _, w := range samples {
		if w.Kind != lab.Watch || w.Backend == "" {
			continue
		}
		client := netip.AddrPortFrom(w.Source, w.Port)
		known, err := s.Known(client)
		if err != nil {
			return err
		}
		if !known {
			s.breach("a watch of %s, connected %s, hangs: no node has its connection\n%s", client, s.when(w.Connected), s.Diagnose(client))
		}
	}
	return nil
}

func keepLogs(m *lab.Mesh, dir string) error {
	errs := []error{os.MkdirAll(dir, 0o755)}
	for _, n := range m.Nodes {
		b, err := os.ReadFile(n.LogFile())
		errs = append(errs, err, os.WriteFile(filepath.Join(dir, n.Name+".log"), b, 0o644))
	}
	return errors.Join(errs...)
}

// rage strikes one group after the other until the time is over, or the mesh does not
// recover. Its error is of the lab, not of the mesh.
func (s *storm) rage(p *planner, duration time.Duration) error {
	for time.Since(s.start) < duration {
		g := p.next()
		if err := s.strike(g); err != nil {
			return err
		}
		ended := time.Now()
		s.groups, s.ends = append(s.groups, g), append(s.ends, ended)
		if err := s.WaitHealthy(recovery); err != nil {
			s.breach("not healthy %s after the faults of group %d ended: %.2000s", recovery, len(s.groups), err)
			return nil
		}
		s.say("healthy again after %s", round(time.Since(ended)))
		if g.hurry {
			continue
		}
		time.Sleep(calm)
		if g.quiet {
			time.Sleep(time.Until(ended.Add(aftermath + calm)))
		}
	}
	time.Sleep(time.Until(s.ends[len(s.ends)-1].Add(aftermath + calm)))
	return nil
}

func (s *storm) say(format string, args ...any) {
	now := time.Now()
	fmt.Fprintf(s.out, "%s %7.3fs  %s\n", now.UTC().Format("15:04:05.000"), now.Sub(s.start).Seconds(), fmt.Sprintf(format, args...))
}

func (s *storm) breach(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.sick = append(s.sick, text)
	s.say("BREACH: %s", text)
}

// strike does one group of faults, each from its time on and for its length.
func (s *storm) strike(g group) error {
	if !g.again {
		s.order = s.byRank()
	}
	type act struct {
		at time.Duration
		do func() error
	}
	var acts []act
	start := time.Now()
	for _, f := range g.faults {
		hit := struck{fault: f, group: len(s.groups)}
		var nodes []*lab.Node
		for _, rank := range f.nodes {
			nodes = append(nodes, s.order[rank])
			hit.names = append(hit.names, s.order[rank].Name)
		}
		var end func() error
		index := 0
		acts = append(acts, act{f.at, func() (err error) {
			s.say("%s, for %s (held by %s)", hit, f.length, strings.Join(s.Recorder.Now(), ", "))
			hit.began = time.Now()
			hit.ended = hit.began.Add(f.length)
			index = len(s.faults)
			s.faults = append(s.faults, hit)
			end, err = f.begin(s.Mesh, nodes, f.length)
			return err
		}}, act{f.at + f.length, func() error {
			err := end()
			s.faults[index].ended = time.Now()
			s.say("%s: over", hit)
			return err
		}})
	}
	slices.SortStableFunc(acts, func(a, b act) int { return cmp.Compare(a.at, b.at) })
	for _, a := range acts {
		time.Sleep(time.Until(start.Add(a.at)))
		if err := a.do(); err != nil {
			return err
		}
	}
	return nil
}

// byRank has the holder first, then the others in their order.
func (s *storm) byRank() []*lab.Node {
	nodes := slices.Clone(s.Nodes)
	if holders := s.Recorder.Now(); len(holders) == 1 {
		holder := s.Node(holders[0])
		nodes = append([]*lab.Node{holder}, others(s.Mesh, holder)...)
	}
	return nodes
}

// blame returns the index of the fault that began last of those in whose window the
// time is, or -1.
func (s *storm) blame(at time.Time) int {
	for i, f := range slices.Backward(s.faults) {
		if f.window(at) {
			return i
		}
	}
	return -1
}

// toll is what one kind has cost.
type toll struct {
	count, lost int
	vacant      time.Duration // the longest
}

// account is what all of it has cost.
type account struct {
	tolls                 map[string]*toll
	vacant                time.Duration // without a holder, in all
	two, twoExcused       time.Duration // kernels with the address
	wire, wireExcused     int           // requests answered by several
	requests, lost, stray int
	patient               lab.Waits
	breaches              []string
}

func (s *storm) settle(samples []lab.Sample, holding lab.Holding, doubles []lab.Double) account {
	a := account{tolls: make(map[string]*toll), breaches: s.sick}
	for _, f := range s.faults {
		if a.tolls[f.name] == nil {
			a.tolls[f.name] = &toll{}
		}
		a.tolls[f.name].count++
	}
	for _, span := range holding.Spans {
		switch {
		case len(span.Holders) == 0:
			s.unheld(&a, span)
		case len(span.Holders) > 1:
			s.heldByTwo(&a, span)
		}
	}
	for _, d := range doubles {
		if s.excused(d.At) {
			a.wireExcused++
		} else {
			a.wire++
		}
	}
	for _, sample := range samples {
		if sample.Kind != lab.Request {
			continue
		}
		a.requests++
		if sample.Error == "" {
			continue
		}
		a.lost++
		// A fault may also strike what was under way.
		if i := max(s.blame(sample.Start), s.blame(sample.End)); i >= 0 {
			a.tolls[s.faults[i].name].lost++
			continue
		}
		a.stray++
		a.breaches = append(a.breaches, fmt.Sprintf("%s: a request of %v was lost outside every fault: %s", s.when(sample.Start), sample.Source, sample.Error))
	}
	return a
}

// weigh judges what ordinary clients saw.
func (s *storm) weigh(a *account, waited []lab.Sample, holder func(time.Time) string) {
	var faults []lab.Fault
	for _, f := range s.faults {
		// Without the node: what is short enough takes no connection.
		faults = append(faults, lab.Fault{At: f.began, Until: f.ended})
	}
	a.patient = lab.Judge(waited, faults, nil, mostWait)
	for _, w := range a.patient.Above {
		if allowed := s.patience(w, holder); w.Beyond > allowed {
			a.breaches = append(a.breaches, fmt.Sprintf("%s: more than %s: %s", s.when(w.Start), round(allowed), w))
		}
	}
	for _, w := range a.patient.Unexplained {
		a.breaches = append(a.breaches, fmt.Sprintf("%s: outside every fault: %s", s.when(w.Start), w))
	}
}

// patience is how long an ordinary client may wait: 2 s and, on top, as long as the longest
// fault in its time that cut off its API server or the VIP's holder, or took packets from it; where no majority was
// left, until there could be a holder again.
func (s *storm) patience(w lab.Wait, holder func(time.Time) string) time.Duration {
	from := w.End.Add(-w.Beyond - w.Delay)
	longest := time.Duration(0)
	for _, f := range s.faults {
		vacant, until := s.groups[f.group].vacant, f.ended
		if vacant {
			until = s.ends[f.group].Add(s.takeover() + restored)
		}
		if until.Before(from) || f.began.After(w.End) {
			continue
		}
		touched := w.Backend == "" || slices.Contains(f.names, w.Backend) || slices.Contains(f.names, holder(from)) ||
			!w.Connected.IsZero() && slices.Contains(f.names, holder(w.Connected))
		if vacant || f.steals || f.costs && touched {
			longest = max(longest, until.Sub(f.began))
		}
	}
	return longest + mostWait
}

func (s *storm) when(t time.Time) string {
	return fmt.Sprintf("%s %.3fs", t.UTC().Format("15:04:05.000"), t.Sub(s.start).Seconds())
}

// unheld judges a time without a holder.
func (s *storm) unheld(a *account, span lab.Span) {
	length := span.To.Sub(span.From)
	a.vacant += length
	i := s.blame(span.From)
	if i < 0 {
		if length > unmoved {
			a.breaches = append(a.breaches, fmt.Sprintf("%s: no holder for %s outside every fault", s.when(span.From), round(length)))
		}
		return
	}
	f := s.faults[i]
	a.tolls[f.name].vacant = max(a.tolls[f.name].vacant, length)
	// The faults that overlap may each cost their time.
	allowed := time.Duration(0)
	for _, o := range s.faults {
		if o.group == f.group && o.window(span.From) {
			allowed += o.bound(s.setting)
		}
	}
	if s.groups[f.group].vacant {
		allowed = max(0, s.ends[f.group].Sub(span.From)) + s.takeover() + restored
	}
	if length > allowed {
		a.breaches = append(a.breaches, fmt.Sprintf("%s: no holder for %s after %q of group %d, more than %s",
			s.when(span.From), round(length), f, f.group+1, round(allowed)))
	}
}

// heldByTwo judges a time with several holders: what of it nothing excuses.
func (s *storm) heldByTwo(a *account, span lab.Span) {
	length := span.To.Sub(span.From)
	from := span.From
	for _, f := range s.faults {
		if f.lingers == nil {
			continue
		}
		if until := f.began.Add(f.lingers(s.setting, f.ended.Sub(f.began))); !from.Before(f.began) && from.Before(until) {
			from = until
		}
	}
	bare := max(0, span.To.Sub(from))
	a.two += bare
	a.twoExcused += length - bare
	if bare > together {
		a.breaches = append(a.breaches, fmt.Sprintf("%s: %v had the address at once for %s, of which nothing excuses %s (more than %s)",
			s.when(span.From), span.Holders, round(length), round(bare), together))
	}
}

// excused reports whether a fault of that time may leave an address behind.
func (s *storm) excused(at time.Time) bool {
	return slices.ContainsFunc(s.faults, func(f struck) bool {
		return f.lingers != nil && !at.Before(f.began) && at.Before(f.began.Add(f.lingers(s.setting, f.ended.Sub(f.began))))
	})
}

func (s *storm) verdict(samples, waited []lab.Sample, end time.Time) error {
	a := s.settle(samples, s.Recorder.Between(s.start, end), s.wire.Doubles(s.start, end))
	s.weigh(&a, waited, holderOf(s.Recorder))
	t := table.NewWriter()
	t.SetOutputMirror(s.out)
	t.SetStyle(table.StyleLight)
	t.SetTitle("What the faults cost, %d new connections a second", chaosRate)
	t.AppendHeader(table.Row{"fault", "times", "longest without holder", "bound alone", "because", "requests lost"})
	for _, k := range kinds {
		if c := a.tolls[k.name]; c != nil {
			t.AppendRow(table.Row{k.name, c.count, round(c.vacant), k.bound(s.setting), k.why, c.lost})
		}
	}
	t.Render()
	lapse := time.Duration(0)
	for _, span := range s.Recorder.Between(s.start, end).Spans {
		lapse = max(lapse, span.Late)
	}
	fmt.Fprintf(s.out, `in all          %s, %d groups of faults
without holder  %s
two kernels     %s, and %s after a freeze or a kill with the guard
two on the wire %d requests, and %d then
requests lost   %d of %d, %d of them outside every fault's window (the fault and %s)
ordinary ones   %d, %s failed, %d unfinished; longest wait %s
samples         every 10ms, at worst %s
`, round(end.Sub(s.start)), len(s.groups), round(a.vacant), round(a.two), round(a.twoExcused), a.wire, a.wireExcused,
		a.lost, a.requests, a.stray, aftermath,
		a.patient.Number, counted(a.patient.Failed, a.patient.Errors), a.patient.Unfinished, round(a.patient.Longest), round(lapse))
	if len(a.breaches) == 0 {
		fmt.Fprintln(s.out, "no promise was broken")
		return nil
	}
	for _, b := range a.breaches {
		fmt.Fprintln(s.out, "BREACH:", b)
	}
	return fmt.Errorf("%d promises broken", len(a.breaches))
}

// list prints every kind of fault.
func list(out io.Writer) {
	embedded, external := setting{nodes: 3, ttl: ttls["default"]}, setting{nodes: 3, external: true, ttl: ttls["default"]}
	t := table.NewWriter()
	t.SetOutputMirror(out)
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"fault", "for", "no holder, embedded store", "external", "because"})
	for _, k := range kinds {
		e, x := k.bound(embedded).String(), k.bound(external).String()
		switch k.store {
		case embeddedAway:
			x = "–"
		case externalAway:
			e = "–"
		}
		t.AppendRow(table.Row{k.name, fmt.Sprintf("%s … %s", k.least, k.most), e, x, k.why})
	}
	t.Render()
}
