package cli

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// doctorReport is what hactl doctor prints as JSON and YAML. The names are stable; what is
// added later has new ones.
type doctorReport struct {
	Mesh       string `json:"mesh"`
	ReportedBy string `json:"reportedBy"` // the member that answered
	// RanOn is the member on which hactl ran; left out: on none, so that no machine was
	// looked at.
	RanOn    string    `json:"ranOn,omitempty"`
	Findings []finding `json:"findings"`
	Checks   []checked `json:"checks"`
}

// finding is one misconfiguration, or one problem of the mesh.
type finding struct {
	Code  string `json:"code"`           // stable, in UPPER_SNAKE_CASE
	Node  string `json:"node,omitempty"` // the member that it is about; left out: none alone
	Found string `json:"found"`
	Why   string `json:"why"` // it matters
	Fix   string `json:"fix"`
}

// checked is what became of one check.
type checked struct {
	Name    string `json:"name"`
	Result  string `json:"result"`            // "well", "found" or "incomplete"
	Missing string `json:"missing,omitempty"` // what could not be looked at, and why
}

// doctor looks for what is wrong with a mesh.
type doctor struct {
	*command
	status *hameshv1.GetStatusResponse
	self   string // the member on which this process runs; empty: none
	root   fs.FS  // of the machine
}

// check looks at one thing. Its error is why it could not look at everything; what it
// found all the same counts.
type check struct {
	name string
	look func(context.Context) ([]finding, error)
}

func (c *command) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Find the well-known misconfigurations, each with its fix",
		Long: `Find the well-known misconfigurations, each with its fix: of the mesh, of what can be
reached from here, and where it runs on a member, of that machine. Run it as root on every
node to see all. Nothing is changed. Exits with 3 where something was found.

-o wide lists every check, and what could not be looked at.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return (&doctor{command: c, root: os.DirFS("/")}).do(cmd.Context())
		},
	}
}

func (d *doctor) do(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	d.status, err = hameshv1.NewStatusServiceClient(conn).GetStatus(ctx, &hameshv1.GetStatusRequest{})
	if err != nil {
		return d.callFailure(ctx, err)
	}
	d.self = thisMember(d.status)
	report := d.examine(ctx)
	if done, err := d.plain(report); err != nil {
		return err
	} else if !done {
		v := view{now: d.now(), wide: d.output == "wide", colour: isTerminal(d.out) && os.Getenv("NO_COLOR") == ""}
		if err := d.print(v.doctor(report)); err != nil {
			return err
		}
	}
	if len(report.Findings) > 0 {
		return &failure{status: exitDegraded}
	}
	return nil
}

// examine makes every check that makes sense from here.
func (d *doctor) examine(ctx context.Context) *doctorReport {
	checks := append(d.meshChecks(), d.reachChecks()...)
	if d.self != "" {
		checks = append(checks, d.hostChecks()...)
	}
	return d.report(ctx, checks)
}

// report makes checks, one after the other.
func (d *doctor) report(ctx context.Context, checks []check) *doctorReport {
	report := &doctorReport{Mesh: d.status.GetMesh(), ReportedBy: d.status.GetReportedBy(), RanOn: d.self, Findings: []finding{}}
	for _, c := range checks {
		found, err := c.look(ctx)
		report.Findings = append(report.Findings, found...)
		result := checked{Name: c.name, Result: "well"}
		if err != nil {
			result.Result, result.Missing = "incomplete", strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		if len(found) > 0 {
			result.Result = "found"
		}
		report.Checks = append(report.Checks, result)
	}
	return report
}

// doctor prints the report as text for people.
func (v view) doctor(r *doctorReport) string {
	var out strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&out, "%s: %s\n", v.paint(f.Code, text.FgYellow), f.Found)
		if f.Why != "" {
			fmt.Fprintf(&out, "  why: %s\n", f.Why)
		}
		fmt.Fprintf(&out, "  fix: %s\n\n", f.Fix)
	}
	incomplete := 0
	rows := newRows("CHECK", "RESULT", "NOT LOOKED AT")
	for _, c := range r.Checks {
		rows.add(c.Name, c.Result, c.Missing)
		if c.Missing != "" {
			incomplete++
		}
	}
	if v.wide {
		out.WriteString(rows.render() + "\n\n")
	}
	fmt.Fprintf(&out, "%d checks, %d found", len(r.Checks), len(r.Findings))
	if incomplete > 0 {
		fmt.Fprintf(&out, ", %d incomplete (-o wide says why)", incomplete)
	}
	where := "on " + r.RanOn + "; the other nodes' machines were not looked at"
	if r.RanOn == "" {
		where = "from outside; run it on each node to have its machine looked at"
	}
	fmt.Fprintf(&out, "   %s, %s\n", r.Mesh, where)
	return out.String()
}
