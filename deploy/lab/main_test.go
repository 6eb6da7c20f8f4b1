//go:build linux

package lab_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestMain(m *testing.M) {
	lab.Agent(standInAgent)
	lab.CLI(standInCLI)
	lab.Role("sleeper", func([]string) int { select {} })
	lab.Enter()
	os.Exit(m.Run())
}

const vip = "10.77.0.100"

// standInAgent is as little of an agent as the lab's own tests need: cp-1 has the VIP
// for ever and passes every connection on to its own API server.
func standInAgent(args []string) int {
	if err := stand(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func stand(args []string) error {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	b, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	var config struct {
		Node struct{ Name, Address string }
	}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Cap") {
			fmt.Fprint(os.Stderr, line)
		}
	}
	// A child, as an agent's guard is one, which has to go with the node's power.
	child := lab.Command("sleeper")
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	if err := child.Start(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "child", child.Process.Pid)
	if config.Node.Name != "cp-1" {
		<-ended
		return nil
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(vip + "/32")
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", ":16443")
	if err != nil {
		return err
	}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			go relay(in, config.Node.Address+":6443")
		}
	}()
	<-ended
	return netlink.AddrDel(link, addr)
}

func relay(in net.Conn, backend string) {
	defer in.Close()
	out, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	defer out.Close()
	go func() {
		_, _ = io.Copy(out, in)
		_ = out.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(in, out)
}

func standInCLI([]string) int {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return 1
	}
	list, err := netlink.AddrList(link, unix.AF_INET)
	if err != nil {
		return 1
	}
	owner := ""
	for _, a := range list {
		if a.IP.String() == vip {
			owner = "cp-1"
		}
	}
	fmt.Printf(`{"mesh": "lab", "state": "STATE_HEALTHY", "vips": [{"name": "kube-api", "address": %q, "owner": %q}]}`, vip, owner)
	return 0
}
