package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hamesh/hamesh/agent/config"
)

func TestMainStatus(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "bad.yaml")
	for path, text := range map[string]string{
		good: string(config.Example()),
		bad:  strings.Replace(string(config.Example()), "kind: Agent", "kind: Agnt\nfoo: 1", 1),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name           string
		args           []string
		status         int
		stdout, stderr string // what each must contain
	}{
		{"version", []string{"version"}, 0, "hameshd ", ""},
		{"help", []string{"--help"}, 0, "", "Usage:"},
		{"unknown command", []string{"start"}, 2, "", `unknown command ["start"]`},
		{"unknown flag", []string{"--conf", "x"}, 2, "", "--conf"},
		{"valid, on another machine", []string{"validate", "--config", good}, 0, good + ": valid", "not the host of this configuration"},
		{"not valid", []string{"validate", "--config", bad}, 2, "", "bad.yaml:"},
		{"not there", []string{"validate", "--config", filepath.Join(dir, "none")}, 2, "", "none"},
		{"run what is not valid", []string{"--config", bad}, 2, "", "foo"},
		{"run on another machine", []string{"--config", good}, 2, "", "not the host of this configuration"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if got := command(c.args, &stdout, &stderr); got != c.status {
				t.Errorf("exit status %d, want %d", got, c.status)
			}
			if !strings.Contains(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) {
				t.Errorf("stdout %q, stderr %q; want %q and %q in them", &stdout, &stderr, c.stdout, c.stderr)
			}
		})
	}
}
