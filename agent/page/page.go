package page

import (
	"bytes"
	"cmp"
	_ "embed" // for the page
	"fmt"
	"html/template"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

// Data is what a page shows.
type Data struct {
	Now     time.Time
	Version string // of the agent that answers
	Status  *hameshv1.GetStatusResponse
	// RightFor says for how long this member's right to a VIP goes on where nothing renews
	// it; none for a VIP that it has no right to.
	RightFor   map[string]time.Duration
	Events     []*hameshv1.Event // newest first
	Unanswered []string          // members whose newest events may be missing
}

//go:embed page.html
var text string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"age": age, "heard": heard, "link": link, "list": list, "object": object, "serves": serves, "when": when, "word": word,
}).Parse(text))

// policy lets the page have its own style and nothing else (Content Security Policy
// Level 3): not even a script that somebody would manage to put into a name.
const policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

// Handler serves the page, with what source returns for each request.
func Handler(source func() Data) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		var b bytes.Buffer // so that nobody gets half a page
		if err := page.Execute(&b, source()); err != nil {
			http.Error(w, fmt.Sprintf("make the page: %v", err), http.StatusInternalServerError)
			return
		}
		h := w.Header()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		_, _ = w.Write(b.Bytes()) // fails where the reader has gone
	})
}

// word turns the name of an enum value into the word that people use: STATE_DOWN is
// "down".
func word(value fmt.Stringer) string {
	name := value.String()
	for _, prefix := range []string{"STATE_", "NODE_STATE_", "BACKEND_STATE_", "RIGHT_", "ROLE_", "EVENT_KIND_"} {
		if short, ok := strings.CutPrefix(name, prefix); ok {
			name = short
			break
		}
	}
	return strings.ToLower(strings.ReplaceAll(name, "_", "-"))
}

// serves is the word for a backend's state; one that only is not ready keeps its connections,
// and is not told to be down.
func serves(b *hameshv1.Backend) string {
	if b.GetState() == hameshv1.BackendState_BACKEND_STATE_DOWN && b.GetNotReady() {
		return "not-ready"
	}
	return word(b.GetState())
}

func list(names []string) string { return strings.Join(names, ", ") }

// link finds the one from one member to another; nil: nothing is known of it.
func link(all []*hameshv1.Link, from, to string) *hameshv1.Link {
	for _, l := range all {
		if l.GetFrom() == from && l.GetTo() == to {
			return l
		}
	}
	return nil
}

// heard is how long ago the member at the end of a link has heard the other one.
func heard(l *hameshv1.Link) string {
	d := l.GetHeard().AsDuration()
	switch {
	case l.GetHeard() == nil:
		return "never heard"
	case d < time.Second:
		return fmt.Sprintf("%d ms ago", d.Milliseconds())
	}
	return d.Truncate(time.Second).String() + " ago"
}

// age is for how long something has been so, in two units at most.
func age(now time.Time, since *timestamppb.Timestamp) string {
	d := max(now.Sub(since.AsTime()), 0)
	switch hours := int(d.Hours()); {
	case d < time.Hour:
		return d.Truncate(time.Second).String()
	case hours < 24:
		return fmt.Sprintf("%dh%dm", hours, int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd%dh", hours/24, hours%24)
	}
}

// when is an instant, by the clock and in the zone of the member that answers.
func when(now time.Time, at *timestamppb.Timestamp) string {
	return at.AsTime().In(now.Location()).Format("2006-01-02 15:04:05.000")
}

// object names what an event is about.
func object(e *hameshv1.Event) string {
	switch {
	case e.GetVip() != "":
		return "vip/" + e.GetVip()
	case e.GetBackend() != "":
		return "backend/" + e.GetBackend()
	default:
		return "node/" + cmp.Or(e.GetPeer(), e.GetNode())
	}
}
