package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitDegraded    = 3
	exitUnreachable = 4
)

const (
	defaultEndpoint = "unix:///run/hamesh/hameshd.sock"
	defaultTimeout  = 10 * time.Second
)

const longHelp = `hactl shows and controls a hamesh mesh. Any member answers for the whole of it; of
several endpoints the first that answers is used. unix:// endpoints need no
certificate; HOST:PORT is TLS where --ca, --cert and --key are given, and plain text
(for agents with "tls: insecure") where they are not.

Environment: HACTL_ENDPOINT (comma separated), HACTL_CA, HACTL_CERT, HACTL_KEY, NO_COLOR.

Exit status:
  0  done, and healthy
  1  failed
  2  wrong usage
  3  answered, but the mesh is not healthy (status, doctor)
  4  nobody could be reached`

// failure is a command that did not end well, for a reason other than wrong usage.
type failure struct {
	status int
	what   string // empty: all has been said on standard output
	hint   string // what to do next
}

func (f *failure) Error() string {
	if f.hint == "" {
		return f.what
	}
	return f.what + "; " + f.hint
}

// command is one run of hactl.
type command struct {
	in       io.Reader
	out, err io.Writer
	now      func() time.Time

	endpoints     []string
	ca, cert, key string
	timeout       time.Duration
	output        string
}

// Run runs hactl with args (without the program's name) and returns its exit status.
// Data goes to stdout; errors go to stderr, one line each. When ctx ends, a watch ends
// like a command that is done, and every other command fails.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return (&command{in: stdin, out: stdout, err: stderr, now: time.Now}).run(ctx, args)
}

func (c *command) run(ctx context.Context, args []string) int {
	root := c.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	// Only commands that have begun return failures; all else is cobra's view of the usage.
	failed := &failure{status: exitUsage, what: err.Error(), hint: "see hactl --help"}
	errors.As(err, &failed)
	if failed.what != "" {
		_, _ = fmt.Fprintln(c.err, "hactl:", strings.Join(strings.Fields(failed.Error()), " "))
	}
	return failed.status
}

func (c *command) root() *cobra.Command {
	root := &cobra.Command{
		Use:               "hactl",
		Short:             "Show and control a hamesh mesh",
		Long:              longHelp,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return c.checkFlags() },
	}
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	flags := root.PersistentFlags()
	flags.StringSliceVar(&c.endpoints, "endpoint", strings.Split(cmp.Or(os.Getenv("HACTL_ENDPOINT"), defaultEndpoint), ","),
		"members to ask in turn: unix:///path or host:port")
	flags.StringVar(&c.ca, "ca", os.Getenv("HACTL_CA"), "CA certificate of the mesh")
	flags.StringVar(&c.cert, "cert", os.Getenv("HACTL_CERT"), "own certificate")
	flags.StringVar(&c.key, "key", os.Getenv("HACTL_KEY"), "key of the own certificate")
	flags.DurationVar(&c.timeout, "timeout", defaultTimeout, "how long a command may take; a watch has no end")
	flags.StringVarP(&c.output, "output", "o", "table", "table, wide, json or yaml")
	// An unknown value cannot happen here: the flag has just been defined.
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(c.statusCommand(), c.eventsCommand(), c.moveCommand(), c.drainCommand(), c.undrainCommand(), c.backendCommand(), c.doctorCommand(), c.drillCommand(), c.pkiCommand(), c.manifestCommand(), c.versionCommand())
	return root
}

func (c *command) checkFlags() error {
	if !slices.Contains(outputs, c.output) {
		return fmt.Errorf("output %q is none of %s", c.output, strings.Join(outputs, ", "))
	}
	if c.timeout <= 0 {
		return fmt.Errorf("timeout %s is not positive", c.timeout)
	}
	if given := len(slices.DeleteFunc([]string{c.ca, c.cert, c.key}, func(s string) bool { return s == "" })); given%3 != 0 {
		return errors.New("--ca, --cert and --key go together: give all three, or none")
	}
	for i, endpoint := range c.endpoints {
		c.endpoints[i] = strings.TrimSpace(endpoint)
		if _, err := target(c.endpoints[i]); err != nil {
			return err
		}
	}
	return nil
}

// stamp is set when a release is linked (-ldflags -X).
var stamp string

// Version is the CLI's: as it was linked, else as the module was built.
var Version = buildVersion()

func buildVersion() string {
	if stamp != "" {
		return stamp
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

func (c *command) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of hactl",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return c.print(fmt.Sprintf("hactl %s %s/%s %s\n", Version, runtime.GOOS, runtime.GOARCH, runtime.Version()))
		},
	}
}

func (c *command) print(text string) error {
	if _, err := io.WriteString(c.out, text); err != nil {
		return &failure{status: exitFailed, what: "writing the output: " + err.Error()}
	}
	return nil
}
