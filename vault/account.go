package vault

import (
	"fmt"
	"time"
	"unicode/utf8"
)

// MaxUserBytes bounds a user id.
const MaxUserBytes = 256

// AccountID names an account: a tenant (an app) and one of its users. Both are
// byte-exact: no case folding, no Unicode normalisation, ever.
type AccountID struct {
	Tenant string
	User   string
}

// Validate refuses ids that no account can have: an empty one, one over
// MaxUserBytes, one that is not UTF-8, and one with control characters.
func (id AccountID) Validate() error {
	switch {
	case id.User == "":
		return &InvalidRequest{Field: "user", Reason: "the user id is empty"}
	case len(id.User) > MaxUserBytes:
		return &InvalidRequest{Field: "user", Reason: fmt.Sprintf("the user id has %d bytes; at most %d are allowed", len(id.User), MaxUserBytes)}
	case !utf8.ValidString(id.User):
		return &InvalidRequest{Field: "user", Reason: "the user id is not valid UTF-8"}
	}
	for _, r := range id.User {
		if r < 0x20 || r >= 0x7f && r <= 0x9f {
			return &InvalidRequest{Field: "user", Reason: "the user id has a control character"}
		}
	}
	return nil
}

// GenerationID is random, made at enrolment start. The zero value means none.
type GenerationID [16]byte

// IsZero reports whether the id names no generation.
func (g GenerationID) IsZero() bool { return g == GenerationID{} }

// Claim is H(generation id, KE1): whose attempt a number is.
type Claim [32]byte

// RowMAC is the MAC over an account and all its generations, made in the token.
type RowMAC [32]byte

// State is where a generation is in its life. A generation only ever moves from
// Staged to Active, between Active and Frozen, and from any of these to Destroyed.
type State string

// States.
const (
	// Staged: its record is stored, its owner has not confirmed it; nobody can attempt it.
	Staged State = "staged"
	// Active: what recovery recovers.
	Active State = "active"
	// Frozen: superseded or turned off without its owner's proof. Still
	// recoverable, under the shared cap, until it expires.
	Frozen State = "frozen"
	// Destroyed: its secrets are erased; the row stays as a tombstone.
	Destroyed State = "destroyed"
)

// Reason says why a generation was destroyed.
type Reason string

// Reasons.
const (
	Exhausted  Reason = "exhausted"  // the last allowed attempt failed
	Failures   Reason = "failures"   // MaxFailures failures in all
	Replaced   Reason = "replaced"   // by a generation that its owner signed for
	Overruled  Reason = "overruled"  // a frozen generation was reinstated over it
	TurnedOff  Reason = "turned-off" // by its owner
	GraceOver  Reason = "grace-over" // frozen, and nobody brought it back
	NotInTime  Reason = "not-in-time"
	Superseded Reason = "superseded" // staged, and another one was staged or activated
)

// Outcome is how an attempt ended.
type Outcome string

// Outcomes. An open attempt that expires is a failed one.
const (
	Open      Outcome = "open"
	Succeeded Outcome = "succeeded"
	Failed    Outcome = "failed"
)

// Attempt is one guess. Everything but Outcome is fixed when it is charged.
type Attempt struct {
	Number    uint32
	Claim     Claim
	Outcome   Outcome
	ChargedAt time.Time
	ExpiresAt time.Time
}

// OpenAt reports whether the attempt can still be finished.
func (a Attempt) OpenAt(now time.Time) bool { return a.Outcome == Open && now.Before(a.ExpiresAt) }

// KSF is the record's key stretching, Argon2id (RFC 9106), as its client chose it.
type KSF struct {
	Time, MemoryKiB, Threads uint32
}

// Generation is one enrolment of an account's backup key.
type Generation struct {
	Number    uint32 // 1, 2, … in the order of staging
	ID        GenerationID
	Follows   GenerationID // the account's head when the enrolment started
	State     State
	Reason    Reason    // only if destroyed
	CreatedAt time.Time // when it was staged
	ExpiresAt time.Time // if staged or frozen: the end of that; else zero

	// Digest is what owners sign: see transcript.Material.
	Digest   [32]byte
	OwnerKey [32]byte // Ed25519 public key
	KSF      KSF
	// Sealed holds t_u, the OPAQUE record and the wrapped key under the master
	// key; nil once destroyed.
	Sealed []byte
	// OPRFKey and ServerKey are the generations of the token keys that this
	// record depends on; Strategy is how the token multiplies with them.
	OPRFKey, ServerKey uint32
	Strategy           string

	// The counters of the guess law; see law.go. They never decrease.
	Started     uint32 // number of the last attempt charged
	LastSuccess uint32 // number of the last attempt that succeeded
	Successes   uint32
	// Attempts are the last success and all after it, by number.
	Attempts []Attempt
}

// Live reports whether the generation can be attempted.
func (g *Generation) Live() bool { return g.State == Active || g.State == Frozen }

// Used counts the attempts since the last success, open ones included.
func (g *Generation) Used() int { return int(g.Started - g.LastSuccess) }

// Failures counts the attempts that have not succeeded, in all, open ones included.
func (g *Generation) Failures() int { return int(g.Started - g.Successes) }

// Policy is what a tenant allows its accounts. It is written into the account's
// row, so that a later setting cannot loosen what protects a key.
type Policy struct {
	// MaxAttempts is the cap on the attempts used since the last success, summed
	// over the live generations: 1 to 10.
	MaxAttempts int
	// Delays[n] is the least time between the latest attempt and the next one when
	// n have been used. Missing entries are no delay.
	Delays []time.Duration
	// Grace is how long a generation stays frozen.
	Grace time.Duration
}

// DefaultPolicy: ten attempts, four of them at once and then 1 min, 5 min,
// 15 min, 1 h, 4 h and 24 h before the next; seven days of grace.
func DefaultPolicy() Policy {
	return Policy{
		MaxAttempts: 10,
		Delays: []time.Duration{0, 0, 0, 0, time.Minute, 5 * time.Minute, 15 * time.Minute,
			time.Hour, 4 * time.Hour, 24 * time.Hour},
		Grace: 7 * 24 * time.Hour,
	}
}

// Bounds of a policy.
const (
	MaxAttemptsLimit = 10
	MaxDelay         = 7 * 24 * time.Hour
	MinGrace         = time.Second
	MaxGrace         = 90 * 24 * time.Hour
)

// Validate refuses a policy out of bounds, naming the bound.
func (p Policy) Validate() error {
	switch {
	case p.MaxAttempts < 1 || p.MaxAttempts > MaxAttemptsLimit:
		return fmt.Errorf("max attempts: want 1 to %d, got %d", MaxAttemptsLimit, p.MaxAttempts)
	case len(p.Delays) > p.MaxAttempts:
		return fmt.Errorf("delays: want at most %d, one for each attempt, got %d", p.MaxAttempts, len(p.Delays))
	case p.Grace < MinGrace || p.Grace > MaxGrace:
		return fmt.Errorf("grace: want %v to %v, got %v", MinGrace, MaxGrace, p.Grace)
	}
	for i, d := range p.Delays {
		if d < 0 || d > MaxDelay {
			return fmt.Errorf("delay %d: want 0 to %v, got %v", i, MaxDelay, d)
		}
	}
	return nil
}

// Account is all that the vault keeps of a user. It is never deleted: what is
// gone stays as tombstones.
type Account struct {
	ID AccountID
	// Pseudonym stands for the account in the audit log: a MAC, made in the token.
	Pseudonym [32]byte
	Policy    Policy
	// Head is the generation that was activated or reinstated last, whatever
	// became of it since: what the next enrolment follows. Zero: none yet.
	Head GenerationID
	// Generations holds those that are not destroyed, and the head, by number.
	// Other tombstones stay in the store and are not read back.
	Generations []Generation
	// NextNumber is the number of the next generation.
	NextNumber uint32
	// MACKey is the generation of the token key that made MAC.
	MACKey uint32
	MAC    RowMAC
}

// Find returns the generation with this id, or nil.
func (a *Account) Find(id GenerationID) *Generation {
	for i := range a.Generations {
		if a.Generations[i].ID == id {
			return &a.Generations[i]
		}
	}
	return nil
}

// in returns the one generation in a state of which there is at most one, or nil.
func (a *Account) in(s State) *Generation {
	for i := range a.Generations {
		if a.Generations[i].State == s {
			return &a.Generations[i]
		}
	}
	return nil
}

// Tenant is an app whose users the vault serves.
type Tenant struct {
	ID     string
	Policy Policy
	Keys   []TenantKey
	// DirectEnrolment says that the tenant trusts its back end with passwords: enrolments and
	// password changes are then taken past the relay channel too.
	DirectEnrolment bool
}

// TenantKey verifies the tokens of a tenant.
type TenantKey struct {
	ID string // the token's kid
	// PublicKey is DER, PKIX (RFC 5280): Ed25519, ECDSA P-256 or RSA of 2048 bits or more.
	PublicKey []byte
}

// EventKind is what happened.
type EventKind string

// Event kinds.
const (
	EventStaged     EventKind = "staged"
	EventActivated  EventKind = "activated"
	EventFrozen     EventKind = "frozen"
	EventReinstated EventKind = "reinstated"
	EventTurnedOff  EventKind = "turned-off" // and frozen or destroyed thereby
	EventAttempt    EventKind = "attempt"
	EventSuccess    EventKind = "success"
	EventFailure    EventKind = "failure"
	EventDestroyed  EventKind = "destroyed"
)

// Event records one change, in the same statement as the change itself. It names
// the account by its pseudonym only.
type Event struct {
	Kind       EventKind
	Tenant     string
	Pseudonym  [32]byte
	Generation GenerationID
	Attempt    uint32 // of attempt, success and failure; else 0
	Reason     Reason // of destroyed; else empty
	RequestID  string // empty if the vault acted by itself
}
