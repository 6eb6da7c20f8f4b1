package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/agent/guard"
)

const usage = `hameshd is the hamesh agent, one on every control-plane node.

Usage:
  hameshd --config FILE            run in the foreground
  hameshd validate --config FILE   only check the configuration
  hameshd version                  print the version

FILE is /etc/hamesh/agent.yaml unless given. Logs go to standard error.
SIGTERM hands every VIP over and ends the agent.
SIGHUP re-reads FILE: what can change without a restart does, if nothing else has changed.
SIGUSR2 upgrades: the program's file, as it is then, goes on in place of the running one, with
every connection. Where it does not start, the running one goes on.
Exit status: 0 ended by a signal, or valid; 1 failed; 2 wrong usage or configuration.
`

// Exit statuses.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// Main runs hameshd with the arguments after the program's name and returns its exit
// status.
func Main(args []string, stdout, stderr io.Writer) int {
	if os.Getpid() == 1 {
		return runAsFirst(args, stdout, stderr)
	}
	return command(args, stdout, stderr)
}

// command does what the arguments ask for, in this process.
func command(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "guard" { // started by the agent alone
		return guard.Main(args[1:], stderr)
	}
	flags := pflag.NewFlagSet("hameshd", pflag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, usage) }
	path := flags.String("config", "/etc/hamesh/agent.yaml", "configuration file")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "hameshd: %v; see hameshd --help\n", err)
		return exitUsage
	}
	switch rest := flags.Args(); {
	case len(rest) == 0:
		relax(*path)
		return run(*path, stderr)
	case len(rest) == 1 && rest[0] == "validate":
		return validate(*path, stdout, stderr)
	case len(rest) == 1 && rest[0] == "version":
		fmt.Fprintln(stdout, "hameshd", Version)
		return exitOK
	default:
		fmt.Fprintf(stderr, "hameshd: unknown command %q; see hameshd --help\n", rest)
		return exitUsage
	}
}

// load reads and resolves the configuration. Only a mere check may go on where this is
// not the host of the configuration.
func load(path string, warn func(string)) (cfg *config.Config, err error) {
	cfg, err = config.Load(path)
	if err != nil {
		return nil, err
	}
	host, err := config.ThisHost()
	if err != nil {
		return nil, err
	}
	warnings, err := cfg.Resolve(host)
	for _, w := range warnings {
		warn(w)
	}
	return cfg, err
}

// warnOn writes warnings before there is a log.
func warnOn(stderr io.Writer) func(string) {
	return func(w string) { fmt.Fprintf(stderr, "warning: %s\n", w) }
}

func validate(path string, stdout, stderr io.Writer) int {
	_, err := load(path, warnOn(stderr))
	switch {
	case errors.Is(err, config.ErrNotThisHost):
		fmt.Fprintf(stderr, "warning: %v: interfaces were not checked\n", err)
	case err != nil:
		fmt.Fprintln(stderr, err)
		return exitUsage
	}
	fmt.Fprintf(stdout, "%s: valid\n", path)
	return exitOK
}

func run(path string, stderr io.Writer) int {
	file, err := program()
	if err != nil {
		fmt.Fprintln(stderr, "hameshd: could not find its own file:", err)
		return exitFailed
	}
	before, err := predecessor()
	if err != nil {
		fmt.Fprintln(stderr, "hameshd:", err)
		return exitFailed
	}
	cfg, err := load(path, warnOn(stderr))
	if err != nil {
		before.regret(err)
		fmt.Fprintln(stderr, err)
		return exitUsage
	}
	out := newPatientWriter(stderr)
	defer out.flush()
	log := newLogger(out, cfg.Log)
	// From here on, so that a signal during the start already ends it in order.
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer cancel()
	hangups, upgrades := make(chan os.Signal, 1), make(chan os.Signal, 1) // several before one is served are one
	signal.Notify(hangups, unix.SIGHUP)
	signal.Notify(upgrades, unix.SIGUSR2)
	defer signal.Stop(hangups)
	defer signal.Stop(upgrades)
	var left *Inheritance
	if before != nil {
		if left, err = inherit(ctx, before); err != nil {
			log.Error("could not take over from the agent that runs", "error", err)
			return exitFailed
		}
		if err := left.fits(cfg); err != nil {
			before.regret(err)
			log.Error("could not take over from the agent that runs", "error", err)
			return exitFailed
		}
	}
	for again := true; again; again = left != nil {
		left, cfg, err = serve(ctx, cfg, left, log, &reload{wanted: hangups, log: log, path: path}, &upgrade{wanted: upgrades, program: file, log: log})
	}
	if err != nil && !errors.Is(err, errSucceeded) {
		before.regret(err)
		log.Error("ended", "error", err)
		return exitFailed
	}
	log.Info("ended")
	return exitOK
}

// serve is one agent's life. It returns what is left to go on with, if that is not another
// process's, and the configuration in force.
func serve(ctx context.Context, cfg *config.Config, from *Inheritance, log *logger, r *reload, u *upgrade) (left *Inheritance, now *config.Config, err error) {
	a, err := New(cfg, from, log)
	if err != nil {
		return nil, nil, fmt.Errorf("could not start: %w", err)
	}
	a.reload, a.upgrade = r, u
	r.agent, r.inForce, u.agent = a, cfg, a
	left, err = a.Run(ctx)
	if !errors.Is(err, errSucceeded) {
		a.Close()
	}
	return left, r.inForce, err
}
