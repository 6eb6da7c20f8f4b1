package hearsay

import (
	"slices"
	"time"
)

// Hearing is how one member hears another one, by its own word.
type Hearing struct {
	Member string
	Age    time.Duration // of the newest heartbeat that came from it; negative: none did
	// Unconnected: it cannot call it, and hears it in calls of the other one alone.
	Unconnected bool
}

// Word is what a member said: T is all of it, the rest is what this package looks at.
type Word[T any] struct {
	Member    string
	Boot, Seq uint64
	Hears     []Hearing // empty: it is of a version that does not tell
	Says      T
	Age       time.Duration // since it was said
}

// Config says who is in the mesh, and what is late.
type Config struct {
	Self    string
	Members []string // this one included, in the order in which they are to be shown
	// Suspect is the silence after which a member counts as not heard (S).
	Suspect time.Duration
	// Slack is by how much a word may be older than that which came by a detour.
	Slack time.Duration
	// Keep is for how long a word is passed on.
	Keep time.Duration
}

// Book is one member's collection of everybody's words. It is not safe for use by several
// goroutines at once.
type Book[T any] struct {
	cfg    Config
	direct map[string]noted[T]
	passed map[string]noted[T]
	silent map[string]bool
	// unconnected are those that this member cannot call.
	unconnected map[string]bool
}

// noted is a word with when it was said, by this node's clock.
type noted[T any] struct {
	word Word[T]
	at   time.Duration
}

func (n noted[T]) aged(now time.Duration) Word[T] {
	w := n.word
	w.Age = now - n.at
	return w
}

// New returns an empty book.
func New[T any](cfg Config) *Book[T] {
	return &Book[T]{cfg: cfg, direct: map[string]noted[T]{}, passed: map[string]noted[T]{}, silent: map[string]bool{}}
}

// newer says whether a word is of a later time than another one of the same member.
func newer[T any](w, than Word[T]) bool {
	return w.Boot > than.Boot || (w.Boot == than.Boot && w.Seq > than.Seq)
}

func (b *Book[T]) other(member string) bool {
	return member != b.cfg.Self && slices.Contains(b.cfg.Members, member)
}

// Hear takes a word from the member itself. An older one than is known already changes
// nothing, except that it comes now; it says whether the member counts as heard by it.
func (b *Book[T]) Hear(now time.Duration, w Word[T]) bool {
	was, ok := b.direct[w.Member]
	switch {
	case !b.other(w.Member):
		return false
	case !ok || newer(w, was.word):
		b.direct[w.Member] = noted[T]{w, now}
		return true
	case w.Boot == was.word.Boot:
		was.at = now
		b.direct[w.Member] = was
		return true
	}
	return false
}

// Take takes a word that another member has passed on, with its age. One that is not newer
// changes nothing: a word that goes round does not become younger by it.
func (b *Book[T]) Take(now time.Duration, w Word[T]) {
	if !b.other(w.Member) || w.Age < 0 || w.Age > b.cfg.Keep {
		return
	}
	if was, ok := b.passed[w.Member]; !ok || newer(w, was.word) {
		b.passed[w.Member] = noted[T]{w, now - w.Age}
	}
}

// SetSilent says which members this one has given up: they are not heard, however young
// their last word is.
func (b *Book[T]) SetSilent(members map[string]bool) { b.silent = members }

// SetUnconnected says which members this one has no connection of its own to.
func (b *Book[T]) SetUnconnected(members map[string]bool) { b.unconnected = members }

// age is that of the newest word that came from a member itself; negative: none did.
func (b *Book[T]) age(now time.Duration, member string) time.Duration {
	n, ok := b.direct[member]
	switch {
	case !ok:
		return -1
	case b.silent[member]:
		return max(now-n.at, b.cfg.Suspect+time.Millisecond)
	}
	return now - n.at
}

// heard says whether an age is that of a member that is heard.
func (b *Book[T]) heard(age time.Duration) bool { return age >= 0 && age <= b.cfg.Suspect }

// Hears is how this member hears each other one.
func (b *Book[T]) Hears(now time.Duration) []Hearing {
	all := make([]Hearing, 0, len(b.cfg.Members))
	for _, m := range b.cfg.Members {
		if m != b.cfg.Self {
			all = append(all, Hearing{Member: m, Age: b.age(now, m), Unconnected: b.unconnected[m]})
		}
	}
	return all
}

// PassOn is what others have to be told: the newest word of each member that this one knows
// and somebody else does not hear. At rest it is nothing.
func (b *Book[T]) PassOn(now time.Duration) (all []Word[T]) {
	if !b.missed(now) {
		return nil
	}
	v := b.View(now)
	missed := map[string]bool{}
	for _, k := range v.Of {
		if k.Known && k.Word != nil {
			for _, h := range k.Word.Hears {
				missed[h.Member] = missed[h.Member] || !b.heard(h.Age)
			}
		}
	}
	for _, m := range b.cfg.Members {
		if k := v.Of[m]; missed[m] && m != b.cfg.Self && k.Known && k.Word != nil {
			all = append(all, *k.Word)
		}
	}
	return all
}

// missed says whether anybody misses anybody, by any word that still counts.
func (b *Book[T]) missed(now time.Duration) bool {
	return slices.ContainsFunc(b.Newest(now), func(w Word[T]) bool {
		return slices.ContainsFunc(w.Hears, func(h Hearing) bool { return !b.heard(h.Age) })
	})
}

// Newest is the newest word of each other member, in their order, of those that are not too
// old to say something.
func (b *Book[T]) Newest(now time.Duration) (all []Word[T]) {
	for _, m := range b.cfg.Members {
		if w, ok := b.newest(now, m); ok {
			all = append(all, w)
		}
	}
	return all
}

func (b *Book[T]) newest(now time.Duration, member string) (Word[T], bool) {
	n, ok := b.direct[member]
	if p, passed := b.passed[member]; passed && (!ok || newer(p.word, n.word)) {
		n, ok = p, true
	}
	w := n.aged(now)
	return w, ok && w.Age <= b.cfg.Keep
}
