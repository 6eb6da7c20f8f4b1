//go:build !linux

package announce

import "errors"

func openWire() (wire, error) { return nil, errors.ErrUnsupported }
