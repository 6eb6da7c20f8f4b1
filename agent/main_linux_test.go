package agent_test

import (
	"context"
	"os"
	"testing"

	"github.com/hamesh/hamesh/agent"
	"github.com/hamesh/hamesh/cli"
	"github.com/hamesh/hamesh/deploy/lab"
)

// The test binary itself is agent, CLI, API server and client of the mesh it makes, so
// that the race detector watches all of them.
func TestMain(m *testing.M) {
	lab.Agent(func(args []string) int { return agent.Main(args, os.Stdout, os.Stderr) })
	lab.CLI(func(args []string) int {
		return cli.Run(context.Background(), args, os.Stdin, os.Stdout, os.Stderr)
	})
	lab.Enter()
	os.Exit(m.Run())
}
