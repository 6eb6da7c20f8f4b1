//go:build !linux

package guard

import (
	"errors"
	"fmt"
	"os"
)

// watch returns an error that wraps errors.ErrUnsupported: only Linux is supported.
func watch(int, *os.File, func()) (ending, error) {
	return 0, fmt.Errorf("watch the agent: %w", errors.ErrUnsupported)
}
