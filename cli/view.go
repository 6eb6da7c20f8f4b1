package cli

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// view turns a status into text for people.
type view struct {
	now    time.Time
	wide   bool
	colour bool
}

func (v view) status(s *hameshv1.GetStatusResponse) string {
	var out strings.Builder
	fmt.Fprintf(&out, "MESH  %s   %s   %s   answered by %s\n",
		s.GetMesh(), v.state(s.GetState().String(), "STATE_"), v.store(s.GetStore()), s.GetReportedBy())
	for _, section := range []string{v.vips(s.GetVips()), v.nodes(s.GetNodes()), v.backends(s.GetBackends()), v.links(s), v.problems(s.GetProblems())} {
		if section != "" {
			out.WriteString("\n" + section + "\n")
		}
	}
	return out.String()
}

func (v view) store(s *hameshv1.Store) string {
	if !s.GetAvailable() {
		return fmt.Sprintf("store %s %s", s.GetKind(), v.paint("UNAVAILABLE", text.FgRed))
	}
	return fmt.Sprintf("store %s, led by %s, members %d", s.GetKind(), cmp.Or(s.GetLeader(), "nobody"), len(s.GetMembers()))
}

func (v view) vips(vips []*hameshv1.Vip) string {
	rows := newRows("VIP", "ADDRESS", "OWNER", "HOLDERS", "RIGHT", "EPOCH", "SINCE").extend(v.wide, "TRANSITIONS").extend(true, "REASON")
	for _, vip := range vips {
		owner := vip.GetOwner()
		if owner == "" {
			owner = v.paint("nobody", text.FgRed)
		}
		right := ""
		if vip.Right != nil {
			right = word(vip.GetRight().String(), "RIGHT_")
		}
		rows.add(vip.GetName(), vip.GetAddress(), owner, strings.Join(vip.GetHolders(), ","), right,
			fmt.Sprint(vip.GetEpoch()), v.since(vip)).extend(v.wide, fmt.Sprint(vip.GetTransitions())).extend(true, vip.GetReason())
	}
	return rows.render()
}

func (v view) nodes(nodes []*hameshv1.Node) string {
	rows := newRows("NODE", "ADDRESS", "ROLE", "STATE", "ELIGIBLE").extend(v.wide, "VERSION", "KEPT CONNECTIONS").extend(true, "REASON")
	for _, node := range nodes {
		eligible := "no"
		if node.GetEligible() {
			eligible = "yes"
		}
		rows.add(node.GetName(), node.GetAddress(), word(node.GetRole().String(), "ROLE_"),
			v.state(node.GetState().String(), "NODE_STATE_"), eligible).extend(v.wide, node.GetVersion(), fmt.Sprint(node.GetKeptConnections())).extend(true, node.GetReason())
	}
	return rows.render()
}

func (v view) backends(backends []*hameshv1.Backend) string {
	rows := newRows("BACKEND", "PROXY", "ADDRESS", "STATE", "CONNECTIONS", "SEEN UP BY").extend(v.wide, "NODE").extend(true, "REASON")
	for _, backend := range backends {
		rows.add(backend.GetName(), backend.GetProxy(), backend.GetAddress(),
			v.backendState(backend), fmt.Sprint(backend.GetConnections()),
			strings.Join(backend.GetSeenUpBy(), ",")).extend(v.wide, backend.GetNode()).extend(true, backend.GetReason())
	}
	return rows.render()
}

// links is who hears whom: a row for each member that listens, a column for each that speaks.
func (v view) links(s *hameshv1.GetStatusResponse) string {
	if !v.wide || len(s.GetLinks()) == 0 {
		return ""
	}
	heard := map[[2]string]string{}
	for _, l := range s.GetLinks() {
		heard[[2]string{l.GetFrom(), l.GetTo()}] = v.link(l)
	}
	rows := newRows("HEARS")
	for _, from := range s.GetNodes() {
		rows.extend(true, from.GetName())
	}
	for _, to := range s.GetNodes() {
		rows.add(to.GetName())
		for _, from := range s.GetNodes() {
			cell := heard[[2]string{from.GetName(), to.GetName()}]
			if cell == "" && from != to {
				cell = "?" // nobody says
			}
			rows.extend(true, cell)
		}
	}
	return rows.render()
}

// link is how long ago one member was heard by another one.
func (v view) link(l *hameshv1.Link) string {
	ago := "never"
	if d := l.GetHeard().AsDuration(); l.GetHeard() != nil && d < time.Minute {
		ago = d.Round(10*time.Millisecond).String() + " ago"
	} else if l.GetHeard() != nil {
		ago = age(d) + " ago"
	}
	switch {
	case l.GetLost():
		return v.paint("LOST, "+ago, text.FgRed)
	case l.GetUnconnected():
		return v.paint("ONE WAY, "+ago, text.FgYellow)
	}
	return ago
}

// backendState is a backend's state; one that only is not ready keeps its connections, and is
// not told to be down.
func (v view) backendState(b *hameshv1.Backend) string {
	if b.GetState() == hameshv1.BackendState_BACKEND_STATE_DOWN && b.GetNotReady() {
		return v.state("NOT_READY", "")
	}
	return v.state(b.GetState().String(), "BACKEND_STATE_")
}

func (v view) problems(problems []*hameshv1.Problem) string {
	if len(problems) == 0 {
		return ""
	}
	lines := []string{"PROBLEMS"}
	for _, problem := range problems {
		lines = append(lines, fmt.Sprintf("  %s: %s", v.paint(problem.GetCode(), text.FgYellow), problem.GetMessage()),
			"    fix: "+problem.GetFix())
	}
	return strings.Join(lines, "\n")
}

func (v view) since(vip *hameshv1.Vip) string {
	switch {
	case vip.GetSince() == nil:
		return ""
	case v.wide:
		return vip.GetSince().AsTime().Format(time.RFC3339)
	}
	return age(v.now.Sub(vip.GetSince().AsTime()))
}

// age prints d with two units at most, as people say it: 12s, 3m5s, 7h2m, 3d4h.
func age(d time.Duration) string {
	days, hours, minutes, seconds := int(d.Hours())/24, int(d.Hours())%24, int(d.Minutes())%60, int(d.Seconds())%60
	switch {
	case d < 0:
		return "0s" // the agent's clock is ahead
	case d < time.Minute:
		return fmt.Sprintf("%ds", seconds)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", minutes, seconds)
	case days == 0:
		return fmt.Sprintf("%dh%dm", hours, minutes)
	}
	return fmt.Sprintf("%dd%dh", days, hours)
}

// word turns the name of an enum value into the word that people use.
func word(name, prefix string) string { return strings.ToLower(strings.TrimPrefix(name, prefix)) }

// state is a word to be noticed: in capitals, and coloured by what it means.
func (v view) state(name, prefix string) string {
	name = strings.TrimPrefix(name, prefix)
	switch name {
	case "HEALTHY", "READY", "UP":
		return v.paint(name, text.FgGreen)
	case "DOWN":
		return v.paint(name, text.FgRed)
	}
	return v.paint(name, text.FgYellow)
}

func (v view) paint(s string, colour text.Color) string {
	if !v.colour {
		return s
	}
	return colour.Sprint(s)
}

// rows are a table without borders; the first row is its header.
type rows [][]string

func newRows(header ...string) *rows { return &rows{header} }

func (r *rows) add(cells ...string) *rows {
	*r = append(*r, cells)
	return r
}

// extend adds cells to the last row where they are wanted.
func (r *rows) extend(wanted bool, cells ...string) *rows {
	if wanted {
		last := len(*r) - 1
		(*r)[last] = append((*r)[last], cells...)
	}
	return r
}

// render returns the table, or nothing where it has no row but the header.
func (r *rows) render() string {
	if len(*r) == 1 {
		return ""
	}
	t := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "   "
	t.SetStyle(style)
	t.SuppressTrailingSpaces()
	for _, cells := range *r {
		row := table.Row{}
		for _, cell := range cells {
			row = append(row, cmp.Or(cell, "-"))
		}
		t.AppendRow(row)
	}
	return t.Render()
}
