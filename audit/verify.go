package audit

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Finding is something that is wrong with a log, and where.
type Finding struct {
	// First and Last are the sequence numbers that it is about; 0: no event's.
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	What  string `json:"what"`
}

func (f Finding) String() string {
	switch {
	case f.First == 0:
		return f.What
	case f.First == f.Last:
		return fmt.Sprintf("event %d: %s", f.First, f.What)
	default:
		return fmt.Sprintf("events %d to %d: %s", f.First, f.Last, f.What)
	}
}

// Result is what a verification came to.
type Result struct {
	After, Last   uint64      // events After+1 to Last were looked at
	Newest        *Checkpoint // the newest that verifies and fits; nil: none
	UnsignedSince time.Time   // when the oldest event after Newest happened; zero: there is none
	Findings      []Finding   // by place where they have one; none: the log is proved up to Newest
	More          int         // findings beyond maxFindings
}

// Bounds of what a Verifier keeps, whatever it is fed.
const (
	maxFindings = 100
	maxSuspects = 32
	maxShift    = 8
)

// Verifier proves a log that it is fed: events by sequence number, each checkpoint after its event. It needs
// memory for its findings alone. It is not safe for concurrent use.
//
// When an event does not fit it goes on with the hash that is stored with the event, so that one finding does not
// hide the next. What was edited without recomputing hashes is so named exactly; what was recomputed is
// found at the next checkpoint, and lies between that and the one before.
type Verifier struct {
	ring       *Keyring
	remembered *Checkpoint
	result     Result

	previous Hash // as stored with event result.Last
	older    Hash // as stored with the event before it
	unknown  bool // the hash before the next event is gone
	computed Hash // what the hash of event result.Last should be, if it is not previous
	signed   uint64
	ahead    *Checkpoint // whose event has not come yet
	edited   *suspect    // event result.Last, if it does not fit and nothing explains it yet
	suspects []suspect
	moved    Finding // a run of renumbered events, being collected
	shift    int64   // of it
	first    suspect // of it
	wrong    uint64  // the last event that something was wrong with
	diverged bool    // the last checkpoint does not fit: nor will those after it
}

// suspect is an event that does not fit its place.
type suspect struct {
	Sealed
	previous  Hash // as stored before it
	explained bool
}

// NewVerifier makes one for the whole log, or for what follows a checkpoint. The
// keyring takes keys at any time before the checkpoints that need them. An error says that start is not signed by this vault.
func NewVerifier(ring *Keyring, start *Checkpoint) (*Verifier, error) {
	v := &Verifier{ring: ring, previous: Start(ring.log.VaultID)}
	if start != nil {
		if err := ring.Verify(start); err != nil {
			return nil, fmt.Errorf("the checkpoint at %d: %w", start.Sequence, err)
		}
		v.previous, v.signed = start.Hash, start.Sequence
		v.result = Result{After: start.Sequence, Last: start.Sequence, Newest: start}
	}
	return v, nil
}

// Remember demands that the log still holds a checkpoint that was seen earlier. It is called before the first event, with
// one that is not before the start. An error says that the checkpoint is not signed by this vault.
func (v *Verifier) Remember(c *Checkpoint) error {
	if err := v.ring.Verify(c); err != nil {
		return fmt.Errorf("the remembered checkpoint: %w", err)
	}
	v.remembered = c
	v.recall()
	return nil
}

// recall compares with the remembered checkpoint at its place.
func (v *Verifier) recall() {
	if c := v.remembered; c != nil && c.Sequence == v.result.Last {
		if c.Hash != v.previous && !v.explained() {
			v.find(v.signed+1, c.Sequence, "another history than the one that was remembered, which was signed at %s", stamp(c.At))
		}
		v.remembered = nil
	}
}

// explained says whether something was found since the last checkpoint that fits, so that one that does not is no news.
func (v *Verifier) explained() bool { return v.diverged || v.wrong > v.signed }

func (v *Verifier) find(first, last uint64, format string, args ...any) {
	if len(v.result.Findings) == maxFindings {
		v.result.More++
		return
	}
	v.result.Findings = append(v.result.Findings, Finding{first, last, fmt.Sprintf(format, args...)})
}

// Event takes the next event. One whose row is gone has the id 0, and its stored hash.
func (v *Verifier) Event(e *Sealed) {
	next := v.result.Last + 1
	switch {
	case e.Sequence < next:
		v.find(e.Sequence, e.Sequence, "it stands after event %d", v.result.Last)
		return
	case e.Sequence > next:
		v.settle()
		v.wrong = e.Sequence
		v.find(next, e.Sequence-1, "missing: deleted after being sealed")
		v.unknown = true
	}
	if c := v.ahead; c != nil && c.Sequence < e.Sequence {
		v.ahead = nil // its event is among the missing
	}
	v.result.Last = e.Sequence
	if since := v.result.UnsignedSince; e.ID != 0 && (since.IsZero() || e.At.Before(since)) {
		v.result.UnsignedSince = e.At
	}
	switch computed := Next(v.previous, e.Sequence, &e.Event); {
	case e.ID == 0:
		v.settle()
		v.wrong = e.Sequence
		v.find(e.Sequence, e.Sequence, "its row is gone: deleted after being sealed")
	case v.unknown:
		// Nothing to compute with. The hash stored here goes into the next.
	case computed == e.Hash:
		v.settle()
	case v.edited != nil && Next(v.computed, e.Sequence, &e.Event) == e.Hash:
		v.hashChanged()
		v.settle()
	case v.renumbered(e):
	default:
		v.settle()
		v.wrong = e.Sequence
		v.computed = computed
		v.edited = &suspect{Sealed: *e, previous: v.previous}
	}
	v.older, v.previous, v.unknown = v.previous, e.Hash, false
	v.recall()
	if c := v.ahead; c != nil && c.Sequence == e.Sequence {
		v.ahead = nil
		v.Checkpoint(c)
	}
}

// hashChanged explains why the last event did not fit.
func (v *Verifier) hashChanged() {
	if !v.edited.explained {
		v.edited.explained = true
		v.find(v.edited.Sequence, v.edited.Sequence, "the hash stored with it was changed; the event is as it was sealed")
	}
}

// renumbered recognises an event that was sealed under another number, in a row of such.
func (v *Verifier) renumbered(e *Sealed) bool {
	fits := func(shift int64) bool {
		number := int64(e.Sequence) + shift
		return shift != 0 && number > 0 && (Next(v.previous, uint64(number), &e.Event) == e.Hash ||
			shift == -1 && Next(v.older, uint64(number), &e.Event) == e.Hash) // the one before is not of the log
	}
	if v.moved.First != 0 && fits(v.shift) {
		v.moved.Last, v.wrong = e.Sequence, e.Sequence
		return true
	}
	for shift := int64(1); shift <= maxShift; shift++ {
		for _, s := range []int64{shift, -shift} {
			if fits(s) {
				v.settle()
				v.moved, v.shift, v.wrong = Finding{First: e.Sequence, Last: e.Sequence}, s, e.Sequence
				v.first = suspect{Sealed: *e, previous: v.previous}
				return true
			}
		}
	}
	return false
}

// settle ends what was being collected.
func (v *Verifier) settle() {
	if s := v.edited; s != nil {
		if !s.explained {
			v.suspects = append(v.suspects, *s)
		}
		v.edited = nil
	}
	if m := v.moved; m.First != 0 && m.First == m.Last {
		v.suspects = append(v.suspects, v.first)
		v.moved, v.shift = Finding{}, 0
	}
	if len(v.suspects) > maxSuspects {
		v.explain()
	}
	if m := v.moved; m.First != 0 {
		what := "removed"
		if v.shift < 0 {
			what = "put in"
		}
		v.find(m.First, m.Last, "sealed as %d to %d, and renumbered: %d before them were %s",
			int64(m.First)+v.shift, int64(m.Last)+v.shift, max(v.shift, -v.shift), what)
		v.moved, v.shift = Finding{}, 0
	}
}

// explain tells events that changed places from those that were changed.
func (v *Verifier) explain() {
	if len(v.result.Findings) == maxFindings { // it is costly, and nobody would read it
		v.result.More += len(v.suspects)
		v.suspects = v.suspects[:0]
		return
	}
	// A suspect belongs where, with a hash that is there or near as the one before, it hashes to one that is there.
	hashes := map[Hash]bool{}
	before := map[Hash]bool{}
	for _, s := range v.suspects {
		hashes[s.Hash], before[s.Hash], before[s.previous] = true, true, true
	}
	belongs := func(s *suspect) uint64 {
		for _, place := range v.suspects {
			for previous := range before {
				if hashes[Next(previous, place.Sequence, &s.Event)] {
					return place.Sequence
				}
			}
		}
		return 0
	}
	for i := range v.suspects {
		s := &v.suspects[i]
		switch place := belongs(s); {
		case place == s.Sequence:
			v.find(s.Sequence, s.Sequence, "out of order: what stood before it was moved")
		case place != 0:
			v.find(s.Sequence, s.Sequence, "out of order: it was sealed as number %d", place)
		default:
			v.find(s.Sequence, s.Sequence, "not what was sealed here: edited, or put in another's place")
		}
	}
	v.suspects = v.suspects[:0]
}

// Checkpoint takes a checkpoint, after its event or, where that is missing, after the one before.
func (v *Verifier) Checkpoint(c *Checkpoint) {
	switch err := v.ring.Verify(c); {
	case err != nil:
		v.find(0, 0, "checkpoint at %d: %v", c.Sequence, err)
	case c.Sequence > v.result.Last:
		kept := *c
		v.ahead = &kept
	case c.Sequence < v.result.Last:
		v.find(0, 0, "checkpoint at %d: it stands after event %d", c.Sequence, v.result.Last)
	default:
		switch {
		case c.Hash == v.previous:
			kept := *c
			v.result.Newest, v.result.UnsignedSince, v.diverged = &kept, time.Time{}, false
		case v.edited != nil && c.Hash == v.computed:
			v.hashChanged()
		case !v.explained():
			v.diverged = true
			v.find(v.signed+1, c.Sequence, "not what the vault signed at %s: at least one of them was changed, and the hashes made anew", stamp(c.At))
		}
		v.signed = c.Sequence
	}
}

// Finish ends the log.
func (v *Verifier) Finish() *Result {
	v.settle()
	v.explain()
	var reported uint64
	if c := v.ahead; c != nil {
		reported = c.Sequence
		v.find(v.result.Last+1, c.Sequence, "missing: the log ends before a checkpoint that was signed at %s", stamp(c.At))
		v.ahead = nil
	}
	if c := v.remembered; c != nil && c.Sequence > reported {
		v.find(v.result.Last+1, c.Sequence, "missing: the log was cut off at its end; the remembered checkpoint was signed at %s", stamp(c.At))
	}
	slices.SortStableFunc(v.result.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.First-1, b.First-1), cmp.Compare(a.Last, b.Last)) // what has no place comes last
	})
	return &v.result
}

// stamp writes a time as exports do.
func stamp(t time.Time) string { return t.UTC().Format(timeLayout) }
