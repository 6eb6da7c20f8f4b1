package deploy

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// known are the names of all metrics, those of a histogram's series too.
func known(t *testing.T) (names []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../agent/metrics/metrics.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING && strings.HasPrefix(l.Value, `"hamesh_`) {
			name, err := strconv.Unquote(l.Value)
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
			if strings.HasSuffix(name, "_seconds") {
				names = append(names, name+"_bucket", name+"_count", name+"_sum")
			}
		}
		return true
	})
	return names
}

var metricName = regexp.MustCompile(`\bhamesh_\w+`)

// checkExpressions checks that expressions of PromQL are of metrics that there are.
func checkExpressions(t *testing.T, known []string, all map[string]string) {
	t.Helper()
	for of, expression := range all {
		names := metricName.FindAllString(expression, -1)
		if len(names) == 0 {
			t.Errorf("%s is of no metric: %q", of, expression)
		}
		for _, name := range names {
			if !slices.Contains(known, name) {
				t.Errorf("%s: there is no metric %s", of, name)
			}
		}
	}
}

func TestAlerts(t *testing.T) {
	b, err := os.ReadFile("monitoring/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalStrict(b, &file); err != nil {
		t.Fatal(err)
	}
	expressions := map[string]string{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if _, twice := expressions[r.Alert]; twice || r.Alert == "" {
				t.Errorf("two alerts have the name %q, or one has none", r.Alert)
			}
			expressions[r.Alert] = r.Expr
			if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
				t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
			}
			if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s says too little: %v", r.Alert, r.Annotations)
			}
		}
	}
	if len(expressions) == 0 {
		t.Error("there are no alerts")
	}
	checkExpressions(t, known(t), expressions)
}

func TestDashboard(t *testing.T) {
	b, err := os.ReadFile("monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID          int
			Type, Title string
			Targets     []struct{ Expr string }
		}
		Annotations struct {
			List []struct{ Name, Expr string }
		}
	}
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}
	expressions, seen := map[string]string{}, map[int]bool{}
	for _, p := range dashboard.Panels {
		if seen[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		seen[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %s shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			expressions[p.Title+": "+target.Expr] = target.Expr
		}
	}
	for _, a := range dashboard.Annotations.List {
		expressions[a.Name] = a.Expr
	}
	if len(expressions) == 0 {
		t.Error("the dashboard is empty")
	}
	checkExpressions(t, known(t), expressions)
}
