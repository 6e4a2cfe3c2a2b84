package pkcs11util_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// recorder keeps what is logged.
type recorder struct {
	mu    sync.Mutex
	lines []string
}

func (r *recorder) logger() *slog.Logger { return slog.New(slog.NewTextHandler(r, nil)) }

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, string(b))
	return len(b), nil
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.lines...)
}

func (r *recorder) count(message string) (n int) {
	for _, line := range r.all() {
		if strings.Contains(line, message) {
			n++
		}
	}
	return n
}

// eventually repeats what is to come true by itself. The limit is there for a test that fails to end.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// working uses every key.
func working(t *testing.T, keys *pkcs11util.Keyset, sealed []byte) {
	t.Helper()
	if got, authentic, err := keys.Open(ctx, pkcs11util.Master, id, sealed, nil); err != nil || !authentic || string(got) != "before" {
		t.Errorf("a value sealed before: %q, %v, %v", got, authentic, err)
	}
	g := [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())
	for _, purpose := range []string{pkcs11util.OPRF, pkcs11util.Server} {
		public, err := keys.PublicKey(purpose, 1)
		if err != nil {
			t.Error(err)
		}
		if got, err := keys.Multiply(ctx, purpose, 1, g); err != nil || got != public {
			t.Errorf("multiplying by %s: %v", purpose, err)
		}
	}
	for _, purpose := range []string{pkcs11util.Identity, pkcs11util.Audit} {
		if _, err := keys.Sign(ctx, purpose, 1, [32]byte{1}); err != nil {
			t.Error(err)
		}
	}
	if _, err := keys.MAC(ctx, 1, nil); err != nil {
		t.Error(err)
	}
	if _, err := keys.Random(ctx, 1); err != nil {
		t.Error(err)
	}
	if err := keys.Check(ctx); err != nil {
		t.Error(err)
	}
}

// Each fault is met by the next call, which fails, with the CKR code; the keys are back by themselves.
func TestFaultsMend(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(*tokentest.Token, testing.TB)
	}{
		{"all sessions closed", (*tokentest.Token).CloseAllSessions},
		{"logged out", (*tokentest.Token).Logout},
		{"module finalised", (*tokentest.Token).Finalize},
	} {
		for _, use := range []struct {
			name string
			call func(*pkcs11util.Keyset, []byte) error
		}{
			{"Check", func(k *pkcs11util.Keyset, _ []byte) error { return k.Check(ctx) }},
			{"Multiply", func(k *pkcs11util.Keyset, _ []byte) error {
				_, err := k.Multiply(ctx, pkcs11util.OPRF, 1, [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed()))
				return err
			}},
			{"Open", func(k *pkcs11util.Keyset, sealed []byte) error {
				_, authentic, err := k.Open(ctx, pkcs11util.Master, id, sealed, nil)
				if err == nil && !authentic {
					t.Error("a fault passed for a forgery")
				}
				return err
			}},
			{"MAC", func(k *pkcs11util.Keyset, _ []byte) error { _, err := k.MAC(ctx, 1, nil); return err }},
		} {
			t.Run(c.name+"/"+use.name, func(t *testing.T) {
				tok := tokentest.New(t)
				log := &recorder{}
				cfg := tok.Config()
				cfg.Logger = log.logger()
				cfg.Sessions = 2
				if err := tok.Close(); err != nil {
					t.Fatal(err)
				}
				keys := tok.OpenKeyset(t, cfg)
				sealed, err := keys.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
				if err != nil {
					t.Fatal(err)
				}
				for round := range 2 {
					c.fault(tok, t)
					err := use.call(keys, sealed)
					var code pkcs11.Error
					if !errors.Is(err, pkcs11util.ErrUnavailable) || !errors.As(err, &code) {
						t.Errorf("round %d: the first call after the fault: %v", round, err)
					}
					eventually(t, "service again", func() bool { return keys.Check(ctx) == nil })
					working(t, keys, sealed)
				}
				// A recovery is put to use before it is logged.
				eventually(t, "the log of both recoveries", func() bool { return log.count("token recovered") >= 2 })
				if lost, back := log.count("token lost"), log.count("token recovered"); lost != 2 || back != 2 {
					t.Errorf("lost %d times, recovered %d times, of 2:\n%s", lost, back, strings.Join(log.all(), ""))
				}
			})
		}
	}
}

// One session that dies is replaced; the connection stays.
func TestOneSessionDies(t *testing.T) {
	// Not parallel: SoftHSM counts handles up, over all tokens of the process.
	tok := tokentest.New(t)
	log := &recorder{}
	cfg := tok.Config()
	cfg.Logger = log.logger()
	cfg.Sessions = 1
	keys := tok.OpenKeyset(t, cfg)
	tok.Raw(t, func(p *pkcs11.Ctx, mine pkcs11.SessionHandle) error {
		for h := mine - 1; h > 0; h-- {
			if p.CloseSession(h) == nil {
				return nil // the session before this one: the Keyset's last, hence its only one for calls
			}
		}
		return errors.New("the Keyset has no session")
	})
	var code pkcs11.Error
	if err := keys.Check(ctx); !errors.As(err, &code) || errors.Is(err, pkcs11util.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if err := keys.Check(ctx); err != nil {
		t.Errorf("the next call: %v", err)
	}
	if log.count("token session replaced") != 1 || log.count("token lost") != 0 {
		t.Errorf("%q", log.all())
	}
}

// A token that goes away and comes back, without a restart of anything.
func TestTokenVanishesAndReturns(t *testing.T) {
	tok := tokentest.New(t)
	bystander := tokentest.New(t)
	sealed, err := tok.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := bystander.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
	if err != nil {
		t.Fatal(err)
	}
	public, err := tok.PublicKey(pkcs11util.OPRF, 1)
	if err != nil {
		t.Fatal(err)
	}

	tok.Vanish(t)
	for range 50 {
		if _, err := tok.MAC(ctx, 1, nil); err == nil {
			t.Fatal("a token that is not there answered")
		}
		if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, sealed, nil); err == nil {
			t.Fatalf("a token that is not there opened a value: %v", authentic)
		}
	}
	if again, err := tok.PublicKey(pkcs11util.OPRF, 1); err != nil || again != public || tok.Newest(pkcs11util.OPRF) != 1 {
		t.Errorf("what is in memory: %v", err)
	}
	eventually(t, "the search for the token", func() bool {
		err := tok.Check(ctx)
		return errors.Is(err, pkcs11util.ErrUnavailable) && strings.Contains(err.Error(), "no token has this label")
	})

	tok.Return(t)
	eventually(t, "service again", func() bool { return tok.Check(ctx) == nil })
	working(t, tok.Keyset, sealed)
	// The search finalised the module under the other token, which recovers too.
	eventually(t, "the other token's service", func() bool { return bystander.Check(ctx) == nil })
	working(t, bystander.Keyset, other)
}

// Two tokens of one module lose it at once, under load, and both come back. No call gives a wrong
// answer meanwhile.
func TestModuleFinalisedUnderLoad(t *testing.T) {
	a, b := tokentest.New(t), tokentest.New(t)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, keys := range []*pkcs11util.Keyset{a.Keyset, b.Keyset} {
		want, err := keys.MAC(ctx, 1, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		public, err := keys.PublicKey(pkcs11util.Server, 1)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := keys.Seal(ctx, pkcs11util.State, id, []byte("y"), nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 6 {
			wg.Go(func() {
				g := [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())
				for {
					select {
					case <-done:
						return
					default:
					}
					if got, err := keys.MAC(ctx, 1, []byte("x")); err == nil && got != want {
						t.Error("another key's MAC")
					}
					if got, err := keys.Multiply(ctx, pkcs11util.Server, 1, g); err == nil && got != public {
						t.Error("another key's product")
					}
					if _, authentic, err := keys.Open(ctx, pkcs11util.State, id, sealed, nil); err == nil && !authentic {
						t.Error("a fault passed for a forgery")
					}
				}
			})
		}
	}
	for range 5 {
		a.CloseAllSessions(t)
		eventually(t, "service again", func() bool { return a.Check(ctx) == nil && b.Check(ctx) == nil })
		b.Logout(t)
		eventually(t, "service again", func() bool { return a.Check(ctx) == nil && b.Check(ctx) == nil })
		a.Reinitialise(t)
		eventually(t, "service again", func() bool { return a.Check(ctx) == nil && b.Check(ctx) == nil })
	}
	close(done)
	wg.Wait()
}

// Handle numbers begin anew with the module: those of before, which may be another token's by now, are not used.
// The call waits for new ones, as its own token is not at fault.
func TestHandlesOfBeforeAreNotUsed(t *testing.T) {
	tok, other := tokentest.New(t), tokentest.New(t)
	want, err := tok.MAC(ctx, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	tok.Reinitialise(t)
	_ = other.Check(ctx)
	eventually(t, "the other token's service", func() bool { return other.Check(ctx) == nil })
	for range 20 { // more sessions, so that every number from before is in use
		other.OpenKeyset(t, other.Config())
	}
	if mac, err := tok.MAC(ctx, 1, nil); err != nil || mac != want {
		t.Errorf("another MAC, or %v", err)
	}
}

// Calls that wait for a session when the connection is lost do not wait for ever.
func TestWaitersEndWithTheConnection(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	cfg := tok.Config()
	cfg.Sessions = 1
	keys := tok.OpenKeyset(t, cfg)
	for range 5 {
		var wg sync.WaitGroup
		var stop atomic.Bool
		for range 8 {
			wg.Go(func() {
				for !stop.Load() {
					_ = keys.Check(ctx) // what counts is that it returns
				}
			})
		}
		tok.Logout(t)
		eventually(t, "service again", func() bool { return keys.Check(ctx) == nil })
		stop.Store(true)
		wg.Wait()
	}
}

// A PIN that was refused is not sent again, by nobody, even when it would be right.
func TestRefusedPINIsNotRepeated(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	const changed = "other-pin"
	var p *pkcs11.Ctx
	var slot uint
	tok.Raw(t, func(ctx *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		info, err := ctx.GetSessionInfo(session)
		if err != nil {
			return err
		}
		p, slot = ctx, info.SlotID
		if err := ctx.SetPIN(session, string(tokentest.PIN), changed); err != nil {
			return err
		}
		return ctx.CloseAllSessions(slot)
	})
	_ = tok.Check(ctx) // meets the fault
	eventually(t, "the PIN refused", func() bool { return errors.Is(tok.Check(ctx), pkcs11util.ErrPINRefused) })
	if err := tok.Check(ctx); errors.Is(err, pkcs11util.ErrUnavailable) {
		t.Errorf("a recovery is still on: %v", err)
	}

	// SoftHSM marks a token whose last login failed, and a login that succeeds clears the mark.
	marked := func() bool {
		info, err := p.GetTokenInfo(slot)
		if err != nil {
			t.Fatal(err)
		}
		return info.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0
	}
	if !marked() {
		t.Fatal("no refused login is to be seen")
	}
	session, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Login(session, pkcs11.CKU_USER, changed); err != nil {
		t.Fatal(err)
	}
	if marked() {
		t.Fatal("the mark stays")
	}
	if err := p.Logout(session); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := tok.Check(ctx); !errors.Is(err, pkcs11util.ErrPINRefused) {
			t.Fatalf("got %v", err)
		}
		if _, err := tok.MAC(ctx, 1, nil); !errors.Is(err, pkcs11util.ErrPINRefused) {
			t.Fatalf("got %v", err)
		}
	}
	if marked() {
		t.Error("the PIN was sent again")
	}
	if err := p.SetPIN(session, changed, string(tokentest.PIN)); err != nil {
		t.Fatal(err)
	}
	if err := p.CloseSession(session); err != nil {
		t.Fatal(err)
	}
	if err := tok.Check(ctx); !errors.Is(err, pkcs11util.ErrPINRefused) {
		t.Errorf("tried again: %v", err)
	}
	if err := tok.OpenKeyset(t, tok.Config()).Check(ctx); err != nil {
		t.Errorf("opened anew: %v", err)
	}
}

// After a fault, other keys under the same names are refused.
func TestExchangedKeysAreRefused(t *testing.T) {
	for _, purpose := range []string{pkcs11util.MAC, pkcs11util.Master, pkcs11util.OPRF, pkcs11util.Identity} {
		t.Run(purpose, func(t *testing.T) {
			tok := tokentest.New(t)
			name := pkcs11util.KeyName{Purpose: purpose, Generation: 1}
			tok.DestroyKey(t, name)
			tok.MakeKey(t, name)
			tok.CloseAllSessions(t)
			_ = tok.Check(ctx)
			eventually(t, "the refusal", func() bool {
				err := tok.Check(ctx)
				return errors.Is(err, pkcs11util.ErrUnavailable) && strings.Contains(err.Error(), "the key that it was")
			})
			// The refusing one goes on trying, and initialises the module under the new one now and then.
			fresh := tok.OpenKeyset(t, tok.Config())
			eventually(t, "a new Keyset, which knows of no other", func() bool { return fresh.Check(ctx) == nil })
		})
	}
}

// Generations that an operator made are found at the next login; older ones may go.
func TestRotation(t *testing.T) {
	tok := tokentest.New(t)
	old, err := tok.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
	if err != nil {
		t.Fatal(err)
	}
	first, second := pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 1}, pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 2}
	relogin := func() {
		t.Helper()
		tok.CloseAllSessions(t)
		_ = tok.Check(ctx)
		eventually(t, "service again", func() bool { return tok.Check(ctx) == nil })
	}
	tok.MakeKey(t, second)
	relogin()
	if got := tok.Newest(pkcs11util.Master); got != 2 {
		t.Errorf("the newest generation is %d", got)
	}
	working(t, tok.Keyset, old)
	young, err := tok.Seal(ctx, pkcs11util.Master, id, []byte("before"), nil)
	if err != nil {
		t.Fatal(err)
	}
	working(t, tok.Keyset, young)
	forged := append([]byte(nil), young...)
	forged[4] = 1 // the generation's last byte
	if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, forged, nil); authentic || err != nil {
		t.Errorf("a value passed off as of another generation: %v, %v", authentic, err)
	}

	tok.DestroyKey(t, first)
	relogin()
	if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, old, nil); authentic || err != nil {
		t.Errorf("a value of a generation that is gone: %v, %v", authentic, err)
	}
	working(t, tok.Keyset, young)

	// Losing the newest is a fault: nothing may go on under an older one.
	tok.MakeKey(t, first)
	tok.DestroyKey(t, second)
	tok.CloseAllSessions(t)
	_ = tok.Check(ctx)
	eventually(t, "the refusal", func() bool {
		err := tok.Check(ctx)
		return err != nil && strings.Contains(err.Error(), second.String())
	})
}

func TestCloseDuringRecovery(t *testing.T) {
	tok := tokentest.New(t)
	tok.Vanish(t)
	_ = tok.Check(ctx)
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tok.Check(ctx); !errors.Is(err, pkcs11util.ErrClosed) {
		t.Errorf("got %v", err)
	}
	tok.Return(t)
}

func TestCancelledBefore(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := tok.Check(over); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := tok.Check(ctx); err != nil {
		t.Errorf("the session is gone: %v", err)
	}
}

// A token that refuses a value and a good one as well is at fault, whatever the value is.
func TestRefusingEverythingIsAFault(t *testing.T) {
	tok := tokentest.New(t)
	sealed, err := tok.Seal(ctx, pkcs11util.Master, id, []byte("content"), nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed[len(sealed)-1] ^= 1
	if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, sealed, nil); authentic || err != nil {
		t.Fatalf("a forgery: %v, %v", authentic, err)
	}
	tok.SpoilKnownAnswer(pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 1})
	_, authentic, err := tok.Open(ctx, pkcs11util.Master, id, sealed, nil)
	if authentic || !errors.Is(err, pkcs11util.ErrUnavailable) {
		t.Errorf("got %v, %v", authentic, err)
	}
}
