package hearsay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	beat    = 100 * time.Millisecond
	suspect = 400 * time.Millisecond
	keep    = 10 * time.Second
)

// world is a mesh whose members speak once a beat, in turn, over the links that are whole.
type world struct {
	now   time.Duration
	names []string
	books map[string]*Book[string]
	seq   uint64
	cut   map[string]bool // "from>to"
	dead  map[string]bool
}

func newWorld(n int) *world {
	w := &world{now: time.Hour, books: map[string]*Book[string]{}, cut: map[string]bool{}, dead: map[string]bool{}}
	for i := range n {
		w.names = append(w.names, fmt.Sprint("cp-", i+1))
	}
	for _, m := range w.names {
		w.books[m] = New[string](Config{Self: m, Members: w.names, Suspect: suspect, Slack: 4 * beat, Keep: keep})
	}
	return w
}

func (w *world) sever(a, b string) { w.cut[a+">"+b], w.cut[b+">"+a] = true, true }

// run lets time pass, and returns the most words that one member passed on at once.
func (w *world) run(d time.Duration) (most int) {
	for end := w.now + d; w.now < end; {
		for _, from := range w.names {
			w.now += beat / time.Duration(len(w.names))
			if w.dead[from] {
				continue
			}
			w.seq++
			book := w.books[from]
			passed := book.PassOn(w.now)
			most = max(most, len(passed))
			said := Word[string]{Member: from, Boot: 1, Seq: w.seq, Hears: book.Hears(w.now), Says: "I am " + from}
			for _, to := range w.names {
				if to == from || w.cut[from+">"+to] || w.dead[to] {
					continue
				}
				w.books[to].Hear(w.now, said)
				for _, p := range passed {
					w.books[to].Take(w.now, p)
				}
			}
		}
	}
	return most
}

func (w *world) down(m string) (all []string) {
	for _, p := range w.books[m].View(w.now).Down {
		all = append(all, p.String())
	}
	return all
}

func TestAtRest(t *testing.T) {
	w := newWorld(5)
	w.run(time.Second)
	if most := w.run(5 * time.Second); most > 0 {
		t.Errorf("%d words passed on at rest", most)
	}
	for _, m := range w.names {
		v := w.books[m].View(w.now)
		if len(v.Down) > 0 || v.Alone || len(v.Links) != 20 {
			t.Errorf("%s: %+v", m, v)
		}
		for _, l := range v.Links {
			if l.Lost || l.Heard < 0 || l.Heard > 3*beat || (l.Told < 0) != (l.To == m) {
				t.Errorf("%s: %+v", m, l)
			}
		}
	}
}

func TestPair(t *testing.T) {
	w := newWorld(3)
	w.run(time.Second)
	w.sever("cp-1", "cp-2")
	w.run(time.Second)
	const want = "cp-1 and cp-2 do not hear each other; cp-3 hears both"
	for _, m := range w.names {
		if got := w.down(m); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %q", m, got)
		}
	}
	of := w.books["cp-1"].View(w.now).Of["cp-2"]
	if !of.Known || of.Heard || of.Word == nil || of.Word.Says != "I am cp-2" || of.Word.Age > suspect {
		t.Errorf("cp-1 knows of cp-2: %+v", of)
	}
	if got := of.Whose("cp-1", "cp-2"); got != "cp-1 does not hear cp-2; cp-3 does" {
		t.Errorf("%q", got)
	}
	// It dies: nobody hears it, so it is down for all, and nothing of it is passed on for long.
	w.dead["cp-2"] = true
	w.run(2 * time.Second)
	for _, m := range []string{"cp-1", "cp-3"} {
		if v := w.books[m].View(w.now); v.Of["cp-2"].Known || len(v.Down) > 0 {
			t.Errorf("%s: %+v", m, v)
		}
	}
	if most := w.run(time.Second); most > 0 {
		t.Errorf("%d words of a dead member are passed on", most)
	}
	w.dead["cp-2"], w.cut = false, map[string]bool{}
	w.run(time.Second)
	if most := w.run(time.Second); most > 0 || len(w.down("cp-3")) > 0 {
		t.Errorf("after the mend: %d words, %v", most, w.down("cp-3"))
	}
}

// TestChain: members in a row, of which each hears its neighbours alone.
func TestChain(t *testing.T) {
	w := newWorld(4)
	w.run(time.Second)
	for _, p := range []string{"13", "14", "24"} {
		w.sever("cp-"+p[:1], "cp-"+p[1:])
	}
	w.run(2 * time.Second)
	for _, m := range w.names {
		v := w.books[m].View(w.now)
		for _, other := range w.names {
			if k := v.Of[other]; !k.Known || (other != m && k.Word == nil) {
				t.Errorf("%s knows of %s: %+v", m, other, k)
			}
		}
		if got := w.down(m); len(got) != 3 || got[1] != "cp-1 and cp-4 do not hear each other; cp-2 hears cp-1; cp-3 hears cp-4" {
			t.Errorf("%s: %q", m, got)
		}
	}
}

func TestOneDirection(t *testing.T) {
	w := newWorld(3)
	w.run(time.Second)
	w.cut["cp-1>cp-2"] = true
	w.books["cp-3"].SetUnconnected(map[string]bool{"cp-1": true})
	w.run(time.Second)
	for _, m := range w.names {
		if got := w.down(m); !slices.Equal(got, []string{"cp-2 does not hear cp-1, which hears it; cp-3 hears both"}) {
			t.Errorf("%s: %q", m, got)
		}
		var oneWay []string
		for _, l := range w.books[m].View(w.now).Links {
			if l.Unconnected {
				oneWay = append(oneWay, l.From+">"+l.To)
			}
		}
		if !slices.Equal(oneWay, []string{"cp-3>cp-1"}) {
			t.Errorf("%s: one way are %v", m, oneWay)
		}
	}
}

func TestAlone(t *testing.T) {
	w := newWorld(3)
	w.run(time.Second)
	w.sever("cp-1", "cp-2")
	w.sever("cp-1", "cp-3")
	w.run(time.Second)
	if v := w.books["cp-1"].View(w.now); !v.Alone || v.Of["cp-2"].Known || len(v.Down) > 0 {
		t.Errorf("%+v", v)
	}
	if v := w.books["cp-2"].View(w.now); v.Alone || v.Of["cp-1"].Known || len(v.Down) > 0 {
		t.Errorf("%+v", v)
	}
}

// TestGivenUp: the word of a guard gives a member up before its silence does.
func TestGivenUp(t *testing.T) {
	w := newWorld(3)
	w.run(time.Second)
	for _, m := range []string{"cp-1", "cp-3"} {
		w.books[m].SetSilent(map[string]bool{"cp-2": true})
	}
	w.dead["cp-2"] = true
	w.run(beat)
	for _, m := range []string{"cp-1", "cp-3"} {
		if v := w.books[m].View(w.now); v.Of["cp-2"].Known {
			t.Errorf("%s takes it for alive: %+v", m, v.Of["cp-2"])
		}
	}
}

// TestRoundabout: a word that comes again does not become younger, nor one of a former boot.
func TestRoundabout(t *testing.T) {
	b := New[string](Config{Self: "cp-1", Members: []string{"cp-1", "cp-2", "cp-3"}, Suspect: suspect, Keep: keep})
	said := Word[string]{Member: "cp-2", Boot: 2, Seq: 5, Says: "new"}
	b.Take(0, said)
	b.Take(time.Second, said)
	old := said
	old.Boot, old.Seq, old.Says = 1, 99, "old"
	b.Take(time.Second, old)
	b.Take(time.Second, Word[string]{Member: "cp-1", Boot: 9, Says: "of itself"})
	b.Take(time.Second, Word[string]{Member: "cp-9", Boot: 9, Says: "of a stranger"})
	b.Take(time.Second, Word[string]{Member: "cp-3", Boot: 1, Age: keep + 1, Says: "too old"})
	all := b.Newest(2 * time.Second)
	if len(all) != 1 || all[0].Says != "new" || all[0].Age != 2*time.Second {
		t.Errorf("%+v", all)
	}
	if all := b.Newest(keep + time.Second); len(all) > 0 {
		t.Errorf("kept for too long: %+v", all)
	}
	// What it says itself is newer.
	b.Hear(3*time.Second, Word[string]{Member: "cp-2", Boot: 2, Seq: 6, Says: "itself"})
	if all := b.Newest(3 * time.Second); len(all) != 1 || all[0].Says != "itself" || all[0].Age != 0 {
		t.Errorf("%+v", all)
	}
}

// TestOlderVersion: of a member that does not tell whom it hears, nothing is concluded.
func TestOlderVersion(t *testing.T) {
	w := newWorld(3)
	w.run(time.Second)
	for _, m := range w.names[:2] {
		w.books[m].Hear(w.now, Word[string]{Member: "cp-3", Boot: 2, Seq: 1, Says: "I am old"})
	}
	v := w.books["cp-1"].View(w.now)
	if strings.Contains(fmt.Sprint(v.Of["cp-1"].Not, v.Of["cp-2"].Not), "cp-3") || len(v.Down) > 0 || len(v.Links) != 4 {
		t.Errorf("%+v", v)
	}
}
