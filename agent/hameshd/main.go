// Command hameshd is the hamesh agent; see package agent.
package main

import (
	"os"

	"github.com/hamesh/hamesh/agent"
)

func main() { os.Exit(agent.Main(os.Args[1:], os.Stdout, os.Stderr)) }
