package vaulttest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

// Device is a client that speaks to a vault.Vault directly, step by step, so that
// tests can leave out, repeat, swap and hold back each step. It stretches nothing:
// its records say Argon2id, its password tests are cheap.
type Device struct {
	Vault   *vault.Vault
	VaultID string
	Context []byte
	Caller  vault.Caller
}

// NoStretch is the identity KSF: it stretches nothing.
type NoStretch struct{}

// Stretch returns its input.
func (NoStretch) Stretch(in []byte) ([]byte, error) { return in, nil }

// KSF is what a Device's records say.
var KSF = vault.KSF{
	Time: opaque.DefaultArgon2id.Time, MemoryKiB: opaque.DefaultArgon2id.MemoryKiB, Threads: uint32(opaque.DefaultArgon2id.Threads),
}

func (d *Device) config() opaque.ClientConfig {
	return opaque.ClientConfig{
		Context: d.Context, ServerIdentity: []byte(d.VaultID),
		ClientIdentity: transcript.ClientIdentity(d.Caller.Account.Tenant, d.Caller.Account.User),
		KSF:            NoStretch{},
	}
}

// Enrolment is one generation as its device knows it.
type Enrolment struct {
	Generation, Follows vault.GenerationID
	Key                 [32]byte // the backup key
	Owner               ed25519.PrivateKey
	Staging             vault.Staging
	Digest              [32]byte
}

// Statement is what the enrolment's owner signs for an action on it.
func (d *Device) Statement(action transcript.Action, from, to vault.GenerationID, digest [32]byte) transcript.Statement {
	a := d.Caller.Account
	return transcript.Statement{
		Action: action, Vault: d.VaultID, Tenant: a.Tenant, User: a.User, Old: from, New: to, Digest: digest,
	}
}

// Reinstatement asks for e back, frozen until then, in place of the active generation, if there is one.
func (d *Device) Reinstatement(e *Enrolment, replaces vault.GenerationID, until time.Time) vault.Reinstatement {
	s := d.Statement(transcript.Reinstate, replaces, e.Generation, e.Digest)
	s.FrozenUntil = until.UnixMicro()
	return vault.Reinstatement{Generation: e.Generation, Replaces: replaces, FrozenUntil: until, Signature: s.Sign(e.Owner)}
}

// Prepare runs an enrolment's start and makes what is to be staged.
func (d *Device) Prepare(ctx context.Context, password string) (*Enrolment, error) {
	request, registration, err := opaque.StartRegistration(rand.Reader, []byte(password))
	if err != nil {
		return nil, err
	}
	started, err := d.Vault.StartEnrolment(ctx, d.Caller, request)
	if err != nil {
		return nil, err
	}
	made, err := registration.Finish(rand.Reader, started.Response, d.config())
	if err != nil {
		return nil, err
	}
	e := &Enrolment{Generation: started.Generation, Follows: started.Follows}
	rand.Read(e.Key[:])
	public, owner, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	e.Owner = owner
	aead, err := cipherFor(made.ExportKey[:], transcript.WrapKeyInfo)
	if err != nil {
		return nil, err
	}
	a := d.Caller.Account
	e.Staging = vault.Staging{
		State: started.State, Record: made.Record, KSF: KSF, OwnerKey: [32]byte(public),
		WrappedKey: [transcript.WrappedKeySize]byte(aead.Seal(nil, nil, e.Key[:], transcript.WrapContext(d.VaultID, a.Tenant, a.User))),
	}
	return e, nil
}

// Stage sends the record.
func (d *Device) Stage(ctx context.Context, e *Enrolment) error {
	staged, err := d.Vault.Stage(ctx, d.Caller, e.Staging)
	if err != nil {
		return err
	}
	if staged.ID != e.Generation {
		return fmt.Errorf("staged generation %x, want %x", staged.ID, e.Generation)
	}
	e.Digest = staged.Digest
	return nil
}

// Activation is e's activation, with previous's proof if there is a previous.
func (d *Device) Activation(e, previous *Enrolment) vault.Activation {
	a := vault.Activation{
		Generation: e.Generation,
		Signature:  d.Statement(transcript.Activate, e.Follows, e.Generation, e.Digest).Sign(e.Owner),
	}
	if previous != nil {
		a.PreviousSignature = d.Statement(transcript.Replace, e.Follows, e.Generation, e.Digest).Sign(previous.Owner)
	}
	return a
}

// Enrol runs all three steps; previous, if any, proves ownership.
func (d *Device) Enrol(ctx context.Context, password string, previous *Enrolment) (*Enrolment, error) {
	e, err := d.Prepare(ctx, password)
	if err != nil {
		return nil, err
	}
	if err := d.Stage(ctx, e); err != nil {
		return nil, err
	}
	_, err = d.Vault.Activate(ctx, d.Caller, d.Activation(e, previous))
	return e, err
}

// MustEnrol is Enrol for tests in which it cannot fail.
func (d *Device) MustEnrol(t testing.TB, password string, previous *Enrolment) *Enrolment {
	t.Helper()
	e, err := d.Enrol(t.Context(), password, previous)
	if err != nil {
		t.Fatalf("enrolling: %v", err)
	}
	return e
}

// Guess is one attempt as its device knows it.
type Guess struct {
	KE1     opaque.KE1
	Start   vault.RecoveryStart
	Started *vault.RecoveryStarted
	login   *opaque.ClientLogin
}

// NewGuess makes a KE1 for a password. Generation zero means the active one.
func (d *Device) NewGuess(password string, generation vault.GenerationID) (*Guess, error) {
	ke1, login, err := opaque.StartLogin(rand.Reader, []byte(password))
	if err != nil {
		return nil, err
	}
	return &Guess{KE1: ke1, Start: vault.RecoveryStart{KE1: ke1, Generation: generation}, login: login}, nil
}

// Send starts the attempt, or sends the same bytes again.
func (d *Device) Send(ctx context.Context, g *Guess) error {
	started, err := d.Vault.StartRecovery(ctx, d.Caller, g.Start)
	if err != nil {
		return err
	}
	g.Started = started
	return nil
}

// Finish proves the password (or, with a wrong one, sends a random KE3) and unwraps the key.
func (d *Device) Finish(ctx context.Context, g *Guess) (key [32]byte, err error) {
	login, failed := g.login.Finish(g.Started.KE2, d.config())
	ke3 := login.KE3
	if failed != nil {
		rand.Read(ke3[:])
	}
	got, err := d.Vault.FinishRecovery(ctx, d.Caller, ke3, g.Started.State)
	if err != nil {
		return key, err
	}
	if failed != nil {
		return key, fmt.Errorf("the vault accepted a random KE3")
	}
	return d.Unwrap(login, got)
}

// Unwrap opens what a finish delivered.
func (d *Device) Unwrap(login opaque.Login, got *vault.Recovered) (key [32]byte, err error) {
	a := d.Caller.Account
	delivery, err := cipherFor(login.SessionKey[:], transcript.DeliveryKeyInfo)
	if err != nil {
		return key, err
	}
	wrapped, err := delivery.Open(nil, nil, got.SealedKey[:], transcript.DeliveryContext(d.VaultID, a.Tenant, a.User, got.Generation))
	if err != nil {
		return key, fmt.Errorf("opening the delivery: %w", err)
	}
	wrap, err := cipherFor(login.ExportKey[:], transcript.WrapKeyInfo)
	if err != nil {
		return key, err
	}
	plain, err := wrap.Open(nil, nil, wrapped, transcript.WrapContext(d.VaultID, a.Tenant, a.User))
	if err != nil {
		return key, fmt.Errorf("unwrapping the key: %w", err)
	}
	return [32]byte(plain), nil
}

// Recover makes a whole attempt at the active generation.
func (d *Device) Recover(ctx context.Context, password string) ([32]byte, error) {
	return d.RecoverFrom(ctx, password, vault.GenerationID{})
}

// RecoverFrom makes a whole attempt at one generation.
func (d *Device) RecoverFrom(ctx context.Context, password string, generation vault.GenerationID) (key [32]byte, err error) {
	g, err := d.NewGuess(password, generation)
	if err != nil {
		return key, err
	}
	if err := d.Send(ctx, g); err != nil {
		return key, err
	}
	return d.Finish(ctx, g)
}

func cipherFor(secret []byte, info string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, info, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
