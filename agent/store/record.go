package store

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/hamesh/hamesh/agent/ownership"
)

// keys is the prefix of all keys of one mesh; it ends in a slash.
type keys string

func (k keys) identity() string          { return string(k) + "identity" }
func (k keys) boot(member string) string { return string(k) + "boot/" + member }
func (k keys) record(vip string) string  { return string(k) + "vips/" + vip + "/record" }
func (k keys) fence(vip string) string   { return string(k) + "vips/" + vip + "/fence" }

// value is what the record key and the fence key hold. The field names are read by
// people with etcdctl and by agents of other versions.
type value struct {
	Owner     string `json:"owner"`
	OwnerBoot uint64 `json:"ownerBoot,omitempty"`
	Prev      string `json:"prev,omitempty"`
	PrevBoot  uint64 `json:"prevBoot,omitempty"`
	Epoch     int64  `json:"epoch,omitempty"` // 0: the revision of this write
	Lease     int64  `json:"lease,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Request   string `json:"request,omitempty"`
}

func encode(w ownership.Write) (string, error) {
	v := value{
		Owner:     w.Record.Owner,
		OwnerBoot: w.Record.OwnerBoot,
		Prev:      w.Record.Prev,
		PrevBoot:  w.Record.PrevBoot,
		Epoch:     w.Record.Epoch,
		Lease:     w.Record.Lease,
		Reason:    w.Record.Reason,
		Request:   w.Record.Request,
	}
	if w.Release {
		v.Owner, v.OwnerBoot, v.Lease = "", 0, 0
	}
	b, err := json.Marshal(v)
	return string(b), err
}

// decode makes the record of a VIP from its two keys; either may be nil.
func decode(vip string, record, fence *mvccpb.KeyValue) (ownership.Record, error) {
	if fence == nil {
		return ownership.Record{VIP: vip, Gone: true}, nil
	}
	var v value
	if err := json.Unmarshal(fence.Value, &v); err != nil {
		return ownership.Record{}, fmt.Errorf("key %s: %w", fence.Key, err)
	}
	r := ownership.Record{
		VIP:       vip,
		Owner:     v.Owner,
		OwnerBoot: v.OwnerBoot,
		Prev:      v.Prev,
		PrevBoot:  v.PrevBoot,
		Epoch:     v.Epoch,
		Revision:  fence.ModRevision,
		Lease:     v.Lease,
		Gone:      record == nil || record.ModRevision != fence.ModRevision,
		Reason:    v.Reason,
		Request:   v.Request,
	}
	if r.Epoch == 0 {
		r.Epoch = r.Revision
	}
	return r, nil
}

// contents is everything below one mesh's prefix.
type contents struct {
	identity string
	boots    map[string]uint64
	records  []ownership.Record
	orders   Orders
}

// parse sorts out the answer to a range over the prefix, which is in key order. Keys of
// unknown names belong to other versions and are left alone.
func (k keys) parse(kvs []*mvccpb.KeyValue) (contents, error) {
	c := contents{boots: map[string]uint64{}, orders: Orders{InForce: map[Subject]Order{}}}
	found := map[string]*mvccpb.KeyValue{}
	for _, kv := range kvs {
		found[string(kv.Key)] = kv
	}
	for _, kv := range kvs {
		name := strings.TrimPrefix(string(kv.Key), string(k))
		if name == "identity" {
			c.identity = string(kv.Value)
		} else if member, ok := strings.CutPrefix(name, "boot/"); ok {
			boot, err := strconv.ParseUint(string(kv.Value), 10, 64)
			if err != nil {
				return c, fmt.Errorf("key %s: %w", kv.Key, err)
			}
			c.boots[member] = boot
		} else if name, ok := strings.CutPrefix(name, "vips/"); ok {
			vip, ok := strings.CutSuffix(name, "/fence")
			if !ok {
				continue
			}
			r, err := decode(vip, found[k.record(vip)], kv)
			if err != nil {
				return c, err
			}
			c.records = append(c.records, r)
		} else if name, ok := strings.CutPrefix(name, "orders/"); ok {
			c.orders.add(name, kv)
		}
	}
	return c, nil
}
