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
	longestBurn = 15 * time.Minute
)

func init() { Role(roleBurner, serveBurner) }

// Burn keeps every processor of this machine busy, with some processes each, for at most
// 15 min. They end by themselves, and with the mesh; Burn returns at once.
func (m *Mesh) Burn(perCPU int, length time.Duration) error {
	if length > longestBurn || perCPU < 1 || perCPU > 8 {
		return fmt.Errorf("burn processors with %d processes each for %s: at most 8 for %s", perCPU, length, longestBurn)
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
