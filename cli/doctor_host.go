package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"sigs.k8s.io/yaml"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// filesEnough is how many descriptors an agent should have: two for each of thousands
	// of connections.
	filesEnough = 16384
	// conntrackFull is how full the kernel's table of connections may be, in percent.
	conntrackFull = 90
)

// hostChecks are of this machine. What they read is as proc(5), sysfs and the kernel's
// Documentation/networking/ip-sysctl.rst have it; other systems have none of it.
func (d *doctor) hostChecks() []check {
	return []check{
		{"kernel-settings", d.kernelSettings},
		{"conntrack", d.conntrack},
		{"descriptors", d.descriptors},
		{"networkd", d.networkd},
		{"rivals", d.rivals},
		{"static-addresses", d.staticAddresses},
		{"node-addresses", d.nodeAddresses},
		{"kubeconfigs", d.kubeconfigs},
	}
}

// text reads a small file; one that is not there is empty, and so is one of a process that
// has just ended (ESRCH, proc(5)).
func (d *doctor) text(name string) (string, error) {
	b, err := fs.ReadFile(d.root, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// number reads a file that holds a number; 0 where it is not there.
func (d *doctor) number(name string) (int, error) {
	text, err := d.text(name)
	if text == "" || err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("/%s: %w", name, err)
	}
	return n, nil
}

// glob lists the files of a pattern, as fs.Glob does, and says which directories and files
// it could not look at, which fs.Glob does not.
func (d *doctor) glob(pattern string) (found []string, _ error) {
	dir, name := path.Split(pattern)
	dirs, err := []string{path.Clean(dir)}, error(nil)
	if strings.Contains(dir, "*") {
		dirs, err = d.glob(dirs[0])
	}
	errs := []error{err}
	for _, dir := range dirs {
		info, err := fs.Stat(d.root, dir)
		if err == nil && !info.IsDir() {
			continue
		}
		var files []fs.DirEntry
		if err == nil {
			files, err = fs.ReadDir(d.root, dir)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, f := range files {
			if ok, err := path.Match(name, f.Name()); err != nil {
				return nil, fmt.Errorf("%s: %w", pattern, err)
			} else if ok {
				found = append(found, path.Join(dir, f.Name()))
			}
		}
	}
	return found, errors.Join(errs...)
}

// elsewhere is why the interfaces that the status names say nothing of this machine; nil:
// they are its own.
func (d *doctor) elsewhere() error {
	if by := d.status.GetReportedBy(); by != d.self {
		return fmt.Errorf("%s has answered, which knows its own interfaces alone: ask this member itself (--endpoint)", by)
	}
	return nil
}

// sysctl returns the value in force of a setting of which the kernel takes the higher one
// of all and the interface's (IN_DEV_MAXCONF, include/linux/inetdevice.h).
func (d *doctor) sysctl(ifname, name string) (int, error) {
	const conf = "proc/sys/net/ipv4/conf/"
	all, err := d.number(conf + "all/" + name)
	own, ownErr := d.number(conf + ifname + "/" + name)
	return max(all, own), errors.Join(err, ownErr)
}

func (d *doctor) kernelSettings(context.Context) (all []finding, _ error) {
	if err := d.elsewhere(); err != nil {
		return nil, err
	}
	routes, err := d.text("proc/net/route")
	errs := []error{err}
	for _, v := range d.status.GetVips() {
		ifname := v.GetInterface()
		switch {
		case ifname == "": // a witness
		case strings.Contains(v.GetAddress(), ":"):
			const conf = "proc/sys/net/ipv6/conf/"
			disabled, err := d.number(conf + ifname + "/disable_ipv6")
			errs = append(errs, err)
			if disabled == 1 {
				all = append(all, finding{
					Code: "IPV6_DISABLED", Node: d.self, Found: fmt.Sprintf("IPv6 is disabled on %s, where %s belongs", ifname, v.GetAddress()),
					Why: "the kernel refuses the address there", Fix: "sysctl -w net.ipv6.conf." + ifname + ".disable_ipv6=0, and in /etc/sysctl.d",
				})
			}
		default:
			ignore, err := d.sysctl(ifname, "arp_ignore")
			errs = append(errs, err)
			if ignore == 2 || ignore == 8 {
				all = append(all, finding{
					Code: "ARP_IGNORED", Node: d.self, Found: fmt.Sprintf("arp_ignore is %d on %s", ignore, ifname),
					Why: "the kernel does not answer who asks for " + v.GetAddress() + ", which has no subnet of its own",
					Fix: "sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf." + ifname + ".arp_ignore=1, and in /etc/sysctl.d",
				})
			}
			filter, err := d.sysctl(ifname, "rp_filter")
			errs = append(errs, err)
			if away := defaultRoute(routes); filter == 1 && away != "" && away != ifname {
				all = append(all, finding{
					Code: "RP_FILTER_STRICT", Node: d.self, Found: fmt.Sprintf("rp_filter is strict (1) on %s, and the default route leaves by %s", ifname, away),
					Why: "the kernel drops, without a word, clients that come from other subnets to " + v.GetAddress() + " on " + ifname,
					Fix: "sysctl -w net.ipv4.conf." + ifname + ".rp_filter=2, and in /etc/sysctl.d",
				})
			}
		}
	}
	return all, errors.Join(errs...)
}

// defaultRoute is the interface of the IPv4 default route with the lowest metric in
// /proc/net/route; empty: there is none.
func defaultRoute(routes string) (ifname string) {
	best := -1
	for line := range strings.Lines(routes) {
		f := strings.Fields(line)
		if len(f) < 8 || f[1] != "00000000" || f[7] != "00000000" {
			continue
		}
		if metric, err := strconv.Atoi(f[6]); err == nil && (best < 0 || metric < best) {
			best, ifname = metric, f[0]
		}
	}
	return ifname
}

func (d *doctor) conntrack(context.Context) ([]finding, error) {
	const dir = "proc/sys/net/netfilter/nf_conntrack_"
	used, usedErr := d.number(dir + "count")
	most, err := d.number(dir + "max")
	if err = errors.Join(usedErr, err); err != nil || most == 0 || used*100 < most*conntrackFull {
		return nil, err
	}
	return []finding{{
		Code: "CONNTRACK_FULL", Node: d.self, Found: fmt.Sprintf("the kernel tracks %d connections of at most %d", used, most),
		Why: "when the table is full, packets of new connections are dropped, and the log says: nf_conntrack: table full",
		Fix: fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d, and in /etc/sysctl.d", 4*most),
	}}, nil
}

// processes returns the ids of those of that name (proc_pid_comm(5)).
func (d *doctor) processes(name string) (pids []string, _ error) {
	dirs, err := d.glob("proc/[0-9]*")
	errs := []error{err}
	for _, dir := range dirs {
		comm, err := d.text(dir + "/comm")
		errs = append(errs, err)
		if comm == name {
			pids = append(pids, path.Base(dir))
		}
	}
	return pids, errors.Join(errs...)
}

func (d *doctor) descriptors(context.Context) (all []finding, err error) {
	pids, err := d.processes("hameshd")
	if len(pids) == 0 {
		return nil, errors.Join(errors.New("no process named hameshd is seen from here"), err)
	}
	for _, pid := range pids {
		limits, err := d.text("proc/" + pid + "/limits")
		if err != nil {
			return all, err
		}
		_, row, _ := strings.Cut(limits, "Max open files")
		f := strings.Fields(row)
		if len(f) == 0 {
			continue
		}
		if most, err := strconv.Atoi(f[0]); err == nil && most < filesEnough {
			all = append(all, finding{
				Code: "FEW_DESCRIPTORS", Node: d.self, Found: fmt.Sprintf("hameshd (process %s) may open %d files", pid, most),
				Why: "each client's connection takes two; what is more is refused", Fix: "LimitNOFILE=1048576 in its unit, or the container runtime's limit",
			})
			break // its guard has the same
		}
	}
	return all, nil
}

// networkd finds interfaces that systemd-networkd manages in a way in which it takes off
// addresses that are not its own (systemd.network(5), KeepConfiguration).
func (d *doctor) networkd(context.Context) (all []finding, _ error) {
	if err := d.elsewhere(); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, v := range d.status.GetVips() {
		ifname := v.GetInterface()
		if ifname == "" || seen[ifname] {
			continue
		}
		seen[ifname] = true
		index, err := d.number("sys/class/net/" + ifname + "/ifindex")
		if err != nil {
			return all, err
		}
		state, err := d.text("run/systemd/netif/links/" + fmt.Sprint(index))
		if err != nil {
			return all, err
		}
		file := assigned(state, "NETWORK_FILE")
		if file == "" {
			continue // not managed
		}
		files := append([]string{file}, strings.FieldsFunc(assigned(state, "NETWORK_FILE_DROPINS"), func(r rune) bool { return r == ' ' || r == ':' })...)
		kept := ""
		for _, f := range files {
			settings, err := d.text(strings.TrimPrefix(f, "/"))
			if err != nil {
				return all, err
			}
			if keep := assigned(settings, "KeepConfiguration"); keep != "" {
				kept = keep
			}
		}
		if !slices.Contains([]string{"static", "yes", "true", "on", "1"}, kept) {
			all = append(all, finding{
				Code: "NETWORKD_DROPS_ADDRESSES", Node: d.self, Found: fmt.Sprintf("systemd-networkd manages %s by %s, without KeepConfiguration=static", ifname, file),
				Why: "when it is restarted or configures the interface anew, as updates do, it takes off addresses that are not its own; hameshd puts them on again, but clients notice",
				Fix: "KeepConfiguration=static in [Network] of " + file + ", or in a drop-in; with netplan, critical: true",
			})
		}
	}
	return all, nil
}

// assigned returns the last value of KEY=VALUE in a text, without quotes.
func assigned(text, key string) (value string) {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.TrimSpace(k) == key {
			value = strings.Trim(strings.TrimSpace(v), `"`)
		}
	}
	return value
}

// mention is a line of a file that names an address.
type mention struct{ file, line string }

func (m mention) String() string { return "/" + m.file }

// mentions finds lines, comments aside, that name an address. The error is of files that
// cannot be read.
func (d *doctor) mentions(address string, patterns ...string) (all []mention, _ error) {
	// Not as a part of another one: 10.0.0.1 is not in 10.0.0.10.
	word := regexp.MustCompile(`(^|[^0-9A-Za-z.:])` + regexp.QuoteMeta(address) + `($|[^0-9A-Za-z.])`)
	var errs []error
	for _, p := range patterns {
		files, err := d.glob(p)
		errs = append(errs, err)
		for _, f := range files {
			info, err := fs.Stat(d.root, f)
			switch {
			case errors.Is(err, fs.ErrNotExist): // a link to nowhere
				continue
			case err == nil && !info.Mode().IsRegular():
				continue
			case err == nil && info.Size() > 1<<20:
				err = fmt.Errorf("/%s has %d bytes, which is too much to look through", f, info.Size())
			}
			var text string
			if err == nil {
				text, err = d.text(f)
			}
			errs = append(errs, err)
			for line := range strings.Lines(text) {
				line = strings.TrimSpace(line)
				if line != "" && !strings.ContainsAny(line[:1], "#;!") && word.MatchString(line) {
					all = append(all, mention{f, line})
				}
			}
		}
	}
	return all, errors.Join(errs...)
}

// manifests are where static pods are.
var manifests = []string{"etc/kubernetes/manifests/*", "var/lib/rancher/*/agent/pod-manifests/*", "var/lib/rancher/*/server/manifests/*"}

// eachVIP collects what look finds for each VIP.
func (d *doctor) eachVIP(look func(*hameshv1.Vip) ([]finding, error)) (all []finding, _ error) {
	var errs []error
	for _, v := range d.status.GetVips() {
		found, err := look(v)
		all, errs = append(all, found...), append(errs, err)
	}
	return all, errors.Join(errs...)
}

// rivals finds others on this machine that are to have a VIP.
func (d *doctor) rivals(context.Context) ([]finding, error) {
	return d.eachVIP(func(v *hameshv1.Vip) (all []finding, _ error) {
		var errs []error
		for _, r := range []struct {
			name  string
			files []string
			stop  string
		}{
			{"keepalived", []string{"etc/keepalived/*", "etc/keepalived/*/*"}, "systemctl disable --now keepalived, or take the address out of its configuration"},
			{"vip-manager", []string{"etc/default/vip-manager*", "etc/vip-manager*", "etc/patroni/vip-manager*"}, "systemctl disable --now vip-manager"},
			{"kube-vip", manifests, "take its manifest away, and then the address off the interface where it is left (ip addr del)"},
		} {
			found, err := d.mentions(v.GetAddress(), r.files...)
			errs = append(errs, err)
			found = slices.DeleteFunc(found, func(m mention) bool {
				text, _ := d.text(m.file) // has just been read
				return !strings.Contains(m.file, r.name) && !strings.Contains(text, r.name)
			})
			if len(found) == 0 {
				continue
			}
			running := ""
			pids, err := d.processes(r.name)
			errs = append(errs, err)
			if len(pids) > 0 {
				running = ", and runs"
			}
			all = append(all, finding{
				Code: "RIVAL", Node: d.self, Found: fmt.Sprintf("%s is configured for %s, by %s%s", r.name, v.GetAddress(), found[0], running),
				Why: "two that put the same address on different nodes make it work for nobody", Fix: r.stop + "; on every node",
			})
		}
		return all, errors.Join(errs...)
	})
}

// staticAddresses finds a VIP that the system puts on this machine at boot.
func (d *doctor) staticAddresses(context.Context) ([]finding, error) {
	return d.eachVIP(func(v *hameshv1.Vip) ([]finding, error) {
		found, err := d.mentions(v.GetAddress(), "etc/network/interfaces", "etc/network/interfaces.d/*", "etc/netplan/*.yaml",
			"etc/systemd/network/*", "run/systemd/network/*", "etc/NetworkManager/system-connections/*", "etc/sysconfig/network-scripts/ifcfg-*")
		// A VIP may well be a server that this machine asks.
		found = slices.DeleteFunc(found, func(m mention) bool {
			return regexp.MustCompile(`(?i)dns|nameserver|ntp|gateway|via`).MatchString(m.line)
		})
		if len(found) == 0 {
			return nil, err
		}
		return []finding{{
			Code: "VIP_STATIC", Node: d.self, Found: fmt.Sprintf("%s is configured in %s: %s", v.GetAddress(), found[0], found[0].line),
			Why: "the system puts it on this node whoever owns it; hameshd takes it off, until the system does so again",
			Fix: "take it out of that file: hameshd alone puts it on",
		}}, err
	})
}

// nodeAddresses finds a VIP that is taken for the address of this node.
func (d *doctor) nodeAddresses(context.Context) ([]finding, error) {
	return d.eachVIP(func(v *hameshv1.Vip) ([]finding, error) {
		found, err := d.mentions(v.GetAddress(), "etc/kubernetes/manifests/etcd.yaml", "etc/kubernetes/manifests/kube-apiserver.yaml",
			"var/lib/kubelet/kubeadm-flags.env", "etc/default/kubelet", "etc/sysconfig/kubelet")
		found = slices.DeleteFunc(found, func(m mention) bool {
			return !regexp.MustCompile(`--(advertise-address|node-ip|initial-advertise-peer-urls|initial-cluster|advertise-client-urls|listen-[a-z-]+)=`).MatchString(m.line)
		})
		if len(found) == 0 {
			return nil, err
		}
		return []finding{{
			Code: "VIP_AS_NODE_ADDRESS", Node: d.self, Found: fmt.Sprintf("%s takes the VIP for the address of this node: %s", found[0], found[0].line),
			Why: "when the VIP moves, etcd, the API server or the kubelet of this node lose their own address",
			Fix: "put the address of the node there: advertiseAddress and node-ip in kubeadm's configuration",
		}}, err
	})
}

// kubeconfigs finds clients on this machine that do not come by the VIP. Those of the
// controller manager, the scheduler and the kubelet are left out: on a control-plane node
// they are meant to use the API server next to them.
func (d *doctor) kubeconfigs(context.Context) (all []finding, _ error) {
	var errs []error
	for _, file := range []string{"etc/kubernetes/admin.conf", "etc/kubernetes/super-admin.conf", "root/.kube/config"} {
		text, err := d.text(file)
		var config struct {
			Clusters []struct {
				Cluster struct {
					Server string `json:"server"`
				} `json:"cluster"`
			} `json:"clusters"`
		}
		if err = errors.Join(err, yaml.Unmarshal([]byte(text), &config)); err != nil {
			errs = append(errs, fmt.Errorf("/%s: %w", file, err))
			continue
		}
		for _, c := range config.Clusters {
			if wrong := d.bypass(c.Cluster.Server); wrong != "" {
				all = append(all, finding{
					Code: "KUBECONFIG_PAST_VIP", Node: d.self, Found: fmt.Sprintf("/%s uses %s, %s", file, c.Cluster.Server, wrong),
					Why: "who uses it is cut off when that one API server fails, whatever the VIP does",
					Fix: "kubectl config set-cluster NAME --kubeconfig /" + file + " --server https://" + d.front() + ", and controlPlaneEndpoint in kubeadm's configuration",
				})
			}
		}
	}
	return all, errors.Join(errs...)
}

// bypass says what is wrong with a server's address; empty: nothing, or it is none of ours.
func (d *doctor) bypass(server string) string {
	u, err := url.Parse(server)
	if err != nil {
		return ""
	}
	for _, n := range d.status.GetNodes() {
		if u.Hostname() == n.GetAddress() {
			return "which is " + n.GetName() + " alone"
		}
	}
	for _, v := range d.status.GetVips() {
		if u.Hostname() == v.GetAddress() && !slices.ContainsFunc(d.entries(), func(e entry) bool { return fmt.Sprint(e.proxy.GetPort()) == u.Port() }) {
			return "which is the API server of the VIP's owner alone, not the proxy"
		}
	}
	return ""
}

// front is where clients should connect.
func (d *doctor) front() string {
	for _, e := range d.entries() {
		return net.JoinHostPort(e.vip.GetAddress(), fmt.Sprint(e.proxy.GetPort()))
	}
	return "VIP:PORT"
}
