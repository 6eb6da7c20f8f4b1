//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
)

// benchmark is everything that was measured.
type benchmark struct {
	Began time.Time
	Took  time.Duration
	Rate  float64 // connections a second at which latencies of new connections were taken
	Most  int     // connections at once
	Turns []played
}

// played is one rival's turn.
type played struct {
	Run      int
	Rival    string
	Readings sheet
}

// values are one figure of one rival, in the order of the runs.
func (b *benchmark) values(rival, name string, over int) (all []float64) {
	for _, t := range b.Turns {
		for _, r := range t.Readings {
			if t.Rival == rival && r.Name == name && r.Over == over {
				all = append(all, r.Value)
			}
		}
	}
	return all
}

// figures are what was measured, in order and once each; growth ones are those that were
// measured over several numbers of connections.
func (b *benchmark) figures(growth bool) (all []reading) {
	for _, rival := range slices.Backward(rivals) { // the last one has them all
		for _, t := range b.Turns {
			for _, r := range t.Readings {
				if t.Rival == rival.name && (r.Over > 0) == growth && !slices.ContainsFunc(all, func(have reading) bool {
					return have.Name == r.Name
				}) {
					all = append(all, r)
				}
			}
		}
	}
	return all
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// digits writes a number with three significant digits, and all of those before the point.
func digits(v float64) string {
	switch size := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case size >= 100 || v == math.Trunc(v):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case size >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	default:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
}

// spread is a median with the least and the greatest value.
func spread(values []float64) string {
	if len(values) < 2 || slices.Min(values) == slices.Max(values) {
		return digits(median(values))
	}
	return fmt.Sprintf("%s (%s to %s)", digits(median(values)), digits(slices.Min(values)), digits(slices.Max(values)))
}

// ratio is that of two medians, where both say something.
func ratio(a, b []float64) string {
	if x, y := median(a), median(b); x > 0 && y > 0 {
		return strconv.FormatFloat(x/y, 'f', 2, 64)
	}
	return "–"
}

func unit(r reading) string {
	if r.Unit == "" {
		return r.Name
	}
	return r.Name + ", " + r.Unit
}

func (b *benchmark) main() table.Writer {
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	t.AppendHeader(table.Row{"figure", direct, haproxyName, haproxyForced, hameshRelayed, "hamesh ÷ HAProxy", "hamesh ÷ direct"})
	for _, f := range b.figures(false) {
		none, other, ours := b.values(direct, f.Name, 0), b.values(haproxyName, f.Name, 0), b.values(hameshRelayed, f.Name, 0)
		t.AppendRow(table.Row{unit(f), spread(none), spread(other), spread(b.values(haproxyForced, f.Name, 0)), spread(ours), ratio(ours, other), ratio(ours, none)})
	}
	return t
}

func (b *benchmark) growth() table.Writer {
	t := table.NewWriter()
	t.SetStyle(table.StyleLight)
	header := table.Row{"figure", "who"}
	for _, n := range growing(b.Most) {
		header = append(header, fmt.Sprintf("over %d", n))
	}
	t.AppendHeader(header)
	for _, f := range b.figures(true) {
		for _, v := range rivals {
			if len(b.values(v.name, f.Name, 1)) == 0 {
				continue
			}
			row := table.Row{unit(f), v.name}
			for _, n := range growing(b.Most) {
				row = append(row, digits(median(b.values(v.name, f.Name, n))))
			}
			t.AppendRow(row)
		}
	}
	return t
}

func (b *benchmark) about() string {
	runs := 0
	for _, t := range b.Turns {
		runs = max(runs, t.Run)
	}
	quiet := "."
	if busy := max(median(b.values(haproxyName, strangers, 0)), median(b.values(hameshRelayed, strangers, 0))); busy > 10 {
		quiet = fmt.Sprintf("; **but so do others, with %.0f %% of one processor**.", busy)
	}
	return fmt.Sprintf("Medians of %d runs (least to greatest) of %s, in which all took turns: without a proxy, HAProxy (mode tcp, nbthread 2, splice-auto, balance source; for streams also told to splice all), "+
		"hameshd (the only member of its mesh, etcd and all). Client, proxy and three backends are in network namespaces of one machine (%d processors %s, Linux %s) and share its processors%s "+
		"TCP has the congestion control cubic. What a proxy sends, it also carries through its peer's kernel. %d client addresses. Connections: %d at once, each with one request of 64 bytes and its answer, in %d slices a run by turns. "+
		"Latency of a new connection: %.0f due a second at random instants, half of what HAProxy can do, counted from when it was due. Streams: %d at once. "+
		"Requests over established connections: %d due a second over all of them.",
		runs, b.Took.Round(time.Second), runtime.NumCPU(), processor(), kernelRelease(), quiet, benchMany, benchSlots, benchSlices, b.Rate, benchBulk, benchAskRate)
}

func (b *benchmark) text() string {
	return b.about() + "\n" + b.main().Render() + "\n" + b.growth().Render()
}

func (b *benchmark) writeMarkdown(file string) error {
	text := fmt.Sprintf("# The relay, measured\n\nMade by `make bench` on %s.\n%s\n\n%s\n\n## With more and more connections\n\n%s\n",
		b.Began.Format(time.DateOnly), b.about(), b.main().RenderMarkdown(), b.growth().RenderMarkdown())
	return os.WriteFile(file, []byte(text), 0o644)
}

func (b *benchmark) writeJSON(file string) error {
	text, err := json.MarshalIndent(b, "", " ")
	if err != nil {
		return fmt.Errorf("encode the benchmark: %w", err)
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
