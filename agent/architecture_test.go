package agent_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/hamesh/hamesh"

// mayImport says which of the module's packages each one may import, tests aside.
// Whatever is not listed here may import none, so that a new dependency is a decision.
var mayImport = map[string]struct {
	packages []string
	why      string
}{
	"agent":                 {[]string{"agent/*", "agent/proxy/*", "gen/*", "server"}, "the composition root: where everything meets"},
	"agent/guard":           {[]string{"agent/credentials", "agent/handover", "agent/vip", "gen/*"}, "a process of its own, with little in it"},
	"agent/hameshd":         {[]string{"agent"}, "flags, signals and logs are agent.Main's"},
	"agent/page":            {[]string{"gen/*"}, "shows the API's messages"},
	"agent/parts":           {[]string{"agent/config"}, "what configurations have in common"},
	"agent/peer":            {[]string{"gen/*"}, "speaks the wire's language; what it says is the agent's business"},
	"agent/probe":           {[]string{"agent/health"}, "its results are health's values"},
	"agent/proxy":           {[]string{"agent/health", "agent/proxy/affinity"}, "acts on health's states, chooses by affinity"},
	"agent/store":           {[]string{"agent/ownership"}, "its events are ownership's values"},
	"cli":                   {[]string{"agent/config", "cli/pki", "deploy", "gen/*"}, "knows agents only by their API and their configuration file, and runs on other systems too"},
	"cli/hactl":             {[]string{"cli"}, "ten lines"},
	"deploy/lab":            {[]string{"gen/*"}, "agent and CLI are processes to it, whatever they are made of"},
	"deploy/lab/hamesh-lab": {[]string{"agent", "cli", "deploy/lab", "deploy/lab/load"}, "agent and CLI in one program, for the demo"},
	"deploy/lab/load":       {[]string{"deploy/lab"}, "its processes run on the lab's hosts"},
	"server":                {[]string{"gen/*"}, "declares the interfaces it needs itself"},
}

// pure packages decide; they import the standard library alone, and nothing of it that
// acts. The values are the exceptions.
var pure = map[string][]string{
	"agent/ownership":      nil,
	"agent/health":         nil,
	"agent/hearsay":        nil,
	"agent/proxy/affinity": {"github.com/cespare/xxhash/v2"}, // a hash, as pure as arithmetic
}

// acting are standard packages that a pure one has no use for.
var acting = []string{"context", "io", "log", "net", "os", "runtime", "sync", "syscall", "testing", "unsafe"}

func TestArchitecture(t *testing.T) {
	files := token.NewFileSet()
	docs := map[string]int{}
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		rel, err := filepath.Rel("..", name)
		if err != nil {
			return err
		}
		pkg := path.Dir(filepath.ToSlash(rel))
		if strings.HasSuffix(name, "_test.go") || strings.HasPrefix(pkg, "gen/") {
			return nil
		}
		f, err := parser.ParseFile(files, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		if _, ok := docs[pkg]; !ok {
			docs[pkg] = 0
		}
		if f.Doc != nil {
			docs[pkg]++
		}
		checkImports(t, pkg, rel, f)
		if _, ok := pure[pkg]; ok {
			checkPure(t, pkg, rel, f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg, n := range docs {
		if n != 1 {
			t.Errorf("%s has %d package comments, want one", pkg, n)
		}
	}
}

func checkImports(t *testing.T, pkg, file string, f *ast.File) {
	for _, i := range f.Imports {
		name, _ := strconv.Unquote(i.Path.Value)
		ours, ok := strings.CutPrefix(name, module+"/")
		if !ok {
			continue
		}
		rule := mayImport[pkg]
		if !slices.ContainsFunc(rule.packages, func(allowed string) bool {
			if prefix, ok := strings.CutSuffix(allowed, "*"); ok {
				return strings.HasPrefix(ours, prefix)
			}
			return ours == allowed
		}) {
			t.Errorf("%s imports %s; %s may import %v: %s", file, ours, pkg, rule.packages, rule.why)
		}
	}
}

func checkPure(t *testing.T, pkg, file string, f *ast.File) {
	for _, i := range f.Imports {
		name, _ := strconv.Unquote(i.Path.Value)
		first, _, _ := strings.Cut(name, "/")
		switch {
		case name == "net/netip", slices.Contains(pure[pkg], name):
		case strings.Contains(first, "."):
			t.Errorf("%s is pure, and imports %s", file, name)
		case slices.Contains(acting, first):
			t.Errorf("%s is pure, and imports %s, which acts", file, name)
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			t.Errorf("%s is pure, and starts a goroutine", file)
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "NewTimer", "NewTicker"}, n.Sel.Name) {
				t.Errorf("%s is pure, and uses time.%s", file, n.Sel.Name)
			}
		}
		return true
	})
}
