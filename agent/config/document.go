package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// document is one YAML document while it is decoded.
type document struct {
	source
	problems Problems
}

// fail notes a problem at a key.
func (d *document) fail(key, message, remedy string) {
	d.problems = append(d.problems, d.problem(key, message, remedy))
}

// failAt notes a problem at a line and column of the file.
func (d *document) failAt(line, column int, key, message, remedy string) {
	d.problems = append(d.problems, Problem{d.file, line, column, key, message, remedy})
}

// given says whether the file has the key.
func (d *document) given(key string) bool {
	_, ok := d.at[key]
	return ok
}

// read parses the text into the root of the one document in it. It notes why and
// returns false where that cannot be.
func (d *document) read(data []byte) (field, bool) {
	if len(data) > maxSize {
		d.failAt(0, 0, "", fmt.Sprintf("is larger than %d bytes", maxSize), "give a configuration file of hameshd")
		return field{}, false
	}
	if !utf8.Valid(data) {
		line := 1
		for ; utf8.Valid(firstLines(data, line)); line++ {
		}
		d.failAt(line, 1, "", "is not UTF-8", "save the file in UTF-8")
		return field{}, false
	}
	nodes, err := parseYAML(data)
	switch {
	case err != nil:
		line, message := syntaxError(data, err)
		remedy := "mend the indentation, quotes or brackets there or just above"
		if text := bytes.TrimLeft(firstLines(data, line)[len(firstLines(data, line-1)):], " "); bytes.HasPrefix(text, []byte("\t")) {
			remedy = "indent with spaces, not with tabs"
		}
		d.failAt(line, 1, "", message, remedy)
	case len(nodes) == 0, len(nodes) == 1 && nodes[0].Content[0].ShortTag() == "!!null":
		d.failAt(1, 1, "", "is empty", "start with apiVersion: "+apiVersion)
	case len(nodes) > 1:
		d.failAt(nodes[1].Line, nodes[1].Column, "", "has more than one document", "leave one; it ends before the line ---")
	default:
		root := nodes[0].Content[0]
		d.at[""] = position{root.Line, root.Column}
		return field{doc: d, node: root}, true
	}
	return field{}, false
}

// parseYAML returns up to two documents of the text.
func parseYAML(data []byte) ([]*yaml.Node, error) {
	var nodes []*yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for len(nodes) < 2 {
		node := new(yaml.Node)
		if err := decoder.Decode(node); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		nodes = append(nodes, node)
	}
	return nodes, nil
}

var yamlError = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// syntaxError finds the line of a syntax error. The parser often names the line where
// the enclosing mapping began, so this looks for the line with which the text stops
// being YAML, unless the text is so long that this would take long.
func syntaxError(data []byte, err error) (line int, message string) {
	match := yamlError.FindStringSubmatch(err.Error())
	line, _ = strconv.Atoi(match[1]) // 0 where no line was named
	if lines := bytes.Count(data, []byte("\n")) + 1; lines <= 1000 && len(data) <= 32<<10 {
		for line = lines; line > 1; line-- {
			if _, err := parseYAML(firstLines(data, line-1)); err == nil {
				break
			}
		}
	}
	return max(line, 1), "is not YAML: " + strings.TrimPrefix(err.Error(), match[0])
}

// firstLines returns the first n lines of the text.
func firstLines(data []byte, n int) []byte {
	end := 0
	for ; n > 0 && end < len(data); n-- {
		i := bytes.IndexByte(data[end:], '\n')
		if i < 0 {
			return data
		}
		end += i + 1
	}
	return data[:end]
}

// field is the value of one key or of one item of a list.
type field struct {
	doc  *document
	node *yaml.Node // nil: left out
	key  string
	moot bool // what should hold it is wrong or left out: its absence is no problem of its own
}

func (f field) given() bool { return f.node != nil }

func (f field) fail(message, remedy string) { f.doc.fail(f.key, message, remedy) }

// required notes a problem where the field is left out.
func (f field) required(remedy string) field {
	if !f.given() && !f.moot {
		f.fail("is missing", remedy)
		f.moot = true
	}
	return f
}

// mismatch notes that the field has not the wanted type.
func (f field) mismatch(want string) {
	message := "is " + describe(f.node)
	if f.node.Kind == yaml.AliasNode {
		want = "the value itself: aliases are not supported"
	}
	f.fail(message, "give "+want)
}

// describe says what stands at a node.
func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.AliasNode:
		return "an alias"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.ShortTag() == "!!null" || n.Value == "":
		return "empty"
	case n.ShortTag() == "!!str":
		return "the text " + quote(n.Value)
	case n.ShortTag() == "!!int" || n.ShortTag() == "!!float":
		return "the number " + quote(n.Value)
	}
	return quote(n.Value) + " of the type " + quote(n.ShortTag())
}

// quote prints text of the file on one line, of bounded length.
func quote(s string) string {
	if runes := []rune(s[:min(len(s), 400)]); len(runes) > 80 {
		s = string(runes[:80]) + "…"
	}
	return strconv.Quote(s)
}

// object reads a mapping with these keys and no others. The result has every one of
// them, left out or not.
func (f field) object(keys ...string) map[string]field {
	fields := make(map[string]field, len(keys))
	ok := f.given()
	if ok && (f.node.Kind != yaml.MappingNode || f.node.ShortTag() != "!!map") {
		f.mismatch("a mapping with the keys " + strings.Join(keys, ", "))
		ok = false
	}
	for _, key := range keys {
		fields[key] = field{doc: f.doc, key: join(f.key, key), moot: !ok}
	}
	if !ok {
		return fields
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(f.node.Content); i += 2 {
		name, value := f.node.Content[i], f.node.Content[i+1]
		path := join(f.key, plain(name.Value))
		if name.Kind != yaml.ScalarNode {
			f.doc.failAt(name.Line, name.Column, f.key, "has "+describe(name)+" as a key", "give one of "+strings.Join(keys, ", "))
			continue
		}
		if line, ok := seen[name.Value]; ok {
			f.doc.failAt(name.Line, name.Column, path, fmt.Sprintf("is repeated, first on line %d", line), "leave one of them")
			continue
		}
		seen[name.Value] = name.Line
		if !slices.Contains(keys, name.Value) {
			f.doc.failAt(name.Line, name.Column, path, "is not a known key", suggest(name.Value, keys))
			continue
		}
		f.doc.at[path] = position{name.Line, name.Column}
		fields[name.Value] = field{doc: f.doc, key: path, node: value}
	}
	return fields
}

func join(parent, key string) string {
	if parent == "" {
		return key
	}
	return parent + "." + key
}

// plain returns a key as it is, or quoted where it would not read as one in a path.
func plain(key string) string {
	for _, r := range key {
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_</", r) {
			return quote(key)
		}
	}
	if key == "" || len(key) > 80 {
		return quote(key)
	}
	return key
}

// suggest names the known key nearest to an unknown one, or all where none is near.
func suggest(unknown string, keys []string) string {
	nearest, least := "", 3 // more edits than two make another word
	for _, key := range keys {
		n := edits(strings.ToLower(unknown), strings.ToLower(key))
		if n < least && n < len(key) {
			nearest, least = key, n
		}
	}
	if nearest == "" {
		return "known here: " + strings.Join(keys, ", ")
	}
	return "did you mean " + nearest + "?"
}

// edits counts the single-character insertions, deletions and substitutions from one
// word to another (Levenshtein distance); words of very different length count as far.
func edits(a, b string) int {
	if d := len(a) - len(b); d > 2 || d < -2 {
		return len(a) + len(b)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// list reads a list. It has no items where the field is left out.
func (f field) list() []field {
	if !f.given() {
		return nil
	}
	if f.node.Kind != yaml.SequenceNode || f.node.ShortTag() != "!!seq" {
		f.mismatch("a list")
		return nil
	}
	items := make([]field, len(f.node.Content))
	for i, node := range f.node.Content {
		items[i] = field{doc: f.doc, node: node, key: fmt.Sprintf("%s[%d]", f.key, i)}
		f.doc.at[items[i].key] = position{node.Line, node.Column}
	}
	return items
}

// items reads a list that must be there and have an item.
func (f field) items(remedy string) []field {
	items := f.required(remedy).list()
	if f.given() && f.node.Kind == yaml.SequenceNode && len(items) == 0 {
		f.fail("is empty", remedy)
	}
	return items
}

// scalar reads a single value of one of YAML's types.
func (f field) scalar(tag, want string) (string, bool) {
	if !f.given() {
		return "", false
	}
	if f.node.Kind != yaml.ScalarNode || f.node.ShortTag() != tag || f.node.Value == "" {
		f.mismatch(want)
		return "", false
	}
	return f.node.Value, true
}

// text reads text; what it stands for is said by want. The result is empty where it is
// wrong.
func (f field) text(fallback, want string) string {
	if !f.given() {
		return fallback
	}
	s, ok := f.scalar("!!str", want+", in quotes where it looks like something else")
	if ok && strings.ContainsFunc(s, unicode.IsControl) {
		f.fail(quote(s)+" has control characters", "give "+want)
		return ""
	}
	return s
}

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// name reads a DNS label (RFC 1123, section 2.1). A wrong one is returned all the same,
// so that references to it are not reported too.
func (f field) name() string {
	const want = "a DNS label: lower-case letters, digits and inner hyphens, at most 63"
	s := f.text("", want)
	if s != "" && !label.MatchString(s) {
		f.fail(quote(s)+" is not a DNS label", "give "+want)
	}
	return s
}

// file reads the path of a file.
func (f field) file() string {
	path := f.text("", "the path of a file")
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(filepath.Dir(f.doc.file), path)
}

// absolute reads an absolute path. The result is empty where it is wrong.
func (f field) absolute(fallback string) string {
	path := f.text(fallback, "an absolute path, such as "+fallback)
	if path == "" {
		return ""
	}
	if !filepath.IsAbs(path) {
		f.fail(quote(path)+" is a relative path", "give an absolute one, such as "+fallback)
		return ""
	}
	return filepath.Clean(path)
}

// integer reads a whole number. The result is 0 where it is wrong.
func (f field) integer(fallback, least, most int) int {
	if !f.given() {
		return fallback
	}
	want := fmt.Sprintf("a whole number from %d to %d", least, most)
	s, ok := f.scalar("!!int", want)
	if !ok {
		return 0
	}
	// Octal, hexadecimal and the like are refused: YAML 1.1 and 1.2 read them differently.
	n, err := strconv.Atoi(s)
	if err != nil || strconv.Itoa(n) != s || n < least || n > most {
		f.fail(quote(s)+" is out of range", "give "+want)
		return 0
	}
	return n
}

func (f field) port(fallback uint16) uint16 {
	return uint16(f.integer(int(fallback), 1, 65535))
}

func (f field) boolean() bool {
	const want = "true or false"
	s, ok := f.scalar("!!bool", want)
	if ok && s != "true" && s != "false" {
		f.mismatch(want)
	}
	return s == "true"
}

// duration reads a duration with its unit. The result is 0 where it is wrong.
func (f field) duration(fallback, least, most time.Duration) time.Duration {
	if !f.given() {
		return fallback
	}
	want := fmt.Sprintf("a duration from %v to %v, with its unit", least, most)
	if f.node.Kind == yaml.ScalarNode && (f.node.ShortTag() == "!!int" || f.node.ShortTag() == "!!float") {
		f.fail(quote(f.node.Value)+" has no unit", "give "+want)
		return 0
	}
	s := f.text("", want)
	if s == "" {
		return 0
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		f.fail(quote(s)+" is not a duration", "give "+want)
		return 0
	}
	if v < least || v > most {
		f.fail(quote(s)+" is out of range", "give "+want)
		return 0
	}
	return v
}

// choice reads one of a few words. The result is empty where it is wrong.
func choice[T ~string](f field, fallback T, others ...T) T {
	if !f.given() {
		return fallback
	}
	known := []string{string(fallback)}
	for _, o := range others {
		known = append(known, string(o))
	}
	want := "one of " + strings.Join(known, ", ")
	s := f.text("", want)
	if s != "" && !slices.Contains(known, s) {
		f.fail(quote(s)+" is not a choice", "give "+want)
		return ""
	}
	return T(s)
}

// address reads the address of a host or a VIP. The result is zero where it is wrong.
func (f field) address() netip.Addr {
	const want = "an IPv4 or IPv6 address, such as 10.77.0.11"
	s := f.text("", want)
	if s == "" {
		return netip.Addr{}
	}
	addr, err := netip.ParseAddr(s)
	if err != nil {
		remedy := "give " + want
		if prefix, err := netip.ParsePrefix(s); err == nil {
			remedy = "leave the prefix length out: " + prefix.Addr().String()
		} else if ap, err := netip.ParseAddrPort(s); err == nil {
			remedy = "leave the port out: " + ap.Addr().String()
		}
		f.fail(quote(s)+" is not an IP address", remedy)
		return netip.Addr{}
	}
	if !f.unicast(addr) {
		return netip.Addr{}
	}
	return addr
}

// addressPort reads an address and a port. The result is zero where it is wrong.
func (f field) addressPort(fallback string) netip.AddrPort {
	want := "an address and a port, such as " + fallback
	s := f.text(fallback, want)
	if s == "" {
		return netip.AddrPort{}
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil || ap.Port() == 0 {
		f.fail(quote(s)+" is not an IP address and port", "give "+want)
		return netip.AddrPort{}
	}
	return ap
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// unicast notes a problem where an address cannot be that of one host as every other
// host writes it.
func (f field) unicast(addr netip.Addr) bool {
	problem, remedy := "", "give a unicast address"
	switch {
	case addr.Is4In6():
		problem, remedy = "an IPv4 address mapped into IPv6", "write "+addr.Unmap().WithZone("").String()
	case addr.IsUnspecified():
		problem = "the unspecified address"
	case addr.IsMulticast():
		problem = "a multicast address"
	case addr == broadcast:
		problem = "the broadcast address"
	case addr.Zone() != "" || addr.Is6() && addr.IsLinkLocalUnicast():
		problem, remedy = "a link-local address, which means another host on each link", "give a global or unique local address"
	default:
		return true
	}
	f.fail(addr.String()+" is "+problem, remedy)
	return false
}
