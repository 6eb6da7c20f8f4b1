//go:build !linux

package vip

import (
	"errors"
	"fmt"

	"github.com/hashicorp/go-hclog"
)

// Open returns an error that wraps errors.ErrUnsupported: only Linux is supported.
func Open(hclog.Logger, []Address) (*Kernel, error) {
	return nil, fmt.Errorf("open the kernel's address table: %w", errors.ErrUnsupported)
}
