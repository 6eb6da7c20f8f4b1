package vip

import (
	"os"
	"testing"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestMain(m *testing.M) {
	lab.Enter()
	os.Exit(m.Run())
}
