package hearsay

import (
	"slices"
	"strings"
	"time"
)

// View is the mesh as all members know it together, as far as one of them knows that.
type View[T any] struct {
	Of    map[string]Known[T] // every member, this one too, which has no Word
	Links []Link              // by listener, then speaker, in the order of the members
	Down  []Pair              // two members that do not hear each other, and which somebody hears
	// Alone: this member hears nobody, though there are others.
	Alone bool
}

// Known is what is known of one member.
type Known[T any] struct {
	// Heard: by the member itself whose view this is.
	Heard bool
	// Known: it is heard by that member, or by one that is known.
	Known bool
	By    []string // who hears it, of those who are known
	Not   []string // who does not
	// Word is its newest one that is not too old to say something; nil: there is none.
	Word *Word[T]
}

// Link is how one member hears another one.
type Link struct {
	From, To    string        // From speaks, To listens
	Heard       time.Duration // how long ago To heard From last; negative: never
	Told        time.Duration // the age of the word that says so; negative: it is an own ear
	Lost        bool          // To does not hear From
	Unconnected bool          // From hears To, and cannot call it
}

// Pair is two members, A before B in the order of their names, that have lost each other.
type Pair struct {
	A, B           string
	ADeaf, BDeaf   bool     // A does not hear B, B does not hear A
	Through        []string // who hears both
	AByNow, BByNow []string // who hears A, who hears B, if nobody hears both
}

// View puts together what is known now.
func (b *Book[T]) View(now time.Duration) View[T] {
	v := View[T]{Of: map[string]Known[T]{}}
	// word is what a member says that is known; limit is how old its ears may be by now.
	word := map[string]Word[T]{}
	limit := map[string]time.Duration{}
	add := func(m string) {
		limit[m] = b.cfg.Suspect
		if !b.heard(b.age(now, m)) {
			limit[m] += b.cfg.Slack
		}
		if w, ok := b.newest(now, m); ok {
			word[m] = w
		}
		v.Of[m] = Known[T]{Known: true}
	}
	// First who is heard here, then who is heard by those, and so on.
	queue := []string{}
	for _, m := range b.cfg.Members {
		if m != b.cfg.Self && b.heard(b.age(now, m)) {
			add(m)
			queue = append(queue, m)
		}
	}
	v.Alone = len(queue) == 0 && len(b.cfg.Members) > 1
	for len(queue) > 0 {
		w := word[queue[0]]
		for _, h := range w.Hears {
			if _, known := v.Of[h.Member]; !known && b.other(h.Member) && h.Age >= 0 && h.Age+w.Age <= limit[queue[0]] {
				add(h.Member)
				queue = append(queue, h.Member)
			}
		}
		queue = queue[1:]
	}
	v.Of[b.cfg.Self] = Known[T]{Heard: true, Known: true}
	b.links(now, &v, word)
	by, not := map[string][]string{}, map[string][]string{}
	for _, l := range v.Links {
		if l.Lost {
			not[l.From] = append(not[l.From], l.To)
		} else {
			by[l.From] = append(by[l.From], l.To)
		}
	}
	for _, m := range b.cfg.Members {
		k := v.Of[m]
		k.Heard = m == b.cfg.Self || b.heard(b.age(now, m))
		k.By, k.Not = by[m], not[m]
		if w, ok := word[m]; ok {
			k.Word = &w
		}
		v.Of[m] = k
	}
	v.Down = pairs(b.cfg.Members, v)
	return v
}

// links lists how the known members hear everybody.
func (b *Book[T]) links(now time.Duration, v *View[T], word map[string]Word[T]) {
	ears := map[string]map[string]Hearing{b.cfg.Self: {}}
	for _, h := range b.Hears(now) {
		ears[b.cfg.Self][h.Member] = h
	}
	for m, w := range word {
		ears[m] = map[string]Hearing{}
		for _, h := range w.Hears {
			ears[m][h.Member] = h
		}
	}
	unconnected := func(from, to string) bool {
		h := ears[from][to]
		return h.Unconnected && b.heard(h.Age)
	}
	for _, to := range b.cfg.Members {
		if !v.Of[to].Known {
			continue
		}
		for _, from := range b.cfg.Members {
			if from == to {
				continue
			}
			if to == b.cfg.Self {
				age := b.age(now, from)
				v.Links = append(v.Links, Link{From: from, To: to, Heard: age, Told: -1, Lost: !b.heard(age), Unconnected: unconnected(from, to)})
				continue
			}
			h, told := ears[to][from]
			if !told {
				continue // of a version that does not tell, or nothing has come of it yet
			}
			// Lost is the listener's own judgement, when it said so: a late word is no lost link.
			l := Link{From: from, To: to, Heard: -1, Told: word[to].Age, Lost: !b.heard(h.Age), Unconnected: unconnected(from, to)}
			if h.Age >= 0 {
				l.Heard = h.Age + l.Told
			}
			v.Links = append(v.Links, l)
		}
	}
}

// pairs finds who has lost each other, though both are known.
func pairs[T any](members []string, v View[T]) (all []Pair) {
	members = slices.Sorted(slices.Values(members))
	for i, a := range members {
		for _, b := range members[i+1:] {
			ka, kb := v.Of[a], v.Of[b]
			p := Pair{A: a, B: b, ADeaf: slices.Contains(kb.Not, a), BDeaf: slices.Contains(ka.Not, b)}
			if !ka.Known || !kb.Known || (!p.ADeaf && !p.BDeaf) {
				continue
			}
			for _, m := range members {
				hearsA, hearsB := m != a && slices.Contains(ka.By, m), m != b && slices.Contains(kb.By, m)
				switch {
				case hearsA && hearsB:
					p.Through = append(p.Through, m)
				case hearsA && m != b:
					p.AByNow = append(p.AByNow, m)
				case hearsB && m != a:
					p.BByNow = append(p.BByNow, m)
				}
			}
			all = append(all, p)
		}
	}
	return all
}

// String says it for people, without anything that changes from one moment to the next.
func (p Pair) String() string {
	text := p.A + " and " + p.B + " do not hear each other"
	switch {
	case !p.BDeaf:
		text = p.A + " does not hear " + p.B + ", which hears it"
	case !p.ADeaf:
		text = p.B + " does not hear " + p.A + ", which hears it"
	}
	if len(p.Through) > 0 {
		return text + "; " + hear(p.Through) + " both"
	}
	for _, part := range []struct {
		who []string
		of  string
	}{{p.AByNow, p.A}, {p.BByNow, p.B}} {
		if len(part.who) > 0 {
			text += "; " + hear(part.who) + " " + part.of
		}
	}
	return text
}

func hear(who []string) string {
	if len(who) == 1 {
		return who[0] + " hears"
	}
	return strings.Join(who, ", ") + " hear"
}

// Whose says why a member that is not heard by this one is known: who hears it.
func (k Known[T]) Whose(self, member string) string {
	text := self + " does not hear " + member
	if len(k.By) == 1 {
		return text + "; " + k.By[0] + " does"
	}
	if len(k.By) > 1 {
		return text + "; " + strings.Join(k.By, ", ") + " do"
	}
	return text
}
