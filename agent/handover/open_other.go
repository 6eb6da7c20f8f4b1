//go:build !linux

package handover

import (
	"fmt"
	"net/netip"
)

// connection is nothing here.
type connection struct{}

// EndStranded returns an error that wraps ErrUnsupported: only Linux is supported.
func EndStranded(netip.Addr, ...uint16) (int, error) {
	return 0, fmt.Errorf("end connections: %w sock_diag: it is not Linux", ErrUnsupported)
}

// Open returns an error that wraps ErrUnsupported: only Linux is supported.
func Open(Config) (*Kernel, error) {
	return nil, fmt.Errorf("open hand-over: %w nf_tables: it is not Linux", ErrUnsupported)
}
