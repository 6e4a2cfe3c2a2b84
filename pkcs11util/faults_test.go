package pkcs11util_test

import (
	"errors"
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

// shimmed is a shimmed token with one Keyset, a value that it sealed, and its log.
type shimmed struct {
	*tokentest.Shim
	keys   *pkcs11util.Keyset
	log    *recorder
	sealed []byte
}

func newShimmed(t *testing.T, sessions int) *shimmed {
	t.Helper()
	s := &shimmed{Shim: tokentest.NewShimmed(t), log: &recorder{}}
	cfg := s.Config()
	if err := s.Keyset.Close(); err != nil { // so that C_Login has one caller
		t.Fatal(err)
	}
	cfg.Sessions, cfg.Logger = sessions, s.log.logger()
	s.keys = s.OpenKeyset(t, cfg)
	var err error
	if s.sealed, err = s.keys.Seal(t.Context(), pkcs11util.Master, id, []byte("before"), nil); err != nil {
		t.Fatal(err)
	}
	return s
}

// calls counts what the levels of recovery do.
type calls struct{ opened, logins, initialised int }

func (s *shimmed) count() calls {
	return calls{s.Calls("C_OpenSession"), s.Calls("C_Login"), s.Calls("C_Initialize")}
}

func (c calls) since(before calls) calls {
	return calls{c.opened - before.opened, c.logins - before.logins, c.initialised - before.initialised}
}

func (s *shimmed) recovered(t *testing.T) {
	t.Helper()
	eventually(t, "service again", func() bool { return s.keys.Check(t.Context()) == nil })
	working(t, s.keys, s.sealed)
}

// uses are calls whose first PKCS#11 function, and one in the middle, are made to fail.
var uses = []struct {
	functions []string
	call      func(s *shimmed) error
}{
	{[]string{"C_DeriveKey", "C_GetAttributeValue", "C_DestroyObject"}, func(s *shimmed) error {
		_, err := s.keys.Multiply(ctx, pkcs11util.OPRF, 1, generator)
		return err
	}},
	{[]string{"C_EncryptInit", "C_Encrypt"}, func(s *shimmed) error {
		_, err := s.keys.Seal(ctx, pkcs11util.State, id, []byte("text"), nil)
		return err
	}},
	{[]string{"C_DecryptInit"}, func(s *shimmed) error {
		_, authentic, err := s.keys.Open(ctx, pkcs11util.Master, id, s.sealed, nil)
		if err == nil && !authentic {
			return errors.New("a fault passed for a forgery")
		}
		return err
	}},
	{[]string{"C_SignInit", "C_Sign"}, func(s *shimmed) error { _, err := s.keys.MAC(ctx, 1, nil); return err }},
	{[]string{"C_Sign"}, func(s *shimmed) error {
		_, err := s.keys.Sign(ctx, pkcs11util.Identity, 1, [32]byte{1})
		return err
	}},
	{[]string{"C_GenerateRandom"}, func(s *shimmed) error { _, err := s.keys.Random(ctx, 8); return err }},
	{[]string{"C_GetSessionInfo"}, func(s *shimmed) error { return s.keys.Check(ctx) }},
}

// codes are what tokens answer when something is wrong with them.
var codes = []uint{
	pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_TOKEN_NOT_PRESENT,
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
	pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_OPERATION_ACTIVE,
	pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
	pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_VENDOR_DEFINED + 7,
}

// First level: one failure, whatever its code and wherever it comes, costs its call and a session. Nobody logs in,
// nothing is initialised, and the next call is served.
func TestOneFailureCostsASession(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 1)
	for _, use := range uses {
		for _, function := range use.functions {
			for _, code := range codes {
				before := s.count()
				s.Fail(function, code, 1)
				if err := use.call(s); !errors.Is(err, pkcs11.Error(code)) || errors.Is(err, pkcs11util.ErrUnavailable) {
					t.Errorf("%s: got %v, want %v", function, err, pkcs11.Error(code))
				}
				if did := s.count().since(before); did != (calls{1, 0, 0}) {
					t.Errorf("%s, %v: %+v", function, pkcs11.Error(code), did)
				}
				if err := use.call(s); err != nil {
					t.Errorf("%s: after %v: %v", function, pkcs11.Error(code), err)
				}
			}
		}
	}
	working(t, s.keys, s.sealed)
}

// C_Decrypt's own codes may mean a forgery: one of those is looked into, and never taken for one.
func TestOneFailureOfDecrypt(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 1)
	for _, code := range codes {
		s.Fail("C_Decrypt", code, 1)
		plain, authentic, err := s.keys.Open(ctx, pkcs11util.Master, id, s.sealed, nil)
		if err == nil && (!authentic || string(plain) != "before") {
			t.Errorf("%v passed for a forgery", pkcs11.Error(code))
		}
		if errors.Is(err, pkcs11util.ErrUnavailable) {
			t.Errorf("a session would have mended it: %v", err)
		}
		if err := s.keys.Check(ctx); err != nil {
			t.Errorf("after %v: %v", pkcs11.Error(code), err)
		}
	}
}

// Second level: a new session does not help, a new login does. The module is not initialised anew.
func TestLoginMends(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 2)
	before := s.count()
	s.Vanish(2) // sessions and login
	s.Return()
	if _, err := s.keys.MAC(ctx, 1, nil); !errors.Is(err, pkcs11util.ErrUnavailable) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)) {
		t.Errorf("the call that met it: %v", err)
	}
	s.recovered(t)
	if did := s.count().since(before); did.logins != 1 || did.initialised != 0 {
		t.Errorf("%+v", did)
	}
}

// Sessions that end alone are replaced as they are met.
func TestSessionsMend(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 3)
	before := s.count()
	s.Vanish(1)
	s.Return()
	for range 3 {
		if err := s.keys.Check(ctx); !errors.Is(err, pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)) || errors.Is(err, pkcs11util.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	}
	working(t, s.keys, s.sealed)
	if did := s.count().since(before); did != (calls{3, 0, 0}) {
		t.Errorf("%+v", did)
	}
}

// Third level: only a new initialisation helps.
func TestInitialisationMends(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 2)
	before := s.count()
	s.Vanish(3)
	s.Return()
	if _, err := s.keys.MAC(ctx, 1, nil); !errors.Is(err, pkcs11util.ErrUnavailable) || !errors.Is(err, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)) {
		t.Errorf("the call that met it: %v", err)
	}
	s.recovered(t)
	if did := s.count().since(before); did.logins != 1 || did.initialised != 1 {
		t.Errorf("%+v", did)
	}
}

// Many calls meet a fault at once: it is recovered from once.
func TestRecoveryIsSingle(t *testing.T) {
	t.Parallel()
	for level := 2; level <= 3; level++ {
		s := newShimmed(t, 4)
		before := s.count()
		s.Hang("C_GenerateRandom", 4)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if _, err := s.keys.Random(ctx, 8); err == nil {
					t.Error("a lost session answered")
				}
			})
		}
		eventually(t, "all sessions in use", func() bool { return s.Held("C_GenerateRandom") == 4 })
		s.Vanish(level)
		s.Return()
		s.Release("C_GenerateRandom")
		wg.Wait()
		s.recovered(t)
		if did := s.count().since(before); did.logins != 1 || did.initialised != level-2 {
			t.Errorf("level %d: %+v", level, did)
		}
		if lost := s.log.count("token lost"); lost != 1 {
			t.Errorf("level %d: lost %d times", level, lost)
		}
	}
}

// A token that is away is asked with growing pauses, not with each call; readiness is false all the
// while, and true again once it is back and proven.
func TestRecoveryBacksOff(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 2)
	s.Vanish(2)
	before := s.count()
	var refused atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := s.keys.Check(ctx); err == nil {
					t.Error("ready without a token")
				} else if errors.Is(err, pkcs11util.ErrUnavailable) {
					refused.Add(1)
				}
			}
		})
	}
	eventually(t, "three attempts", func() bool { return s.log.count("token recovery failed") >= 3 })
	close(stop)
	wg.Wait()
	attempts := s.log.count("token recovery failed")
	if did := s.count().since(before); did.initialised > attempts+1 || did.logins != 0 {
		t.Errorf("%d attempts: %+v", attempts, did)
	}
	if refused.Load() < 100 {
		t.Errorf("only %d calls were refused at once", refused.Load())
	}
	s.Return()
	s.recovered(t)
}

// A PIN that is refused while the token is recovered is sent once, and never again.
func TestRefusedPINIsSentOnce(t *testing.T) {
	t.Parallel()
	for _, code := range []uint{
		pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE,
	} {
		s := newShimmed(t, 2)
		before := s.count()
		s.Fail("C_Login", code, tokentest.Always)
		s.Vanish(2)
		s.Return()
		_ = s.keys.Check(ctx)
		eventually(t, "the refusal", func() bool { return errors.Is(s.keys.Check(ctx), pkcs11util.ErrPINRefused) })
		s.Fail("C_Login", 0, 0) // it would be taken now
		for range 50 {
			if err := s.keys.Check(ctx); !errors.Is(err, pkcs11util.ErrPINRefused) || !errors.Is(err, pkcs11.Error(code)) {
				t.Fatalf("got %v", err)
			}
		}
		if err := s.keys.Close(); err != nil { // after which nothing goes on in the background
			t.Error(err)
		}
		if did := s.count().since(before); did.logins != 1 || did.initialised != 0 {
			t.Errorf("%v: %+v", pkcs11.Error(code), did)
		}
	}
}

// The same in the middle of a recycling, and at the start.
func TestRefusedPINElsewhere(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter = 60
	if err := s.Keyset.Close(); err != nil {
		t.Fatal(err)
	}
	keys := s.OpenKeyset(t, cfg)
	before := s.Calls("C_Login")
	s.Fail("C_Login", pkcs11.CKR_PIN_INCORRECT, tokentest.Always)
	var err error
	for err == nil {
		_, err = keys.Multiply(ctx, pkcs11util.OPRF, 1, generator)
	}
	if !errors.Is(err, pkcs11util.ErrPINRefused) {
		t.Errorf("got %v", err)
	}
	if _, err := pkcs11util.Open(ctx, cfg); !errors.Is(err, pkcs11util.ErrPINRefused) {
		t.Errorf("at the start: %v", err)
	}
	if n := s.Calls("C_Login") - before; n != 2 {
		t.Errorf("%d logins", n)
	}
	s.Fail("C_Login", 0, 0)
	s.Set(tokentest.PINLocked)
	before = s.Calls("C_Login")
	if _, err := pkcs11util.Open(ctx, cfg); !errors.Is(err, pkcs11util.ErrPINRefused) || !strings.Contains(err.Error(), "locked") {
		t.Errorf("a PIN that is locked: %v", err)
	}
	if s.Calls("C_Login") != before {
		t.Error("a PIN that is locked was sent")
	}
}

// A token on which one function stays broken is not ready, whatever else works.
func TestOneFunctionBroken(t *testing.T) {
	t.Parallel()
	for _, use := range uses {
		function := use.functions[0]
		t.Run(function, func(t *testing.T) {
			t.Parallel()
			s := newShimmed(t, 2)
			s.Fail(function, pkcs11.CKR_DEVICE_ERROR, tokentest.Always)
			if err := use.call(s); !errors.Is(err, pkcs11util.ErrUnavailable) {
				t.Errorf("the first call: %v", err)
			}
			for range 20 {
				if err := s.keys.Check(ctx); !errors.Is(err, pkcs11util.ErrUnavailable) {
					t.Fatalf("ready: %v", err)
				}
			}
			s.Fail(function, 0, 0)
			s.recovered(t)
		})
	}
}

// seventh is 7·G, compressed.
func seventh(t *testing.T) [33]byte {
	t.Helper()
	p, err := nistec.NewP256Point().ScalarBaseMult(append(make([]byte, 31), 7))
	if err != nil {
		t.Fatal(err)
	}
	return [33]byte(p.BytesCompressed())
}

// A token that computes wrong gets no answer past the checks, and is not ready.
func TestLyingToken(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]tokentest.Setting{
		"the same secret": tokentest.SameSecret, "another point": tokentest.OtherPoint, "bad signatures": tokentest.BadSignatures,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShimmed(t, 2)
			want, err := s.keys.Multiply(ctx, pkcs11util.OPRF, 1, seventh(t))
			if err != nil {
				t.Fatal(err)
			}
			s.Set(lie)
			eventually(t, "the lie seen", func() bool { return errors.Is(s.keys.Check(ctx), pkcs11util.ErrUnavailable) })
			for range 20 {
				if _, err := s.keys.Multiply(ctx, pkcs11util.OPRF, 1, seventh(t)); err == nil {
					t.Fatal("an answer of a lying token")
				}
			}
			s.Set(lie.Off())
			s.recovered(t)
			// Now and then only: what comes is right.
			s.Set(lie, tokentest.LieEvery(7))
			right := 0
			for i := range 200 {
				got, err := s.keys.Multiply(ctx, pkcs11util.OPRF, 1, seventh(t))
				if err == nil && got != want {
					t.Fatalf("a wrong product, in try %d", i)
				}
				if err == nil {
					right++
				}
			}
			t.Logf("%d of 200 answered", right)
		})
	}
}

// A connection that proves well and does not last is not made anew with every call.
func TestRecoveryOfWhatDoesNotLast(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 1)
	before := s.count()
	// Every 40th derive is wrong: a login's proof may pass, and soon another call fails.
	s.Set(tokentest.OtherPoint, tokentest.LieEvery(40))
	lost := 0
	for lost < 2000 {
		if _, err := s.keys.Multiply(ctx, pkcs11util.OPRF, 1, seventh(t)); err != nil {
			lost++
		}
	}
	// Two thousand refused calls, and hardly a login: the pauses grew.
	if did := s.count().since(before); did.logins > 40 {
		t.Errorf("%+v", did)
	}
	s.Set(tokentest.OtherPoint.Off())
	s.recovered(t)
}

// A call that hangs keeps its session, and nobody else: the others are served, also when the login
// is lost and made anew meanwhile, and nobody gets the session before it has come out.
func TestHangingCall(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 2)
	s.Hang("C_GenerateRandom", 1)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = s.keys.Random(ctx, 8) })
	eventually(t, "the call hangs", func() bool { return s.Held("C_GenerateRandom") == 1 })
	for range 20 {
		serves(t, s)
	}
	before := s.count()
	s.Vanish(2)
	s.Return()
	if err := s.keys.Check(ctx); err == nil {
		t.Error("a lost session answered")
	}
	s.recovered(t)
	if did := s.count().since(before); did.logins != 1 || did.initialised != 0 {
		t.Errorf("%+v", did)
	}
	for range 20 {
		serves(t, s)
	}
	s.Release("C_GenerateRandom")
	wg.Wait()
	s.recovered(t)
	if s.log.count("token lost") != 1 {
		t.Errorf("the hanging call's end was taken for another fault:\n%s", strings.Join(s.log.all(), ""))
	}
}

func serves(t *testing.T, s *shimmed) {
	t.Helper()
	if err := errors.Join(s.keys.Check(ctx), uses[0].call(s)); err != nil {
		t.Error(err)
	}
}

// Close does not wait for ever.
func TestCloseWithAHangingCall(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 1)
	s.Hang("C_GenerateRandom", 1)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = s.keys.Random(ctx, 8) })
	eventually(t, "the call hangs", func() bool { return s.Held("C_GenerateRandom") == 1 })
	if err := s.keys.Close(); err == nil {
		t.Error("closed under a call that hangs")
	}
	s.Release("C_GenerateRandom")
	wg.Wait()
}

// Slow is not lost.
func TestSlowToken(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 2)
	before := s.count()
	s.Delay("C_DeriveKey", 20*time.Millisecond, tokentest.Always)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := uses[0].call(s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if did := s.count().since(before); did != (calls{}) {
		t.Errorf("%+v", did)
	}
}

// Two handles for one key are refused, at the start and after a fault.
func TestDuplicateHandles(t *testing.T) {
	t.Parallel()
	s := newShimmed(t, 1)
	s.Set(tokentest.Duplicates)
	if _, err := pkcs11util.Open(ctx, s.Config()); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("got %v", err)
	}
	s.Vanish(2)
	s.Return()
	eventually(t, "the refusal", func() bool {
		err := s.keys.Check(ctx)
		return errors.Is(err, pkcs11util.ErrUnavailable) && strings.Contains(err.Error(), "twice")
	})
	s.Set(tokentest.Duplicates.Off())
	s.recovered(t)
}
