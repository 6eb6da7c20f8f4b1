package parts

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/hamesh/hamesh/agent/config"
)

// DigestLength is how many bytes of a part's hash are told: enough to notice a difference
// that nobody makes on purpose, and few in every heartbeat.
const DigestLength = 4

// Names are what the parts are called, in the order of the digests.
var Names = []string{"members", "vips", "proxies", "timing", "store", "api and tls"}

// Parts are the texts of a configuration's parts, and the digest of each.
type Parts struct {
	Texts   []string // JSON
	Digests []byte   // DigestLength bytes each
}

// Of returns the parts of a configuration. What each member decides for itself is left out:
// its role and priority, interfaces, files, the log. Files and the order of lists that have
// none are left out too.
func Of(c *config.Config) Parts {
	members := map[string]string{}
	for _, m := range c.Members {
		members[m.Name] = m.Address.String()
	}
	vips := slices.Clone(c.VIPs)
	for i := range vips {
		vips[i].Interface = ""
	}
	proxies := slices.Clone(c.Proxies)
	for i := range proxies {
		h := &proxies[i].HealthCheck
		h.CAFile, h.CertFile, h.KeyFile = "", "", ""
		proxies[i].Limits, proxies[i].ConnectionLog = config.Limits{}, ""
	}
	timing := c.Timing
	timing.Profile = "" // its values count, whatever they came from
	store := map[string]any{}
	if c.Store.External != nil {
		// Members may name different endpoints of one etcd cluster.
		store["external"] = map[string]any{"prefix": c.Store.External.Prefix}
	} else {
		store["embedded"] = map[string]any{"peerPort": c.Store.Embedded.PeerPort}
	}
	var p Parts
	for _, part := range []any{
		map[string]any{"mesh": c.Mesh, "members": members},
		map[string]any{"vips": plain(reflect.ValueOf(vips))},
		map[string]any{"proxies": plain(reflect.ValueOf(proxies))},
		map[string]any{"timing": plain(reflect.ValueOf(timing))},
		map[string]any{"store": store},
		map[string]any{"api": map[string]any{"port": c.API.Port}, "tls": map[string]any{"insecure": c.TLS.Insecure}},
	} {
		text, err := json.Marshal(part)
		if err != nil {
			panic(err) // plain data; what JSON cannot write is a mistake in this function
		}
		sum := sha256.Sum256(text)
		p.Texts = append(p.Texts, string(text))
		p.Digests = append(p.Digests, sum[:DigestLength]...)
	}
	return p
}

// plain turns a value of a configuration into what JSON writes as people know it: keys as in
// the file, durations and addresses in words, lists of things with names as mappings, so
// that their order makes no difference. What is empty is left out.
func plain(v reflect.Value) any {
	if text, ok := v.Interface().(fmt.Stringer); ok {
		return text.String()
	}
	switch v.Kind() {
	case reflect.Struct:
		all := map[string]any{}
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if f.IsExported() && !v.Field(i).IsZero() {
				all[strings.ToLower(f.Name[:1])+f.Name[1:]] = plain(v.Field(i))
			}
		}
		return all
	case reflect.Slice:
		named := map[string]any{}
		list := []any{}
		for i := range v.Len() {
			item := plain(v.Index(i))
			list = append(list, item)
			if m, ok := item.(map[string]any); ok {
				if name, ok := m["name"].(string); ok {
					delete(m, "name")
					named[name] = m
				}
			}
		}
		if len(named) == v.Len() && v.Len() > 0 {
			return named
		}
		return list
	}
	return v.Interface()
}

// Words writes digests as the status has them.
func Words(digests []byte) (words []string) {
	for d := range slices.Chunk(digests, DigestLength) {
		words = append(words, hex.EncodeToString(d))
	}
	return words
}

// Differ lists the parts in which two configurations differ, by their digests. Digests that
// are not of as many parts are of a version that counts differently, and say nothing.
func Differ(a, b []byte) (differ []int) {
	if len(a) != len(b) || len(a) != len(Names)*DigestLength {
		return nil
	}
	for i := range Names {
		at := i * DigestLength
		if string(a[at:at+DigestLength]) != string(b[at:at+DigestLength]) {
			differ = append(differ, i)
		}
	}
	return differ
}
