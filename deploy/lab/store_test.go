//go:build linux

package lab_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/hamesh/hamesh/deploy/lab"
)

func TestStore(t *testing.T) {
	m := newMesh(t, lab.Options{Nodes: 1, ExternalStore: true})
	host := m.Client.Host
	client, err := clientv3.New(clientv3.Config{
		Endpoints: m.Store.Endpoints(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return host.DialContext(ctx, &net.Dialer{}, "tcp", address)
		})},
	})
	must(t, err)
	defer client.Close()
	read := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		r, err := client.Get(ctx, "k")
		if err != nil || len(r.Kvs) == 0 {
			return "", errors.Join(errors.New("nothing there"), err)
		}
		return string(r.Kvs[0].Value), nil
	}
	must(t, lab.Await(2*soon, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := client.Put(ctx, "k", "v")
		return err
	}))
	for _, fault := range []struct {
		name string
		do   func() error
	}{{"stopped", m.Store.Stop}, {"killed", m.Store.Kill}} {
		must(t, fault.do())
		if v, err := read(); err == nil {
			t.Errorf("%s, it answers %q", fault.name, v)
		}
		must(t, m.Store.Start())
		must(t, lab.Await(2*soon, func() error {
			if v, err := read(); err != nil || v != "v" {
				return fmt.Errorf("after it was %s: %q, %w", fault.name, v, err)
			}
			return nil
		}))
	}
}
