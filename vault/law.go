package vault

import (
	"crypto/sha256"
	"time"

	"github.com/backup-key-vault/bkv/transcript"
)

// This file is the guess law, whole:
//
//	No evaluated OPRF element leaves the vault before its attempt is durably
//	counted; and nothing but a success or the owner's proof ever refunds an
//	attempt: no fault, retry, restart, restore or fail-over. The attempts used
//	since the last success, summed over all live generations of an account, never
//	exceed its cap; and no generation outlives MaxFailures failures in all.
//
// The functions below decide on an account in memory. StartRecovery and
// FinishRecovery (recovery.go) hold the order: decide, write, and only then
// evaluate. The store refuses a write that would break the law, once more.

const (
	// AttemptLifetime is how long an attempt can be finished or, after a lost
	// reply, asked for again. It is fixed when the attempt is charged.
	AttemptLifetime = 5 * time.Minute
	// MaxFailures ends a generation, however many successes lie between: it
	// bounds the guesses of somebody whose guesses its owner's successes forgive.
	MaxFailures = 100
)

// claimOf names a guess: the same KE1 at the same generation is the same guess.
func claimOf(generation GenerationID, ke1 []byte) Claim {
	return sha256.Sum256(transcript.Fields("bkv/v1/claim", generation[:], ke1))
}

// used counts the attempts since the last success over the live generations.
func (a *Account) used() int {
	n := 0
	for i := range a.Generations {
		if g := &a.Generations[i]; g.Live() {
			n += g.Used()
		}
	}
	return n
}

// AttemptsLeft is what the cap leaves.
func (a *Account) AttemptsLeft() int { return max(0, a.Policy.MaxAttempts-a.used()) }

// openUntil is when the last open attempt of g expires; zero if none is open.
func (g *Generation) openUntil(now time.Time) (until time.Time) {
	for _, t := range g.Attempts {
		if t.OpenAt(now) && t.ExpiresAt.After(until) {
			until = t.ExpiresAt
		}
	}
	return until
}

// openUntil is when the last open attempt of any live generation expires; zero if none is open.
func (a *Account) openUntil(now time.Time) (until time.Time) {
	for i := range a.Generations {
		if g := &a.Generations[i]; g.Live() {
			if u := g.openUntil(now); u.After(until) {
				until = u
			}
		}
	}
	return until
}

// nextAttempt is the time before which no attempt is answered; zero: at once.
// The delay runs from the latest attempt that still counts as used.
func (a *Account) nextAttempt() time.Time {
	n := a.used()
	if n == 0 || n >= len(a.Policy.Delays) || a.Policy.Delays[n] == 0 {
		return time.Time{}
	}
	var latest time.Time
	for i := range a.Generations {
		g := &a.Generations[i]
		if !g.Live() {
			continue
		}
		for _, t := range g.Attempts {
			if t.Number > g.LastSuccess && t.ChargedAt.After(latest) {
				latest = t.ChargedAt
			}
		}
	}
	return latest.Add(a.Policy.Delays[n])
}

// sameGuess returns the open attempt that claim was charged for, or nil. It is
// looked at before expected number, delay and cap: the same guess, sent again,
// is answered again and not charged.
func (g *Generation) sameGuess(claim Claim, now time.Time) *Attempt {
	for i := range g.Attempts {
		if t := &g.Attempts[i]; t.Claim == claim && t.OpenAt(now) {
			return t
		}
	}
	return nil
}

// charge counts a new attempt on g, a live generation of a, or says why it may not
// be made: TooEarly. It changes nothing if it refuses.
func (a *Account) charge(g *Generation, claim Claim, now time.Time) (*Attempt, error) {
	if next := a.nextAttempt(); next.After(now) {
		return nil, &TooEarly{Next: next, Wait: next.Sub(now)}
	}
	// Used up, but not destroyed yet: an attempt is still open, and its right KE3 counts.
	if a.used() >= a.Policy.MaxAttempts {
		until := a.openUntil(now)
		return nil, &TooEarly{Next: until, Wait: until.Sub(now)}
	}
	if g.Failures() >= MaxFailures {
		until := g.openUntil(now)
		return nil, &TooEarly{Next: until, Wait: until.Sub(now)}
	}
	g.Started++
	g.Attempts = append(g.Attempts, Attempt{
		Number: g.Started, Claim: claim, Outcome: Open, ChargedAt: now, ExpiresAt: now.Add(AttemptLifetime),
	})
	return &g.Attempts[len(g.Attempts)-1], nil
}

// credit records that an open attempt succeeded. It forgives the attempts before it and
// none after it, of its own generation alone: else whoever enrols a generation
// with a password of his own could refill the attempts at another.
func (g *Generation) credit(t *Attempt) {
	t.Outcome = Succeeded
	g.LastSuccess = t.Number
	g.Successes++
	for len(g.Attempts) > 0 && g.Attempts[0].Number < g.LastSuccess {
		g.Attempts = g.Attempts[1:]
	}
}

// settle does what time and the cap demand, and reports the generations that it destroyed.
//
// When the attempts are used up and none is open any more, every frozen
// generation is destroyed, and the active one too if it used them up by itself.
func (a *Account) settle(now time.Time) (destroyed []*Generation) {
	exhausted := a.used() >= a.Policy.MaxAttempts && a.openUntil(now).IsZero()
	for i := range a.Generations {
		g := &a.Generations[i]
		var why Reason
		switch {
		case g.State == Staged && !now.Before(g.ExpiresAt):
			why = NotInTime
		case g.State == Frozen && !now.Before(g.ExpiresAt):
			why = GraceOver
		case g.State == Frozen && exhausted,
			g.State == Active && exhausted && g.Used() >= a.Policy.MaxAttempts:
			why = Exhausted
		case g.Live() && g.Failures() >= MaxFailures && g.openUntil(now).IsZero():
			why = Failures
		default:
			continue
		}
		g.destroy(why)
		destroyed = append(destroyed, g)
	}
	return destroyed
}

// destroy erases a generation's secrets and leaves the tombstone.
func (g *Generation) destroy(why Reason) {
	clear(g.Sealed)
	g.State, g.Reason, g.Sealed, g.ExpiresAt = Destroyed, why, nil, time.Time{}
}

// Due is when settle has something to do next; zero: never. A store keeps it
// beside the account, so that destruction does not wait for a next request.
func (a *Account) Due() (due time.Time) {
	sooner := func(t time.Time) {
		if due.IsZero() || t.Before(due) {
			due = t
		}
	}
	var open time.Time // when the last attempt that is open now has expired
	for i := range a.Generations {
		g := &a.Generations[i]
		if g.State == Staged || g.State == Frozen {
			sooner(g.ExpiresAt)
		}
		if !g.Live() {
			continue
		}
		var own time.Time
		for _, t := range g.Attempts {
			if t.Outcome == Open && t.ExpiresAt.After(own) {
				own = t.ExpiresAt
			}
		}
		if own.After(open) {
			open = own
		}
		if g.Failures() >= MaxFailures && !own.IsZero() {
			sooner(own)
		}
	}
	if a.used() >= a.Policy.MaxAttempts && !open.IsZero() {
		sooner(open)
	}
	return due
}
