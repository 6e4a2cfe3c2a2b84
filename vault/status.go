package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/backup-key-vault/bkv/ohttp"
	"github.com/backup-key-vault/bkv/transcript"
)

// Status is what an account's user may know of it.
type Status struct {
	// Generations are those that live or are staged, and the head.
	Generations  []Generation
	Follow       GenerationID // what the next enrolment follows
	AttemptsLeft int
	MaxAttempts  int
	NextAttempt  time.Time // zero: now, or none at all
}

// Status reports an account. What is due is done first, so a status never shows a
// generation whose time is over. It charges nothing.
//
// Errors: InvalidRequest, ErrNotEnrolled, ErrAccountFault, ErrTokenUnavailable, ErrStoreUnavailable.
func (v *Vault) Status(ctx context.Context, c Caller) (*Status, error) {
	e, err := v.change(ctx, c, false, func(*edit) error { return nil })
	if err != nil {
		return nil, err
	}
	return e.status(), nil
}

func (e *edit) status() *Status {
	s := &Status{Follow: e.Head, MaxAttempts: e.Policy.MaxAttempts}
	live := false
	for _, g := range e.Generations {
		if g.State != Destroyed || g.ID == e.Head {
			g.Sealed = nil
			s.Generations = append(s.Generations, g)
			live = live || g.Live()
		}
	}
	if live {
		s.AttemptsLeft = e.AttemptsLeft()
		if next := e.nextAttempt(); next.After(e.now) {
			s.NextAttempt = next
		}
		if s.AttemptsLeft == 0 {
			s.NextAttempt = e.openUntil(e.now)
		}
	}
	return s
}

// Sweep does what is due in all accounts, so that destruction does not wait for a
// next request. Accounts that cannot be swept are passed over; their errors are
// joined. It returns how many were changed. Any number of instances can sweep at once.
func (v *Vault) Sweep(ctx context.Context) (int, error) {
	const page = 100
	var after AccountID
	var swept int
	var errs []error
	for {
		ids, err := v.store.Due(ctx, after, page)
		if err != nil {
			return swept, errors.Join(append(errs, storeFault("looking for due accounts", err))...)
		}
		for _, id := range ids {
			if err := ctx.Err(); err != nil {
				return swept, errors.Join(append(errs, err)...)
			}
			if _, err := v.Status(ctx, Caller{Account: id}); err != nil {
				errs = append(errs, fmt.Errorf("sweeping an account of tenant %s: %w", id.Tenant, err))
				continue
			}
			swept++
		}
		if len(ids) < page {
			return swept, errors.Join(errs...)
		}
		after = ids[len(ids)-1]
	}
}

// Identity is what clients know a vault by.
type Identity struct {
	ID          string
	Context     []byte
	IdentityKey [33]byte
	Fingerprint transcript.Fingerprint
	Keys        transcript.KeyList
	Signature   [64]byte // of Keys.Digest, by the identity key
	Relay       []byte   // the hybrid relay key's configuration, as it is in Keys
}

// identityGeneration is the identity key's: it has one, ever, as clients pin it.
const identityGeneration = 1

// keyListLifetime is how long a signed key list holds; one is signed for each call
// of Identity, so callers keep the answer for a while.
const keyListLifetime = 7 * 24 * time.Hour

// Serial is the key list's: it is counted from the generations in use, so that all instances agree on it
// and it grows with every new key.
func (v *Vault) Serial() uint64 {
	return uint64(v.token.Newest(purposeServer)) + uint64(v.token.Newest(purposeRelay)) - 1
}

// Outdated reports whether a list of this serial and hybrid relay key is not what Identity would make now. While that
// cannot be said it is not.
func (v *Vault) Outdated(ctx context.Context, serial uint64, relay []byte) bool {
	if serial != v.Serial() {
		return true
	}
	configs, err := v.RelayConfigs(ctx)
	if err != nil {
		return false
	}
	encoded, err := configs[0].Encode()
	return err == nil && !bytes.Equal(encoded, relay)
}

// Identity makes and signs the list of the vault's keys: every generation of the
// server key that records may be served with, the one in use first, and the configurations of the relay key in
// use, the hybrid first.
func (v *Vault) Identity(ctx context.Context, now time.Time) (*Identity, error) {
	key, err := v.token.PublicKey(purposeIdentity, identityGeneration)
	if err != nil {
		return nil, tokenFault("reading the identity key", err)
	}
	id := &Identity{
		ID: v.id, Context: slices.Clone(v.context), IdentityKey: key,
		Fingerprint: transcript.FingerprintOf(v.id, key[:]),
		Keys: transcript.KeyList{
			Vault: v.id, NotBefore: now.Add(-time.Hour).Unix(), Expires: now.Add(keyListLifetime).Unix(),
		},
	}
	newest := v.token.Newest(purposeServer)
	id.Keys.Serial = v.Serial()
	for _, generation := range slices.Backward(v.token.Generations(purposeServer)) {
		if generation > newest {
			continue // made in advance
		}
		key, err := v.token.PublicKey(purposeServer, generation)
		if err != nil {
			return nil, tokenFault("reading the server key", err)
		}
		id.Keys.Keys = append(id.Keys.Keys, transcript.ListedKey{Purpose: purposeServer, Generation: generation, Key: key[:]})
	}
	relay, err := v.RelayConfigs(ctx)
	if err != nil {
		return nil, err
	}
	for _, config := range relay {
		encoded, err := config.Encode()
		if err != nil {
			return nil, fmt.Errorf("listing the relay key: %w", err)
		}
		if config.KEM == ohttp.MLKEM768P256 {
			id.Relay = encoded
		}
		id.Keys.Keys = append(id.Keys.Keys, transcript.ListedKey{Purpose: purposeRelay, Generation: v.token.Newest(purposeRelay), Key: encoded})
	}
	if id.Signature, err = v.token.Sign(ctx, purposeIdentity, identityGeneration, id.Keys.Digest()); err != nil {
		return nil, tokenFault("signing the key list", err)
	}
	return id, nil
}
