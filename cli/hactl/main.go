// Command hactl shows and controls a hamesh mesh; see package cli.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/hamesh/hamesh/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := cli.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
