package vault

import (
	"context"
	"errors"
	"time"

	"github.com/backup-key-vault/bkv/transcript"
)

func isNotEnrolled(err error) bool { return errors.Is(err, ErrNotEnrolled) }

func (v *Vault) statement(id AccountID, action transcript.Action, from, to GenerationID, digest [32]byte) transcript.Statement {
	return transcript.Statement{
		Action: action, Vault: v.id, Tenant: id.Tenant, User: id.User, Old: from, New: to, Digest: digest,
	}
}

// TurnOff ends a generation. With its owner's signature (transcript.TurnOff) it is
// destroyed at once, frozen or active. Without one, only the active generation can be
// turned off, and it stays frozen for the grace time. A signature acts on its own
// generation only. The same request again is harmless, unless the generation was
// reinstated meanwhile: then one without a signature freezes it once more. That gives a
// relay which recorded it nothing that it cannot do anyhow: it signs its users' tokens,
// and such a request needs no more than a token.
//
// Errors: ErrNotEnrolled, ErrBadSignature, Conflict, ErrAccountFault,
// ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) TurnOff(ctx context.Context, c Caller, generation GenerationID, signature []byte) (*Status, error) {
	e, err := v.change(ctx, c, false, func(e *edit) error {
		g := e.Find(generation)
		if g == nil {
			return &Conflict{Reason: "the account has no such generation, or it is gone; look at the status"}
		}
		proven := len(signature) > 0
		if proven && !v.statement(c.Account, transcript.TurnOff, g.ID, GenerationID{}, g.Digest).
			VerifiedBy(g.OwnerKey[:], signature) {
			return ErrBadSignature
		}
		switch {
		case g.State == Destroyed, g.State == Frozen && !proven:
			return nil // it is off, or will be when its grace is over
		case g.State == Staged:
			return &Conflict{Reason: "the generation is staged and not activated yet; it expires by itself"}
		case proven:
			e.note(g, EventTurnedOff, 0)
			e.destroy(g, TurnedOff)
		default:
			e.note(g, EventTurnedOff, 0)
			if err := e.freeze(g); err != nil {
				return err
			}
		}
		if g.ID == e.Head {
			e.supersedeStaged()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e.status(), nil
}

// Reinstatement asks for a frozen generation back.
type Reinstatement struct {
	Generation GenerationID
	// Replaces is the active generation, or zero if there is none.
	Replaces GenerationID
	// FrozenUntil is the ExpiresAt of Generation, to the microsecond: it says which
	// freezing the signature ends.
	FrozenUntil time.Time
	Signature   []byte // by the frozen generation's owner (transcript.Reinstate)
}

// Reinstate makes a frozen generation active again, by its owner's signature. The
// generation that is active then is destroyed: it came without that owner's proof,
// and whoever made it can enrol once more. Counters stay as they are. The same
// request again is harmless, for good: after a later freezing it is a Conflict.
//
// Errors: ErrNotEnrolled, ErrBadSignature, ErrKeyDestroyed, Conflict,
// ErrAccountFault, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) Reinstate(ctx context.Context, c Caller, req Reinstatement) (*Status, error) {
	e, err := v.change(ctx, c, false, func(e *edit) error {
		g := e.Find(req.Generation)
		if g == nil {
			return &Conflict{Reason: "the account has no such generation, or it is gone; look at the status"}
		}
		statement := v.statement(c.Account, transcript.Reinstate, req.Replaces, g.ID, g.Digest)
		statement.FrozenUntil = req.FrozenUntil.UnixMicro()
		if !statement.VerifiedBy(g.OwnerKey[:], req.Signature) {
			return ErrBadSignature
		}
		active := e.in(Active)
		switch {
		case g.State == Active:
			return nil
		case g.State == Destroyed:
			return ErrKeyDestroyed
		case g.State == Staged:
			return &Conflict{Reason: "the generation is staged, not frozen; activate it"}
		case active == nil && !req.Replaces.IsZero(), active != nil && req.Replaces != active.ID:
			return &Conflict{Reason: "another generation is active than the one that the signature replaces; look at the status"}
		case !g.ExpiresAt.Equal(req.FrozenUntil):
			return &Conflict{Reason: "it was frozen anew since the signature was made; look at the status"}
		}
		if active != nil {
			e.destroy(active, Overruled)
		}
		e.supersedeStaged()
		g.State, g.ExpiresAt = Active, time.Time{}
		e.Head = g.ID
		e.note(g, EventReinstated, 0)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e.status(), nil
}
