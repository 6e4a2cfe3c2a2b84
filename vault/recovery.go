package vault

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// RecoveryStart asks for an attempt.
type RecoveryStart struct {
	KE1 opaque.KE1
	// Generation names one; zero: the active one.
	Generation GenerationID
	// Attempt is the number that the client expects; 0: any. Another number is a
	// Conflict and is not charged.
	Attempt uint32
}

// RecoveryStarted answers StartRecovery.
type RecoveryStarted struct {
	KE2          opaque.KE2
	State        []byte
	Generation   GenerationID
	Attempt      uint32
	AttemptsLeft int
	ExpiresAt    time.Time
	KSF          KSF
}

// StartRecovery counts an attempt durably and only then evaluates it.
//
// The same KE1 at the same generation, while its attempt is open, is the same
// guess: it is answered again, with the same number and expiry, and not charged. So
// after ErrTokenUnavailable and ErrStoreUnavailable, where the attempt may have been
// charged, the same bytes can be sent again.
//
// Errors that charge nothing: InvalidRequest, ErrNotEnrolled, Conflict, TooEarly,
// ErrKeyDestroyed, ErrAccountFault.
func (v *Vault) StartRecovery(ctx context.Context, c Caller, req RecoveryStart) (*RecoveryStarted, error) {
	// 1. Decide and count. When change returns without an error, the attempt is in the store.
	var g *Generation
	var t *Attempt
	e, err := v.change(ctx, c, false, func(e *edit) (err error) {
		if g, err = e.choose(req.Generation); err != nil {
			return err
		}
		claim := claimOf(g.ID, req.KE1[:])
		if t = g.sameGuess(claim, e.now); t != nil {
			return nil
		}
		if req.Attempt != 0 && req.Attempt != g.Started+1 {
			return &Conflict{Reason: fmt.Sprintf("the next attempt is number %d, not %d; somebody else made one: look at the status", g.Started+1, req.Attempt)}
		}
		if t, err = e.charge(g, claim, e.now); err != nil {
			return err
		}
		e.note(g, EventAttempt, t.Number)
		return nil
	})
	if err != nil {
		return nil, err
	}

	// 2. Evaluate. Everything from here on can be repeated for the same claim.
	s, err := v.openSecrets(ctx, e.Account, g)
	if err != nil {
		return nil, err
	}
	serverKey, err := v.token.PublicKey(purposeServer, g.ServerKey)
	if err != nil {
		return nil, tokenFault("reading the server key", err)
	}
	ke2, expect, err := opaque.GenerateKE2(ctx, opaque.Session{
		Context:        v.context,
		ServerIdentity: []byte(v.id),
		ClientIdentity: transcript.ClientIdentity(c.Account.Tenant, c.Account.User),
	}, v.random, s.record, req.KE1, serverStatic{v, g.ServerKey, serverKey}, v.oprf(s.share, g.OPRFKey))
	if err != nil {
		return nil, fmt.Errorf("making KE2: %w", err)
	}
	state := recoveryState{
		claim: t.Claim, attempt: t.Number, expect: expect, expires: t.ExpiresAt,
		failuresSince: t.Number - g.LastSuccess - 1, failuresTotal: g.Started - g.Successes - 1,
	}
	sealed, err := v.sealState(ctx, labelRecoveryState, c.Account, g.ID, state.encode())
	if err != nil {
		return nil, err
	}
	return &RecoveryStarted{
		KE2: ke2, State: sealed, Generation: g.ID, Attempt: t.Number,
		AttemptsLeft: e.AttemptsLeft(), ExpiresAt: t.ExpiresAt, KSF: g.KSF,
	}, nil
}

// choose finds the generation that an attempt is for.
func (e *edit) choose(id GenerationID) (*Generation, error) {
	if id.IsZero() {
		if g := e.in(Active); g != nil {
			return g, nil
		}
		if e.in(Frozen) != nil {
			return nil, &Conflict{Reason: "the backup was turned off without its owner's proof; the frozen generation can be recovered if it is named"}
		}
		if head := e.Find(e.Head); head != nil && (head.Reason == Exhausted || head.Reason == Failures) {
			return nil, ErrKeyDestroyed
		}
		return nil, ErrNotEnrolled
	}
	switch g := e.Find(id); {
	case g == nil:
		return nil, &Conflict{Reason: "the account has no such generation, or it is gone; look at the status"}
	case g.State == Destroyed:
		return nil, ErrKeyDestroyed
	case g.State == Staged:
		return nil, &Conflict{Reason: "the generation is staged and not activated yet"}
	default:
		return g, nil
	}
}

// Recovered answers FinishRecovery.
type Recovered struct {
	Generation GenerationID
	// SealedKey is the wrapped key under the session key: nonce, ciphertext, tag.
	SealedKey [transcript.DeliverySize]byte
	// FailuresSince counts the failures between the last success and this attempt,
	// FailuresTotal those of all time, so that the client can show those that are not its own.
	FailuresSince, FailuresTotal uint32
}

// FinishRecovery checks the client's proof. A right one forgives the attempts up to
// its own and returns the wrapped key; a wrong one closes the attempt, and destroys
// what is exhausted by it. Either, sent again, is answered again.
//
// Errors: WrongPassword; ErrKeyDestroyed; InvalidRequest for a foreign state;
// Conflict for an attempt that is over; ErrAccountFault, ErrTokenUnavailable,
// ErrStoreUnavailable. None charges anything: the attempt was charged at start.
func (v *Vault) FinishRecovery(ctx context.Context, c Caller, ke3 opaque.KE3, rawState []byte) (*Recovered, error) {
	id, r, err := v.openState(ctx, labelRecoveryState, c.Account, rawState)
	if err != nil {
		return nil, err
	}
	var state recoveryState
	if err := state.decode(r); err != nil {
		return nil, err
	}
	sessionKey, wrong := state.expect.Verify(ke3) // the one error is ErrWrongClientMAC

	var sealedRecord Generation // as it was when the attempt was credited
	e, err := v.change(ctx, c, false, func(e *edit) error {
		g := e.Find(id)
		if g == nil || !g.Live() {
			return ErrKeyDestroyed
		}
		t := g.attempt(state.attempt, state.claim)
		switch {
		case t == nil:
			return &Conflict{Reason: "the attempt is over: a later one succeeded; start again"}
		case t.Outcome == Succeeded && wrong == nil, t.Outcome == Failed && wrong != nil:
			// Answered again below.
		case t.Outcome != Open:
			return &Conflict{Reason: "the attempt was finished with another proof; start again"}
		case !t.OpenAt(e.now):
			return &Conflict{Reason: "the attempt has expired; it counts as failed; start again"}
		case wrong == nil:
			g.credit(t)
			e.note(g, EventSuccess, state.attempt)
		default:
			t.Outcome = Failed
			e.note(g, EventFailure, state.attempt)
		}
		sealedRecord = *g
		return nil
	})
	if err != nil {
		return nil, err
	}
	if wrong != nil {
		if g := e.Find(id); !g.Live() {
			return nil, ErrKeyDestroyed
		}
		return nil, &WrongPassword{AttemptsLeft: e.AttemptsLeft(), NextAttempt: e.nextAttempt()}
	}

	s, err := v.openSecrets(ctx, e.Account, &sealedRecord)
	if err != nil {
		return nil, err
	}
	sealed, err := deliver(sessionKey, s.wrapped[:],
		transcript.DeliveryContext(v.id, c.Account.Tenant, c.Account.User, id))
	if err != nil {
		return nil, err
	}
	return &Recovered{
		Generation: id, SealedKey: sealed,
		FailuresSince: state.failuresSince, FailuresTotal: state.failuresTotal,
	}, nil
}

// attempt returns the kept attempt of this number and claim, or nil.
func (g *Generation) attempt(number uint32, claim Claim) *Attempt {
	for i := range g.Attempts {
		if t := &g.Attempts[i]; t.Number == number && t.Claim == claim {
			return t
		}
	}
	return nil
}

// deliver seals the wrapped key under the session key, with a fresh nonce each time.
func deliver(session opaque.SessionKey, wrapped, associated []byte) (out [transcript.DeliverySize]byte, err error) {
	key, err := hkdf.Key(sha256.New, session[:], nil, transcript.DeliveryKeyInfo, 32)
	if err != nil {
		return out, fmt.Errorf("deriving the delivery key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return out, fmt.Errorf("delivery cipher: %w", err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return out, fmt.Errorf("delivery cipher: %w", err)
	}
	copy(out[:], gcm.Seal(nil, nil, wrapped, associated))
	return out, nil
}
