package vault

import (
	"errors"
	"fmt"
	"time"
)

// Refusals. None of them charges an attempt.
var (
	// ErrNotEnrolled: the account has no generation that could be meant.
	ErrNotEnrolled = errors.New("not enrolled")
	// ErrKeyDestroyed: the generation is gone for good.
	ErrKeyDestroyed = errors.New("the key is destroyed")
	// ErrBadSignature: an owner's signature does not verify.
	ErrBadSignature = errors.New("the owner's signature does not verify")
	// ErrAccountFault: the stored row is not what the vault wrote. Nothing is done with it.
	ErrAccountFault = errors.New("the account's row fails its authentication")
)

// Faults. The same request can be sent again, byte for byte. An attempt that was
// charged before the fault stays charged, and open to the same bytes.
var (
	ErrTokenUnavailable = errors.New("the token is unavailable")
	ErrStoreUnavailable = errors.New("the store is unavailable")
)

// What a store answers; never seen by the domain's callers.
var (
	ErrStale = errors.New("the account changed since it was read")
	ErrLaw   = errors.New("the write would break the guess law")
)

// ClosingKey is a store's answer to a write after which something new would depend on
// a key that is about to be destroyed.
type ClosingKey struct{ Key Key }

func (e *ClosingKey) Error() string { return fmt.Sprintf("nothing new may depend on key %v", e.Key) }

// InvalidRequest is input that is refused before anything is done.
type InvalidRequest struct {
	Field  string // as the wire names it
	Reason string // what is wrong, without the value
}

func (e *InvalidRequest) Error() string { return fmt.Sprintf("invalid %s: %s", e.Field, e.Reason) }

// Conflict is a request that does not fit the account as it is now.
type Conflict struct {
	Reason string // what does not fit, and what to do
}

func (e *Conflict) Error() string { return "conflict: " + e.Reason }

// WrongPassword is a finish whose proof is wrong. Its attempt was charged at start.
type WrongPassword struct {
	// AttemptsLeft is 0 only while an attempt of somebody else is open: it decides.
	// If nothing is left and nothing open, the answer is ErrKeyDestroyed.
	AttemptsLeft int
	NextAttempt  time.Time // no attempt is answered before; zero: at once
}

func (e *WrongPassword) Error() string {
	return fmt.Sprintf("wrong password, %d attempts left", e.AttemptsLeft)
}

// TooEarly is an attempt before its time. It is not charged.
type TooEarly struct {
	Next time.Time     // by the database's clock
	Wait time.Duration // from the database's now to Next
}

func (e *TooEarly) Error() string { return fmt.Sprintf("too early, wait %v", e.Wait) }
