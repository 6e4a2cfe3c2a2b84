package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

const right, wrong = "right", "wrong"

// throng is users who enrol, recover and are guessed at, all at once, against a vaultd
// that comes and goes. A request that gets no answer is sent again, byte for byte,
// until it gets one.
type throng struct {
	deployment *deployment
	at         *address
	over       atomic.Bool // begin nothing new

	// gate is held for reading over each request and the note of its answer: whoever holds it
	// for writing sees notes of all answers that came.
	gate sync.RWMutex

	mu       sync.Mutex
	keys     map[string][32]byte // of acknowledged enrolments, by user
	resting  []string            // users who are neither guessed at nor recovering just now
	answered map[string]int      // by victim: distinct guesses that were answered
	users    int
}

// insist repeats a request until it is answered by something else than a fault, and returns that.
func (g *throng) insist(ctx context.Context, request func() error) error {
	for {
		g.gate.RLock()
		err := request()
		g.gate.RUnlock()
		var r *refused
		switch {
		case err == nil, errors.As(err, &r) && r.status != 503:
			return err
		case ctx.Err() != nil:
			return fmt.Errorf("no answer in time: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// enrol enrols a new user. Every third becomes a victim.
func (g *throng) enrol(ctx context.Context) error {
	g.mu.Lock()
	g.users++
	n := g.users
	g.mu.Unlock()
	p := g.deployment.phone(g.at, fmt.Sprintf("user-%d", n))
	var e *enrolment
	if err := g.insist(ctx, func() (err error) { e, err = p.prepare(ctx, right); return err }); err != nil {
		return fmt.Errorf("starting an enrolment: %w", err)
	}
	if err := g.insist(ctx, func() error { return p.commit(ctx, e) }); err != nil {
		return fmt.Errorf("enrolling: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keys[p.user] = e.key
	if n%3 == 0 {
		g.answered[p.user] = 0
	} else {
		g.resting = append(g.resting, p.user)
	}
	return nil
}

// recover recovers the key of a user, one device at a time.
func (g *throng) recover(ctx context.Context) error {
	g.mu.Lock()
	if len(g.resting) == 0 {
		g.mu.Unlock()
		return nil
	}
	i := rand.N(len(g.resting))
	user := g.resting[i]
	g.resting = append(g.resting[:i], g.resting[i+1:]...)
	want := g.keys[user]
	g.mu.Unlock()

	p := g.deployment.phone(g.at, user)
	guess, err := newGuess(right)
	if err != nil {
		return err
	}
	if err := g.insist(ctx, func() error { return p.start(ctx, guess) }); err != nil {
		return fmt.Errorf("starting a recovery: %w", err)
	}
	var key [32]byte
	if err := g.insist(ctx, func() (err error) { key, err = p.end(ctx, guess); return err }); err != nil || key != want {
		return fmt.Errorf("%s recovered %x, want %x: %w", user, key, want, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.resting = append(g.resting, user)
	return nil
}

// guess guesses at a victim, beside others who may be at the same one.
func (g *throng) guess(ctx context.Context) error {
	g.mu.Lock()
	var user string
	for user = range g.answered { // any
		break
	}
	g.mu.Unlock()
	if user == "" {
		return nil
	}
	p := g.deployment.phone(g.at, user)
	guess, err := newGuess(wrong)
	if err != nil {
		return err
	}
	err = g.insist(ctx, func() error {
		err := p.start(ctx, guess)
		if err == nil {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.answered[user]++
		}
		return err
	})
	if isRefused(err, "too-early") || isRefused(err, "key-destroyed") {
		return nil // others have used it up
	}
	if err != nil {
		return fmt.Errorf("guessing: %w", err)
	}
	err = g.insist(ctx, func() error { return second(p.end(ctx, guess)) })
	if !isRefused(err, "wrong-password") && !isRefused(err, "key-destroyed") {
		return fmt.Errorf("a wrong guess was answered with: %w", err)
	}
	return nil
}

// besiege lets a throng at vaultd, which is started and ended in turn; end returns when it
// has ended. Afterwards everything begun is finished with a last vaultd, and what
// was answered is compared with what the database has and the vault gives.
func besiege(t *testing.T, rounds int, end func(*vaultd, *throng)) {
	d := deploy(t, storetest.New(t))
	g := &throng{deployment: d, at: &address{}, keys: map[string][32]byte{}, answered: map[string]int{}}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	var working sync.WaitGroup
	for round := range rounds + 1 {
		v := d.start(t)
		g.at.move(v.url)
		if round == 0 {
			for _, do := range []func(context.Context) error{g.enrol, g.recover, g.guess, g.enrol, g.recover, g.guess} {
				working.Go(func() {
					for !g.over.Load() {
						if err := do(ctx); err != nil {
							t.Error(err)
							return
						}
						time.Sleep(time.Millisecond) // there may have been nothing to do
					}
				})
			}
		}
		if round < rounds {
			time.Sleep(50*time.Millisecond + rand.N(700*time.Millisecond))
			end(v, g)
		}
	}
	g.over.Store(true)
	working.Wait()
	if t.Failed() {
		return
	}

	guesses, destroyed := 0, 0
	for user, answered := range g.answered {
		if n := d.started(t, user); n != int64(answered) || n > 10 {
			t.Errorf("%s: %d guesses were answered, %d are counted", user, answered, n)
		}
		guesses += answered
	}
	for user, want := range g.keys {
		key, err := d.phone(g.at, user).recover(ctx, right)
		if g.answered[user] == 10 {
			if destroyed++; !isRefused(err, "key-destroyed") {
				t.Errorf("%s, after ten wrong guesses: %v", user, err)
			}
		} else if err != nil || key != want {
			t.Errorf("%s, whose enrolment was acknowledged: %v", user, err)
		}
	}
	if n := query[int64](t, d.database, `SELECT count(*) FROM generations WHERE started - last_success >= 10 AND sealed IS NOT NULL`); n != 0 {
		t.Errorf("%d keys that are used up are still there", n)
	}
	if guesses == 0 || len(g.resting) == 0 {
		t.Error("too little happened to say anything")
	}
	t.Logf("%d enrolled, %d wrong guesses at %d of them, %d destroyed", len(g.keys), guesses, len(g.answered), destroyed)
}

// kill -9 at random moments: no guess is answered without its count and none counted
// twice, what was acknowledged holds, what was destroyed stays destroyed.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	besiege(t, 6, func(v *vaultd, _ *throng) { v.kill() })
}

// SIGTERM at random moments: what runs is finished. When vaultd has ended, with status
// 0, every attempt that it counted was answered, without anything being sent again.
func TestTerminatedUnderLoad(t *testing.T) {
	t.Parallel()
	besiege(t, 6, func(v *vaultd, g *throng) {
		v.stop(t)
		g.gate.Lock()
		defer g.gate.Unlock()
		for user, answered := range g.answered {
			if n := g.deployment.started(t, user); n != int64(answered) {
				t.Errorf("%s: %d guesses were answered, %d were counted", user, answered, n)
			}
		}
	})
}

// vaultctl token init, killed in the middle of it several times, ends well all the same.
func TestTokenInitKilled(t *testing.T) {
	t.Parallel()
	for range 4 {
		db, dir := storetest.New(t), t.TempDir()
		env := tokenEnv(t, dir, tokentest.NewDirectory(t))
		for range 5 {
			init := program(t.Context(), env, "vaultctl", "token", "init")
			if err := init.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(rand.N(400 * time.Millisecond))
			_ = init.Process.Kill() // it may have ended
			_ = init.Wait()
		}
		out := mustRun(t, env, "vaultctl", "token", "init")
		if made, kept := strings.Count(out, "made bkv/"), strings.Count(out, "kept bkv/"); made+kept != 8 {
			t.Errorf("after it was killed:\n%s", out)
		}
		identity := mustRun(t, env, "vaultctl", "identity")
		if out := mustRun(t, env, "vaultctl", "token", "init"); strings.Count(out, "kept bkv/") != 8 {
			t.Errorf("once more:\n%s", out)
		}
		v := startVaultd(t, append(env, "BKV_DATABASE_URL_FILE="+write(t, dir, "url", db.RuntimeURL)))
		if v.fingerprint != strings.TrimSpace(identity) {
			t.Errorf("vaultd has fingerprint %s, vaultctl %s", v.fingerprint, identity)
		}
		v.stop(t)
	}
}
