package agent

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hamesh/hamesh/agent/hearsay"
	"github.com/hamesh/hamesh/agent/ownership"
	"github.com/hamesh/hamesh/agent/parts"
	hameshv1 "github.com/hamesh/hamesh/gen/hamesh/v1"
)

const (
	// wordsKept is for how long the word of a member that is not heard is passed on.
	wordsKept = 10 * time.Second
	// detour is by how many heartbeats later a word may come that is passed on.
	detour = 4
	// hearsayBytes bounds what of others is passed on in one heartbeat, textBytes what it says
	// about its own configuration: beyond that, who asks learns less.
	hearsayBytes, textBytes = 64 << 10, 8 << 10
)

// known is the mesh as all members know it together.
type known = hearsay.View[*hameshv1.Heartbeat]

// words are what all members say about each other. They are for the status, events and
// metrics, for finding somebody who can carry an order out, and for the place of etcd's
// leader; nothing that decides over an address or a client's connection looks at them.
type words struct {
	agent *Agent

	mu     sync.Mutex
	book   *hearsay.Book[*hameshv1.Heartbeat]
	looked ownership.Instant // when extra was last made

	// What the ownership loop needs waits for nobody: when each other member was last heard,
	// 0: never; whom it has given up; what else is to be told.
	ears   map[string]*atomic.Int64
	silent atomic.Pointer[map[string]bool]
	extra  atomic.Pointer[extra]
	sent   atomic.Pointer[hameshv1.Heartbeat] // the last one, to be measured
}

// extra is what heartbeats say beside what they always do, made now and then: the ownership
// loop sends them, and waits for nothing.
type extra struct {
	hearsay   []hearsay.Word[*hameshv1.Heartbeat]
	at        ownership.Instant
	parts     []*hameshv1.ConfigPart
	storeAway bool
	leader    string
	// unconnected are the members that cannot be called.
	unconnected map[string]bool
}

func newWords(a *Agent) *words {
	c := hearsay.Config{
		Self: a.cfg.Node.Name, Suspect: a.cfg.Timing.SuspectAfter, Slack: detour * a.timing().Heartbeat, Keep: wordsKept,
	}
	for _, m := range a.cfg.Members {
		c.Members = append(c.Members, m.Name)
	}
	w := &words{agent: a, book: hearsay.New[*hameshv1.Heartbeat](c), ears: map[string]*atomic.Int64{}}
	for _, m := range c.Members {
		if m != c.Self {
			w.ears[m] = &atomic.Int64{}
		}
	}
	w.silent.Store(&map[string]bool{})
	w.extra.Store(&extra{})
	w.sent.Store(&hameshv1.Heartbeat{})
	return w
}

// asWord reads a heartbeat as one.
func asWord(h *hameshv1.Heartbeat, age time.Duration) hearsay.Word[*hameshv1.Heartbeat] {
	w := hearsay.Word[*hameshv1.Heartbeat]{Member: h.GetMember(), Boot: h.GetBoot(), Seq: h.GetSequence(), Says: h, Age: age}
	for _, one := range h.GetHears() {
		heard := hearsay.Hearing{Member: one.GetMember(), Age: -1, Unconnected: one.GetUnconnected()}
		if one.AgeMs != nil {
			heard.Age = time.Duration(one.GetAgeMs()) * time.Millisecond
		}
		w.Hears = append(w.Hears, heard)
	}
	return w
}

// hear takes a heartbeat from the member itself, with what it passes on.
func (w *words) hear(h *hameshv1.Heartbeat) {
	at := now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.book.Hear(time.Duration(at), asWord(h, 0)) {
		w.ears[h.GetMember()].Store(int64(at))
	}
	for _, said := range h.GetHearsay() {
		w.book.Take(time.Duration(at), asWord(said.GetHeartbeat(), time.Duration(said.GetAgeMs())*time.Millisecond))
	}
}

// setSilent takes who has been given up. It does not block.
func (w *words) setSilent(silent map[string]ownership.Instant) {
	all := make(map[string]bool, len(silent))
	for member := range silent {
		all[member] = true
	}
	w.silent.Store(&all)
}

// view is what is known now.
func (w *words) view() known {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.book.SetSilent(*w.silent.Load())
	return w.book.View(time.Duration(now()))
}

// tell adds to a heartbeat what this member says of others. It does not block.
func (w *words) tell(h *hameshv1.Heartbeat) {
	at, x, silent := now(), w.extra.Load(), *w.silent.Load()
	for _, m := range w.agent.cfg.Members {
		ear := w.ears[m.Name]
		if ear == nil {
			continue // itself
		}
		said := &hameshv1.Hearing{Member: m.Name, Unconnected: x.unconnected[m.Name]}
		if heard := ownership.Instant(ear.Load()); heard != 0 {
			age := max(at.Sub(heard), 0)
			if silent[m.Name] { // however young its last word is
				age = max(age, w.agent.cfg.Timing.SuspectAfter+time.Millisecond)
			}
			said.AgeMs = proto.Uint32(uint32(min(age/time.Millisecond, math.MaxUint32)))
		}
		h.Hears = append(h.Hears, said)
	}
	h.StoreAway, h.StoreLeader, h.ConfigParts = x.storeAway, x.leader, x.parts
	for _, said := range x.hearsay {
		if age := said.Age + at.Sub(x.at); age <= wordsKept {
			h.Hearsay = append(h.Hearsay, &hameshv1.Hearsay{Heartbeat: said.Says, AgeMs: uint32(age / time.Millisecond)})
		}
	}
}

// look makes extra anew, once a heartbeat or so.
func (w *words) look() {
	at, a := now(), w.agent
	w.mu.Lock()
	if at.Sub(w.looked) < a.cfg.Timing.Heartbeat*3/4 {
		w.mu.Unlock()
		return
	}
	w.looked = at
	unconnected := map[string]bool{}
	for member, link := range a.links {
		unconnected[member] = link.Lost() > oneWayAfter
	}
	w.book.SetUnconnected(unconnected)
	w.book.SetSilent(*w.silent.Load())
	passOn, newest := w.book.PassOn(time.Duration(at)), w.book.Newest(time.Duration(at))
	w.mu.Unlock()
	stored := a.store.Status()
	x := &extra{at: at, storeAway: !stored.Available, leader: stored.Leader, unconnected: unconnected}
	size := 0
	for _, said := range passOn {
		said.Says = stripped(said.Says)
		if size += proto.Size(said.Says); size <= hearsayBytes {
			x.hearsay = append(x.hearsay, said)
		}
	}
	x.parts = differing(a.parts.Load(), newest)
	w.extra.Store(x)
}

// stripped is what of a heartbeat is passed on: what it says to people, and nothing that it
// has from others.
func stripped(h *hameshv1.Heartbeat) *hameshv1.Heartbeat {
	return &hameshv1.Heartbeat{
		Member: h.GetMember(), Boot: h.GetBoot(), Sequence: h.GetSequence(), Ready: h.GetReady(), Vips: h.GetVips(),
		Eligible: h.GetEligible(), Reason: h.GetReason(), Backends: h.GetBackends(), Version: h.GetVersion(), Role: h.GetRole(),
		ConfigDigests: h.GetConfigDigests(), Hears: h.GetHears(), StoreAway: h.GetStoreAway(), StoreLeader: h.GetStoreLeader(),
		ConfigParts: h.GetConfigParts(),
	}
}

// differing are the parts of the own configuration in which another member's is different,
// in words, as far as there is room for them.
func differing(own *parts.Parts, others []hearsay.Word[*hameshv1.Heartbeat]) (all []*hameshv1.ConfigPart) {
	differ := map[int]bool{}
	for _, w := range others {
		if w.Says.GetVersion() == Version {
			for _, i := range parts.Differ(own.Digests, w.Says.GetConfigDigests()) {
				differ[i] = true
			}
		}
	}
	room := textBytes
	for i, text := range own.Texts {
		if !differ[i] {
			continue
		}
		said := &hameshv1.ConfigPart{Part: uint32(i)}
		if len(text) <= room {
			room -= len(text)
			said.Text = []byte(text)
		}
		all = append(all, said)
	}
	return all
}

// byOthers are the members that this one does not hear and knows through others, by their
// words.
func byOthers(k known) (all []*hameshv1.Heartbeat) {
	for _, of := range k.Of {
		if of.Known && !of.Heard && of.Word != nil {
			all = append(all, of.Word.Says)
		}
	}
	return all
}

// together adds to what this member knows of a VIP what those say that are known through
// others.
func together(v ownership.VIPView, others []*hameshv1.Heartbeat) ownership.VIPView {
	var reports []ownership.Heartbeat
	for _, h := range others {
		reports = append(reports, fromProto(h))
	}
	each := func(look func(b ownership.Heartbeat, r ownership.Report)) {
		for _, b := range reports {
			for _, r := range b.VIPs {
				if r.VIP == v.Name {
					look(b, r)
				}
			}
		}
	}
	each(func(_ ownership.Heartbeat, r ownership.Report) {
		if r.Record.Newer(v.Record) {
			v.Record, v.Right = r.Record, ownership.NoRight
		}
	})
	v.Holders = append([]string(nil), v.Holders...)
	each(func(b ownership.Heartbeat, r ownership.Report) {
		if r.Held {
			v.Holders = append(v.Holders, b.Member)
		}
		if b.Member == v.Record.Owner && b.Boot == v.Record.OwnerBoot {
			v.Right = r.Right
		}
	})
	return v
}
