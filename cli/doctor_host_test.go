package cli

import (
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const hostRoutes = `Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth1	00000000	0101A8C0	0003	0	0	200	00000000	0	0	0
eth0	00000000	01004D0A	0003	0	0	100	00000000	0	0	0
eth0	00004D0A	00000000	0001	0	0	100	0000FFFF	0	0	0
`

const hostLimits = `Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max open files            FILES                FILES                files
Max locked memory         8388608              8388608              bytes
`

func kubeconfig(server string) string {
	return "apiVersion: v1\nkind: Config\nclusters:\n- name: kubernetes\n  cluster:\n    server: " + server + "\n"
}

// TestDoctorOfTheHost adds files to a machine on which nothing is wrong.
func TestDoctorOfTheHost(t *testing.T) {
	const conf4, conf6 = "proc/sys/net/ipv4/conf/", "proc/sys/net/ipv6/conf/"
	base := map[string]string{
		conf4 + "all/arp_ignore": "1\n", conf4 + "eth0/arp_ignore": "0\n", conf4 + "eth0/rp_filter": "1\n",
		conf6 + "eth0/disable_ipv6":                 "0\n",
		"proc/net/route":                            hostRoutes,
		"proc/sys/net/netfilter/nf_conntrack_count": "100\n", "proc/sys/net/netfilter/nf_conntrack_max": "262144\n",
		"proc/70/comm": "hameshd\n", "proc/70/limits": strings.ReplaceAll(hostLimits, "FILES", "1048576"),
		"proc/71/comm":                                 "keepalived\n", // for another address
		"etc/keepalived/keepalived.conf":               "vrrp_instance I {\n  virtual_ipaddress {\n    10.77.0.10\n    10.77.0.1001\n    # 10.77.0.100\n  }\n}\n",
		"sys/class/net/eth0/ifindex":                   "2\n",
		"etc/netplan/50.yaml":                          "network:\n  ethernets:\n    eth0:\n      addresses: [10.77.0.11/16]\n      nameservers: {addresses: [10.77.0.100]}\n",
		"etc/kubernetes/admin.conf":                    kubeconfig("https://10.77.0.100:16443"),
		"etc/kubernetes/kubelet.conf":                  kubeconfig("https://10.77.0.11:6443"),
		"etc/kubernetes/manifests/etcd.yaml":           "    - --initial-advertise-peer-urls=https://10.77.0.11:2380\n",
		"etc/kubernetes/manifests/kube-apiserver.yaml": "    - --advertise-address=10.77.0.11\n    - --service-account-issuer=https://10.77.0.100:16443\n",
	}
	for name, test := range map[string]struct {
		files map[string]string
		vip   string // empty: 10.77.0.100
		want  []string
		said  string
	}{
		"nothing":        {},
		"arp_ignore 2":   {map[string]string{conf4 + "eth0/arp_ignore": "2\n"}, "", []string{"ARP_IGNORED"}, "arp_ignore is 2 on eth0"},
		"arp_ignore all": {map[string]string{conf4 + "all/arp_ignore": "8\n"}, "", []string{"ARP_IGNORED"}, "arp_ignore is 8"},
		"rp_filter": {map[string]string{"proc/net/route": strings.ReplaceAll(hostRoutes, "\t100\t00000000", "\t300\t00000000")}, "",
			[]string{"RP_FILTER_STRICT"}, "leaves by eth1"},
		"rp_filter loose": {map[string]string{"proc/net/route": strings.ReplaceAll(hostRoutes, "\t100\t00000000", "\t300\t00000000"), conf4 + "all/rp_filter": "2\n"}, "", nil, ""},
		"no IPv6":         {map[string]string{conf6 + "eth0/disable_ipv6": "1\n"}, "fd77::100", []string{"IPV6_DISABLED"}, "fd77::100"},
		"no IPv6 needed":  {map[string]string{conf6 + "eth0/disable_ipv6": "1\n"}, "", nil, ""},
		"conntrack":       {map[string]string{"proc/sys/net/netfilter/nf_conntrack_count": "262000\n"}, "", []string{"CONNTRACK_FULL"}, "262000 connections of at most 262144"},
		"descriptors": {map[string]string{"proc/70/limits": strings.ReplaceAll(hostLimits, "FILES", "1024")}, "",
			[]string{"FEW_DESCRIPTORS"}, "process 70) may open 1024"},
		"networkd": {map[string]string{
			"run/systemd/netif/links/2":                   "ADMIN_STATE=configured\nNETWORK_FILE=/run/systemd/network/10-netplan-eth0.network\n",
			"run/systemd/network/10-netplan-eth0.network": "[Match]\nName=eth0\n[Network]\nAddress=10.77.0.11/16\n",
		}, "", []string{"NETWORKD_DROPS_ADDRESSES"}, "/run/systemd/network/10-netplan-eth0.network"},
		"networkd, kept": {map[string]string{
			"run/systemd/netif/links/2":                           "NETWORK_FILE=/etc/systemd/network/eth0.network\nNETWORK_FILE_DROPINS=\"/etc/systemd/network/eth0.network.d/keep.conf\"\n",
			"etc/systemd/network/eth0.network":                    "[Match]\nName=eth0\n[Network]\nKeepConfiguration=no\n",
			"etc/systemd/network/eth0.network.d/keep.conf":        "[Network]\nKeepConfiguration = static\n",
			"etc/systemd/network/eth0.network.d/other.conf.saved": "10.77.0.100",
		}, "", nil, ""},
		"networkd, another interface": {map[string]string{"run/systemd/netif/links/3": "NETWORK_FILE=/x\n"}, "", nil, ""},
		"keepalived": {map[string]string{"etc/keepalived/conf.d/api.conf": "  virtual_ipaddress { 10.77.0.100/24 dev eth0 }\n"}, "",
			[]string{"RIVAL"}, "keepalived is configured for 10.77.0.100, by /etc/keepalived/conf.d/api.conf, and runs"},
		"kube-vip": {map[string]string{"etc/kubernetes/manifests/kube-vip.yaml": "    - name: address\n      value: 10.77.0.100\n    image: ghcr.io/kube-vip/kube-vip:v1\n"}, "",
			[]string{"RIVAL"}, "/etc/kubernetes/manifests/kube-vip.yaml"},
		"another manifest": {map[string]string{"etc/kubernetes/manifests/x.yaml": "      value: 10.77.0.100\n"}, "", nil, ""},
		"netplan": {map[string]string{"etc/netplan/99.yaml": "      addresses: [10.77.0.11/16, 10.77.0.100/32]\n"}, "",
			[]string{"VIP_STATIC"}, "/etc/netplan/99.yaml: addresses: [10.77.0.11/16, 10.77.0.100/32]"},
		"ifupdown, IPv6": {map[string]string{"etc/network/interfaces": "iface eth0 inet6 static\n  address fd77::100/64\n"}, "fd77::100", []string{"VIP_STATIC"}, "fd77::100/64"},
		"node-ip":        {map[string]string{"var/lib/kubelet/kubeadm-flags.env": "KUBELET_KUBEADM_ARGS=\"--node-ip=10.77.0.100 --x=y\"\n"}, "", []string{"VIP_AS_NODE_ADDRESS"}, "kubeadm-flags.env"},
		"etcd":           {map[string]string{"etc/kubernetes/manifests/etcd.yaml": "    - --initial-advertise-peer-urls=https://10.77.0.100:2380\n"}, "", []string{"VIP_AS_NODE_ADDRESS"}, "etcd.yaml"},
		"kubeconfig": {map[string]string{"etc/kubernetes/admin.conf": kubeconfig("https://10.77.0.12:6443")}, "",
			[]string{"KUBECONFIG_PAST_VIP"}, "https://10.77.0.12:6443, which is cp-2 alone"},
		"kubeconfig, another port": {map[string]string{"root/.kube/config": kubeconfig("https://10.77.0.100:6443")}, "", []string{"KUBECONFIG_PAST_VIP"}, "not the proxy"},
		"kubeconfig of another":    {map[string]string{"root/.kube/config": kubeconfig("https://192.0.2.7:6443")}, "", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := fstest.MapFS{}
			for _, files := range []map[string]string{base, test.files} {
				for file, text := range files {
					root[file] = &fstest.MapFile{Data: []byte(text)}
				}
			}
			s := healthy()
			s.Vips[0].Interface, s.Proxies = "eth0", []*hameshv1.Proxy{{Name: "kube-api", Port: 16443}}
			if test.vip != "" {
				s.Vips[0].Address = test.vip
			}
			d := &doctor{status: s, self: "cp-1", root: root}
			r := d.report(t.Context(), d.hostChecks())
			complete(t, r.Findings)
			if got := codesOf(r.Findings); !slices.Equal(got, test.want) {
				t.Fatalf("found %v, want %v\n%+v", got, test.want, r.Findings)
			}
			for _, c := range r.Checks {
				if c.Missing != "" {
					t.Errorf("%s is incomplete: %s", c.Name, c.Missing)
				}
			}
			if len(r.Findings) > 0 && !strings.Contains(r.Findings[0].Found, test.said) {
				t.Errorf("%q does not say %q", r.Findings[0].Found, test.said)
			}
			if len(r.Findings) > 0 && r.Findings[0].Node != "cp-1" {
				t.Errorf("of node %q", r.Findings[0].Node)
			}
		})
	}
}

// locked is a machine on which only some files may be read.
type locked struct{ fstest.MapFS }

func (l locked) ReadFile(name string) ([]byte, error) {
	if strings.HasPrefix(name, "etc/") || strings.HasSuffix(name, "limits") {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return l.MapFS.ReadFile(name)
}

// What could not be read is no finding, and not passed over in silence either.
func TestDoctorWithoutPrivilege(t *testing.T) {
	root := locked{fstest.MapFS{}}
	for _, file := range []string{"etc/kubernetes/admin.conf", "etc/keepalived/keepalived.conf", "etc/netplan/50.yaml", "proc/7/limits"} {
		root.MapFS[file] = &fstest.MapFile{Data: []byte("10.77.0.100")}
	}
	root.MapFS["proc/7/comm"] = &fstest.MapFile{Data: []byte("hameshd\n")}
	d := &doctor{status: healthy(), self: "cp-1", root: root}
	r := d.report(t.Context(), d.hostChecks())
	var incomplete []string
	for _, c := range r.Checks {
		if c.Missing != "" {
			incomplete = append(incomplete, c.Name)
		}
	}
	if want := []string{"descriptors", "rivals", "static-addresses", "kubeconfigs"}; len(r.Findings) > 0 || !slices.Equal(incomplete, want) {
		t.Errorf("incomplete: %v, want %v; found %+v", incomplete, want, r.Findings)
	}
}

// barred is a machine on which files and directories below these may not be looked at.
type barred struct {
	fstest.MapFS
	names []string
}

func (b barred) Open(name string) (fs.File, error) {
	for _, n := range b.names {
		if name == n || strings.HasPrefix(name, n+"/") {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
		}
	}
	return b.MapFS.Open(name)
}

func (b barred) ReadFile(name string) ([]byte, error) {
	if _, err := b.Open(name); err != nil {
		return nil, err
	}
	return b.MapFS.ReadFile(name)
}

func (b barred) ReadDir(name string) ([]fs.DirEntry, error) {
	if _, err := b.Open(name); err != nil {
		return nil, err
	}
	return b.MapFS.ReadDir(name)
}

func (b barred) Stat(name string) (fs.FileInfo, error) {
	for _, n := range b.names {
		if strings.HasPrefix(name, n+"/") { // the name itself is in a directory that is open
			return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrPermission}
		}
	}
	return b.MapFS.Stat(name)
}

// TestDoctorBarred bars the way to one place after the other: the checks that look there
// are incomplete, and no other.
func TestDoctorBarred(t *testing.T) {
	root := fstest.MapFS{}
	for _, file := range []string{
		"proc/7/comm", "proc/7/limits", "proc/net/route", "proc/sys/net/ipv4/conf/eth0/rp_filter", "proc/sys/net/netfilter/nf_conntrack_max",
		"sys/class/net/eth0/ifindex", "etc/keepalived/conf.d/a.conf", "etc/netplan/50.yaml", "etc/kubernetes/manifests/etcd.yaml", "etc/large",
	} {
		root[file] = &fstest.MapFile{Data: []byte("1\n")}
	}
	root["proc/7/comm"] = &fstest.MapFile{Data: []byte("hameshd\n")}
	for name, want := range map[string][]string{
		"none":                        nil,
		"proc/sys/net/ipv4/conf/eth0": {"kernel-settings"},
		"proc/sys/net/netfilter/nf_conntrack_max": {"conntrack"},
		"proc/7/comm":                        {"descriptors"},
		"proc/7/limits":                      {"descriptors"},
		"sys/class/net/eth0":                 {"networkd"},
		"etc/keepalived":                     {"rivals"},
		"etc/keepalived/conf.d":              {"rivals"},
		"etc/netplan":                        {"static-addresses"},
		"etc/kubernetes/manifests":           {"rivals", "node-addresses"},
		"etc/kubernetes/manifests/etcd.yaml": {"rivals", "node-addresses"},
	} {
		t.Run(name, func(t *testing.T) {
			s := healthy()
			s.Vips[0].Interface = "eth0"
			d := &doctor{status: s, self: "cp-1", root: barred{root, []string{name}}}
			r := d.report(t.Context(), d.hostChecks())
			var incomplete []string
			for _, c := range r.Checks {
				if c.Missing != "" {
					incomplete = append(incomplete, c.Name)
				}
			}
			if !slices.Equal(incomplete, want) {
				t.Errorf("incomplete: %v, want %v; %+v", incomplete, want, r.Checks)
			}
		})
	}
	root["etc/netplan/51.yaml"] = &fstest.MapFile{Data: make([]byte, 1<<20+1)}
	root["etc/netplan/52.yaml"] = &fstest.MapFile{Data: []byte(strings.Repeat("x", 1<<17) + "\naddresses: [10.77.0.100/32]\n")}
	d := &doctor{status: healthy(), self: "cp-1", root: root}
	found, err := d.staticAddresses(t.Context())
	if len(found) != 1 || err == nil || !strings.Contains(err.Error(), "51.yaml") {
		t.Errorf("%+v, %v", found, err)
	}
}

// Another member's word on its interfaces says nothing of this machine.
func TestDoctorAsksItself(t *testing.T) {
	s := healthy()
	s.Vips[0].Interface = "eth0"
	root := fstest.MapFS{"proc/sys/net/ipv4/conf/eth0/arp_ignore": {Data: []byte("2\n")}}
	for self, want := range map[string]bool{"cp-1": true, "cp-2": false} {
		d := &doctor{status: s, self: self, root: root}
		found, err := d.kernelSettings(t.Context())
		_, networkdErr := d.networkd(t.Context())
		if (len(found) == 1) != want || (err == nil) != want || (networkdErr == nil) != want {
			t.Errorf("on %s: %v, %v, %v", self, found, err, networkdErr)
		}
	}
}

// A machine that is none of Linux has none of the files.
func TestDoctorElsewhere(t *testing.T) {
	s := healthy()
	s.Vips[0].Interface = "en0"
	d := &doctor{status: s, self: "cp-1", root: fstest.MapFS{}}
	if r := d.report(t.Context(), d.hostChecks()); len(r.Findings) > 0 {
		t.Errorf("%+v", r.Findings)
	}
}
