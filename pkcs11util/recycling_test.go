package pkcs11util_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// generator is P-256's, compressed.
var generator = [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())

// Several tokens and Keysets of one module, all in use, while the module is finalised and
// initialised over and over: no call fails, and each answer is right.
func TestRecyclingUnderLoad(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter, cfg.Sessions = 100, 2
	other := s.NewToken(t)
	keysets := []*pkcs11util.Keyset{s.OpenKeyset(t, cfg), s.OpenKeyset(t, cfg), other.Keyset}

	before := s.Calls("C_Initialize")
	var wg sync.WaitGroup
	for _, keys := range keysets {
		public, err := keys.PublicKey(pkcs11util.Server, 1)
		if err != nil {
			t.Fatal(err)
		}
		want, err := keys.MAC(t.Context(), 1, []byte("message"))
		if err != nil {
			t.Fatal(err)
		}
		for range 4 {
			wg.Go(func() {
				for range 100 {
					got, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator)
					if err != nil || got != public {
						t.Errorf("multiplying: %v", err)
						return
					}
					sealed, err := keys.Seal(t.Context(), pkcs11util.State, [16]byte{1}, []byte("text"), nil)
					if err != nil {
						t.Errorf("sealing: %v", err)
						return
					}
					plain, authentic, err := keys.Open(t.Context(), pkcs11util.State, [16]byte{1}, sealed, nil)
					if err != nil || !authentic || string(plain) != "text" {
						t.Errorf("opening: %v", err)
						return
					}
					if mac, err := keys.MAC(t.Context(), 1, []byte("message")); err != nil || mac != want {
						t.Errorf("MAC: %v", err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	// 12 × 100 points at two objects each, in hundreds, and what proving the keys takes.
	if n := s.Calls("C_Initialize") - before; n < 20 || n > 60 {
		t.Errorf("recycled %d times", n)
	}
	for _, keys := range keysets {
		if err := keys.Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// Nothing is recycled that need not be: another vendor's module, or with the setting off.
func TestRecyclingIsForSoftHSM(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter = -1
	keys := s.OpenKeyset(t, cfg)
	before := s.Calls("C_Initialize")
	for range 100 {
		if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil {
			t.Fatal(err)
		}
	}
	if s.Calls("C_Initialize") != before {
		t.Error("recycled")
	}
	cfg.RecycleAfter = -2
	if _, err := pkcs11util.Open(t.Context(), cfg); err == nil {
		t.Error("-2 was taken")
	}
}

// A recycling cannot begin while a call hangs in the module. The others wait for it as long as
// their contexts allow, and are served again without it.
func TestRecyclingGivesWayToAHangingCall(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter, cfg.Sessions = 20, 2
	keys := s.OpenKeyset(t, cfg)
	s.Hang("C_GenerateRandom", 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := keys.Random(t.Context(), 8); err != nil {
			t.Errorf("the call that hung: %v", err)
		}
	})
	eventually(t, "the call hangs", func() bool { return s.Held("C_GenerateRandom") == 1 })
	before := s.Calls("C_Initialize")
	for range 30 {
		if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil {
			t.Fatal(err)
		}
	}
	if s.Calls("C_Initialize") != before {
		t.Fatal("the module was finalised under a call")
	}
	s.Release("C_GenerateRandom")
	wg.Wait()
	eventually(t, "recycled", func() bool {
		if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil {
			t.Fatal(err)
		}
		return s.Calls("C_Initialize") > before
	})
}

// An operator's login is not ended by a recycling. If somebody else initialises the module meanwhile,
// the Keyset goes on all the same.
func TestRecyclingSparesAnOperator(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter = 20
	keys := s.OpenKeyset(t, cfg)
	admin, err := pkcs11util.OpenAdmin(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := s.Calls("C_Initialize")
	multiply := func() {
		t.Helper()
		for range 100 {
			if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil {
				t.Fatal(err)
			}
		}
	}
	multiply()
	if _, _, err := admin.Keys(); err != nil {
		t.Errorf("the operator's login: %v", err)
	}
	if s.Calls("C_Initialize") != before {
		t.Error("recycled")
	}
	s.Reinitialise(t)
	multiply()
	if n := s.Calls("C_Initialize") - before; n != 1 {
		t.Errorf("initialised %d times", n)
	}
	admin.Close()
	multiply()
	if s.Calls("C_Initialize") < before+2 {
		t.Error("not recycled")
	}
}

// What is said of the keys while the module is recycled holds afterwards, too, whether the recycling
// comes about or not.
func TestKeysChosenWhileRecycling(t *testing.T) {
	t.Parallel()
	for _, function := range []string{"C_Sign", "C_GenerateRandom"} {
		t.Run(function, func(t *testing.T) {
			t.Parallel()
			s := tokentest.NewShimmed(t)
			cfg := s.Config()
			cfg.RecycleAfter = 60
			keys := s.OpenKeyset(t, cfg)
			if err := errors.Join(keys.MakeKey(ctx, pkcs11util.Master, 2), keys.SetCurrent(pkcs11util.Master, 1, 0)); err != nil {
				t.Fatal(err)
			}
			old, err := keys.Seal(ctx, pkcs11util.Master, id, []byte("text"), nil)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			before := s.Calls("C_Finalize")
			s.Hang(function, 1)
			if function == "C_GenerateRandom" { // a call that hangs, and the recycling gives way to it
				wg.Go(func() { _, _ = keys.Random(ctx, 8) })
				eventually(t, "the call hangs", func() bool { return s.Held(function) == 1 })
			}
			wg.Go(func() {
				for range 60 {
					if _, err := keys.Multiply(ctx, pkcs11util.Server, 1, generator); err != nil {
						t.Error(err)
					}
				}
			})
			eventually(t, "a recycling", func() bool { return keys.Recycling() })
			if function == "C_Sign" { // the new connection's proof hangs, after the keys were found
				eventually(t, "the proof hangs", func() bool { return s.Held(function) == 1 })
			}
			if err := keys.SetCurrent(pkcs11util.Master, 2, 0); err != nil {
				t.Fatal(err)
			}
			keys.Forget(pkcs11util.Master, 1)
			if function == "C_Sign" {
				s.Release(function)
			}
			sealed, err := keys.Seal(ctx, pkcs11util.Master, id, []byte("text"), nil)
			if err != nil || sealed[4] != 2 || keys.Newest(pkcs11util.Master) != 2 {
				t.Errorf("sealed under another generation than the chosen one: %x, %v", sealed, err)
			}
			if _, authentic, err := keys.Open(ctx, pkcs11util.Master, id, old, nil); authentic || err != nil {
				t.Errorf("a forgotten key opened: %v, %v", authentic, err)
			}
			if recycled := s.Calls("C_Finalize") > before; recycled != (function == "C_Sign") {
				t.Errorf("recycled: %v", recycled)
			}
			s.Release(function)
			wg.Wait()
		})
	}
}

// Whoever waits for a recycling does so within his context.
func TestRecyclingRespectsContexts(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter = 20
	keys := s.OpenKeyset(t, cfg)
	s.Hang("C_Login", 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 20 {
			if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil {
				t.Error(err)
			}
		}
	})
	eventually(t, "the recycling hangs", func() bool { return s.Held("C_Login") == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error)
	go func() {
		_, err := keys.MAC(ctx, 1, nil)
		answer <- err
	}()
	cancel()
	if err := <-answer; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	waiting := make(chan error)
	go func() { waiting <- keys.Check(t.Context()) }()
	s.Release("C_Login")
	if err := <-waiting; err != nil {
		t.Errorf("the call that waited: %v", err)
	}
	wg.Wait()
}

// If the token does not come back from a recycling, it is lost like any other, and recovered.
func TestRecyclingThatFails(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		function string
		code     uint
	}{
		{"C_Initialize", pkcs11.CKR_GENERAL_ERROR},
		{"C_Login", pkcs11.CKR_DEVICE_ERROR},
		{"C_GetSlotList", pkcs11.CKR_FUNCTION_FAILED},
		{"C_DeriveKey", pkcs11.CKR_DEVICE_MEMORY},
	} {
		t.Run(c.function, func(t *testing.T) {
			t.Parallel()
			s := tokentest.NewShimmed(t)
			cfg := s.Config()
			cfg.RecycleAfter = 40
			keys := s.OpenKeyset(t, cfg)
			finalized := s.Calls("C_Finalize")
			if c.function != "C_DeriveKey" {
				s.Fail(c.function, c.code, tokentest.Always)
			}
			for s.Calls("C_Finalize") == finalized {
				if _, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator); err != nil && !errors.Is(err, pkcs11util.ErrUnavailable) {
					t.Fatal(err)
				}
				if s.Calls("C_DestroyObject") > 30 {
					s.Fail(c.function, c.code, tokentest.Always)
				}
			}
			eventually(t, "unavailable", func() bool {
				err := keys.Check(t.Context())
				return errors.Is(err, pkcs11util.ErrUnavailable) && errors.Is(err, pkcs11.Error(c.code))
			})
			s.Fail(c.function, 0, 0)
			eventually(t, "recovered", func() bool { return keys.Check(t.Context()) == nil })
		})
	}
}

// Close in the middle of a recycling.
func TestCloseWhileRecycling(t *testing.T) {
	t.Parallel()
	s := tokentest.NewShimmed(t)
	cfg := s.Config()
	cfg.RecycleAfter = 20
	for range 10 {
		keys, err := pkcs11util.Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for {
					_, err := keys.Multiply(t.Context(), pkcs11util.Server, 1, generator)
					if errors.Is(err, pkcs11util.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		before := s.Calls("C_Finalize")
		eventually(t, "recycling", func() bool { return s.Calls("C_Finalize") > before })
		if err := keys.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	}
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("another Keyset of the module: %v", err)
	}
}

// TestMillion multiplies a million times, or as often as BKV_MULTIPLICATIONS says, and
// prints the process's memory. By hand:
//
//	BKV_MULTIPLICATIONS=1000000 go test ./pkcs11util -run TestMillion -v -timeout 1h
//	BKV_MULTIPLICATIONS=1000000 BKV_RECYCLE_AFTER=-1 ...   for comparison
func TestMillion(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("BKV_MULTIPLICATIONS"))
	if err != nil {
		t.Skip("runs by hand: BKV_MULTIPLICATIONS=1000000")
	}
	tok := tokentest.New(t)
	cfg := tok.Config()
	cfg.RecycleAfter, _ = strconv.Atoi(os.Getenv("BKV_RECYCLE_AFTER"))
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	log := &recorder{}
	cfg.Logger = log.logger()
	keys := tok.OpenKeyset(t, cfg)
	fmt.Printf("%9d multiplications: %4d MiB resident\n", 0, resident(t))
	for i := 1; i <= n; i++ {
		if _, err := keys.Multiply(t.Context(), pkcs11util.OPRF, 1, generator); err != nil {
			t.Fatal(err)
		}
		if i%(n/10) == 0 {
			fmt.Printf("%9d multiplications: %4d MiB resident, recycled %d times\n", i, resident(t), log.count("module recycled"))
		}
	}
}

// Forged values leave the memory as it was: whoever may send sealed values could fill it otherwise. With
// C_Decrypt as miekg/pkcs11 v1.1.2 calls it, this takes 40 MiB.
func TestForgeriesLeaveNoMemory(t *testing.T) {
	ctx := t.Context()
	tok := tokentest.New(t)
	id, associated := [16]byte{1}, []byte("associated")
	forged, err := tok.Seal(ctx, pkcs11util.State, id, make([]byte, 8192), associated)
	if err != nil {
		t.Fatal(err)
	}
	forged[len(forged)-1] ^= 1
	forge := func(n int) {
		t.Helper()
		for range n {
			if _, authentic, err := tok.Open(ctx, pkcs11util.State, id, forged, associated); err != nil || authentic {
				t.Fatalf("a forgery: %v, %v", authentic, err)
			}
		}
	}
	forge(500)
	runtime.GC()
	before := resident(t)
	forge(2500)
	runtime.GC()
	if grown := resident(t) - before; grown > 15 {
		t.Errorf("2500 forgeries took %d MiB", grown)
	}
}

// resident is the process's memory in MiB, as Linux counts it.
func resident(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib / 1024
}
