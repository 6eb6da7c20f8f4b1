package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/text"
	"sigs.k8s.io/yaml"
)

// drillReport is what hactl drill prints as JSON and YAML. The names are stable; what is
// added later has new ones. Times are milliseconds. Causes of failures are refused, reset,
// closed, timedOut, unreachable and other.
type drillReport struct {
	Mesh    string `json:"mesh"`
	VIP     string `json:"vip"`
	Address string `json:"address"` // where clients connect: the VIP and a port
	// Kind is "move" (planned) or "crash".
	Kind string `json:"kind"`
	// Speaks is "https", where each new connection got an answer to GET /readyz, or "tcp",
	// where connecting was all.
	Speaks string `json:"speaks"`
	// MeasuredOn is the candidate on which hactl ran; left out: on none. Their own connections
	// do not outlive moves, so that nothing is judged by them then.
	MeasuredOn string       `json:"measuredOn,omitempty"`
	StartedAt  time.Time    `json:"startedAt"`
	Rate       int          `json:"rate"` // new connections per second
	Phases     []drillPhase `json:"phases"`
	Summary    drillSummary `json:"summary"`
	// Verdict is "passed", or "failed": a planned move failed connections, ordinary requests
	// included, broke streams, or made an ordinary client wait more than 2 s; or the drill did
	// not come to its end.
	Verdict string `json:"verdict"`
	Reason  string `json:"reason"` // of the verdict, for people
}

// drillPhase is one change of the owner, from just before the order until well after.
type drillPhase struct {
	// Kind is "move", "crash", or "return": the last move, to where the VIP was before.
	Kind  string `json:"kind"`
	From  string `json:"from"`
	To    string `json:"to"`
	Epoch int64  `json:"epoch"`
	// MoveMs is the time of the move as the agent says, from the order until the new owner
	// has announced the address; left out of a crash.
	MoveMs *float64 `json:"moveMs,omitempty"`
	// HealthyMs is the time from the order until the agent that crashed was back and the
	// mesh healthy; left out of planned moves.
	HealthyMs *float64 `json:"healthyMs,omitempty"`
	// GapMs is the longest time in which no new connection was answered. Without any fault
	// it is the time between two of them, 10 at the default rate, and what answering takes.
	GapMs       float64        `json:"gapMs"`
	Connections int            `json:"connections"` // new ones, failed ones included
	Failed      int            `json:"failed"`
	Failures    map[string]int `json:"failures"` // by cause
	SlowestMs   float64        `json:"slowestMs"`
	Streams     int            `json:"streams"` // established before the change
	Broken      int            `json:"broken"`
	Breaks      map[string]int `json:"breaks"` // by cause
	// SilenceMs is the longest time in which a stream that speaks, every 200, got no answer.
	SilenceMs float64 `json:"silenceMs"`
	// Ordinary is of the requests under way in the phase, and in none before it.
	Ordinary ordinaryReport `json:"ordinary"`

	from, to time.Time
}

// ordinaryReport is what ordinary clients saw: they dial for 30 s, wait for an answer as long
// as TCP does, and never try a request again.
type ordinaryReport struct {
	OneShot ordinaryWaits `json:"oneShot"` // a new connection each, 10 per second
	// Kept is one request after the other on 5 connections; none where only TCP is spoken. One
	// that breaks between two requests is no failure: the next request opens another.
	Kept ordinaryWaits `json:"kept"`
}

func (r *ordinaryReport) add(q request) {
	if q.kept {
		r.Kept.add(q)
	} else {
		r.OneShot.add(q)
	}
}

func (r *ordinaryReport) failed() int { return r.OneShot.Failed + r.Kept.Failed }
func (r *ordinaryReport) waited() int { return r.OneShot.Waited + r.Kept.Waited }

type ordinaryWaits struct {
	Requests int            `json:"requests"` // failed and unfinished ones included
	Failed   int            `json:"failed"`
	Failures map[string]int `json:"failures"` // by cause
	// LongestMs is the longest time until an answer or an error, or to the end.
	LongestMs  float64 `json:"longestMs"`
	Waited     int     `json:"waited"`     // more than 2 s, failed and unfinished ones included
	Unfinished int     `json:"unfinished"` // still without answer or error 3 s after the drill
}

func (w *ordinaryWaits) add(q request) {
	w.Requests++
	if q.cause != "" {
		w.Failed++
		w.Failures[q.cause]++
	}
	took := q.ended.Sub(q.begun)
	w.LongestMs = max(w.LongestMs, ms(took))
	if took > patience {
		w.Waited++
	}
	if q.unfinished {
		w.Unfinished++
	}
}

func newOrdinaryReport() ordinaryReport {
	return ordinaryReport{OneShot: ordinaryWaits{Failures: map[string]int{}}, Kept: ordinaryWaits{Failures: map[string]int{}}}
}

// began says whether the connection began in the phase.
func (p drillPhase) began(k knock) bool { return !k.begun.Before(p.from) && k.begun.Before(p.to) }

// drillSummary is over all phases but the return, except for the counts, which are over all.
type drillSummary struct {
	Repetitions int        `json:"repetitions"`
	MoveMs      *quantiles `json:"moveMs,omitempty"`
	HealthyMs   *quantiles `json:"healthyMs,omitempty"`
	GapMs       *quantiles `json:"gapMs,omitempty"`
	Connections int        `json:"connections"`
	Failed      int        `json:"failed"`
	Streams     int        `json:"streams"`
	Broken      int        `json:"broken"`
	// FailedOutside counts new connections that failed while nothing moved: before the first
	// phase, between two, or after the last.
	FailedOutside int `json:"failedOutside"`
	// Late counts connections that were left out, because too many were under way.
	Late int `json:"late"`
	// Ordinary is over the whole drill, also while nothing moved; its last two fields are as
	// FailedOutside and Late.
	Ordinary ordinarySummary `json:"ordinary"`
}

type ordinarySummary struct {
	ordinaryReport
	FailedOutside int `json:"failedOutside"`
	Late          int `json:"late"`
}

// quantiles are of the nearest rank: each is one of the values.
type quantiles struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	P95    float64 `json:"p95"`
	Max    float64 `json:"max"`
}

func quantilesOf(values []float64) *quantiles {
	if len(values) == 0 {
		return nil
	}
	slices.Sort(values)
	rank := func(percent int) float64 { return values[(len(values)*percent+99)/100-1] }
	return &quantiles{Min: values[0], Median: rank(50), P95: rank(95), Max: values[len(values)-1]}
}

func ms(d time.Duration) float64 {
	return float64(d.Round(10*time.Microsecond)) / float64(time.Millisecond)
}

// count adds to each phase what became of the connections that began in it.
func (r *drillReport) count(knocks []knock) {
	slices.SortFunc(knocks, func(a, b knock) int { return a.ended.Compare(b.ended) })
	for _, k := range knocks {
		if k.cause != "" && !slices.ContainsFunc(r.Phases, func(p drillPhase) bool { return p.began(k) }) {
			r.Summary.FailedOutside++
		}
	}
	for i := range r.Phases {
		p := &r.Phases[i]
		p.Failures = map[string]int{}
		answered, gap, slowest := p.from, time.Duration(0), time.Duration(0)
		for _, k := range knocks {
			if k.cause == "" && k.ended.Before(p.to) {
				if k.ended.After(p.from) {
					gap = max(gap, k.ended.Sub(answered))
				}
				answered = k.ended
			}
			if !p.began(k) {
				continue
			}
			p.Connections++
			slowest = max(slowest, k.ended.Sub(k.begun))
			if k.cause != "" {
				p.Failed++
				p.Failures[k.cause]++
			}
		}
		p.GapMs, p.SlowestMs = ms(max(gap, p.to.Sub(answered))), ms(slowest)
	}
}

// countOrdinary adds each request to the phase that it met first, and to the summary.
func (r *drillReport) countOrdinary(requests []request, late int) {
	all := &r.Summary.Ordinary
	all.ordinaryReport, all.Late = newOrdinaryReport(), late
	for i := range r.Phases {
		r.Phases[i].Ordinary = newOrdinaryReport()
	}
	for _, q := range requests {
		all.add(q)
		// Not where it began: what waits when the order is given waits because of it.
		met := slices.IndexFunc(r.Phases, func(p drillPhase) bool { return q.begun.Before(p.to) && q.ended.After(p.from) })
		switch {
		case met >= 0:
			r.Phases[met].Ordinary.add(q)
		case q.cause != "":
			all.FailedOutside++
		}
	}
}

// conclude makes summary and verdict; wrong is why the drill did not come to its end.
func (r *drillReport) conclude(wrong error) {
	var moves, healthy, gaps []float64
	promised, waited := 0, 0 // what broke though planned moves break nothing, and who waited
	for _, p := range r.Phases {
		s := &r.Summary
		s.Connections, s.Failed, s.Streams, s.Broken = s.Connections+p.Connections, s.Failed+p.Failed, s.Streams+p.Streams, s.Broken+p.Broken
		if p.Kind != "crash" {
			promised += p.Failed + p.Broken + p.Ordinary.failed()
			waited += p.Ordinary.waited()
		}
		if p.Kind == "return" {
			continue
		}
		s.Repetitions++
		gaps = append(gaps, p.GapMs)
		if p.MoveMs != nil {
			moves = append(moves, *p.MoveMs)
		}
		if p.HealthyMs != nil {
			healthy = append(healthy, *p.HealthyMs)
		}
	}
	r.Summary.MoveMs, r.Summary.HealthyMs, r.Summary.GapMs = quantilesOf(moves), quantilesOf(healthy), quantilesOf(gaps)
	r.Verdict = "passed"
	switch {
	case wrong != nil:
		r.Verdict, r.Reason = "failed", wrong.Error()
	case promised > 0 && r.MeasuredOn == "":
		r.Verdict, r.Reason = "failed", fmt.Sprintf("planned moves failed or broke %d connections", promised)
		if waited > 0 {
			r.Reason += fmt.Sprintf(", and made %d ordinary requests wait more than %s", waited, patience)
		}
	case waited > 0 && r.MeasuredOn == "":
		r.Verdict, r.Reason = "failed", fmt.Sprintf("planned moves made %d ordinary requests wait more than %s", waited, patience)
	case r.MeasuredOn != "":
		r.Reason = "measured on " + r.MeasuredOn + ", a candidate, whose own connections do not outlive moves: run it on another machine"
	case r.Kind == "crash":
		r.Reason = "every agent came back, and the mesh is healthy"
	default:
		r.Reason = "no connection failed, no stream broke"
	}
}

// drill prints the report as text for people.
func (v view) drill(r *drillReport) string {
	var out strings.Builder
	fmt.Fprintf(&out, "DRILL  %s at %s   %d new %s connections/s, %d streams\n\n", r.VIP, r.Address, r.Rate, r.Speaks, drillStreams)
	crash := r.Kind == "crash"
	phases := newRows("PHASE", "FROM", "TO", "MOVE").extend(crash, "HEALTHY AFTER").
		extend(true, "LONGEST GAP", "CONNECTIONS", "FAILED", "STREAMS", "BROKEN").
		extend(v.wide, "EPOCH", "FAILURES", "SLOWEST", "BREAKS", "LONGEST SILENCE")
	for i, p := range r.Phases {
		phases.add(fmt.Sprintf("%d %s", i+1, p.Kind), p.From, p.To, span(p.MoveMs)).extend(crash, span(p.HealthyMs)).
			extend(true, span(&p.GapMs), fmt.Sprint(p.Connections), v.bad(p.Failed), fmt.Sprint(p.Streams), v.bad(p.Broken)).
			extend(v.wide, fmt.Sprint(p.Epoch), counts(p.Failures), span(&p.SlowestMs), counts(p.Breaks), span(&p.SilenceMs))
	}
	if len(r.Phases) > 0 {
		out.WriteString(phases.render() + "\n\n")
	}
	if r.Summary.Repetitions > 1 {
		rows := newRows(fmt.Sprintf("OF %d", r.Summary.Repetitions), "MIN", "MEDIAN", "P95", "MAX")
		for _, s := range []struct {
			name string
			q    *quantiles
		}{{"move", r.Summary.MoveMs}, {"healthy after", r.Summary.HealthyMs}, {"longest gap", r.Summary.GapMs}} {
			if s.q != nil {
				rows.add(s.name, span(&s.q.Min), span(&s.q.Median), span(&s.q.P95), span(&s.q.Max))
			}
		}
		out.WriteString(rows.render() + "\n\n")
	}
	out.WriteString(v.ordinary(r) + "\n\n")
	if n := r.Summary.Ordinary.waited(); n > 0 {
		fmt.Fprintf(&out, "%s ordinary requests waited more than %s", v.bad(n), patience)
		if n := r.Summary.Ordinary.OneShot.Unfinished + r.Summary.Ordinary.Kept.Unfinished; n > 0 {
			fmt.Fprintf(&out, ", %s of them still at the end", v.bad(n))
		}
		out.WriteString("\n")
	}
	if n := r.Summary.FailedOutside + r.Summary.Ordinary.FailedOutside; n > 0 {
		fmt.Fprintf(&out, "%s connections failed while nothing moved: see hactl doctor\n", v.bad(n))
	}
	colour := text.FgGreen
	if r.Verdict != "passed" {
		colour = text.FgRed
	}
	fmt.Fprintf(&out, "%s: %s\n", v.paint(r.Verdict, colour), r.Reason)
	return out.String()
}

// ordinary prints what ordinary clients saw in the whole drill, and with -o wide in each phase.
func (v view) ordinary(r *drillReport) string {
	waits := newRows().extend(v.wide, "PHASE").
		extend(true, "ORDINARY CLIENTS", "REQUESTS", "FAILED", "FAILURES", "LONGEST WAIT", "OVER "+strings.ToUpper(patience.String()), "UNFINISHED")
	add := func(phase string, o *ordinaryReport) {
		row := func(name string, w *ordinaryWaits) {
			waits.add().extend(v.wide, phase).
				extend(true, name, fmt.Sprint(w.Requests), v.bad(w.Failed), counts(w.Failures), span(&w.LongestMs), v.bad(w.Waited), v.bad(w.Unfinished))
		}
		row(fmt.Sprintf("one-shot, %d/s", ordinaryRate), &o.OneShot)
		if r.Speaks == "https" {
			row(fmt.Sprintf("%d kept connections", ordinaryKept), &o.Kept)
		}
	}
	if v.wide {
		for i := range r.Phases {
			add(fmt.Sprintf("%d %s", i+1, r.Phases[i].Kind), &r.Phases[i].Ordinary)
		}
	}
	add("whole drill", &r.Summary.Ordinary.ordinaryReport)
	return waits.render()
}

// bad is a number that should be 0.
func (v view) bad(n int) string {
	if n == 0 {
		return "0"
	}
	return v.paint(fmt.Sprint(n), text.FgRed)
}

// span prints milliseconds; nil: they were not measured.
func span(ms *float64) string {
	if ms == nil {
		return ""
	}
	d := time.Duration(*ms * float64(time.Millisecond))
	if d >= time.Second {
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

func counts(of map[string]int) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(of)) {
		all = append(all, fmt.Sprintf("%s %d", name, of[name]))
	}
	return strings.Join(all, ", ")
}

// plain prints what is no message of an agent as JSON or YAML, and says false where
// neither is wanted.
func (c *command) plain(value any) (bool, error) {
	if c.output != "json" && c.output != "yaml" {
		return false, nil
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	err := encoder.Encode(value)
	text := out.Bytes()
	if err == nil && c.output == "yaml" {
		text, err = yaml.JSONToYAML(text)
	}
	if err != nil {
		return true, &failure{status: exitFailed, what: "encoding the report: " + err.Error()}
	}
	return true, c.print(string(text))
}
