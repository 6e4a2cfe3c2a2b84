package vault_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// The tests of this file run on a real Postgres and a token that fails on command.

// newFaulty is a deployment on a shimmed token, whose module is recycled now and then.
func newFaulty(t *testing.T) (*real, *tokentest.Shim) {
	t.Helper()
	db := storetest.New(t)
	if err := db.OwnerStore(t).AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: vault.DefaultPolicy()}); err != nil {
		t.Fatal(err)
	}
	shim := tokentest.NewShimmed(t)
	cfg := shim.Config()
	cfg.Sessions, cfg.RecycleAfter = 2, 300
	keys := shim.OpenKeyset(t, cfg)
	return &real{db: db, token: &countingToken{Token: keys, evaluated: map[[33]byte]bool{}}}, shim
}

// patient repeats a step, with the same bytes, for as long as the token is away.
func patient(t *testing.T, failed *atomic.Int64, step func() error) error {
	deadline := time.Now().Add(2 * time.Minute) // for a test that fails to end
	for {
		err := step()
		if !errors.Is(err, vault.ErrTokenUnavailable) {
			return err
		}
		failed.Add(1)
		if time.Now().After(deadline) {
			t.Error("the token never came back")
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// A token that vanishes and comes back under load, over and over, losing less or more each time, while its module
// is recycled, too. Service returns by itself. Every request is sent again with
// the same bytes until it is answered, and each guess costs one attempt.
func TestTokenVanishesUnderLoad(t *testing.T) {
	t.Parallel()
	r, shim := newFaulty(t)
	instances := []*vault.Vault{r.instance(t), r.instance(t)}
	var starts, guesses, failed, done atomic.Int64
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}

	// life is one account's: enrolled, recovered, and guessed at until it is destroyed.
	life := func(user string, v, other *vault.Vault) error {
		d := deviceOf(v, user)
		var e *vaulttest.Enrolment
		if err := patient(t, &failed, func() (err error) {
			starts.Add(1) // each has a t_u of its own
			e, err = d.Prepare(t.Context(), "right")
			return err
		}); err != nil {
			return fmt.Errorf("enrolling: %w", err)
		}
		if err := patient(t, &failed, func() error { return d.Stage(t.Context(), e) }); err != nil {
			return fmt.Errorf("staging: %w", err)
		}
		if err := patient(t, &failed, func() error { return errOf(v.Activate(t.Context(), d.Caller, d.Activation(e, nil))) }); err != nil {
			return fmt.Errorf("activating: %w", err)
		}
		for n := uint32(1); n <= 11; n++ { // a success, and ten failures
			password := "wrong"
			if n == 1 {
				password = "right"
			}
			g, err := d.NewGuess(password, e.Generation)
			if err != nil {
				return err
			}
			g.Start.Attempt = n
			guesses.Add(1)
			// The same bytes through both instances at once.
			var second error
			var wg sync.WaitGroup
			wg.Go(func() {
				second = patient(t, &failed, func() error { return errOf(other.StartRecovery(t.Context(), d.Caller, g.Start)) })
			})
			err = patient(t, &failed, func() error { return d.Send(t.Context(), g) })
			wg.Wait()
			if err := errors.Join(err, second); err != nil {
				return fmt.Errorf("attempt %d: %w", n, err)
			}
			if g.Started.Attempt != n {
				return fmt.Errorf("attempt %d was charged as number %d", n, g.Started.Attempt)
			}
			var key [32]byte
			err = patient(t, &failed, func() (err error) {
				key, err = d.Finish(t.Context(), g)
				return err
			})
			var wrong *vault.WrongPassword
			switch {
			case n == 1 && (err != nil || key != e.Key),
				n > 1 && n < 11 && (!errors.As(err, &wrong) || wrong.AttemptsLeft != int(11-n)),
				n == 11 && !errors.Is(err, vault.ErrKeyDestroyed):
				return fmt.Errorf("finishing attempt %d: %w", n, err)
			}
			done.Add(1)
			if stopped() {
				return nil
			}
		}
		return nil
	}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := 0; !stopped(); n++ {
				if err := life(fmt.Sprintf("user-%d-%d", w, n), instances[w%2], instances[1-w%2]); err != nil {
					t.Errorf("worker %d, account %d: %v", w, n, err)
					return
				}
			}
		})
	}
	progress := func(what string, of *atomic.Int64, by int64) {
		t.Helper()
		from := of.Load()
		deadline := time.Now().Add(2 * time.Minute)
		for of.Load() < from+by {
			if time.Now().After(deadline) || t.Failed() {
				t.Fatalf("never: %s", what)
			}
			time.Sleep(time.Millisecond)
		}
	}
	end := sync.OnceFunc(func() { close(stop) })
	defer wg.Wait()
	defer end()
	for range 2 {
		for level := 1; level <= 3; level++ {
			progress("service", &done, 10)
			shim.Vanish(level)
			progress("requests that find no token", &failed, 20)
			shim.Return()
			progress("service again, by itself", &done, 10)
		}
	}
	end()
	wg.Wait()

	charged := sum(t, r.db, `SELECT coalesce(sum(started), 0) FROM generations`)
	if charged != guesses.Load() {
		t.Errorf("%d attempts charged for %d guesses", charged, guesses.Load())
	}
	if n := int64(r.token.count()); n > charged+starts.Load() {
		t.Errorf("%d distinct evaluations for %d attempts and %d enrolment starts", n, charged, starts.Load())
	}
	if over := sum(t, r.db, `SELECT count(*) FROM generations WHERE started - last_success > 10`); over != 0 {
		t.Errorf("%d generations beyond their cap", over)
	}
	t.Logf("%d attempts, %d requests found no token, %d recyclings and recoveries",
		charged, failed.Load(), shim.Calls("C_Initialize"))
}

func sum(t *testing.T, db *storetest.Database, sql string) (n int64) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// The token fails between the charge and the answer. The attempt stays charged, and open to the same
// bytes, however often they are sent; other bytes are another attempt.
func TestTokenFailsAfterTheCharge(t *testing.T) {
	t.Parallel()
	r, shim := newFaulty(t)
	d := deviceOf(r.instance(t), "ann")
	e := d.MustEnrol(t, "right", nil)
	g, err := d.NewGuess("right", e.Generation)
	if err != nil {
		t.Fatal(err)
	}
	started := func() int64 { return sum(t, r.db, `SELECT sum(started) FROM generations`) }

	// Once: only the call is lost.
	shim.Fail("C_DeriveKey", pkcs11.CKR_DEVICE_ERROR, 1)
	if err := d.Send(t.Context(), g); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatalf("got %v", err)
	}
	if n := started(); n != 1 {
		t.Fatalf("%d attempts charged", n)
	}
	if err := d.Send(t.Context(), g); err != nil || g.Started.Attempt != 1 || g.Started.AttemptsLeft != 9 {
		t.Fatalf("the same bytes: %+v, %v", g.Started, err)
	}

	// Until the token is lost, gone, and back in need of a new initialisation.
	wrong, err := d.NewGuess("wrong", e.Generation)
	if err != nil {
		t.Fatal(err)
	}
	shim.Fail("C_DeriveKey", pkcs11.CKR_DEVICE_ERROR, tokentest.Always)
	for range 30 {
		if err := d.Send(t.Context(), wrong); !errors.Is(err, vault.ErrTokenUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	shim.Vanish(3)
	shim.Fail("C_DeriveKey", 0, 0)
	for range 30 {
		if err := d.Send(t.Context(), wrong); !errors.Is(err, vault.ErrTokenUnavailable) {
			t.Fatalf("got %v", err)
		}
		if _, err := d.Finish(t.Context(), g); !errors.Is(err, vault.ErrTokenUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	shim.Return()
	var failed atomic.Int64
	if err := patient(t, &failed, func() error { return d.Send(t.Context(), wrong) }); err != nil || wrong.Started.Attempt != 2 {
		t.Fatalf("the same bytes: %+v, %v", wrong.Started, err)
	}
	if n := started(); n != 2 {
		t.Fatalf("%d attempts charged for two guesses", n)
	}
	// The first is still open, and right.
	if key, err := d.Finish(t.Context(), g); err != nil || key != e.Key {
		t.Fatalf("finishing what was started before: %v", err)
	}
	if n := r.token.count(); n > 3 {
		t.Errorf("%d distinct evaluations for an enrolment and two guesses", n)
	}
}
