//go:build linux

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

const (
	roleBurner  = "burner"
	perCPU      = 2 // burners
	longestBurn = 30 * time.Second
)

func init() { Role(roleBurner, serveBurner) }

// Burn keeps every processor of this machine busy, with two processes each, for at most
// 30 s. They end by themselves; Burn returns at once.
func (m *Mesh) Burn(length time.Duration) error {
	if length > longestBurn {
		return fmt.Errorf("burn processors for %s: at most %s", length, longestBurn)
	}
	for range perCPU * runtime.NumCPU() {
		if _, err := launch(m.Client.Host, Command(roleBurner, length.String()), filepath.Join(m.dir, "burner.log")); err != nil {
			return err
		}
	}
	return nil
}

func serveBurner(args []string) int {
	length, err := time.ParseDuration(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
	}
	return 0
}
