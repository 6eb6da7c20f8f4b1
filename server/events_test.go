package server_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
	"github.com/hamesh/hamesh/server"
)

func id(node string, at int64) string { return server.EventID(time.Unix(at, 0), node) }

func TestEventID(t *testing.T) {
	early, late := time.Unix(0, 1), time.Unix(4e9, 5) // the year 2096
	if a, b := server.EventID(early, "z"), server.EventID(late, "a"); a >= b {
		t.Errorf("%s is not before %s", a, b)
	}
	for _, node := range []string{"cp-1", "a-b-c"} {
		if at, got, err := server.ParseEventID(server.EventID(late, node)); err != nil || got != node || !at.Equal(late) {
			t.Errorf("%s: %v of %q, %v", node, at, got, err)
		}
	}
	for _, bad := range []string{"", "x", "0000000000000001", "0000000000000001-", "000000000000000x-cp-1", "00000000000000001-cp-1", "+00000000000001f-cp-1"} {
		if _, _, err := server.ParseEventID(bad); err == nil {
			t.Errorf("%q is taken for an id", bad)
		}
	}
}

func TestListEvents(t *testing.T) {
	a := newAgent()
	for at := range int64(4) {
		a.tell("cp-1", 10+at)
		a.tell("cp-2", 10+at)
	}
	client := hameshv1.NewStatusServiceClient(dial(t, serve(t, a, server.Options{Insecure: true}).tcp, insecure.NewCredentials()))
	for name, test := range map[string]struct {
		request *hameshv1.ListEventsRequest
		want    string
	}{
		"all":                              {&hameshv1.ListEventsRequest{}, "10 10 11 11 12 12 13 13"},
		"since":                            {&hameshv1.ListEventsRequest{Since: timestamppb.New(time.Unix(12, 0))}, "12 12 13 13"},
		"after one of one node":            {&hameshv1.ListEventsRequest{After: []string{id("cp-1", 12)}}, "12 13 13"},
		"after one of each":                {&hameshv1.ListEventsRequest{After: []string{id("cp-1", 12), id("cp-2", 11)}}, "12 13 13"},
		"the newest id of a node counts":   {&hameshv1.ListEventsRequest{After: []string{id("cp-1", 12), id("cp-1", 10), id("cp-2", 13)}}, "13"},
		"after one, since for the other":   {&hameshv1.ListEventsRequest{After: []string{id("cp-1", 12)}, Since: timestamppb.New(time.Unix(13, 0))}, "13 13"},
		"a node that is not there is fine": {&hameshv1.ListEventsRequest{After: []string{id("cp-9", 13)}}, "13 13"},
	} {
		t.Run(name, func(t *testing.T) {
			response, err := client.ListEvents(t.Context(), test.request)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range response.GetEvents() {
				at, _, err := server.ParseEventID(e.GetId())
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, at.UTC().Format("5"))
			}
			if strings.Join(got, " ") != test.want || !slices.Equal(response.GetUnanswered(), []string{"cp-3"}) {
				t.Errorf("%v, want %s; unanswered %v", got, test.want, response.GetUnanswered())
			}
		})
	}
	if _, err := client.ListEvents(t.Context(), &hameshv1.ListEventsRequest{After: []string{"x"}}); outcome(err) != "InvalidArgument EVENT_ID_INVALID" {
		t.Errorf("no id: %v", err)
	}
}

// A watch goes on with what is new, and also with what is older and comes late.
func TestWatchEvents(t *testing.T) {
	a := newAgent()
	a.tell("cp-1", 10)
	s := serve(t, a, server.Options{Insecure: true})
	client := hameshv1.NewStatusServiceClient(dial(t, s.tcp, insecure.NewCredentials()))
	watch, err := client.WatchEvents(t.Context(), &hameshv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(node string, at int64) {
		t.Helper()
		news, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if got := news.GetEvent().GetId(); got != id(node, at) {
			t.Errorf("event %s, want %s", got, id(node, at))
		}
	}
	next("cp-1", 10)
	a.tell("cp-1", 20)
	next("cp-1", 20)
	a.tell("cp-2", 5)
	next("cp-2", 5)

	resumed, err := client.WatchEvents(t.Context(), &hameshv1.WatchEventsRequest{After: []string{id("cp-1", 20), id("cp-2", 5)}})
	if err != nil {
		t.Fatal(err)
	}
	// There is no past to be told, and that is told at once.
	if _, err := resumed.Header(); err != nil {
		t.Fatal(err)
	}
	a.tell("cp-2", 6)
	next("cp-2", 6)
	if news, err := resumed.Recv(); err != nil || news.GetEvent().GetId() != id("cp-2", 6) {
		t.Errorf("resumed: %v, %v", news, err)
	}
	s.stop()
	if _, err := watch.Recv(); outcome(err) != "Unavailable STOPPING" {
		t.Errorf("at the end: %v", err)
	}
}
