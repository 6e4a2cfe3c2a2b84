package vault

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// Lifetimes of an enrolment's steps.
const (
	// EnrolmentStateLifetime is from start to stage.
	EnrolmentStateLifetime = time.Hour
	// StagedLifetime is from stage to activate.
	StagedLifetime = 24 * time.Hour
)

// EnrolmentStarted answers StartEnrolment.
type EnrolmentStarted struct {
	Response   opaque.RegistrationResponse
	State      []byte
	Generation GenerationID
	Follows    GenerationID
	ExpiresAt  time.Time
}

// StartEnrolment evaluates a new password under a fresh t_u. It stores nothing and
// counts nothing: the evaluation tells nothing about any record that exists. It can
// be repeated at will.
//
// Errors: InvalidRequest, ErrAccountFault, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) StartEnrolment(ctx context.Context, c Caller, request opaque.RegistrationRequest) (*EnrolmentStarted, error) {
	account, now, err := v.read(ctx, c.Account)
	switch {
	case err == nil:
	case isNotEnrolled(err):
		account = &Account{}
	default:
		return nil, err
	}
	state := enrolmentState{
		follows:   account.Head,
		oprfKey:   v.token.Newest(purposeOPRF),
		serverKey: v.token.Newest(purposeServer),
		expires:   now.Add(EnrolmentStateLifetime),
	}
	if state.share, err = opaque.RandomScalar(v.tokenRandom(ctx)); err != nil {
		return nil, tokenFault("choosing the record's share", err)
	}
	var generation GenerationID
	if _, err := v.tokenRandom(ctx).Read(generation[:]); err != nil {
		return nil, tokenFault("choosing the generation's id", err)
	}
	serverKey, err := v.token.PublicKey(purposeServer, state.serverKey)
	if err != nil {
		return nil, tokenFault("reading the server key", err)
	}
	response, err := opaque.CreateRegistrationResponse(ctx, request, opaque.PublicKey(serverKey), v.oprf(state.share, state.oprfKey))
	if err != nil {
		return nil, fmt.Errorf("evaluating the registration request: %w", err)
	}
	sealed, err := v.sealState(ctx, labelEnrolmentState, c.Account, generation, state.encode())
	if err != nil {
		return nil, err
	}
	return &EnrolmentStarted{
		Response: response, State: sealed, Generation: generation, Follows: state.follows, ExpiresAt: state.expires,
	}, nil
}

// Staging is what a client makes of an enrolment's start.
type Staging struct {
	State      []byte
	Record     opaque.RegistrationRecord
	WrappedKey [transcript.WrappedKeySize]byte
	KSF        KSF
	OwnerKey   [32]byte
}

// Stage stores a record. Nobody can attempt it before it is activated. A state
// stages one record: the same request again gets the same answer, another record
// is a Conflict. A generation that was staged before and not activated is superseded.
//
// Errors: InvalidRequest, Conflict, ErrAccountFault, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) Stage(ctx context.Context, c Caller, s Staging) (*Generation, error) {
	if err := s.KSF.validate(); err != nil {
		return nil, err
	}
	id, r, err := v.openState(ctx, labelEnrolmentState, c.Account, s.State)
	if err != nil {
		return nil, err
	}
	var state enrolmentState
	if err := state.decode(r); err != nil {
		return nil, err
	}
	serverKey, err := v.token.PublicKey(purposeServer, state.serverKey)
	if err != nil {
		return nil, tokenFault("reading the server key", err)
	}
	digest := transcript.Material{
		Record: s.Record[:], WrappedKey: s.WrappedKey[:],
		Time: s.KSF.Time, MemoryKiB: s.KSF.MemoryKiB, Threads: s.KSF.Threads,
		OwnerKey: s.OwnerKey[:], ServerKey: serverKey[:],
	}.Digest()
	sealed, err := v.sealSecrets(ctx, c.Account, id, &secrets{share: state.share, record: s.Record, wrapped: s.WrappedKey})
	if err != nil {
		return nil, err
	}
	var staged *Generation
	_, err = v.change(ctx, c, true, func(e *edit) error {
		if staged = e.Find(id); staged != nil {
			if staged.Digest != digest || staged.State == Destroyed {
				return &Conflict{Reason: "this state has staged another record, or one that is gone; start the enrolment again"}
			}
			return nil
		}
		if !e.now.Before(state.expires) {
			return &InvalidRequest{Field: "state", Reason: "the state has expired; start the enrolment again"}
		}
		if e.Head != state.follows {
			return &Conflict{Reason: "the account changed since this enrolment started; start it again"}
		}
		if taken, err := v.store.Taken(ctx, c.Account, id); err != nil {
			return storeFault("looking for the generation", err)
		} else if taken {
			return &Conflict{Reason: "this enrolment was superseded by a later one; start again"}
		}
		e.supersedeStaged()
		e.Generations = append(e.Generations, Generation{
			Number: e.NextNumber, ID: id, Follows: state.follows, State: Staged,
			CreatedAt: e.now, ExpiresAt: e.now.Add(StagedLifetime),
			Digest: digest, OwnerKey: s.OwnerKey, KSF: s.KSF, Sealed: sealed,
			OPRFKey: state.oprfKey, ServerKey: state.serverKey, Strategy: v.token.Strategy(),
		})
		e.NextNumber++
		e.keys = []Key{{purposeMaster, SealedUnder(sealed)}, {purposeOPRF, state.oprfKey}, {purposeServer, state.serverKey}}
		staged = &e.Generations[len(e.Generations)-1]
		e.note(staged, EventStaged, 0)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return staged, nil
}

// validate refuses stretching that clients would refuse at recovery.
func (k KSF) validate() error {
	if k.Threads > math.MaxUint8 {
		return &InvalidRequest{Field: "ksf", Reason: fmt.Sprintf("threads: want at most %d", opaque.MaxArgon2id.Threads)}
	}
	if err := (opaque.Argon2id{Time: k.Time, MemoryKiB: k.MemoryKiB, Threads: uint8(k.Threads)}).Validate(); err != nil {
		return &InvalidRequest{Field: "ksf", Reason: err.Error()}
	}
	return nil
}

// supersedeStaged destroys what is staged: one enrolment at a time.
func (e *edit) supersedeStaged() {
	if g := e.in(Staged); g != nil {
		e.destroy(g, Superseded)
	}
}

// Activation confirms a staged generation.
type Activation struct {
	Generation GenerationID
	// Signature is by the staged generation's owner key (transcript.Activate).
	Signature []byte
	// PreviousSignature, if any, is by the active generation's owner key (transcript.Replace).
	PreviousSignature []byte
}

// Activate makes a staged generation the active one, from the generation that its
// enrolment started from and no other. With the proof of the present owner, the
// active generation is destroyed in the same statement; without it, it stays
// frozen for the grace time, still recoverable under the shared cap. The same
// request again is harmless.
//
// Errors: ErrNotEnrolled, ErrBadSignature, Conflict, ErrKeyDestroyed,
// ErrAccountFault, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) Activate(ctx context.Context, c Caller, req Activation) (*Status, error) {
	e, err := v.change(ctx, c, false, func(e *edit) error {
		g := e.Find(req.Generation)
		if g == nil {
			return &Conflict{Reason: "no generation of this id is staged; it may have expired or been superseded; start the enrolment again"}
		}
		statement := v.statement(c.Account, transcript.Activate, g.Follows, g.ID, g.Digest)
		if !statement.VerifiedBy(g.OwnerKey[:], req.Signature) {
			return ErrBadSignature
		}
		switch g.State {
		case Active:
			return nil
		case Destroyed:
			return ErrKeyDestroyed
		case Frozen:
			return &Conflict{Reason: "the generation was activated and is now frozen; its owner can reinstate it"}
		}
		if e.Head != g.Follows {
			return &Conflict{Reason: "the account changed since this enrolment started; start it again"}
		}
		if active := e.in(Active); active != nil {
			replace := statement
			replace.Action = transcript.Replace
			switch {
			case len(req.PreviousSignature) == 0:
				if err := e.freeze(active); err != nil {
					return err
				}
			case !replace.VerifiedBy(active.OwnerKey[:], req.PreviousSignature):
				return ErrBadSignature
			default:
				e.destroy(active, Replaced)
			}
		}
		if e.in(Frozen) == nil {
			e.Policy = c.Policy // the account begins anew; nothing older is left to protect
		}
		g.State, g.ExpiresAt = Active, time.Time{}
		e.Head = g.ID
		e.note(g, EventActivated, 0)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e.status(), nil
}

// freeze keeps the active generation recoverable for the grace time. There is one
// frozen generation at most: while there is, a change without proof is refused.
func (e *edit) freeze(active *Generation) error {
	if frozen := e.in(Frozen); frozen != nil {
		return &Conflict{Reason: "an earlier generation is still frozen, until " + frozen.ExpiresAt.Format(time.RFC3339) +
			"; until then only the owner of the active generation can replace it or turn it off: sign for it"}
	}
	active.State, active.ExpiresAt = Frozen, e.now.Add(e.Policy.Grace)
	e.note(active, EventFrozen, 0)
	return nil
}
