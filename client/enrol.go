package client

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// Enrolled is a backup key that the vault keeps.
type Enrolled struct {
	Key        backup.Key
	Generation api.GenerationID
}

// Enrol makes a backup key and puts it into the vault under a password. The key is
// returned when the vault has acknowledged it, and not before, so that nothing is
// encrypted under a key which nobody could get back.
//
// Errors: ErrInvalidPassword, ErrAlreadyEnrolled, ErrConflict, *PendingEnrolment, and
// those of Status. After any but *PendingEnrolment nothing has changed at the vault
// that a recovery would notice, and Enrol can be called again.
func (c *Client) Enrol(ctx context.Context, password string) (Enrolled, error) {
	key, err := backup.NewKey(c.random)
	if err != nil {
		return Enrolled{}, err
	}
	return c.EnrolKey(ctx, password, key)
}

// EnrolKey is Enrol for a key that exists already. Do not use a key for a backup before it
// has been enrolled, or it is lost with the device.
func (c *Client) EnrolKey(ctx context.Context, password string, key backup.Key) (Enrolled, error) {
	status, err := c.Status(ctx)
	if errors.Is(err, ErrNotEnrolled) {
		status, err = &api.Status{}, nil
	}
	if err != nil {
		return Enrolled{}, err
	}
	if find(status, stateActive) != nil {
		return Enrolled{}, ErrAlreadyEnrolled
	}
	return c.enrol(ctx, password, key, status.Follow, nil)
}

// ReplaceWithoutProof puts a new key in the place of the active one without proving to own
// that: for a user who has lost both device and password. The old generation is frozen. Its
// owner can bring it back until its time is over, and until then it cannot be replaced like
// this again (ErrConflict). So keep the new key first: if the app ends before the answer,
// ChangePassword with that key goes on.
//
// Errors: as Enrol, with ErrNotEnrolled, ErrFrozen or ErrKeyDestroyed where there is
// nothing to replace.
func (c *Client) ReplaceWithoutProof(ctx context.Context, password string, newKey backup.Key) (Enrolled, error) {
	return c.replace(ctx, password, newKey, nil)
}

// ChangePassword puts the same key under a new password. Key proves who asks, so the old
// generation, and with it the old password, is destroyed at once. Where the old password
// may have let somebody read the key, use ChangePasswordAndKey.
//
// Errors: as Enrol; ErrForbidden if key does not own the active generation; ErrNotEnrolled,
// ErrFrozen or ErrKeyDestroyed if there is none.
func (c *Client) ChangePassword(ctx context.Context, key backup.Key, newPassword string) (Enrolled, error) {
	return c.replace(ctx, newPassword, key, &key)
}

// ChangePasswordAndKey is ChangePassword with a new key. What was encrypted under the old key
// must be encrypted anew before the old key is forgotten. Keep the new key first: if the app
// ends before the answer, one of the two owns what the vault has.
func (c *Client) ChangePasswordAndKey(ctx context.Context, key backup.Key, newPassword string, newKey backup.Key) (Enrolled, error) {
	return c.replace(ctx, newPassword, newKey, &key)
}

// ChangePasswordWithOld recovers the key, which is one attempt, and changes its password.
//
// Errors: those of Recover, then those of ChangePassword. After *PendingRecovery, go on
// with what it recovers and ChangePassword.
func (c *Client) ChangePasswordWithOld(ctx context.Context, oldPassword, newPassword string) (Enrolled, error) {
	if err := CheckPassword(newPassword); err != nil { // before an attempt is made
		return Enrolled{}, err
	}
	recovered, err := c.Recover(ctx, oldPassword)
	if err != nil {
		return Enrolled{}, err
	}
	return c.ChangePassword(ctx, recovered.Key, newPassword)
}

func (c *Client) replace(ctx context.Context, password string, key backup.Key, proof *backup.Key) (Enrolled, error) {
	status, err := c.Status(ctx)
	if err != nil {
		return Enrolled{}, err
	}
	old, err := active(status)
	if err != nil {
		return Enrolled{}, err
	}
	return c.enrol(ctx, password, key, old.ID, proof)
}

// enrol is an enrolment up to its one point of no return: when it stages, every byte
// that is still to be sent has been made.
func (c *Client) enrol(ctx context.Context, password string, key backup.Key, follows api.GenerationID, proof *backup.Key) (Enrolled, error) {
	normal, err := normalise(password)
	if err != nil {
		return Enrolled{}, err
	}
	v, err := c.identity(ctx)
	if err != nil {
		return Enrolled{}, err
	}
	request, registration, err := opaque.StartRegistration(c.random, normal)
	if err != nil {
		return Enrolled{}, err
	}
	start, err := json.Marshal(api.StartEnrolmentRequest{RegistrationRequest: request[:]})
	if err != nil {
		return Enrolled{}, err
	}
	var started api.StartEnrolmentResponse
	if err := c.call(ctx, "POST", c.resource+"/enrolment", start, &started); err != nil {
		return Enrolled{}, fmt.Errorf("starting the enrolment: %w", err)
	}
	if err := checkState(started.State); err != nil {
		return Enrolled{}, err
	}
	if started.Generation.IsZero() {
		return Enrolled{}, fmt.Errorf("%w: the enrolment has no generation", ErrBadResponse)
	}
	if started.Follows != follows {
		return Enrolled{}, fmt.Errorf("%w: another enrolment was faster", ErrConflict)
	}
	response, err := opaque.ParseRegistrationResponse(started.RegistrationResponse)
	if err != nil {
		return Enrolled{}, fmt.Errorf("%w: %w", ErrBadResponse, err)
	}
	if err := ctx.Err(); err != nil { // stretching cannot be interrupted
		return Enrolled{}, err
	}
	registered, err := registration.Finish(c.random, response, c.opaqueConfig(v, c.ksf))
	if err != nil {
		return Enrolled{}, err
	}
	if err := c.vouches(ctx, v, registered.ServerPublicKey); err != nil {
		return Enrolled{}, err
	}
	wrapped, err := wrap(c.random, registered.ExportKey, key, transcript.WrapContext(v.id, c.tenant, c.user))
	if err != nil {
		return Enrolled{}, err
	}
	owner := key.OwnerKey(v.id, c.tenant, c.user)
	ownerPublic := []byte(owner.Public().(ed25519.PublicKey))
	e := &pendingEnrolment{client: c, key: key, generation: started.Generation}
	e.digest = transcript.Material{
		Record: registered.Record[:], WrappedKey: wrapped,
		Time: c.ksf.Time, MemoryKiB: c.ksf.MemoryKiB, Threads: uint32(c.ksf.Threads),
		OwnerKey: ownerPublic, ServerKey: registered.ServerPublicKey[:],
	}.Digest()
	e.stage, err = json.Marshal(api.StageRequest{
		State: started.State, Record: registered.Record[:], WrappedKey: wrapped, OwnerKey: ownerPublic,
		KSF: api.KSF{Algorithm: api.Argon2id, Time: c.ksf.Time, MemoryKiB: c.ksf.MemoryKiB, Threads: uint32(c.ksf.Threads)},
	})
	if err != nil {
		return Enrolled{}, err
	}
	statement := transcript.Statement{
		Action: transcript.Activate, Vault: v.id, Tenant: c.tenant, User: c.user,
		Old: follows, New: started.Generation, Digest: e.digest,
	}
	activation := api.ActivateRequest{Generation: started.Generation, Signature: statement.Sign(owner)}
	if proof != nil {
		statement.Action = transcript.Replace
		activation.PreviousSignature = statement.Sign(proof.OwnerKey(v.id, c.tenant, c.user))
	}
	if e.activate, err = json.Marshal(activation); err != nil {
		return Enrolled{}, err
	}
	return e.run(ctx)
}

// maxStateBytes bounds a vault's sealed state, which has to fit into a request.
const maxStateBytes = 4096

func checkState(state api.Bytes) error {
	if len(state) == 0 || len(state) > maxStateBytes {
		return fmt.Errorf("%w: a state of %d bytes", ErrBadResponse, len(state))
	}
	return nil
}

// PendingEnrolment is the error of an enrolment or a password change that may have
// reached the vault, and may not. Resume goes on with the same bytes, which the
// vault takes for the same enrolment; calling the operation anew would be another one. The
// key, if it is new, is not in use before Resume has returned it.
//
// If the app ends before that, the vault either never got as far as activating the new
// generation, which then vanishes after a day, or keeps it: the password recovers its key.
type PendingEnrolment struct {
	cause     error
	enrolment *pendingEnrolment
}

func (e *PendingEnrolment) Error() string { return "the enrolment is not finished: " + e.cause.Error() }

// Format prints the error alone: fmt would else go down to the key.
func (e PendingEnrolment) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, e.Error()) }

// Unwrap returns what stopped it.
func (e *PendingEnrolment) Unwrap() error { return e.cause }

// Resume goes on with the enrolment. It can be called at any time, as often as it takes, and
// concurrently.
//
// Errors: *PendingEnrolment as long as it is not known whether the vault has it;
// any other is the vault's refusal (ErrConflict, ErrForbidden, ErrKeyDestroyed, *Problem), and
// the operation can be called anew.
func (e *PendingEnrolment) Resume(ctx context.Context) (Enrolled, error) { return e.enrolment.run(ctx) }

// pendingEnrolment holds every byte that an enrolment has still to send.
type pendingEnrolment struct {
	client          *Client
	key             backup.Key
	generation      api.GenerationID
	digest          [transcript.DigestSize]byte
	stage, activate []byte

	mu sync.Mutex // held over the requests: one run at a time
}

func (e *pendingEnrolment) run(ctx context.Context) (Enrolled, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.advance(ctx); err != nil {
		if refused(err) {
			return Enrolled{}, err
		}
		return Enrolled{}, &PendingEnrolment{cause: err, enrolment: e}
	}
	return Enrolled{Key: e.key, Generation: e.generation}, nil
}

func (e *pendingEnrolment) advance(ctx context.Context) error {
	c := e.client
	// When it is resumed the record may be staged, or active, already: then the same
	// bytes are confirmed again.
	var staged api.StageResponse
	if err := c.call(ctx, "PUT", c.resource, e.stage, &staged); err != nil {
		return fmt.Errorf("staging the record: %w", err)
	}
	if staged.Generation != e.generation || string(staged.Digest) != string(e.digest[:]) {
		return fmt.Errorf("%w: another record was staged than the one that was sent", ErrBadResponse)
	}
	var status api.Status
	if err := c.call(ctx, "POST", c.resource+"/activation", e.activate, &status); err != nil {
		return fmt.Errorf("activating the generation: %w", err)
	}
	if g := find(&status, stateActive); g == nil || g.ID != e.generation {
		return fmt.Errorf("%w: another generation was activated than the one that was sent", ErrBadResponse)
	}
	return nil
}
