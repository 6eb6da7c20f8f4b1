//go:build linux

// Command hamesh-lab runs a whole mesh on this machine, in namespaces of its own: as
// root, or as any user where user namespaces are allowed. Nothing of it is left when it
// ends, however it ends.
//
//	hamesh-lab demo      plays a fixed row of faults and shows what each cost
//	hamesh-lab chaos     strikes with random faults, and fails where a promise was broken
//	hamesh-lab endure    burns the processors, and fails where a VIP moves for that
//	hamesh-lab failover  measures fail-over, also beside keepalived and HAProxy
//	hamesh-lab rolling   restarts all API servers, and shows who serves whom then
//	hamesh-lab bench     measures the relay beside HAProxy and a direct connection
//
// What it is not: a way to run hamesh for anybody but an onlooker.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hamesh/hamesh/agent"
	"github.com/hamesh/hamesh/cli"
	"github.com/hamesh/hamesh/deploy/lab"
)

func main() {
	lab.Agent(func(args []string) int { return agent.Main(args, os.Stdout, os.Stderr) })
	lab.CLI(func(args []string) int {
		return cli.Run(context.Background(), args, os.Stdin, os.Stdout, os.Stderr)
	})
	lab.Enter()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() {
		s := <-interrupted
		fmt.Fprintln(os.Stderr, "interrupted: all of it ends with this process")
		os.Exit(128 + int(s.(unix.Signal)))
	}()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

const usage = `usage:
  hamesh-lab demo     [-keep] [-nodes N] [-timing default|fast]
  hamesh-lab chaos    [-duration D] [-seed N] [-nodes N] [-timing default|fast] [-external] [-logs DIR]
  hamesh-lab chaos    -list
  hamesh-lab endure   [-duration D] [-loops N] [-timing default|fast]
  hamesh-lab failover [-trials N] [-timing default,fast] [-peers] [-out FILE]
  hamesh-lab clients  [-scenario NAME,…] [-trials N] [-timing default|fast] [-nodes N] [-external] [-away D]
  hamesh-lab rolling  [-goaway 0,0.02] [-watch D]
  hamesh-lab bench    [-runs N | -quick] [-out FILE]
  hamesh-lab bench    -idle N [-for D]
`

func run(args []string, out, complaints io.Writer) int {
	commands := map[string]func(*flag.FlagSet, []string, io.Writer) (func() error, error){
		"demo": demoCommand, "chaos": chaosCommand, "endure": endureCommand, "failover": failoverCommand,
		"clients": clientsCommand, "bench": benchCommand, "rolling": rollingCommand,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		fmt.Fprint(complaints, usage)
		return 2
	}
	flags := flag.NewFlagSet("hamesh-lab "+args[0], flag.ContinueOnError)
	flags.SetOutput(complaints)
	do, err := commands[args[0]](flags, args[1:], out)
	if err != nil {
		return 2 // flags has told why
	}
	if err := do(); err != nil {
		fmt.Fprintln(complaints, "hamesh-lab:", err)
		return 1
	}
	return 0
}

func timingFlag(flags *flag.FlagSet) *string {
	timing := "default"
	flags.Func("timing", "timing profile: default (when left out) or fast", func(s string) error {
		if ttls[s] == 0 {
			return fmt.Errorf("no profile %q", s)
		}
		timing = s
		return nil
	})
	return &timing
}

func demoCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	keep := flags.Bool("keep", false, "leave the mesh running at the end, and print how to look around")
	nodes := flags.Int("nodes", 3, "how many nodes")
	timing := timingFlag(flags)
	err := flags.Parse(args)
	var linger func(*lab.Mesh)
	if *keep {
		linger = func(m *lab.Mesh) {
			lookAround(out, m)
			select {} // until interrupted
		}
	}
	return func() error { return demo(out, lab.Options{Nodes: *nodes, Timing: *timing}, linger) }, err
}

func chaosCommand(flags *flag.FlagSet, args []string, out io.Writer) (func() error, error) {
	duration := flags.Duration("duration", time.Minute, "how long faults begin")
	seed := flags.Uint64("seed", 1, "the same seed gives the same faults")
	nodes := flags.Int("nodes", 3, "how many nodes")
	timing := timingFlag(flags)
	external := flags.Bool("external", false, "an etcd of its own instead of the agents' embedded one")
	logs := flags.String("logs", "", "copy the agents' logs to this directory")
	kinds := flags.Bool("list", false, "print the kinds of faults and end")
	err := flags.Parse(args)
	return func() error {
		if *kinds {
			list(out)
			return nil
		}
		return chaos(out, chaosOptions{
			Options:  lab.Options{Nodes: *nodes, Timing: *timing, ExternalStore: *external, Clients: 50},
			duration: *duration, seed: *seed, logs: *logs,
		})
	}, err
}
