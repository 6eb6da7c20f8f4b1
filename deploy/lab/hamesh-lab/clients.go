//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/hamesh/hamesh/deploy/lab"
)

const (
	// mostWait is the longest that an ordinary client may wait beyond its answer.
	mostWait = 2 * time.Second
	// hanging is how long a client waits before all kernels are asked why.
	hanging = 3 * time.Second
	warmUp  = 3 * time.Second // until every client is in the midst of something
	soon    = 6 * time.Second // after a fault: who has not learnt of it by now, hangs
	shown   = 10              // waits that are printed, of each trial
	asked   = 3               // clients whose hanging is diagnosed, after each fault
)

// bounds are what ordinary clients may see at most; 0: no matter.
type bounds struct {
	wait     time.Duration // beyond what they should
	known    time.Duration // until all that were connected to what was lost know
	takeover time.Duration // until the VIP is held elsewhere
}

// ordeal is a scenario of ordinary clients: try plays it once and reports what they saw.
type ordeal struct {
	name   string
	what   string
	trials int // how often, where the command does not say
	bounds
	try func(s *stage, trial int) (*seen, error)
}

var ordeals = []ordeal{
	{
		name: "cut", what: "the owner's power is cut", trials: 4,
		bounds: bounds{wait: mostWait, known: 800 * time.Millisecond},
		try:    (*stage).cutOnce,
	},
	{
		name: "second", what: "an owner is cut after the one before it came back", trials: 8,
		bounds: bounds{takeover: 600 * time.Millisecond},
		try:    (*stage).cutSecond,
	},
	{
		name: "cuts", what: "one owner after the other is cut", trials: 50,
		bounds: bounds{wait: mostWait},
		try:    (*stage).cutAgain,
	},
	{
		name: "owner", what: "programs on the owner itself, which loses the VIP", trials: 4,
		bounds: bounds{known: 200 * time.Millisecond},
		try:    (*stage).onOwner,
	},
}

// seen is what one trial showed.
type seen struct {
	lab.Waits
	takeover time.Duration // 0: not measured
	note     string
}

// stage is a mesh under ordinary clients.
type stage struct {
	*lab.Mesh
	out  io.Writer
	away time.Duration // how long a cut owner stays away, in "second"
	rng  *rand.Rand

	run   *lab.Run // nil: there is no load
	quit  chan struct{}
	watch chan error // the end of diagnose

	judged time.Time // up to when samples have been judged, in "cuts"

	mu     sync.Mutex
	faults []lab.Fault // since the load began
}

func clientsCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	wanted := ordeals
	flags.Func("scenario", "scenarios, as cut,second (when left out: all): "+strings.Join(names(ordeals), ", "), func(text string) error {
		wanted = nil
		for name := range strings.SplitSeq(text, ",") {
			i := slices.Index(names(ordeals), name)
			if i < 0 {
				return fmt.Errorf("no scenario %q", name)
			}
			wanted = append(wanted, ordeals[i])
		}
		return nil
	})
	trials := flags.Int("trials", 0, "how often each is played; 0: as often as it takes, by scenario")
	nodes := flags.Int("nodes", 3, "how many nodes")
	timing := timingFlag(flags)
	external := flags.Bool("external", false, "an etcd of its own instead of the agents' embedded one")
	away := flags.Duration("away", 30*time.Second, "how long the first owner is cut in the scenario second")
	err := flags.Parse(args)
	return func() error {
		m, err := lab.NewMesh(lab.Options{Nodes: *nodes, Timing: *timing, ExternalStore: *external, Clients: 200})
		if err != nil {
			return err
		}
		s := &stage{Mesh: m, out: out, away: *away, rng: rand.New(rand.NewPCG(1, 0))}
		return errors.Join(s.play(wanted, *trials), s.end(), m.Close())
	}, err
}

func names(all []ordeal) (names []string) {
	for _, o := range all {
		names = append(names, o.name)
	}
	return names
}

// play plays the scenarios, prints a table and returns an error where a limit was broken.
func (s *stage) play(wanted []ordeal, trials int) error {
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.SetTitle("What ordinary clients saw: worst of all trials")
	t.AppendHeader(table.Row{"scenario", "what happens", "trials", "longest wait beyond the answer", "all connected knew after", "VIP held elsewhere after", "failed", "unfinished", ""})
	var errs []error
	for _, o := range wanted {
		var worst seen
		worst.Errors = make(map[string]int)
		n, broken, err := o.play(s, trials, &worst)
		mark := "as expected"
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", o.name, err))
			mark = "NOT DONE"
		} else if broken > 0 {
			errs = append(errs, fmt.Errorf("%s: %d limits broken", o.name, broken))
			mark = "NOT as expected"
		}
		t.AppendRow(table.Row{
			o.name, o.what, n, round(worst.Longest), round(worst.Known), round(worst.takeover),
			counted(worst.Failed, worst.Errors), worst.Unfinished, mark,
		})
		if err != nil {
			break // the mesh is in no state for more
		}
	}
	fmt.Fprintf(s.out, "\n%s\n", t.Render())
	return errors.Join(errs...)
}

func (o ordeal) play(s *stage, trials int, worst *seen) (n, broken int, err error) {
	defer func() { err = errors.Join(err, s.end()) }()
	if trials == 0 {
		trials = o.trials
	}
	for n < trials {
		if err := s.WaitHealthy(ready); err != nil {
			return n, broken, err
		}
		got, err := o.try(s, n)
		if err != nil {
			return n, broken, err
		}
		n++
		fmt.Fprintf(s.out, "%s %d: %s\n", o.name, n, got)
		s.list("", got.Above)
		s.list("unexplained: ", got.Unexplained)
		for _, complaint := range o.complaints(got) {
			broken++
			fmt.Fprintf(s.out, "  LIMIT: %s\n", complaint)
		}
		worst.add(got)
	}
	return n, broken, nil
}

// list prints the first of some waits.
func (s *stage) list(label string, waits []lab.Wait) {
	for i, w := range waits {
		if i == shown {
			fmt.Fprintf(s.out, "  %sand %d more\n", label, len(waits)-shown)
			return
		}
		fmt.Fprintf(s.out, "  %s%s\n", label, w)
	}
}

// complaints says which limits were broken.
func (b bounds) complaints(got *seen) (all []string) {
	check := func(what string, limit, is time.Duration) {
		if limit > 0 && is > limit {
			all = append(all, fmt.Sprintf("%s %s, more than %s", what, round(is), limit))
		}
	}
	if len(got.Above) > 0 {
		check("a client waited", b.wait, got.Above[0].Beyond)
	}
	check("the last one that was connected knew after", b.known, got.Known)
	check("the VIP was held elsewhere after", b.takeover, got.takeover)
	return all
}

func (s *seen) add(o *seen) {
	s.Longest, s.Known, s.takeover = max(s.Longest, o.Longest), max(s.Known, o.Known), max(s.takeover, o.takeover)
	s.Number += o.Number
	s.Failed += o.Failed
	s.Unfinished += o.Unfinished
	for cause, n := range o.Errors {
		s.Errors[cause] += n
	}
}

func (s *seen) String() string {
	text := fmt.Sprintf("%s of %d failed, %d unfinished, longest wait %s", counted(s.Failed, s.Errors), s.Number, s.Unfinished, round(s.Longest))
	if s.Connected > 0 {
		text += fmt.Sprintf(", all of %d connected knew after %s", s.Connected, round(s.Known))
	}
	if s.takeover > 0 {
		text += fmt.Sprintf(", VIP held elsewhere after %s", round(s.takeover))
	}
	if s.note != "" {
		text += " (" + s.note + ")"
	}
	return text
}

// begin starts a load unless there is one, and diagnoses who hangs until end or stop.
func (s *stage) begin(c *lab.Client, o lab.Ordinary) (err error) {
	if s.run != nil {
		return nil
	}
	o.Target = s.VIP()
	if s.run, err = c.StartOrdinary(o); err != nil {
		return err
	}
	s.mu.Lock()
	s.faults = nil
	s.mu.Unlock()
	s.judged = time.Time{}
	s.quit, s.watch = make(chan struct{}), make(chan error, 1)
	go func() { s.watch <- s.diagnose() }()
	time.Sleep(warmUp)
	return nil
}

// end ends the load, if there is one.
func (s *stage) end() error {
	if s.run == nil {
		return nil
	}
	_, err := s.stop()
	return err
}

// stop ends the load and returns every sample.
func (s *stage) stop() ([]lab.Sample, error) {
	close(s.quit)
	watched := <-s.watch
	samples, err := s.run.Stop()
	s.run = nil
	return samples, errors.Join(watched, err)
}

// diagnose prints what all kernels know of clients that hang while somebody holds the VIP,
// at once, for it may be gone soon.
func (s *stage) diagnose() error {
	told := make(map[netip.AddrPort]bool)
	fault, left := 0, 0
	for {
		select {
		case <-s.quit:
			return nil
		case <-time.After(500 * time.Millisecond):
		}
		faults := s.struck()
		if len(faults) != fault {
			fault, left = len(faults), asked
		}
		if len(s.Recorder.Now()) == 0 || left == 0 {
			continue
		}
		samples, err := s.run.UnderWay()
		if err != nil {
			return err
		}
		for _, w := range lab.Judge(samples, faults, s.holder(), hanging).Above {
			// Who hangs since an earlier fault has less to tell by now.
			fresh := w.Fault == nil || w.Fault.At.Equal(faults[fault-1].At)
			if client := netip.AddrPortFrom(w.Source, w.Port); fresh && !told[client] && left > 0 {
				told[client] = true
				left--
				fmt.Fprintf(s.out, "  hangs: %s\n%s", w, indent(s.Diagnose(client)))
			}
		}
	}
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("    " + line)
	}
	return b.String()
}

// fault notes that clients may have to wait from now on; the returned function notes its
// end.
func (s *stage) fault(node string) (over func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := len(s.faults)
	s.faults = append(s.faults, lab.Fault{At: time.Now(), Until: time.Now().Add(time.Hour), Node: node})
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults[i].Until = time.Now()
	}
}

func (s *stage) struck() []lab.Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.faults)
}

// holder says who held the VIP at a time, by what is recorded up to now.
func (s *stage) holder() func(time.Time) string { return holderOf(s.Recorder) }

func holderOf(r *lab.Recorder) func(time.Time) string {
	spans := r.Between(time.Time{}, time.Now()).Spans
	return func(at time.Time) string {
		for _, span := range slices.Backward(spans) {
			if !span.From.After(at) && len(span.Holders) > 0 {
				return span.Holders[0]
			}
		}
		return ""
	}
}

// judge is what the samples of a load that has been stopped say.
func (s *stage) judge(samples []lab.Sample) *seen {
	return &seen{Waits: lab.Judge(samples, s.struck(), s.holder(), mostWait)}
}

// elsewhere is how long it took from the last fault on until another node than this one
// held the VIP; to the end, where none did.
func (s *stage) elsewhere(node string) time.Duration {
	faults := s.struck()
	from, to := faults[len(faults)-1].At, time.Now()
	for _, span := range s.Recorder.Between(from, to).Spans {
		if slices.ContainsFunc(span.Holders, func(h string) bool { return h != node }) {
			return span.From.Sub(from)
		}
	}
	return to.Sub(from)
}

// cutOwner cuts the owner off, by turns so that it notices by itself and so that it does
// not, and returns how that ends.
func (s *stage) cutOwner(turn int) (owner *lab.Node, mend func() error, err error) {
	if owner, err = s.WaitOwner(ready); err != nil {
		return nil, nil, err
	}
	cut, again := owner.Port().Cut, owner.Port().Mend
	if turn%2 == 1 {
		cut, again = owner.Port().Isolate, owner.Port().Rejoin
	}
	over := s.fault(owner.Name)
	return owner, func() error { over(); return again() }, cut()
}

// cutOnce is a power cut as the others see it, under the full load.
func (s *stage) cutOnce(trial int) (*seen, error) {
	if err := s.begin(s.Client, lab.Ordinary{Calls: 200, Connections: 100, Watches: 200}); err != nil {
		return nil, err
	}
	owner, mend, err := s.cutOwner(trial)
	if err != nil {
		return nil, err
	}
	time.Sleep(soon)
	samples, err := s.stop()
	if err := errors.Join(err, mend()); err != nil {
		return nil, err
	}
	got := s.judge(samples)
	got.takeover, got.note = s.elsewhere(owner.Name), owner.Name+" was cut"
	return got, nil
}

// cutSecond cuts an owner that took over from one that came back since. By turns it has the
// store's leader with it, and by turns the first and the second are cut in either way.
func (s *stage) cutSecond(trial int) (*seen, error) {
	_, mend, err := s.cutOwner(trial / 2)
	if err != nil {
		return nil, err
	}
	time.Sleep(s.away)
	if err := errors.Join(mend(), s.WaitHealthy(ready)); err != nil {
		return nil, err
	}
	owner, err := s.WaitOwner(ready)
	if err != nil {
		return nil, err
	}
	status, err := owner.Status()
	if err != nil {
		return nil, err
	}
	leader := status.GetStore().GetLeader()
	if trial%2 == 1 && leader != "" && leader != owner.Name { // it would be led away from the owner, in a while
		if err := ask(owner, "move-vip", "kube-api", "--to", leader, "--wait"); err != nil {
			return nil, err
		}
	}
	if owner, mend, err = s.cutOwner(trial / 4); err != nil {
		return nil, err
	}
	time.Sleep(soon)
	got := &seen{takeover: s.elsewhere(owner.Name), note: fmt.Sprintf("%s was cut, %s led the store", owner.Name, leader)}
	return got, mend()
}

// cutAgain is one of many cuts, with clients of every sort that go on from one to the next.
func (s *stage) cutAgain(trial int) (*seen, error) {
	if err := s.begin(s.Client, lab.Ordinary{Calls: 60, Connections: 30, Slow: 10, Watches: 60}); err != nil {
		return nil, err
	}
	from := time.Now()
	owner, mend, err := s.cutOwner(trial)
	if err != nil {
		return nil, err
	}
	length := 1500*time.Millisecond + time.Duration(s.rng.Int64N(int64(4500*time.Millisecond)))
	time.Sleep(length)
	if err := errors.Join(mend(), s.WaitHealthy(ready)); err != nil {
		return nil, err
	}
	time.Sleep(time.Until(from.Add(soon)))
	before, now := s.judged, time.Now()
	s.judged = now
	samples, err := s.run.UnderWay()
	if err != nil {
		return nil, err
	}
	for _, one := range s.run.Samples() {
		if one.End.After(before) && !one.End.After(now) {
			samples = append(samples, one)
		}
	}
	got := s.judge(samples)
	got.Above = slices.DeleteFunc(got.Above, func(w lab.Wait) bool {
		if w.Unfinished && w.Fault != nil && w.Fault.At.Before(before) {
			return true // is told of already, and again when it ends
		}
		// Nobody can be served while nobody holds the VIP.
		return w.Beyond-vacant(s.Recorder.Between(w.End.Add(-w.Beyond), w.End)) <= mostWait
	})
	got.takeover, got.note = s.elsewhere(owner.Name), fmt.Sprintf("%s was cut for %s", owner.Name, round(length))
	return got, nil
}

// vacant is how long nobody held the VIP, in all.
func vacant(h lab.Holding) (none time.Duration) {
	for _, span := range h.Spans {
		if len(span.Holders) == 0 {
			none += span.To.Sub(span.From)
		}
	}
	return none
}

// onOwner has programs on the owner use the VIP, which are connected from the VIP to the
// VIP, and takes it from them.
func (s *stage) onOwner(trial int) (*seen, error) {
	owner, err := s.WaitOwner(ready)
	if err != nil {
		return nil, err
	}
	client, err := owner.Client()
	if err != nil {
		return nil, err
	}
	if err := s.begin(client, lab.Ordinary{Connections: 10, Watches: 10}); err != nil {
		return nil, err
	}
	struck := time.Now()
	what, strike, mend, length := "link flap", owner.Port().Cut, owner.Port().Mend, time.Second
	if trial%2 == 1 {
		what, strike, mend, length = "agent frozen", owner.Freeze, owner.Thaw, 3*time.Second
	}
	if err := strike(); err != nil {
		return nil, err
	}
	time.Sleep(length)
	err = mend()
	time.Sleep(soon)
	samples, e := s.stop()
	if err := errors.Join(err, e); err != nil {
		return nil, err
	}
	note := what + ", the address stayed"
	for _, span := range s.Recorder.Between(struck, time.Now()).Spans {
		if !slices.Contains(span.Holders, owner.Name) {
			note = fmt.Sprintf("%s, the address left %s after %s", what, owner.Name, round(span.From.Sub(struck)))
			s.mu.Lock()
			s.faults = []lab.Fault{{At: span.From, Until: struck.Add(length), Node: owner.Name}}
			s.mu.Unlock()
			break
		}
	}
	// Connections that were made since have the node's own address.
	samples = slices.DeleteFunc(samples, func(one lab.Sample) bool { return one.Source != s.VIP().Addr() })
	got := s.judge(samples)
	got.note = note
	return got, nil
}
