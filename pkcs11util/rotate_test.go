package pkcs11util_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

var rotateID = [16]byte{1}

// countObjects counts the objects of a label in the token.
func countObjects(t *testing.T, tok *tokentest.Token, label string) (n int) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(session, 10)
		n = len(found)
		return errors.Join(err, p.FindObjectsFinal(session))
	})
	return n
}

// use does what a purpose's key is for.
func use(k *pkcs11util.Keyset, purpose string, generation uint32) error {
	ctx := context.Background()
	switch purpose {
	case pkcs11util.Master, pkcs11util.State:
		sealed, err := k.Seal(ctx, purpose, rotateID, []byte("x"), []byte("a"))
		if err != nil {
			return err
		}
		if got := binary.BigEndian.Uint32(sealed[1:5]); got != generation {
			return fmt.Errorf("sealed under %d", got)
		}
		if _, authentic, err := k.Open(ctx, purpose, rotateID, sealed, []byte("a")); err != nil || !authentic {
			return fmt.Errorf("opening: %v, %w", authentic, err)
		}
		return nil
	case pkcs11util.MAC:
		_, err := k.MAC(ctx, generation, []byte("x"))
		return err
	case pkcs11util.Identity, pkcs11util.Audit:
		_, err := k.Sign(ctx, purpose, generation, [32]byte{1})
		return err
	case pkcs11util.OPRF, pkcs11util.Server:
		public, err := k.PublicKey(purpose, generation)
		if err != nil {
			return err
		}
		_, err = k.Multiply(ctx, purpose, generation, public)
		return err
	default:
		_, err := k.PublicKey(purpose, generation)
		return err
	}
}

func TestMakeUseAndDestroyKeys(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	k, other := tok.Keyset, tok.OpenKeyset(t, tok.Config())
	for _, purpose := range pkcs11util.Purposes() {
		if err := errors.Join(k.SetCurrent(purpose, 1, 0), other.SetCurrent(purpose, 1, 0)); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time it is there
			if err := k.MakeKey(t.Context(), purpose, 2); err != nil {
				t.Fatal(err)
			}
		}
		if k.Newest(purpose) != 1 || !slices.Equal(k.Generations(purpose), []uint32{1, 2}) {
			t.Fatalf("%s: %d is in use of %v", purpose, k.Newest(purpose), k.Generations(purpose))
		}
		if err := use(k, purpose, 1); err != nil {
			t.Errorf("%s/1 after another was made: %v", purpose, err)
		}
		if err := k.SetCurrent(purpose, 2, 0); err != nil {
			t.Fatal(err)
		}
		if err := use(k, purpose, 2); err != nil {
			t.Errorf("%s/2: %v", purpose, err)
		}
		if err := k.DestroyKey(t.Context(), purpose, 2); !errors.Is(err, pkcs11util.ErrInUse) {
			t.Errorf("destroying %s/2, which is in use: %v", purpose, err)
		}
		label := pkcs11util.KeyName{Purpose: purpose, Generation: 1}.String()
		for range 2 { // the second time it is gone
			if err := k.DestroyKey(t.Context(), purpose, 1); err != nil {
				t.Fatal(err)
			}
		}
		if n := countObjects(t, tok, label); n != 0 {
			t.Errorf("%d objects are left of %s", n, label)
		}
		if _, err := k.Proof(purpose, 1); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("%s is still known: %v", label, err)
		}
		// The other one is told to use a key that it does not know.
		if err := other.SetCurrent(purpose, 2, 0); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("%s/2 before it was looked for: %v", purpose, err)
		}
	}
	// It was left behind: the keys that it uses are gone.
	if err := use(other, pkcs11util.Master, 1); err == nil {
		t.Error("a destroyed key is used")
	}
	deadline := time.Now().Add(30 * time.Second)
	for err := other.Look(t.Context()); err != nil; err = other.Look(t.Context()) {
		if !errors.Is(err, pkcs11util.ErrUnavailable) || time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, purpose := range pkcs11util.Purposes() {
		if err := errors.Join(use(other, purpose, 2), other.SetCurrent(purpose, 2, 0)); err != nil {
			t.Errorf("%s after looking: %v", purpose, err)
		}
	}
	// A new one finds whole keys, and finds them usable.
	fresh := tok.OpenKeyset(t, tok.Config())
	for _, purpose := range pkcs11util.Purposes() {
		if err := use(fresh, purpose, 2); err != nil || !slices.Equal(fresh.Generations(purpose), []uint32{2}) {
			t.Errorf("%s in a new keyset: %v, %v", purpose, fresh.Generations(purpose), err)
		}
	}
}

func TestKeysAreMadeBesideCalls(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	k := tok.Keyset
	for _, purpose := range pkcs11util.Purposes() {
		if err := k.SetCurrent(purpose, 1, 0); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, purpose := range []string{pkcs11util.Master, pkcs11util.OPRF, pkcs11util.MAC, pkcs11util.Audit} {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					if n == 0 {
						t.Errorf("%s was never used", purpose)
					}
					return
				default:
				}
				if err := use(k, purpose, 1); err != nil {
					t.Errorf("%s/1: %v", purpose, err)
					return
				}
			}
		})
	}
	for generation := uint32(2); generation < 12; generation++ {
		for _, purpose := range []string{pkcs11util.State, pkcs11util.Server, pkcs11util.Relay} {
			if err := k.MakeKey(t.Context(), purpose, generation); err != nil {
				t.Fatal(err)
			}
			if err := k.SetCurrent(purpose, generation, 0); err != nil {
				t.Fatal(err)
			}
			if err := k.DestroyKey(t.Context(), purpose, generation-1); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(done)
	wg.Wait()
}

// What a crash left under temporary labels of a purpose is destroyed before a key of that purpose is made, and nothing else.
func TestMakeKeyCleansUp(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	generate := func(name pkcs11util.KeyName) (label string) {
		label = pkcs11util.TemporaryLabel(name)
		_, private, public, err := pkcs11util.DefaultProfile().Templates(name.Purpose)
		if err != nil {
			t.Fatal(err)
		}
		tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
			attribute := pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)
			_, _, err := p.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				append(public, attribute), append(private, attribute))
			return err
		})
		return label
	}
	mine := generate(pkcs11util.KeyName{Purpose: pkcs11util.OPRF, Generation: 2})
	others := generate(pkcs11util.KeyName{Purpose: pkcs11util.Server, Generation: 2})
	if err := tok.Keyset.MakeKey(t.Context(), pkcs11util.OPRF, 2); err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]int{mine: 0, others: 2, "bkv/oprf/1": 2, "bkv/oprf/2": 2, "bkv/server/1": 2} {
		if n := countObjects(t, tok, label); n != want {
			t.Errorf("%d objects are labelled %s, want %d", n, label, want)
		}
	}
	for _, name := range []pkcs11util.KeyName{{Purpose: "tmp", Generation: 1}, {Purpose: "", Generation: 1}, {Purpose: pkcs11util.OPRF}} {
		if err := tok.Keyset.MakeKey(t.Context(), name.Purpose, name.Generation); err == nil {
			t.Errorf("made %s", name)
		}
	}
}

// A keyset that meets the next generation looks for it by itself; forged headers do not make it look more often.
func TestUnknownGenerationIsLookedFor(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	a, b := tok.Keyset, tok.OpenKeyset(t, tok.Config())
	for _, k := range []*pkcs11util.Keyset{a, b} {
		if err := k.SetCurrent(pkcs11util.State, 1, 0); err != nil {
			t.Fatal(err)
		}
	}
	seal := func() []byte {
		sealed, err := a.Seal(t.Context(), pkcs11util.State, rotateID, []byte("x"), []byte("a"))
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	forge := func(generation uint32) []byte {
		forged := seal()
		binary.BigEndian.PutUint32(forged[1:], generation)
		return forged
	}
	for _, generation := range []uint32{0, 3, 4, 1<<32 - 1} {
		if _, authentic, err := b.Open(t.Context(), pkcs11util.State, rotateID, forge(generation), []byte("a")); err != nil || authentic {
			t.Errorf("generation %d: %v, %v", generation, authentic, err)
		}
	}
	if _, authentic, err := b.Open(t.Context(), pkcs11util.State, rotateID, forge(2), []byte("a")); err != nil || authentic {
		t.Errorf("the next generation, which is not there: %v, %v", authentic, err)
	}
	if err := a.MakeKey(t.Context(), pkcs11util.State, 2); err != nil {
		t.Fatal(err)
	}
	if err := a.SetCurrent(pkcs11util.State, 2, 0); err != nil {
		t.Fatal(err)
	}
	genuine := seal()
	// Until it looks again it cannot tell, and says so.
	deadline := time.Now().Add(30 * time.Second)
	for {
		plain, authentic, err := b.Open(t.Context(), pkcs11util.State, rotateID, genuine, []byte("a"))
		if authentic && string(plain) == "x" {
			break
		}
		if !errors.Is(err, pkcs11util.ErrUnavailable) {
			t.Fatalf("a genuine value: authentic %v, %v", authentic, err)
		}
		if time.Now().After(deadline) {
			t.Fatal("it never looked again")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if b.Newest(pkcs11util.State) != 1 {
		t.Error("a key is used because it was seen")
	}
}

// What is used and what is forgotten outlives a new login.
func TestChosenKeysOutliveARecovery(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	tok.MakeKey(t, pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 2})
	tok.MakeKey(t, pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 3})
	k := tok.OpenKeyset(t, tok.Config())
	if k.Newest(pkcs11util.Master) != 3 {
		t.Fatal("without a choice, the highest is used")
	}
	if err := k.SetCurrent(pkcs11util.Master, 2, 0); err != nil {
		t.Fatal(err)
	}
	k.Forget(pkcs11util.Master, 1)
	k.Forget(pkcs11util.Master, 1)
	tok.CloseAllSessions(t)
	deadline := time.Now().Add(30 * time.Second)
	for k.Check(t.Context()) != nil {
		if time.Now().After(deadline) {
			t.Fatal("no recovery")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if got := k.Generations(pkcs11util.Master); k.Newest(pkcs11util.Master) != 2 || !slices.Equal(got, []uint32{2, 3}) {
		t.Errorf("%d is in use of %v", k.Newest(pkcs11util.Master), got)
	}
	if err := use(k, pkcs11util.Master, 2); err != nil {
		t.Error(err)
	}
	if err := k.Look(t.Context()); err != nil || slices.Contains(k.Generations(pkcs11util.Master), 1) {
		t.Errorf("looking brought a forgotten key back: %v", err)
	}
}

func TestProofsTellKeysApart(t *testing.T) {
	t.Parallel()
	a, b := tokentest.New(t), tokentest.New(t)
	again := a.OpenKeyset(t, a.Config())
	if a.Serial() == "" || a.Serial() == b.Serial() || a.Serial() != again.Serial() {
		t.Errorf("serial numbers %q, %q, %q", a.Serial(), b.Serial(), again.Serial())
	}
	for _, purpose := range pkcs11util.Purposes() {
		proof, err := a.Proof(purpose, 1)
		if err != nil || len(proof) < 16 || len(proof) > 256 {
			t.Fatalf("%s: a proof of %d bytes, %v", purpose, len(proof), err)
		}
		if same, err := again.Confirm(t.Context(), purpose, 1, proof); err != nil || !same {
			t.Errorf("%s: the same key: %v, %v", purpose, same, err)
		}
		if same, err := b.Confirm(t.Context(), purpose, 1, proof); err != nil || same {
			t.Errorf("%s: another key: %v, %v", purpose, same, err)
		}
		if same, err := a.Confirm(t.Context(), purpose, 1, nil); err != nil || same {
			t.Errorf("%s: no proof: %v, %v", purpose, same, err)
		}
		if _, err := a.Confirm(t.Context(), purpose, 7, proof); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("%s/7: %v", purpose, err)
		}
	}
}

func TestWornOutKeysSealNoMore(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	if err := tok.SetCurrent(pkcs11util.Master, 1, pkcs11util.MaxSeals-2); err != nil {
		t.Fatal(err)
	}
	for n := range 4 {
		_, err := tok.Seal(t.Context(), pkcs11util.Master, rotateID, []byte("x"), []byte("a"))
		if want := n >= 2; errors.Is(err, pkcs11util.ErrWornOut) != want {
			t.Errorf("seal %d: %v", n, err)
		}
	}
	if err := use(tok.Keyset, pkcs11util.State, 1); err != nil {
		t.Errorf("another key: %v", err)
	}
}
