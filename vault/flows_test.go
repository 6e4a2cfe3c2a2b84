package vault_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

const vaultID = "vault.test"

// world is a vault in memory with one user's device.
type world struct {
	*vaulttest.Device
	token *vaulttest.SoftToken
	store *vaulttest.MemoryStore
	clock *clock
}

// newWorld has no delays, so that stories about the cap need no waiting.
func newWorld(t testing.TB) *world {
	t.Helper()
	c := &clock{now: time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)}
	w := &world{token: vaulttest.NewSoftToken(), store: vaulttest.NewMemoryStore(c.Now), clock: c}
	v, err := vault.New(vault.Config{ID: vaultID, Store: w.store, Token: w.token})
	if err != nil {
		t.Fatal(err)
	}
	policy := vault.DefaultPolicy()
	policy.Delays = nil
	w.Device = &vaulttest.Device{Vault: v, VaultID: vaultID, Caller: vault.Caller{
		Account: vault.AccountID{Tenant: "app", User: "ann"}, Policy: policy, RequestID: "r1",
	}}
	return w
}

func (w *world) as(tenant, user string) *vaulttest.Device {
	d := *w.Device
	d.Caller.Account = vault.AccountID{Tenant: tenant, User: user}
	return &d
}

func (w *world) status(t testing.TB) *vault.Status {
	t.Helper()
	s, err := w.Vault.Status(t.Context(), w.Caller)
	if err != nil {
		t.Fatalf("status: %v", err)
	}
	return s
}

func (w *world) generation(t testing.TB, id vault.GenerationID) vault.Generation {
	t.Helper()
	for _, g := range w.status(t).Generations {
		if g.ID == id {
			return g
		}
	}
	return vault.Generation{State: vault.Destroyed}
}

// send starts an attempt and fails the test if it is not answered.
func (w *world) send(t testing.TB, password string, generation vault.GenerationID) *vaulttest.Guess {
	t.Helper()
	g, err := w.NewGuess(password, generation)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(t.Context(), g); err != nil {
		t.Fatalf("starting an attempt: %v", err)
	}
	return g
}

// wrong makes a whole wrong attempt.
func (w *world) wrong(t testing.TB, generation vault.GenerationID) error {
	t.Helper()
	_, err := w.RecoverFrom(t.Context(), "wrong", generation)
	if err == nil {
		t.Fatal("a wrong password recovered a key")
	}
	return err
}

func wantConflict(t testing.TB, what string, err error) {
	t.Helper()
	var conflict *vault.Conflict
	if !errors.As(err, &conflict) {
		t.Errorf("%s: got %v, want a conflict", what, err)
	}
}

func wantIs(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func TestEnrolAndRecover(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, err := w.Vault.Status(t.Context(), w.Caller)
	wantIs(t, "status before", err, vault.ErrNotEnrolled)
	e := w.MustEnrol(t, "right", nil)
	key, err := w.Recover(t.Context(), "right")
	if err != nil || key != e.Key {
		t.Fatalf("recovering: %v", err)
	}
	s := w.status(t)
	if s.AttemptsLeft != 10 || len(s.Generations) != 1 || s.Generations[0].Successes != 1 || s.Generations[0].Sealed != nil {
		t.Fatalf("status: %+v", s)
	}
}

func TestTenWrongGuessesDestroy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for left := 9; left >= 1; left-- {
		var wrong *vault.WrongPassword
		if err := w.wrong(t, e.Generation); !errors.As(err, &wrong) || wrong.AttemptsLeft != left {
			t.Fatalf("got %v, want %d attempts left", err, left)
		}
	}
	wantIs(t, "the tenth", w.wrong(t, e.Generation), vault.ErrKeyDestroyed)
	_, err := w.Recover(t.Context(), "right")
	wantIs(t, "the right password afterwards", err, vault.ErrKeyDestroyed)
	g := w.generation(t, e.Generation)
	if g.State != vault.Destroyed || g.Reason != vault.Exhausted {
		t.Fatalf("generation: %+v", g)
	}
	if w.store.Holds(e.Staging.Record[:16]) || w.store.SealedBytes() != 0 {
		t.Fatal("the store still holds secrets")
	}
	// Enrolling again starts again, from the tombstone.
	again := w.MustEnrol(t, "other", nil)
	if again.Follows != e.Generation {
		t.Fatal("the new enrolment does not follow the tombstone")
	}
	if key, err := w.Recover(t.Context(), "other"); err != nil || key != again.Key {
		t.Fatalf("after enrolling again: %v", err)
	}
}

// A success forgives what was before: nine wrong, one right, nine wrong, one right.
func TestSuccessForgives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for range 2 {
		for range 9 {
			w.wrong(t, e.Generation)
		}
		g := w.send(t, "right", e.Generation)
		login, err := w.Finish(t.Context(), g)
		if err != nil || login != e.Key {
			t.Fatal(err)
		}
	}
	if s := w.status(t); s.AttemptsLeft != 10 || s.Generations[0].Failures() != 18 {
		t.Fatalf("status: %+v", s)
	}
}

func TestFailuresAreReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	w.wrong(t, e.Generation)
	if _, err := w.Recover(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	w.wrong(t, e.Generation)
	w.wrong(t, e.Generation)
	g := w.send(t, "right", e.Generation)
	ke3 := w.rightKE3(t, g)
	got, err := w.Vault.FinishRecovery(t.Context(), w.Caller, ke3, g.Started.State)
	if err != nil || got.FailuresSince != 2 || got.FailuresTotal != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
}

// rightKE3 reads the expected KE3 out of the state, as only the vault can.
func (w *world) rightKE3(t testing.TB, g *vaulttest.Guess) opaque.KE3 {
	t.Helper()
	ke3, err := w.Vault.ExpectedKE3(t.Context(), w.Caller.Account, g.Started.State)
	if err != nil {
		t.Fatal(err)
	}
	return ke3
}

// --- replays and tricks: each is refused or harmless, no attempt is refunded or gained ---

func TestCapturedStageAndActivationAfterPasswordChange(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.MustEnrol(t, "first", nil)
	for range 7 {
		w.wrong(t, first.Generation)
	}
	second := w.MustEnrol(t, "second", first)
	wantConflict(t, "stage again", errOf(w.Vault.Stage(t.Context(), w.Caller, first.Staging)))
	wantConflict(t, "activate again", errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(first, nil))))
	if s := w.status(t); len(s.Generations) != 1 || s.Generations[0].ID != second.Generation {
		t.Fatalf("status: %+v", s)
	}
}

func errOf[T any](_ T, err error) error { return err }

func TestStageAndActivateTwiceAreHarmless(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e, err := w.Prepare(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Stage(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Recover(t.Context(), "right"); !errors.Is(err, vault.ErrNotEnrolled) {
		t.Fatalf("an attempt at a staged generation: %v", err)
	}
	wantConflict(t, "naming the staged one", errOf(w.RecoverFrom(t.Context(), "right", e.Generation)))
	for range 2 {
		if _, err := w.Vault.Activate(t.Context(), w.Caller, w.Activation(e, nil)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Stage(t.Context(), e); err != nil {
		t.Fatalf("the same stage after activation: %v", err)
	}
	other := e.Staging
	other.WrappedKey[0] ^= 1
	wantConflict(t, "another record under the same state", errOf(w.Vault.Stage(t.Context(), w.Caller, other)))
	if got := w.store.Count("activated"); got != 1 {
		t.Fatalf("%d activations", got)
	}
}

func TestSecondEnrolmentSupersedesTheStagedOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.Prepare(t.Context(), "a")
	b, _ := w.Prepare(t.Context(), "b")
	if err := errors.Join(w.Stage(t.Context(), a), w.Stage(t.Context(), b)); err != nil {
		t.Fatal(err)
	}
	wantConflict(t, "activating the superseded", errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(a, nil))))
	wantConflict(t, "staging the superseded again", errOf(w.Vault.Stage(t.Context(), w.Caller, a.Staging)))
	if _, err := w.Vault.Activate(t.Context(), w.Caller, w.Activation(b, nil)); err != nil {
		t.Fatal(err)
	}
}

// An enrolment that started before another one was activated cannot follow it.
func TestActivationOnlyFromThePreviousGeneration(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	late, err := w.Prepare(t.Context(), "late")
	if err != nil {
		t.Fatal(err)
	}
	w.MustEnrol(t, "first", nil)
	wantConflict(t, "staging from before", w.Stage(t.Context(), late))
}

func TestEnrolmentStateExpires(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e, err := w.Prepare(t.Context(), "right")
	if err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(vault.EnrolmentStateLifetime)
	var invalid *vault.InvalidRequest
	if err := w.Stage(t.Context(), e); !errors.As(err, &invalid) || invalid.Field != "state" {
		t.Fatalf("an expired state: %v", err)
	}
	e, _ = w.Prepare(t.Context(), "right")
	if err := w.Stage(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(vault.StagedLifetime)
	wantConflict(t, "activating a day late", errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(e, nil))))
}

func TestOldRecoveryState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	g := w.send(t, "right", e.Generation)
	w.clock.Advance(vault.AttemptLifetime)
	_, err := w.Finish(t.Context(), g)
	wantConflict(t, "finishing an expired attempt", err)
	if s := w.status(t); s.AttemptsLeft != 9 {
		t.Fatalf("attempts left %d, want 9", s.AttemptsLeft)
	}
	// A later success leaves nothing of an earlier open attempt to finish.
	early := w.send(t, "right", e.Generation)
	if _, err := w.Recover(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	_, err = w.Finish(t.Context(), early)
	wantConflict(t, "finishing what a later success closed", err)
	if s := w.status(t); s.Generations[0].Successes != 1 {
		t.Fatalf("%+v", s)
	}
}

func TestSecondFinish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)

	g := w.send(t, "right", e.Generation)
	right := w.rightKE3(t, g)
	for range 3 {
		if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, right, g.Started.State); err != nil {
			t.Fatalf("the same right finish: %v", err)
		}
	}
	wantConflict(t, "wrong after right", errOf(w.Vault.FinishRecovery(t.Context(), w.Caller, opaque.KE3{}, g.Started.State)))
	if s := w.status(t); s.AttemptsLeft != 10 || s.Generations[0].Successes != 1 {
		t.Fatalf("%+v", s)
	}

	g = w.send(t, "right", e.Generation)
	right = w.rightKE3(t, g)
	for range 3 {
		var wrong *vault.WrongPassword
		if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, opaque.KE3{}, g.Started.State); !errors.As(err, &wrong) || wrong.AttemptsLeft != 9 {
			t.Fatalf("the same wrong finish: %v", err)
		}
	}
	wantConflict(t, "right after wrong", errOf(w.Vault.FinishRecovery(t.Context(), w.Caller, right, g.Started.State)))
	if s := w.status(t); s.AttemptsLeft != 9 {
		t.Fatalf("%+v", s)
	}
}

func TestFinishAfterDestruction(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	g := w.send(t, "right", e.Generation)
	off := w.Statement(transcript.TurnOff, e.Generation, vault.GenerationID{}, e.Digest).Sign(e.Owner)
	if _, err := w.Vault.TurnOff(t.Context(), w.Caller, e.Generation, off); err != nil {
		t.Fatal(err)
	}
	_, err := w.Finish(t.Context(), g)
	wantIs(t, "finish after destruction", err, vault.ErrKeyDestroyed)
	_, err = w.Recover(t.Context(), "right")
	wantIs(t, "recovery after turning off", err, vault.ErrNotEnrolled)
}

func TestForeignStates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	bob, elsewhere := w.as("app", "bob"), w.as("other", "ann")
	e := w.MustEnrol(t, "right", nil)
	bob.MustEnrol(t, "right", nil)
	elsewhere.MustEnrol(t, "right", nil)
	g := w.send(t, "right", e.Generation)
	ke3 := w.rightKE3(t, g)
	prepared, err := w.Prepare(t.Context(), "new")
	if err != nil {
		t.Fatal(err)
	}
	var invalid *vault.InvalidRequest
	for _, d := range []*vaulttest.Device{bob, elsewhere} {
		if _, err := d.Vault.FinishRecovery(t.Context(), d.Caller, ke3, g.Started.State); !errors.As(err, &invalid) {
			t.Errorf("another account's recovery state: %v", err)
		}
		if _, err := d.Vault.Stage(t.Context(), d.Caller, prepared.Staging); !errors.As(err, &invalid) {
			t.Errorf("another account's enrolment state: %v", err)
		}
	}
	// Nor does one kind of state pass for the other, nor one that was changed.
	if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, ke3, prepared.Staging.State); !errors.As(err, &invalid) {
		t.Errorf("an enrolment state at finish: %v", err)
	}
	for i := range g.Started.State {
		changed := append([]byte{}, g.Started.State...)
		changed[i] ^= 1
		if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, ke3, changed); !errors.As(err, &invalid) {
			t.Fatalf("a state changed at byte %d: %v", i, err)
		}
	}
	for n := range len(g.Started.State) {
		if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, ke3, g.Started.State[:n]); !errors.As(err, &invalid) {
			t.Fatalf("a state cut to %d bytes: %v", n, err)
		}
	}
	if s := w.status(t); s.AttemptsLeft != 9 {
		t.Fatalf("attempts left %d: only the one start counts", s.AttemptsLeft)
	}
}

// The same KE1 at another generation is another guess.
func TestKE1AtAnotherGenerationIsCharged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	old := w.MustEnrol(t, "old", nil)
	g := w.send(t, "old", old.Generation)
	fresh := w.MustEnrol(t, "new", nil) // without proof: old is frozen
	g.Start.Generation = fresh.Generation
	if err := w.Send(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if s := w.status(t); s.AttemptsLeft != 8 {
		t.Fatalf("attempts left %d, want 8", s.AttemptsLeft)
	}
	if _, err := w.Finish(t.Context(), g); err == nil {
		t.Fatal("the old password opened the new generation")
	}
}

// The same guess again: same number, same expiry, no charge, at any time while it is open,
// whatever cap, delay and expected number say; and no longer than that.
func TestSameGuessAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Caller.Policy = vault.DefaultPolicy() // with delays
	w.Caller.Policy.Delays[1] = time.Hour
	e := w.MustEnrol(t, "right", nil)
	g := w.send(t, "right", e.Generation)
	g.Start.Attempt = 1
	first := *g.Started
	w.clock.Advance(vault.AttemptLifetime - time.Second)
	if err := w.Send(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if g.Started.Attempt != first.Attempt || !g.Started.ExpiresAt.Equal(first.ExpiresAt) || g.Started.AttemptsLeft != 9 || g.Started.KE2 == first.KE2 {
		t.Fatalf("again: %+v, first: %+v", g.Started, first)
	}
	// Either state will do.
	g.Started.State = first.State
	g.Started.KE2 = first.KE2
	if key, err := w.Finish(t.Context(), g); err != nil || key != e.Key {
		t.Fatal(err)
	}
	if n := w.token.Evaluated(); n != 2 { // the enrolment's and the guess's
		t.Fatalf("%d distinct evaluations, want 2", n)
	}

	g = w.send(t, "right", e.Generation)
	w.clock.Advance(vault.AttemptLifetime)
	var early *vault.TooEarly
	if err := w.Send(t.Context(), g); !errors.As(err, &early) {
		t.Fatalf("the same bytes after expiry are a new guess, and too early: %v", err)
	}
}

func TestWrongExpectedNumberIsNotCharged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for _, n := range []uint32{2, 7, 1<<32 - 1} {
		g, _ := w.NewGuess("right", e.Generation)
		g.Start.Attempt = n
		wantConflict(t, fmt.Sprintf("expecting number %d", n), w.Send(t.Context(), g))
	}
	if s := w.status(t); s.AttemptsLeft != 10 {
		t.Fatalf("attempts left %d", s.AttemptsLeft)
	}
}

func TestTenthAttemptOpenWhileARightKE3Arrives(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for range 8 {
		w.wrong(t, e.Generation)
	}
	ninth, tenth := w.send(t, "right", e.Generation), w.send(t, "wrong", e.Generation)
	var early *vault.TooEarly
	g, _ := w.NewGuess("right", e.Generation)
	if err := w.Send(t.Context(), g); !errors.As(err, &early) {
		t.Fatalf("an eleventh: %v", err)
	}
	if key, err := w.Finish(t.Context(), ninth); err != nil || key != e.Key {
		t.Fatalf("the ninth, right: %v", err)
	}
	if s := w.status(t); s.AttemptsLeft != 9 {
		t.Fatalf("attempts left %d: the ninth forgives no later one", s.AttemptsLeft)
	}
	var wrong *vault.WrongPassword
	if _, err := w.Finish(t.Context(), tenth); !errors.As(err, &wrong) || wrong.AttemptsLeft != 9 {
		t.Fatalf("the tenth, wrong: %v", err)
	}
}

// The last attempt, never finished: the sweeper destroys when it has expired.
func TestSweepDestroysWhatIsExhausted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for range 10 {
		w.send(t, "wrong", e.Generation)
	}
	w.clock.Advance(vault.AttemptLifetime - time.Microsecond)
	if n, err := w.Vault.Sweep(t.Context()); n != 0 || err != nil {
		t.Fatalf("swept %d too soon, %v", n, err)
	}
	w.clock.Advance(time.Microsecond)
	if n, err := w.Vault.Sweep(t.Context()); n != 1 || err != nil {
		t.Fatalf("swept %d, %v", n, err)
	}
	if w.store.SealedBytes() != 0 {
		t.Fatal("secrets are left in the store")
	}
	if n, err := w.Vault.Sweep(t.Context()); n != 0 || err != nil {
		t.Fatalf("swept %d again, %v", n, err)
	}
}

// --- ownership ---

func TestPasswordChangeWithProofReplacesAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.MustEnrol(t, "first", nil)
	for range 5 {
		w.wrong(t, first.Generation)
	}
	second := w.MustEnrol(t, "second", first)
	if s := w.status(t); s.AttemptsLeft != 10 || len(s.Generations) != 1 {
		t.Fatalf("%+v", s)
	}
	_, err := w.RecoverFrom(t.Context(), "first", first.Generation)
	wantConflict(t, "the replaced generation", err)
	if key, err := w.Recover(t.Context(), "second"); err != nil || key != second.Key {
		t.Fatal(err)
	}
}

func TestUnprovenEnrolmentFreezes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	for range 3 {
		w.wrong(t, mine.Generation)
	}
	theirs := w.MustEnrol(t, "theirs", nil)
	frozen := w.generation(t, mine.Generation)
	if frozen.State != vault.Frozen || !frozen.ExpiresAt.Equal(w.clock.Now().Add(7*24*time.Hour)) {
		t.Fatalf("%+v", frozen)
	}
	// A further enrolment without proof is refused; status unchanged.
	third, err := w.Prepare(t.Context(), "third")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Stage(t.Context(), third); err != nil {
		t.Fatal(err)
	}
	wantConflict(t, "a further one without proof", errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(third, nil))))
	wantIs(t, "the frozen owner's proof does not replace the active one",
		errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(third, mine))), vault.ErrBadSignature)
	// Both recover with their own passwords, under one cap.
	if key, err := w.RecoverFrom(t.Context(), "mine", mine.Generation); err != nil || key != mine.Key {
		t.Fatal(err)
	}
	if key, err := w.RecoverFrom(t.Context(), "theirs", theirs.Generation); err != nil || key != theirs.Key {
		t.Fatal(err)
	}
	// The grace over, the sweeper destroys it.
	w.clock.Advance(7 * 24 * time.Hour)
	if _, err := w.Vault.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = w.RecoverFrom(t.Context(), "mine", mine.Generation)
	wantConflict(t, "after the grace", err)
}

// A success on an enrolment of one's own does not refill the attempts at another's.
func TestOwnSuccessDoesNotRefillTheFrozenOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	w.MustEnrol(t, "theirs", nil)
	guesses := 0
	for range 30 {
		g, _ := w.NewGuess("guess", mine.Generation)
		if err := w.Send(t.Context(), g); err == nil {
			guesses++
			_, _ = w.Finish(t.Context(), g)
		}
		_, _ = w.Recover(t.Context(), "theirs")
	}
	if guesses != 10 {
		t.Fatalf("%d guesses at the frozen generation, want 10", guesses)
	}
	if g := w.generation(t, mine.Generation); g.State != vault.Destroyed {
		t.Fatalf("%+v", g)
	}
}

func TestTurnOffBySignatureActsOnItsOwnGenerationOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	theirs := w.MustEnrol(t, "theirs", nil)
	before := w.generation(t, mine.Generation)
	w.clock.Advance(time.Hour)
	sign := func(e *vaulttest.Enrolment, target vault.GenerationID, digest [32]byte) []byte {
		return w.Statement(transcript.TurnOff, target, vault.GenerationID{}, digest).Sign(e.Owner)
	}
	wantIs(t, "their signature on mine", errOf(w.Vault.TurnOff(t.Context(), w.Caller, mine.Generation, sign(theirs, mine.Generation, mine.Digest))), vault.ErrBadSignature)
	for range 2 { // again is harmless
		if _, err := w.Vault.TurnOff(t.Context(), w.Caller, theirs.Generation, sign(theirs, theirs.Generation, theirs.Digest)); err != nil {
			t.Fatal(err)
		}
	}
	after := w.generation(t, mine.Generation)
	if after.State != vault.Frozen || !after.ExpiresAt.Equal(before.ExpiresAt) {
		t.Fatalf("the frozen generation noticed: before %+v, after %+v", before, after)
	}
	_, err := w.Recover(t.Context(), "mine")
	wantConflict(t, "recovery that names nothing", err)
	if key, err := w.RecoverFrom(t.Context(), "mine", mine.Generation); err != nil || key != mine.Key {
		t.Fatal(err)
	}
	// And it comes back by its owner's signature.
	back := w.Reinstatement(mine, vault.GenerationID{}, before.ExpiresAt)
	for range 2 {
		if _, err := w.Vault.Reinstate(t.Context(), w.Caller, back); err != nil {
			t.Fatal(err)
		}
	}
	if key, err := w.Recover(t.Context(), "mine"); err != nil || key != mine.Key {
		t.Fatal(err)
	}
}

func TestTurnOffWithoutProofFreezes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	for range 2 {
		if _, err := w.Vault.TurnOff(t.Context(), w.Caller, e.Generation, nil); err != nil {
			t.Fatal(err)
		}
	}
	if g := w.generation(t, e.Generation); g.State != vault.Frozen {
		t.Fatalf("%+v", g)
	}
	w.clock.Advance(7 * 24 * time.Hour)
	_, err := w.Recover(t.Context(), "right")
	wantIs(t, "after the grace", err, vault.ErrNotEnrolled)
	if w.store.SealedBytes() != 0 {
		t.Fatal("secrets are left in the store")
	}
}

func TestReinstatementOverrules(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	for range 4 {
		w.wrong(t, mine.Generation)
	}
	theirs := w.MustEnrol(t, "theirs", nil)
	until := w.generation(t, mine.Generation).ExpiresAt
	captured := w.Reinstatement(mine, theirs.Generation, until)
	forged := *mine
	forged.Owner = theirs.Owner
	wantIs(t, "signed by the other owner",
		errOf(w.Vault.Reinstate(t.Context(), w.Caller, w.Reinstatement(&forged, theirs.Generation, until))), vault.ErrBadSignature)
	wantConflict(t, "naming no active generation",
		errOf(w.Vault.Reinstate(t.Context(), w.Caller, w.Reinstatement(mine, vault.GenerationID{}, until))))
	status, err := w.Vault.Reinstate(t.Context(), w.Caller, captured)
	if err != nil || status.Follow != mine.Generation || status.AttemptsLeft != 6 {
		t.Fatalf("%+v, %v", status, err)
	}
	if w.generation(t, theirs.Generation).State != vault.Destroyed {
		t.Fatal("the overruled generation lives")
	}
	// Captured, it does not work against a later enrolment.
	w.MustEnrol(t, "again", nil)
	wantConflict(t, "the captured reinstatement", errOf(w.Vault.Reinstate(t.Context(), w.Caller, captured)))
}

// A reinstatement ends the freezing that it was signed for, and no later one.
func TestReinstatementEndsOneFreezing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	w.wrong(t, mine.Generation)
	freeze := func() time.Time {
		t.Helper()
		if _, err := w.Vault.TurnOff(t.Context(), w.Caller, mine.Generation, nil); err != nil {
			t.Fatal(err)
		}
		return w.generation(t, mine.Generation).ExpiresAt
	}
	until := freeze()
	back := w.Reinstatement(mine, vault.GenerationID{}, until)
	for range 2 { // again, while it is active, is harmless
		if _, err := w.Vault.Reinstate(t.Context(), w.Caller, back); err != nil {
			t.Fatal(err)
		}
	}
	w.clock.Advance(time.Microsecond) // the least by which two freezings differ
	later := freeze()
	events := len(w.store.Events())
	wantConflict(t, "the first freezing's", errOf(w.Vault.Reinstate(t.Context(), w.Caller, back)))
	moved := back
	moved.FrozenUntil = later
	wantIs(t, "the first one's signature with the second one's time",
		errOf(w.Vault.Reinstate(t.Context(), w.Caller, moved)), vault.ErrBadSignature)
	finer := w.Reinstatement(mine, vault.GenerationID{}, later.Add(time.Nanosecond))
	wantConflict(t, "a time between two microseconds", errOf(w.Vault.Reinstate(t.Context(), w.Caller, finer)))
	g := w.generation(t, mine.Generation)
	if g.State != vault.Frozen || !g.ExpiresAt.Equal(later) || g.Used() != 1 || len(w.store.Events()) != events {
		t.Fatalf("a refused reinstatement changed something: %+v", g)
	}
	if _, err := w.Vault.Reinstate(t.Context(), w.Caller, w.Reinstatement(mine, vault.GenerationID{}, later)); err != nil {
		t.Fatal(err)
	}
	if key, err := w.Recover(t.Context(), "mine"); err != nil || key != mine.Key {
		t.Fatal(err)
	}
}

// What is staged when something is activated or reinstated cannot be activated any more.
func TestReinstatementSupersedesWhatIsStaged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := w.MustEnrol(t, "mine", nil)
	if _, err := w.Vault.TurnOff(t.Context(), w.Caller, mine.Generation, nil); err != nil {
		t.Fatal(err)
	}
	staged, err := w.Prepare(t.Context(), "staged")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Stage(t.Context(), staged); err != nil {
		t.Fatal(err)
	}
	until := w.generation(t, mine.Generation).ExpiresAt
	if _, err := w.Vault.Reinstate(t.Context(), w.Caller, w.Reinstatement(mine, vault.GenerationID{}, until)); err != nil {
		t.Fatal(err)
	}
	wantConflict(t, "activating it", errOf(w.Vault.Activate(t.Context(), w.Caller, w.Activation(staged, nil))))
}

func TestActivationSignatures(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.MustEnrol(t, "first", nil)
	e, err := w.Prepare(t.Context(), "second")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Stage(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	good := w.Activation(e, first)
	for name, spoil := range map[string]func(a *vault.Activation){
		"no signature":      func(a *vault.Activation) { a.Signature = nil },
		"a short signature": func(a *vault.Activation) { a.Signature = a.Signature[:63] },
		"another owner's":   func(a *vault.Activation) { a.Signature = w.Activation(e, first).PreviousSignature },
		"a bad proof":       func(a *vault.Activation) { a.PreviousSignature = a.Signature },
		"a proof of another act": func(a *vault.Activation) {
			a.PreviousSignature = w.Statement(transcript.TurnOff, e.Follows, e.Generation, e.Digest).Sign(first.Owner)
		},
		"a proof for other ids": func(a *vault.Activation) {
			a.PreviousSignature = w.Statement(transcript.Replace, e.Generation, e.Follows, e.Digest).Sign(first.Owner)
		},
		"a proof of another record": func(a *vault.Activation) {
			a.PreviousSignature = w.Statement(transcript.Replace, e.Follows, e.Generation, [32]byte{}).Sign(first.Owner)
		},
	} {
		a := good
		spoil(&a)
		wantIs(t, name, errOf(w.Vault.Activate(t.Context(), w.Caller, a)), vault.ErrBadSignature)
	}
	if g := w.generation(t, first.Generation); g.State != vault.Active {
		t.Fatalf("refused activations changed the account: %+v", g)
	}
	if _, err := w.Vault.Activate(t.Context(), w.Caller, good); err != nil {
		t.Fatal(err)
	}
}

// A later, looser policy of the tenant does not loosen what protects a key.
func TestPolicyInForceIsTheAccounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Caller.Policy.MaxAttempts = 3
	e := w.MustEnrol(t, "right", nil)
	w.Caller.Policy.MaxAttempts = 10
	w.wrong(t, e.Generation)
	w.wrong(t, e.Generation)
	wantIs(t, "the third", w.wrong(t, e.Generation), vault.ErrKeyDestroyed)
}

func TestHundredFailuresOverManySuccesses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	failures := 0
	for round := 0; ; round++ {
		if round > 20 {
			t.Fatal("no end")
		}
		var err error
		for range 9 {
			g, _ := w.NewGuess("wrong", e.Generation)
			if err = w.Send(t.Context(), g); err != nil {
				break
			}
			failures++
			ke3 := opaque.KE3{}
			rand.Read(ke3[:])
			_, err = w.Vault.FinishRecovery(t.Context(), w.Caller, ke3, g.Started.State)
			if errors.Is(err, vault.ErrKeyDestroyed) {
				break
			}
		}
		if errors.Is(err, vault.ErrKeyDestroyed) {
			break
		}
		g := w.send(t, "right", e.Generation)
		if _, err := w.Vault.FinishRecovery(t.Context(), w.Caller, w.rightKE3(t, g), g.Started.State); err != nil {
			t.Fatal(err)
		}
	}
	if failures != vault.MaxFailures || w.generation(t, e.Generation).Reason != vault.Failures {
		t.Fatalf("%d failures, %+v", failures, w.generation(t, e.Generation))
	}
}

// With the token gone after the charge, the attempt stays charged and open to the same bytes.
func TestTokenGoneAfterTheCharge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	g, _ := w.NewGuess("right", e.Generation)
	gone := errors.New("device removed")
	w.token.FailWith(func(operation string) error {
		if operation == "multiply" {
			return gone
		}
		return nil
	})
	for range 3 {
		err := w.Send(t.Context(), g)
		wantIs(t, "without a token", err, vault.ErrTokenUnavailable)
		wantIs(t, "the cause", err, gone)
	}
	w.token.FailWith(nil)
	if s := w.status(t); s.AttemptsLeft != 9 {
		t.Fatalf("attempts left %d, want 9", s.AttemptsLeft)
	}
	if err := w.Send(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if key, err := w.Finish(t.Context(), g); err != nil || key != e.Key {
		t.Fatal(err)
	}
}

func TestCancelledContextChargesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.MustEnrol(t, "right", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g, _ := w.NewGuess("right", e.Generation)
	wantIs(t, "cancelled", w.Send(ctx, g), context.Canceled)
	if s := w.status(t); s.AttemptsLeft != 10 {
		t.Fatalf("attempts left %d", s.AttemptsLeft)
	}
}

func TestIdentityIsSigned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id, err := w.Vault.Identity(t.Context(), time.Now())
	if err != nil || len(id.Keys.Keys) != 3 || id.Keys.Serial == 0 {
		t.Fatalf("%+v, %v", id, err)
	}
	parsed, err := transcript.ParseFingerprint(id.Fingerprint.String())
	if err != nil || parsed != transcript.FingerprintOf(vaultID, id.IdentityKey[:]) {
		t.Fatal(err)
	}
}

// While an older generation is frozen, a looser policy is not taken over: the cap is shared.
func TestPolicyHoldsWhileAGenerationIsFrozen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.Caller.Policy.MaxAttempts = 3
	mine := w.MustEnrol(t, "mine", nil)
	w.Caller.Policy.MaxAttempts = 10
	theirs := w.MustEnrol(t, "theirs", nil)
	if s := w.status(t); s.MaxAttempts != 3 {
		t.Fatalf("max attempts %d, want 3", s.MaxAttempts)
	}
	w.wrong(t, mine.Generation)
	w.wrong(t, theirs.Generation)
	var wrong *vault.WrongPassword
	if err := w.wrong(t, theirs.Generation); !errors.As(err, &wrong) || wrong.AttemptsLeft != 1 {
		t.Fatalf("the third destroys the frozen one and leaves the active one its own: %v", err)
	}
	if g := w.generation(t, mine.Generation); g.State != vault.Destroyed {
		t.Fatalf("%+v", g)
	}
	// Alone again, the account takes the tenant's policy with its next enrolment.
	w.MustEnrol(t, "again", theirs)
	if s := w.status(t); s.MaxAttempts != 10 {
		t.Fatalf("max attempts %d, want 10", s.MaxAttempts)
	}
}
