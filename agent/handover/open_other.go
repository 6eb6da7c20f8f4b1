//go:build !linux

package handover

import "fmt"

// connection is nothing here.
type connection struct{}

// Open returns an error that wraps ErrUnsupported: only Linux is supported.
func Open(Config) (*Kernel, error) {
	return nil, fmt.Errorf("open hand-over: %w nf_tables: it is not Linux", ErrUnsupported)
}
