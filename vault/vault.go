// Package vault is the domain: accounts and their generations, enrolment,
// recovery, ownership, and the guess law (law.go).
//
// A device makes a random backup key and puts it here under a password. The
// vault holds, for each enrolment, an OPAQUE record (RFC 9807) and the backup key
// as the device wrapped it under OPAQUE's export key. It learns neither the
// password nor the key. It evaluates the password's OPRF inside a PKCS#11 token,
// at most ten times without a success, and then destroys the record.
//
//	enrol     start: blinded password → evaluation, state
//	          stage: record, wrapped key, state → a staged generation
//	          activate: owner's signature → the active generation
//	recover   start: KE1 → (count, then evaluate) → KE2, state
//	          finish: KE3, state → the wrapped key, under the session key
//
// Trust boundary: the package trusts the token for keys and the caller for who the
// user is. It does not trust the store: every row carries a MAC made in the token,
// and secrets are sealed in the token, bound to vault, tenant, user and generation.
//
// Every change of an account is a compare-and-swap on its MAC: read, verify, decide,
// make the next MAC, write where the row still carries the old one; on a lost race
// read again. So any number of Vaults can share one store. All methods are safe for
// concurrent use.
package vault

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Config is what a Vault is made of. All fields are required but Context, Random, Log and Observer.
type Config struct {
	// ID is the vault's id: OPAQUE's server identity, the audience of tokens, and
	// part of everything that is sealed or signed. It can never change.
	ID string
	// Context is OPAQUE's context (RFC 9807 §6), empty by default because the most
	// used stock clients send none. It can never change.
	Context []byte
	Store   Store
	Token   Token
	// Random is for OPAQUE's nonces and ephemeral keys; crypto/rand by default.
	Random io.Reader
	// Log gets what nobody else reports: rows that fail their MAC. Default: nothing.
	Log *slog.Logger
	// Observer hears what this Vault does. Default: nobody.
	Observer Observer
}

// Observer counts. Its methods are called from many goroutines at once and must return at once.
type Observer interface {
	// Recorded is called after an event was written. An event whose write was answered with a fault is not
	// reported, although it may be there: the table of events is the record, and this a sign of life.
	Recorded(EventKind, Reason)
	// AccountFault is called for a row that the vault did not write.
	AccountFault()
}

type noObserver struct{}

func (noObserver) Recorded(EventKind, Reason) {}
func (noObserver) AccountFault()              {}

// Vault is the service, without its transport.
type Vault struct {
	id      string
	context []byte
	store   Store
	token   Token
	random  io.Reader
	log     *slog.Logger
	observe Observer
	seeds   relaySeeds
}

// New checks the configuration. It calls neither store nor token.
func New(c Config) (*Vault, error) {
	if len(c.ID) == 0 || len(c.ID) > 255 {
		return nil, fmt.Errorf("vault id: want 1 to 255 bytes, got %d", len(c.ID))
	}
	if len(c.Context) > 1<<16-1 {
		return nil, fmt.Errorf("OPAQUE context: want at most 65535 bytes, got %d", len(c.Context))
	}
	if c.Store == nil || c.Token == nil {
		return nil, errors.New("a vault needs a store and a token")
	}
	v := &Vault{id: c.ID, context: c.Context, store: c.Store, token: c.Token, random: c.Random, log: c.Log, observe: c.Observer}
	if v.random == nil {
		v.random = rand.Reader
	}
	if v.log == nil {
		v.log = slog.New(slog.DiscardHandler)
	}
	if v.observe == nil {
		v.observe = noObserver{}
	}
	return v, nil
}

// Caller is who asks. Whoever makes it has authenticated the tenant and the user.
type Caller struct {
	Account AccountID
	// Policy is the tenant's, for accounts that are new or begin anew.
	Policy Policy
	// RequestID goes into events and logs.
	RequestID string
}

// maxRaces bounds how often a change is decided anew because others were faster.
// Every lost race is somebody else's progress, so reaching it means a crowd on one account.
const maxRaces = 64

// read reads and verifies an account. It answers ErrNotEnrolled if there is none.
func (v *Vault) read(ctx context.Context, id AccountID) (*Account, time.Time, error) {
	if err := id.Validate(); err != nil {
		return nil, time.Time{}, err
	}
	snap, err := v.store.Account(ctx, id)
	if errors.Is(err, ErrAccountFault) {
		return nil, time.Time{}, v.accountFault(ctx, &Account{ID: id}, "the row does not decode")
	}
	if err != nil {
		return nil, time.Time{}, storeFault("reading the account", err)
	}
	if !snap.Exists {
		return nil, snap.Now, ErrNotEnrolled
	}
	if snap.Account.ID != id {
		return nil, snap.Now, v.accountFault(ctx, &snap.Account, "the row is another account's")
	}
	mac, err := v.rowMAC(ctx, &snap.Account)
	if err != nil {
		return nil, snap.Now, err
	}
	if !mac.equal(snap.Account.MAC) {
		return nil, snap.Now, v.accountFault(ctx, &snap.Account, "the row's MAC does not verify")
	}
	return &snap.Account, snap.Now, nil
}

// accountFault reports a row that the vault did not write.
func (v *Vault) accountFault(ctx context.Context, a *Account, what string) error {
	v.observe.AccountFault()
	v.log.ErrorContext(ctx, "account fault", "tenant", a.ID.Tenant,
		"pseudonym", fmt.Sprintf("%x", a.Pseudonym[:8]), "what", what)
	return fmt.Errorf("%w: %s", ErrAccountFault, what)
}

// edit is an account while a change is being decided.
type edit struct {
	*Account
	now     time.Time
	create  bool
	caller  Caller
	changed map[uint32]bool // numbers of generations that differ from what was read
	rewrite bool            // write the row, for its MAC's sake, even if nothing differs
	keys    []Key           // what is written depends on these, and what was read may not have
	events  []Event
}

func (e *edit) dirty() bool { return e.rewrite || len(e.changed) > 0 }

// note marks a generation as changed, with the event that says how.
func (e *edit) note(g *Generation, kind EventKind, attempt uint32) {
	e.changed[g.Number] = true
	e.events = append(e.events, Event{
		Kind: kind, Tenant: e.ID.Tenant, Pseudonym: e.Pseudonym,
		Generation: g.ID, Attempt: attempt, Reason: g.Reason, RequestID: e.caller.RequestID,
	})
}

// destroy erases a generation and notes it.
func (e *edit) destroy(g *Generation, why Reason) {
	g.destroy(why)
	e.note(g, EventDestroyed, 0)
}

func (e *edit) settle() {
	for _, g := range e.Account.settle(e.now) {
		e.note(g, EventDestroyed, 0)
	}
}

// change is the one way an account changes. It reads the account, settles what is
// due, lets decide change it, and writes the result in one statement, where the row
// still carries the MAC that was read. On a lost race it begins again, so decide
// may run several times and must not act outside the account.
//
// What is due is written first and by itself, so that it holds even if decide refuses.
// If decide changes nothing, nothing is written. create makes the account if there is none.
func (v *Vault) change(ctx context.Context, c Caller, create bool, decide func(*edit) error) (*edit, error) {
	for range maxRaces {
		account, now, err := v.read(ctx, c.Account)
		e := &edit{Account: account, now: now, caller: c, changed: map[uint32]bool{}}
		if create && errors.Is(err, ErrNotEnrolled) {
			e.create = true
			e.Account, err = v.newAccount(ctx, c)
		}
		if err != nil {
			return nil, err
		}
		e.settle()
		if len(e.changed) == 0 {
			if err := decide(e); err != nil {
				return nil, err
			}
			e.settle()
			if !e.dirty() {
				return e, nil
			}
			err := v.write(ctx, e)
			if err == nil {
				return e, nil
			}
			if !errors.Is(err, ErrStale) {
				return nil, err
			}
			continue
		}
		if err := v.write(ctx, e); err != nil && !errors.Is(err, ErrStale) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: %d others changed the account first", ErrStoreUnavailable, maxRaces)
}

// write makes the account's next MAC and writes what e changed.
func (v *Vault) write(ctx context.Context, e *edit) error {
	previous := e.MAC
	e.MACKey = max(e.MACKey, v.token.Newest(purposeMAC)) // another instance may know of a newer one first
	mac, err := v.rowMAC(ctx, e.Account)
	if err != nil {
		return err
	}
	e.MAC = mac
	change := Change{Previous: previous, Create: e.create, Account: *e.Account, Events: e.events}
	change.Keys = append(e.keys, Key{purposeMAC, e.MACKey})
	for _, g := range e.Generations {
		if e.changed[g.Number] {
			change.Changed = append(change.Changed, g)
		}
	}
	var closing *ClosingKey
	switch err := v.store.Write(ctx, change); {
	case err == nil:
		for i := range e.events {
			v.observe.Recorded(e.events[i].Kind, e.events[i].Reason)
		}
		return nil
	case errors.Is(err, ErrStale):
		return err
	case errors.As(err, &closing) && (closing.Key.Purpose == purposeOPRF || closing.Key.Purpose == purposeServer):
		return &Conflict{Reason: "the vault's keys changed since this enrolment started; start it again"}
	case errors.As(err, &closing):
		// This instance has not noticed the rotation yet, and will within seconds.
		return tokenFault("writing the account", err)
	default:
		return storeFault("writing the account", err)
	}
}

func (v *Vault) newAccount(ctx context.Context, c Caller) (*Account, error) {
	pseudonym, err := v.token.MAC(ctx, pseudonymKey, pseudonymInput(v.id, c.Account))
	if err != nil {
		return nil, tokenFault("making the account's pseudonym", err)
	}
	return &Account{ID: c.Account, Pseudonym: pseudonym, Policy: c.Policy, NextNumber: 1}, nil
}

// storeFault and tokenFault keep the cause reachable: a context's error stays itself.
func storeFault(doing string, err error) error {
	return fmt.Errorf("%s: %w: %w", doing, ErrStoreUnavailable, err)
}

func tokenFault(doing string, err error) error {
	return fmt.Errorf("%s: %w: %w", doing, ErrTokenUnavailable, err)
}
