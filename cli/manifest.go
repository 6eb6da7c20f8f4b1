package cli

import (
	_ "embed" // for the pod
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/hamesh/hamesh/agent/config"
	"github.com/hamesh/hamesh/deploy"
)

// usualConfig is where hameshd looks for its configuration.
const usualConfig = "/etc/hamesh/agent.yaml"

//go:embed manifest/static-pod.yaml
var podText string

var podTemplate = template.Must(template.New("static pod").Funcs(template.FuncMap{"join": strings.Join}).Parse(podText))

func (c *command) manifestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "manifest",
		Short: "Print ready deployment files for a configuration",
		Long: `Print ready deployment files for a configuration, which is checked first.
A node needs one of them, and its own configuration:

  hactl manifest systemd > /etc/systemd/system/hameshd.service
  hactl manifest static-pod --image IMAGE > /etc/kubernetes/manifests/hameshd.yaml

The unit does not depend on kubelet and container runtime: while they are restarted, the
VIPs stay where they are.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("manifest needs a command: static-pod or systemd")
		},
	}
	var file, installedAs, image string
	flags := cmd.PersistentFlags()
	flags.StringVar(&file, "config", usualConfig, "configuration file to read")
	flags.StringVar(&installedAs, "installed-as", "", "where that file will be on the node; left out: where it is")
	show := func(render func(placement) (string, error)) error {
		p, err := place(file, installedAs)
		if err != nil {
			return err
		}
		text, err := render(p)
		if err != nil {
			return err
		}
		return c.print(text)
	}
	pod := &cobra.Command{
		Use:   "static-pod --image IMAGE",
		Short: "Print a static pod for the kubelet's manifest directory",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return show(func(p placement) (string, error) { return p.pod(image) })
		},
	}
	pod.Flags().StringVar(&image, "image", "", "container image with hameshd in its PATH")
	require(pod, "image")
	unit := &cobra.Command{
		Use:   "systemd",
		Short: "Print a unit for systemd",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return show(placement.unit) },
	}
	cmd.AddCommand(pod, unit)
	return cmd
}

// placement is where a configuration puts its agent's files on the node.
type placement struct {
	*config.Config
	file  string   // the configuration itself
	reads []string // directories of the other files that it names; with duplicates
}

// place reads a configuration that will be at installedAs on the node; empty: where it is.
func place(file, installedAs string) (placement, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return placement{}, &failure{status: exitFailed, what: "reading the configuration: " + err.Error(), hint: "name one with --config"}
	}
	if _, err := config.Parse(file, data); err != nil {
		return placement{}, refusedConfig(file, err)
	}
	if installedAs == "" {
		if installedAs, err = filepath.Abs(file); err != nil {
			return placement{}, &failure{status: exitFailed, what: "finding the configuration: " + err.Error(), hint: "name its place with --installed-as"}
		}
	}
	if !path.IsAbs(installedAs) {
		return placement{}, fmt.Errorf("--installed-as %s is a relative path", installedAs)
	}
	// Once more: relative paths in it count from where it will be.
	p := placement{file: path.Clean(installedAs)}
	if p.Config, err = config.Parse(p.file, data); err != nil {
		return placement{}, refusedConfig(file, err)
	}
	files := []string{p.TLS.CAFile, p.TLS.CertFile, p.TLS.KeyFile}
	if e := p.Store.External; e != nil && e.TLS != nil {
		files = append(files, e.TLS.CAFile, e.TLS.CertFile, e.TLS.KeyFile)
	}
	for _, proxy := range p.Proxies {
		files = append(files, proxy.HealthCheck.CAFile, proxy.HealthCheck.CertFile, proxy.HealthCheck.KeyFile)
	}
	for _, f := range append(slices.Clone(files), p.file, p.DataDir, p.API.Socket) {
		if f != "" && !plainPath.MatchString(f) {
			return placement{}, &failure{status: exitFailed, what: fmt.Sprintf("%q has characters that a deployment file would have to quote", f), hint: "choose a plain path"}
		}
	}
	for _, f := range files {
		if f != "" {
			p.reads = append(p.reads, path.Dir(f))
		}
	}
	return p, nil
}

// plainPath is a path that means the same in a shell, a unit (systemd.unit(5)) and YAML.
var plainPath = regexp.MustCompile(`^/[A-Za-z0-9._/+@-]*$`)

// refusedConfig reports the first problem of a configuration.
func refusedConfig(file string, err error) error {
	what := err.Error()
	var problems config.Problems
	if errors.As(err, &problems) && len(problems) > 1 {
		what = fmt.Sprintf("%v; and %d more, see hameshd validate --config %s", problems[0], len(problems)-1, file)
	}
	return &failure{status: exitUsage, what: what}
}

// capabilities are those that the agent needs (capabilities(7)).
func (p placement) capabilities() []string {
	all := []string{"NET_ADMIN", "NET_RAW"}
	ports := []uint16{p.API.Port, p.Metrics.Listen.Port()}
	if e := p.Store.Embedded; e != nil {
		ports = append(ports, e.ClientPort, e.PeerPort)
	}
	for _, proxy := range p.Proxies {
		ports = append(ports, proxy.Port)
	}
	if slices.Min(ports) < 1024 {
		all = append(all, "NET_BIND_SERVICE")
	}
	return all
}

// mount is a directory of the node in the pod.
type mount struct {
	Name, Path, Type string
	ReadOnly         bool
}

// mounts are the directories that the agent needs, those that it writes to first: they may
// hold one that it only reads.
func (p placement) mounts() (all []mount) {
	add := func(m mount) {
		if !slices.ContainsFunc(all, func(known mount) bool { return beneath(known.Path, m.Path) }) {
			all = append(all, m)
		}
	}
	add(mount{Name: "data", Path: p.DataDir, Type: "DirectoryOrCreate"})
	add(mount{Name: "run", Path: path.Dir(p.API.Socket), Type: "DirectoryOrCreate"})
	add(mount{Name: "config", Path: path.Dir(p.file), Type: "Directory", ReadOnly: true})
	for i, dir := range slices.Compact(slices.Sorted(slices.Values(p.reads))) {
		add(mount{Name: fmt.Sprintf("pki-%d", i), Path: dir, Type: "Directory", ReadOnly: true})
	}
	return all
}

// beneath says whether dir is base or somewhere in it.
func beneath(base, dir string) bool {
	return dir == base || strings.HasPrefix(dir, strings.TrimSuffix(base, "/")+"/")
}

// plainImage is the name of a container image that YAML reads as it is.
var plainImage = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]*[A-Za-z0-9]$`)

func (p placement) pod(image string) (string, error) {
	if !plainImage.MatchString(image) {
		return "", fmt.Errorf("image %q is no name of an image", image)
	}
	host := p.Metrics.Listen.Addr()
	switch {
	case host == netip.IPv4Unspecified():
		host = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case host == netip.IPv6Unspecified():
		host = netip.IPv6Loopback()
	}
	var out strings.Builder
	err := podTemplate.Execute(&out, struct {
		Image, Config string
		Capabilities  []string
		MetricsHost   netip.Addr
		MetricsPort   uint16
		Mounts        []mount
	}{image, p.file, p.capabilities(), host, p.Metrics.Listen.Port(), p.mounts()})
	return out.String(), err
}

// hidden are the directories that ProtectHome=true makes empty (systemd.exec(5)).
var hidden = []string{"/home", "/root", "/run/user"}

func (p placement) unit() (string, error) {
	for _, dir := range append(slices.Clone(p.reads), path.Dir(p.file), p.DataDir, path.Dir(p.API.Socket)) {
		if slices.ContainsFunc(hidden, func(h string) bool { return beneath(h, dir) }) {
			return "", &failure{status: exitFailed, what: dir + " is hidden from the unit (ProtectHome=true)", hint: "put its files elsewhere, as in /etc/hamesh"}
		}
	}
	unit := strings.ReplaceAll(deploy.Unit, usualConfig, p.file)
	capabilities := "CAP_" + strings.Join(p.capabilities(), " CAP_")
	unit = directive(unit, "AmbientCapabilities", "AmbientCapabilities="+capabilities)
	unit = directive(unit, "CapabilityBoundingSet", "CapabilityBoundingSet="+capabilities)
	// In its own places systemd makes a directory and lets the service write there.
	for _, d := range []struct {
		directive, root, dir string
		writes               bool
	}{
		{"StateDirectory", "/var/lib/", p.DataDir, true},
		{"RuntimeDirectory", "/run/", path.Dir(p.API.Socket), true},
		{"ConfigurationDirectory", "/etc/", path.Dir(p.file), false},
	} {
		line := ""
		if name, ok := strings.CutPrefix(d.dir, d.root); ok {
			line = d.directive + "=" + name
		} else if d.writes {
			line = "ReadWritePaths=" + d.dir
		}
		unit = directive(unit, d.directive, line)
	}
	return unit, nil
}

// directive replaces the line of a unit that sets name; empty: it goes.
func directive(unit, name, line string) string {
	if line != "" {
		line += "\n"
	}
	return regexp.MustCompile(`(?m)^`+name+`=.*\n`).ReplaceAllLiteralString(unit, line)
}
