package vault

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// Key names a key of the token.
type Key struct {
	Purpose    string
	Generation uint32
}

func (k Key) String() string { return fmt.Sprintf("%s/%d", k.Purpose, k.Generation) }

// purposes are those of all keys, in the order in which they are shown.
var purposes = []string{purposeMaster, purposeState, purposeOPRF, purposeServer, purposeRelay, purposeMAC, purposeIdentity, purposeAudit}

// KeyState is where a generation of a key is in its life. It only moves downwards.
type KeyState string

// States of keys.
const (
	// KeyMaking: an instance has claimed the number and makes the key. A claim whose holder died ends as
	// KeyDestroyed; its number is never used again, so that no two keys get one name.
	KeyMaking KeyState = "making"
	// KeyMade: at least one token has shown that it holds the key; nothing uses it.
	KeyMade KeyState = "made"
	// KeyCurrent: new work uses it.
	KeyCurrent KeyState = "current"
	// KeyRetired: what depends on it is still served.
	KeyRetired KeyState = "retired"
	// KeyClosing: likewise, and the store refuses writes after which more would depend on it.
	KeyClosing KeyState = "closing"
	// KeyDestroyed: no token holds it. The row stays, so that it cannot come back.
	KeyDestroyed KeyState = "destroyed"
)

// KeyGeneration is a row of the table of keys.
type KeyGeneration struct {
	Key
	State KeyState
	// Proof tells the key from every other and gives nothing away; nil: not made.
	Proof []byte
	// Times; zero: not yet.
	CreatedAt, CurrentSince, RetiredAt, DestroyedAt time.Time
	// RewrappedAt is when nothing depended on older generations any more.
	RewrappedAt time.Time
	// Holder is the instance that makes the key, or rewraps to it, and HeldUntil when it is taken for dead.
	Holder    string
	HeldUntil time.Time
	// Seals is how many values instances have reported to have sealed.
	Seals uint64
	// Tokens are those that have shown that they hold the key, by serial number.
	Tokens []KeyHolding
}

// KeyHolding says that a token held a key.
type KeyHolding struct {
	Serial string
	Gone   bool // it was destroyed there
	Left   bool // the token was taken out of service; it comes back by showing again that it holds the key
}

// heldBy reports whether the token holds the key, and whether it ever did.
func (g *KeyGeneration) heldBy(serial string) (holds, held bool) {
	for _, t := range g.Tokens {
		if t.Serial == serial && !t.Left {
			return !t.Gone, true
		}
	}
	return false, false
}

// held reports whether the lease is somebody else's than holder's.
func (g *KeyGeneration) heldByOther(holder string, now time.Time) bool {
	return g.Holder != "" && g.Holder != holder && now.Before(g.HeldUntil)
}

// register notes that a token holds the key.
func (g *KeyGeneration) register(serial string) {
	for i := range g.Tokens {
		if t := &g.Tokens[i]; t.Serial == serial {
			t.Left = false
			return
		}
	}
	g.Tokens = append(g.Tokens, KeyHolding{Serial: serial})
}

// release notes that the key was destroyed in a token, or that the token left, and reports whether it thereby is gone for good.
func (g *KeyGeneration) release(serial string, now time.Time, destroyed bool) bool {
	anywhere := false
	for i := range g.Tokens {
		t := &g.Tokens[i]
		if t.Serial == serial {
			t.Gone, t.Left = t.Gone || destroyed, t.Left || !destroyed
		}
		anywhere = anywhere || !t.Gone && !t.Left
	}
	if g.State != KeyClosing || anywhere {
		return false
	}
	g.State, g.DestroyedAt = KeyDestroyed, now
	return true
}

// KeyTable is the table of keys, or the part of one purpose, as it was read: by purpose
// and generation, with the database's clock.
type KeyTable struct {
	Now  time.Time
	Keys []KeyGeneration
}

// Find returns the row of a key, or nil.
func (t *KeyTable) Find(k Key) *KeyGeneration {
	for i := range t.Keys {
		if t.Keys[i].Key == k {
			return &t.Keys[i]
		}
	}
	return nil
}

// Current returns the generation of purpose that is in use, or nil.
func (t *KeyTable) Current(purpose string) *KeyGeneration {
	for i := range t.Keys {
		if g := &t.Keys[i]; g.Purpose == purpose && g.State == KeyCurrent {
			return g
		}
	}
	return nil
}

// tokens are the serial numbers of the tokens in service: those that hold any key.
func (t *KeyTable) tokens() (serials []string) {
	for i := range t.Keys {
		for _, h := range t.Keys[i].Tokens {
			if !h.Gone && !h.Left && !slices.Contains(serials, h.Serial) {
				serials = append(serials, h.Serial)
			}
		}
	}
	return serials
}

// ready reports whether a key can be used: every token in service holds it.
func (t *KeyTable) ready(g *KeyGeneration) (missing []string) {
	for _, serial := range t.tokens() {
		if holds, _ := g.heldBy(serial); !holds {
			missing = append(missing, serial)
		}
	}
	return missing
}

// KeyEdit is the table of keys while the rows of one purpose are changed.
type KeyEdit struct {
	KeyTable
	Events []KeyEvent
}

// KeyEvent records a change of a key, in the transaction that makes the change.
type KeyEvent struct {
	Kind     EventKind
	Key      Key    // zero: about a token as a whole
	Detail   string // of key-erased and token-forgotten, the token's serial number
	Operator string // who asked; empty: the vault acted by itself, or nobody knows who
}

// Kinds of events of keys.
const (
	EventKeyMade      EventKind = "key-made"
	EventKeyCurrent   EventKind = "key-current"
	EventRewrapDone   EventKind = "rewrap-done"
	EventKeyClosing   EventKind = "key-closing"
	EventKeyErased    EventKind = "key-erased" // in one token
	EventKeyDestroyed EventKind = "key-destroyed"
	EventForgotten    EventKind = "token-forgotten"
)

func (e *KeyEdit) note(kind EventKind, key Key) { e.noteAt(kind, key, "") }

func (e *KeyEdit) noteAt(kind EventKind, key Key, serial string) {
	e.Events = append(e.Events, KeyEvent{Kind: kind, Key: key, Detail: serial})
}

// KeyStore keeps the table of keys. Implementations are safe for concurrent use, by several processes.
type KeyStore interface {
	// Keys reads the whole table.
	Keys(ctx context.Context) (KeyTable, error)
	// EditKeys gives the table to edit and writes what it made of the rows of one purpose, with its
	// events, in one transaction; of several at one time, each sees what the one before wrote. Seals are not
	// written, nor rows of other purposes. Nothing is written if edit returns an error, which is then the result. edit may run again.
	EditKeys(ctx context.Context, purpose string, edit func(*KeyEdit) error) error
	// AddSeals adds to the count of seals under a key.
	AddSeals(ctx context.Context, key Key, n uint64) error
	// Dependents counts what depends on a key: records that are not destroyed, for mac accounts.
	Dependents(ctx context.Context, key Key) (int64, error)
	// AllDependents counts for all keys.
	AllDependents(ctx context.Context) (map[Key]int64, error)
	// AwaitWrites waits until every write of an account that runs now has ended. Writes that begin later see
	// what was committed before AwaitWrites was called.
	AwaitWrites(ctx context.Context) error
	// OldestDestruction is when the first record was destroyed at since or later; zero: none.
	OldestDestruction(ctx context.Context, since time.Time) (time.Time, error)
}

// KeyToken is what rotation asks of a token. Generations, Seals and Proof answer from memory.
type KeyToken interface {
	// Serial is the token's serial number.
	Serial() string
	// Generations are those of purpose that the token holds.
	Generations(purpose string) []uint32
	// Look learns of keys that others made or destroyed.
	Look(ctx context.Context) error
	// MakeKey makes a key, or finds it made; it leaves a whole key or none. One instance makes keys of a purpose at one time.
	MakeKey(ctx context.Context, purpose string, generation uint32) error
	// DestroyKey destroys a key that is not in use. What is not there is destroyed.
	DestroyKey(ctx context.Context, purpose string, generation uint32) error
	// SetCurrent says which generation new work uses, and how many seals others have made under it.
	SetCurrent(purpose string, generation uint32, sealsElsewhere uint64) error
	// Forget acts as if the token did not hold the key.
	Forget(purpose string, generation uint32)
	// Seals counts the seals made here, since the start.
	Seals(purpose string, generation uint32) uint64
	// Proof tells a key from all others; Confirm compares with one that was made elsewhere.
	Proof(purpose string, generation uint32) ([]byte, error)
	Confirm(ctx context.Context, purpose string, generation uint32, proof []byte) (same bool, err error)
}

// KeyRefusal is an operator's wish about keys that cannot be fulfilled now, or ever. Nothing was changed, or what was can be gone on with.
type KeyRefusal struct {
	Reason string // what stands against it, and what to do
}

func (e *KeyRefusal) Error() string { return e.Reason }

func refuse(format string, args ...any) error { return &KeyRefusal{fmt.Sprintf(format, args...)} }
