package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"

	"github.com/hamesh/hamesh/agent/config"
)

// digestLength is how many bytes of a part's hash are told: enough to notice a difference
// that nobody makes on purpose, and few in every heartbeat.
const digestLength = 4

// configDigests returns the digests of the parts of a configuration that all members must
// have in common, in the order in which Node.config_digests has them. What each member
// decides for itself is left out: its role and priority, interfaces, files, the log. Files
// and the order of lists that have none are left out too.
func configDigests(c *config.Config) []byte {
	var members []string
	for _, m := range c.Members {
		members = append(members, m.Name+"="+m.Address.String())
	}
	slices.Sort(members)
	vips := slices.Clone(c.VIPs)
	for i := range vips {
		vips[i].Interface = ""
	}
	slices.SortFunc(vips, func(a, b config.VIP) int { return strings.Compare(a.Name, b.Name) })
	proxies := slices.Clone(c.Proxies)
	for i := range proxies {
		h := &proxies[i].HealthCheck
		h.CAFile, h.CertFile, h.KeyFile = "", "", ""
		proxies[i].Limits, proxies[i].ConnectionLog = config.Limits{}, config.LogOff
		proxies[i].Backends = slices.Clone(proxies[i].Backends)
		slices.SortFunc(proxies[i].Backends, func(a, b config.Backend) int { return strings.Compare(a.Name, b.Name) })
	}
	slices.SortFunc(proxies, func(a, b config.Proxy) int { return strings.Compare(a.Name, b.Name) })
	timing := c.Timing
	timing.Profile = "" // its values count, whatever they came from
	var prefix, kind string
	var peerPort uint16
	if c.Store.External != nil {
		// Members may name different endpoints of one etcd cluster.
		kind, prefix = "external", c.Store.External.Prefix
	} else {
		kind, peerPort = "embedded", c.Store.Embedded.PeerPort
	}
	var digests []byte
	for _, part := range []any{
		[]any{c.Mesh, members}, vips, proxies, timing, []any{kind, prefix, peerPort}, []any{c.API.Port, c.TLS.Insecure},
	} {
		text, err := json.Marshal(part)
		if err != nil {
			panic(err) // plain data; a type that JSON cannot write is a mistake in this function
		}
		sum := sha256.Sum256(text)
		digests = append(digests, sum[:digestLength]...)
	}
	return digests
}

// digestWords writes digests as the status has them.
func digestWords(digests []byte) (words []string) {
	for d := range slices.Chunk(digests, digestLength) {
		words = append(words, hex.EncodeToString(d))
	}
	return words
}
