//go:build linux

// Command hamesh-lab runs a whole mesh on this machine, in namespaces of its own: as
// root, or as any user where user namespaces are allowed. Nothing of it is left when it
// ends, however it ends.
//
//	hamesh-lab demo [-keep] [-nodes N] [-timing default|fast]
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

func run(args []string, out, complaints io.Writer) int {
	flags := flag.NewFlagSet("hamesh-lab demo", flag.ContinueOnError)
	flags.SetOutput(complaints)
	keep := flags.Bool("keep", false, "leave the mesh running at the end, and print how to look around")
	nodes := flags.Int("nodes", 3, "how many nodes")
	timing := flags.String("timing", "default", "timing profile: default or fast")
	if len(args) == 0 || args[0] != "demo" {
		fmt.Fprintln(complaints, "usage: hamesh-lab demo [-keep] [-nodes N] [-timing default|fast]")
		return 2
	}
	if err := flags.Parse(args[1:]); err != nil {
		return 2
	}
	var linger func(*lab.Mesh)
	if *keep {
		linger = func(m *lab.Mesh) {
			lookAround(out, m)
			select {} // until interrupted
		}
	}
	if err := demo(out, lab.Options{Nodes: *nodes, Timing: *timing}, linger); err != nil {
		fmt.Fprintln(complaints, "hamesh-lab:", err)
		return 1
	}
	return 0
}
