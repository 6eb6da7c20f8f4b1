package guard

import (
	"io"
	"os"
	"testing"

	"github.com/hamesh/hamesh/deploy/lab"
)

// The test binary itself is also the agent whose process is killed, and its guard.
func TestMain(m *testing.M) {
	lab.Role(roleAgent, func(args []string) int {
		switch args[0] {
		case "guard":
			return Main(args[1:], os.Stderr)
		case "idle":
			_, _ = io.Copy(io.Discard, os.Stdin)
			return exitOK
		}
		return standIn(args)
	})
	lab.Enter()
	os.Exit(m.Run())
}
