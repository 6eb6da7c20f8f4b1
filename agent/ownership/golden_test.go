package ownership

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite testdata/*.txt")

// TestConversations runs every script in testdata and compares what the simulated world
// says with the indented lines beneath each command.
func TestConversations(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got, err := runScript(string(want), 1, 0)
			if err != nil {
				t.Errorf("%v\n%s", err, got)
			}
			if *update && err == nil {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(want) {
				t.Errorf("the conversation differs (rewrite it with -update):\n%s", got)
			}
		})
	}
}

// script runs a world by commands, one a line:
//
//	members N [external] [fast] [probe] [preempt] [preferred=cp-1] [witness=cp-3]
//	stranger here|gone (somebody outside the mesh has the address)
//	start all|cp-1         restart cp-1           shutdown cp-1
//	power-cut cp-1         kill cp-1              kill-both cp-1 (the guard too)
//	eligible cp-1          ineligible cp-1        stall cp-1 500ms
//	cut cp-1 cp-2          cut cp-1 -> cp-2       isolate cp-1
//	lag cp-1 -> cp-2 80ms  join cp-1 cp-2         mend (all links)
//	store down|up          store cut|mend cp-1    store expire cp-1 (its lease)
//	store slow cp-1 20ms   store late cp-1 1s (its writes)
//	store lose|drop 0.5    store starve cp-1 (of keep-alives)
//	kernel 20ms (at most, to put on or off)
//	move cp-2              run 500ms              run 100ms..200ms (anything between)
//	expect holder cp-1     expect nobody|somebody
//	expect excepted (a right by majority and one by an external store at once)
//
// Empty lines and those that begin with # are comments; indented lines are what the
// world says.
type script struct {
	w    *world
	rng  *rand.Rand // for durations that are ranges
	seed uint64
	out  strings.Builder
}

// runScript returns the script with the conversation of the given seed.
func runScript(text string, seed uint64, faults faultSet) (string, error) {
	s := &script{seed: seed, rng: rand.New(rand.NewPCG(seed, 3))}
	for number, command := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if strings.HasPrefix(command, " ") {
			continue
		}
		fmt.Fprintln(&s.out, command)
		fields := strings.Fields(command)
		if len(fields) == 0 || fields[0] == "#" {
			continue
		}
		err := s.do(fields)
		if s.w != nil {
			s.w.faults = faults
			s.out.WriteString(s.w.conversation())
			s.w.log = nil
			if err == nil && s.w.failed != "" {
				err = fmt.Errorf("%s", s.w.failed)
			}
		}
		if err != nil {
			return s.out.String(), fmt.Errorf("line %d, %q: %w", number+1, command, err)
		}
	}
	return s.out.String(), nil
}

func (s *script) do(fields []string) error {
	verb, args := fields[0], slices.DeleteFunc(slices.Clone(fields[1:]), func(f string) bool { return f == "->" })
	oneWay := slices.Contains(fields, "->")
	var err error
	duration := func(text string) (d time.Duration) {
		from, to, ranged := strings.Cut(text, "..")
		if d, err = time.ParseDuration(from); err == nil && ranged {
			var end time.Duration
			end, err = time.ParseDuration(to)
			d += time.Duration(s.rng.Int64N(int64(max(1, end-d))))
		}
		return d
	}
	number := func(text string) (f float64) {
		f, err = strconv.ParseFloat(text, 64)
		return f
	}
	w := s.w
	member := func(i int) *node {
		if i < len(args) {
			for _, n := range w.nodes {
				if n.name == args[i] {
					return n
				}
			}
		}
		err = fmt.Errorf("no such member")
		return w.nodes[0]
	}
	cut := func(from, to *node) { w.cut[[2]int{from.id, to.id}] = true }
	what := verb
	if (verb == "store" || verb == "expect") && len(args) > 0 {
		what, args = verb+" "+args[0], args[1:]
	}
	if len(args) == 0 && !slices.Contains([]string{"mend", "store down", "store up", "expect nobody", "expect somebody", "expect excepted"}, what) {
		return fmt.Errorf("incomplete")
	}
	switch what {
	case "members":
		return s.members(args)
	case "start":
		if args[0] == "all" {
			w.startAll()
		} else {
			member(0).start()
		}
	case "restart":
		member(0).kill()
		member(0).start()
	case "shutdown":
		member(0).deliver(Shutdown{})
	case "power-cut":
		member(0).powerCut()
	case "kill":
		member(0).kill()
	case "kill-both":
		member(0).killBoth()
	case "eligible", "ineligible":
		n := member(0)
		n.elig = what == "eligible"
		n.deliver(Eligibility{Eligible: n.elig})
	case "stall":
		member(0).stalled = w.now + duration(args[1])
	case "cut":
		cut(member(0), member(1))
		if !oneWay {
			cut(member(1), member(0))
		}
	case "isolate":
		for _, n := range w.nodes {
			cut(n, member(0))
			cut(member(0), n)
		}
	case "lag":
		w.lag[[2]int{member(0).id, member(1).id}] = duration(args[2])
	case "join":
		for _, link := range [][2]int{{member(0).id, member(1).id}, {member(1).id, member(0).id}} {
			delete(w.cut, link)
			delete(w.lag, link)
		}
	case "stranger":
		w.stranger = map[string]string{"here": "02:00:00:00:00:99"}[args[0]]
	case "mend":
		clear(w.cut)
		clear(w.lag)
	case "store down", "store up":
		w.store.up = what == "store up"
	case "store cut", "store mend":
		member(0).storeCut = what == "store cut"
	case "store expire":
		delete(w.store.leases, member(0).lease)
		r := w.store.keys["api"]
		r.Gone = r.Gone || r.Owner == args[0]
		w.store.keys["api"] = r
	case "store slow":
		member(0).slow = duration(args[1])
	case "store starve":
		member(0).starved = true
	case "kernel":
		w.kernel = duration(args[0])
	case "store late":
		member(0).late = duration(args[1])
	case "store lose":
		w.store.lose = number(args[0])
	case "store drop":
		w.store.drop = number(args[0])
	case "move":
		w.order(args[0])
	case "run":
		w.run(w.now + duration(args[0]))
	case "expect holder":
		name := "nobody"
		if n := w.holder(); n != nil {
			name = n.name
		}
		if name != args[0] {
			return fmt.Errorf("it is %s", name)
		}
	case "expect excepted":
		if w.excepted == 0 {
			return fmt.Errorf("there was never a second right by store")
		}
	case "expect somebody":
		if w.holder() == nil {
			return fmt.Errorf("it is nobody")
		}
	case "expect nobody":
		if n := w.holder(); n != nil {
			return fmt.Errorf("it is %s", n.name)
		}
	default:
		return fmt.Errorf("unknown command")
	}
	return err
}

func (s *script) members(args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 {
		return fmt.Errorf("how many members?")
	}
	timing, external := defaultTiming, slices.Contains(args, "external")
	if slices.Contains(args, "fast") {
		timing = fastTiming
	}
	s.w = newWorld(s.seed, n, external, timing)
	s.w.keep = true
	for _, arg := range args[1:] {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "external", "fast":
		case "probe":
			s.w.cfg.Probe = true
		case "preempt":
			s.w.cfg.VIPs[0].Preempt = true
		case "preferred":
			s.w.cfg.VIPs[0].Preferred = strings.Split(value, ",")
		case "witness":
			for i := range s.w.cfg.Members {
				s.w.cfg.Members[i].Witness = s.w.cfg.Members[i].Witness || s.w.cfg.Members[i].Name == value
			}
		default:
			return fmt.Errorf("unknown word %q", arg)
		}
	}
	return nil
}
