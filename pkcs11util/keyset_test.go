package pkcs11util_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

var (
	ctx = context.Background()
	id  = [16]byte{1, 2, 3}
)

func TestSealAndOpen(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	plaintext, associated := []byte("thirty-two bytes of some secret."), []byte("for whom")
	for _, purpose := range []string{pkcs11util.Master, pkcs11util.State} {
		sealed, err := tok.Seal(ctx, purpose, id, plaintext, associated)
		if err != nil {
			t.Fatal(err)
		}
		again, err := tok.Seal(ctx, purpose, id, plaintext, associated)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(sealed, again) || bytes.Equal(sealed[22:34], again[22:34]) {
			t.Error("two sealed values share their IV")
		}
		if bytes.Contains(sealed, plaintext[:8]) {
			t.Error("the sealed value shows its content")
		}
		got, authentic, err := tok.Open(ctx, purpose, id, sealed, associated)
		if err != nil || !authentic || !bytes.Equal(got, plaintext) {
			t.Errorf("%s: got %q, %v, %v", purpose, got, authentic, err)
		}
	}
	for _, n := range []int{1, 15, 16, 17, 8192} {
		sealed, err := tok.Seal(ctx, pkcs11util.State, id, make([]byte, n), nil)
		if err != nil {
			t.Fatal(err)
		}
		got, authentic, err := tok.Open(ctx, pkcs11util.State, id, sealed, nil)
		if err != nil || !authentic || !bytes.Equal(got, make([]byte, n)) {
			t.Errorf("%d bytes: got %d, %v, %v", n, len(got), authentic, err)
		}
	}
	for _, n := range []int{0, 8193} {
		if _, err := tok.Seal(ctx, pkcs11util.Master, id, make([]byte, n), nil); err == nil {
			t.Errorf("sealed %d bytes", n)
		}
	}
	for _, purpose := range []string{pkcs11util.MAC, pkcs11util.OPRF, "nothing", ""} {
		if _, err := tok.Seal(ctx, purpose, id, plaintext, nil); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("sealing for %q: %v", purpose, err)
		}
	}
}

// Whatever is not exactly what was sealed is forged: no error, no fault, no recovery.
func TestForgeriesAreNoFaults(t *testing.T) {
	t.Parallel()
	tok, stranger := tokentest.New(t), tokentest.New(t)
	log := &recorder{}
	cfg := tok.Config()
	cfg.Logger = log.logger()
	keys := tok.OpenKeyset(t, cfg)

	associated := []byte("associated")
	sealed, err := keys.Seal(ctx, pkcs11util.Master, id, []byte("content"), associated)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := stranger.Seal(ctx, pkcs11util.Master, id, []byte("content"), associated)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, purpose string, id [16]byte, sealed, associated []byte) {
		t.Helper()
		if got, authentic, err := keys.Open(ctx, purpose, id, sealed, associated); authentic || err != nil || got != nil {
			t.Errorf("%s: got %q, %v, %v", what, got, authentic, err)
		}
	}
	refused("other associated data", pkcs11util.Master, id, sealed, []byte("Associated"))
	refused("no associated data", pkcs11util.Master, id, sealed, nil)
	refused("more associated data", pkcs11util.Master, id, sealed, append(associated, 0))
	refused("other id", pkcs11util.Master, [16]byte{1, 2, 4}, sealed, associated)
	refused("other purpose", pkcs11util.State, id, sealed, associated)
	refused("purpose that does not seal", pkcs11util.MAC, id, sealed, associated)
	refused("no purpose", "", id, sealed, associated)
	refused("another token's", pkcs11util.Master, id, foreign, associated)
	refused("huge", pkcs11util.Master, id, append(sealed, make([]byte, 1<<20)...), associated)
	refused("one byte more", pkcs11util.Master, id, append(bytes.Clone(sealed), 0), associated)
	otherID := [16]byte{9}
	moved := bytes.Clone(sealed)
	copy(moved[6:22], otherID[:])
	refused("id exchanged in the header", pkcs11util.Master, otherID, moved, associated)
	for n := range sealed {
		refused(fmt.Sprintf("cut to %d bytes", n), pkcs11util.Master, id, sealed[:n], associated)
	}
	for bit := range len(sealed) * 8 {
		forged := bytes.Clone(sealed)
		forged[bit/8] ^= 1 << (bit % 8)
		refused(fmt.Sprintf("bit %d flipped", bit), pkcs11util.Master, id, forged, associated)
	}
	if got, authentic, err := keys.Open(ctx, pkcs11util.Master, id, sealed, associated); !authentic || err != nil || string(got) != "content" {
		t.Errorf("the sealed value itself: got %q, %v, %v", got, authentic, err)
	}
	if lines := log.all(); len(lines) > 0 {
		t.Errorf("forgeries were taken for faults: %q", lines)
	}
}

func TestMultiplyAgainstSoftware(t *testing.T) {
	t.Parallel()
	order, _ := new(big.Int).SetString("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
	scalar := func(n *big.Int) (b [32]byte) { n.FillBytes(b[:]); return b }
	random := func() [32]byte {
		n, err := rand.Int(rand.Reader, new(big.Int).Sub(order, big.NewInt(1)))
		if err != nil {
			t.Fatal(err)
		}
		return scalar(n.Add(n, big.NewInt(1)))
	}
	for name, k := range map[string][32]byte{
		"random": random(), "random again": random(),
		"one": scalar(big.NewInt(1)), "two": scalar(big.NewInt(2)), "minus one": scalar(new(big.Int).Sub(order, big.NewInt(1))),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tok := tokentest.Import(t, map[string][32]byte{pkcs11util.OPRF: k, pkcs11util.Server: random()})
			q, err := nistec.NewP256Point().ScalarBaseMult(k[:])
			if err != nil {
				t.Fatal(err)
			}
			public, err := tok.PublicKey(pkcs11util.OPRF, 1)
			if err != nil || !bytes.Equal(public[:], q.BytesCompressed()) {
				t.Fatalf("public key %x, %v; want %x", public, err, q.BytesCompressed())
			}
			g := nistec.NewP256Point().SetGenerator()
			points := []*nistec.P256Point{g, nistec.NewP256Point().Double(g)}
			// Q and −Q, where k·P and Q have something to do with each other; −G is refused, below.
			for _, p := range []*nistec.P256Point{q, nistec.NewP256Point().Negate(q)} {
				if p.Equal(nistec.NewP256Point().Negate(g)) == 0 {
					points = append(points, p)
				}
			}
			for range 150 { // some x-coordinates will begin with a zero byte
				s := random()
				p, err := nistec.NewP256Point().ScalarBaseMult(s[:])
				if err != nil {
					t.Fatal(err)
				}
				points = append(points, p)
			}
			signs := map[byte]int{}
			for _, p := range points {
				want, err := nistec.NewP256Point().ScalarMult(p, k[:])
				if err != nil {
					t.Fatal(err)
				}
				got, err := tok.Multiply(ctx, pkcs11util.OPRF, 1, [33]byte(p.BytesCompressed()))
				if err != nil || !bytes.Equal(got[:], want.BytesCompressed()) {
					t.Fatalf("%x times the key: got %x, %v; want %x", p.BytesCompressed(), got, err, want.BytesCompressed())
				}
				signs[got[0]]++
			}
			if signs[2] == 0 || signs[3] == 0 {
				t.Errorf("one of the two candidates was never right: %v", signs)
			}
		})
	}
}

func TestInvalidPointsDoNotReachTheToken(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	// A closed Keyset answers ErrClosed to whatever gets as far as to want a session.
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	g := nistec.NewP256Point().SetGenerator()
	valid := [33]byte(g.BytesCompressed())
	if _, err := tok.Multiply(ctx, pkcs11util.OPRF, 1, valid); !errors.Is(err, pkcs11util.ErrClosed) {
		t.Errorf("a valid point: %v", err)
	}
	prefixed := func(b byte) [33]byte { p := valid; p[0] = b; return p }
	minusG := [33]byte(g.Negate(g).BytesCompressed())
	offCurve, tooBig := [33]byte{0: 2}, [33]byte{0: 2}
	for { // half of all numbers are no x-coordinate of P-256
		if _, err := nistec.NewP256Point().SetBytes(offCurve[:]); err != nil {
			break
		}
		offCurve[32]++
	}
	for i := range 32 {
		tooBig[1+i] = 0xff // 2^256−1, above p
	}
	for name, p := range map[string][33]byte{
		"minus G": minusG, "zero": {}, "identity's prefix": prefixed(0), "uncompressed": prefixed(4), "hybrid": prefixed(6),
		"prefix 1": prefixed(1), "off the curve": offCurve, "x not reduced": tooBig,
	} {
		if got, err := tok.Multiply(ctx, pkcs11util.OPRF, 1, p); !errors.Is(err, pkcs11util.ErrInvalidPoint) || got != [33]byte{} {
			t.Errorf("%s: got %x, %v", name, got, err)
		}
	}
}

func TestKeysKeepToTheirPurpose(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	g := [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())
	for _, purpose := range []string{pkcs11util.Relay, pkcs11util.Identity, pkcs11util.Master, ""} {
		if _, err := tok.Multiply(ctx, purpose, 1, g); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("multiplying by %q: %v", purpose, err)
		}
	}
	for _, purpose := range []string{pkcs11util.OPRF, pkcs11util.Server, pkcs11util.MAC, ""} {
		if _, err := tok.Sign(ctx, purpose, 1, [32]byte{}); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("signing by %q: %v", purpose, err)
		}
	}
	for _, generation := range []uint32{0, 2} {
		if _, err := tok.Multiply(ctx, pkcs11util.OPRF, generation, g); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("multiplying by generation %d: %v", generation, err)
		}
		if _, err := tok.MAC(ctx, generation, nil); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("MAC of generation %d: %v", generation, err)
		}
		if _, err := tok.Sign(ctx, pkcs11util.Identity, generation, [32]byte{}); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("signing by generation %d: %v", generation, err)
		}
		if _, err := tok.PublicKey(pkcs11util.OPRF, generation); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("public key of generation %d: %v", generation, err)
		}
	}
	for _, purpose := range []string{pkcs11util.Master, pkcs11util.MAC, ""} {
		if _, err := tok.PublicKey(purpose, 1); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("public key of %q: %v", purpose, err)
		}
	}
	for purpose, want := range map[string]uint32{pkcs11util.Master: 1, pkcs11util.Audit: 1, "": 0, "nothing": 0} {
		if got := tok.Newest(purpose); got != want {
			t.Errorf("newest of %q: %d", purpose, got)
		}
	}
}

func TestMACAndSignAndRandom(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	seen := map[[32]byte]string{}
	for _, message := range []string{"", "a", "b", strings.Repeat("long", 5000)} {
		mac, err := tok.MAC(ctx, 1, []byte(message))
		if err != nil {
			t.Fatal(err)
		}
		again, err := tok.MAC(ctx, 1, []byte(message))
		if err != nil || again != mac {
			t.Errorf("the MAC changes: %x, %x, %v", mac, again, err)
		}
		if _, twice := seen[mac]; twice {
			t.Error("two messages have one MAC")
		}
		seen[mac] = message
	}

	for _, purpose := range []string{pkcs11util.Identity, pkcs11util.Audit} {
		public, err := tok.PublicKey(purpose, 1)
		if err != nil {
			t.Fatal(err)
		}
		point, err := nistec.NewP256Point().SetBytes(public[:])
		if err != nil {
			t.Fatal(err)
		}
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte(purpose))
		signature, err := tok.Sign(ctx, purpose, 1, digest)
		if err != nil {
			t.Fatal(err)
		}
		r, s := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])
		if !ecdsa.Verify(key, digest[:], r, s) {
			t.Errorf("%s: the signature does not verify", purpose)
		}
	}

	a, err := tok.Random(ctx, 32)
	if err != nil {
		t.Fatal(err)
	}
	b, err := tok.Random(ctx, 32)
	if err != nil || bytes.Equal(a, b) || len(a) != 32 {
		t.Errorf("got %x and %x, %v", a, b, err)
	}
	for _, n := range []int{-1, 0, 1<<16 + 1} {
		if _, err := tok.Random(ctx, n); err == nil {
			t.Errorf("gave %d random bytes", n)
		}
	}
}

// More goroutines than sessions, all operations at once, each answer checked.
func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	cfg := tok.Config()
	cfg.Sessions = 2
	keys := tok.OpenKeyset(t, cfg)
	g := [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())
	public, err := keys.PublicKey(pkcs11util.Server, 1)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for i := range 20 {
				plaintext := fmt.Appendf(nil, "%d/%d", worker, i)
				sealed, err := keys.Seal(ctx, pkcs11util.State, id, plaintext, plaintext)
				if err != nil {
					t.Error(err)
					return
				}
				if got, authentic, err := keys.Open(ctx, pkcs11util.State, id, sealed, plaintext); err != nil || !authentic || !bytes.Equal(got, plaintext) {
					t.Errorf("opening: %q, %v, %v", got, authentic, err)
				}
				if _, authentic, err := keys.Open(ctx, pkcs11util.State, id, sealed, nil); err != nil || authentic {
					t.Errorf("opening a forgery: %v, %v", authentic, err)
				}
				if got, err := keys.Multiply(ctx, pkcs11util.Server, 1, g); err != nil || got != public {
					t.Errorf("1·Q: got %x, %v", got, err)
				}
				mac, err := keys.MAC(ctx, 1, plaintext)
				if again, againErr := tok.MAC(ctx, 1, plaintext); err != nil || againErr != nil || mac != again {
					t.Errorf("MAC: %v, %v", err, againErr)
				}
			}
		})
	}
	wg.Wait()
}

// What a thief of the PIN can do with the keys of a token that keeps to the standard: use them.
func TestKeysCannotBeExtracted(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	yes, no := []byte{1}, []byte{0}
	allowed := map[string][]uint{
		"master": {pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}, "state": {pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT},
		"oprf": {pkcs11.CKA_DERIVE}, "server": {pkcs11.CKA_DERIVE}, "relay": {pkcs11.CKA_DERIVE},
		"mac": {pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY}, "identity": {pkcs11.CKA_SIGN}, "audit": {pkcs11.CKA_SIGN},
	}
	all := []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE, pkcs11.CKA_SIGN_RECOVER}
	checked := 0
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		read := func(h pkcs11.ObjectHandle, a uint) ([]byte, error) {
			values, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
			if err != nil {
				return nil, err
			}
			return values[0].Value, nil
		}
		wrapping, err := p.GenerateKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		})
		if err != nil {
			return err
		}
		for purpose, usage := range allowed {
			label := "bkv/" + purpose + "/1"
			if err := p.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true)}); err != nil {
				return err
			}
			found, _, err := p.FindObjects(session, 10)
			if err != nil {
				return err
			}
			if err := p.FindObjectsFinal(session); err != nil {
				return err
			}
			if len(found) != 1 {
				t.Fatalf("%s: %d private objects", label, len(found))
			}
			h := found[0]
			want := map[uint][]byte{
				pkcs11.CKA_TOKEN: yes, pkcs11.CKA_SENSITIVE: yes, pkcs11.CKA_EXTRACTABLE: no,
				pkcs11.CKA_ALWAYS_SENSITIVE: yes, pkcs11.CKA_NEVER_EXTRACTABLE: yes, pkcs11.CKA_LOCAL: yes,
			}
			for _, flag := range all {
				want[flag] = no
			}
			for _, flag := range usage {
				want[flag] = yes
			}
			for a, value := range want {
				got, err := read(h, a)
				if err == pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) && bytes.Equal(value, no) {
					continue // a flag that this class of key does not have
				}
				if err != nil || !bytes.Equal(got, value) {
					t.Errorf("%s: attribute %#x is %x, %v; want %x", label, a, got, err, value)
				}
			}
			if got, err := read(h, pkcs11.CKA_VALUE); err != pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
				t.Errorf("%s: read %d bytes of the key, %v", label, len(got), err)
			}
			for _, a := range []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			} {
				if err := p.SetAttributeValue(session, h, []*pkcs11.Attribute{a}); err == nil {
					t.Errorf("%s: attribute %#x could be changed", label, a.Type)
				}
				if copied, err := p.CopyObject(session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), a}); err == nil {
					t.Errorf("%s: copied as %d with attribute %#x changed", label, copied, a.Type)
				}
			}
			if got, err := p.WrapKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, wrapping, h); err == nil {
				t.Errorf("%s: wrapped out in %d bytes", label, len(got))
			}
			checked++
		}
		return nil
	})
	if checked != 8 {
		t.Errorf("checked %d keys", checked)
	}
}

// Keys of the right name whose attributes, type or halves are wrong are refused at login, by name.
func TestWrongKeysAreRefused(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	type attributes = []*pkcs11.Attribute
	aes := func(purpose string, change ...*pkcs11.Attribute) func(*pkcs11.Ctx, pkcs11.SessionHandle, string) error {
		return func(p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) error {
			secret, _, _, err := pkcs11util.DefaultProfile().Templates(purpose)
			if err != nil {
				return err
			}
			mech := uint(pkcs11.CKM_AES_KEY_GEN)
			if purpose == pkcs11util.MAC {
				mech = pkcs11.CKM_GENERIC_SECRET_KEY_GEN
			}
			_, err = p.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, changed(secret, label, change))
			return err
		}
	}
	// A pair's halves get the label of the case, or another one if given.
	pair := func(purpose string, privateLabel, publicLabel string, curve []byte, change ...*pkcs11.Attribute) func(*pkcs11.Ctx, pkcs11.SessionHandle, string) error {
		return func(p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) error {
			_, private, public, err := pkcs11util.DefaultProfile().Templates(purpose)
			if err != nil {
				return err
			}
			var publicChange attributes
			if curve != nil {
				publicChange = attributes{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve)}
			}
			_, _, err = p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				changed(public, cmp.Or(publicLabel, label), publicChange), changed(private, cmp.Or(privateLabel, label), change))
			return err
		}
	}
	both := func(fs ...func(*pkcs11.Ctx, pkcs11.SessionHandle, string) error) func(*pkcs11.Ctx, pkcs11.SessionHandle, string) error {
		return func(p *pkcs11.Ctx, s pkcs11.SessionHandle, label string) error {
			for _, f := range fs {
				if err := f(p, s, label); err != nil {
					return err
				}
			}
			return nil
		}
	}
	set := func(a uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(a, v) }
	p384 := []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22} // 1.3.132.0.34
	for _, c := range []struct {
		name, label, says string
		make              func(*pkcs11.Ctx, pkcs11.SessionHandle, string) error
	}{
		{"extractable", "bkv/master/2", "CKA_EXTRACTABLE", aes("master", set(pkcs11.CKA_EXTRACTABLE, true))},
		{"not sensitive", "bkv/state/2", "CKA_SENSITIVE", aes("state", set(pkcs11.CKA_SENSITIVE, false))},
		{"not private", "bkv/mac/2", "CKA_PRIVATE", aes("mac", set(pkcs11.CKA_PRIVATE, false))},
		{"may wrap", "bkv/master/2", "CKA_WRAP", aes("master", set(pkcs11.CKA_WRAP, true))},
		{"may not decrypt", "bkv/master/2", "CKA_DECRYPT", aes("master", set(pkcs11.CKA_DECRYPT, false))},
		{"AES-128", "bkv/master/2", "CKA_VALUE_LEN", aes("master", set(pkcs11.CKA_VALUE_LEN, 16))},
		{"generic secret as AES", "bkv/master/2", "CKA_", aes("mac")},
		{"AES as MAC key", "bkv/mac/2", "CKA_", aes("master")},
		{"secret key as key pair", "bkv/oprf/2", "class", aes("master")},
		{"key pair as secret key", "bkv/mac/2", "class", pair("oprf", "", "", nil)},
		{"derives and signs", "bkv/oprf/2", "CKA_SIGN", pair("oprf", "", "", nil, set(pkcs11.CKA_SIGN, true))},
		{"signs and derives", "bkv/identity/2", "CKA_DERIVE", pair("identity", "", "", nil, set(pkcs11.CKA_DERIVE, true))},
		{"extractable private key", "bkv/server/2", "CKA_EXTRACTABLE", pair("server", "", "", nil, set(pkcs11.CKA_EXTRACTABLE, true))},
		{"P-384", "bkv/relay/2", "CKA_EC_PARAMS", pair("relay", "", "", p384)},
		{"no public half", "bkv/oprf/2", "public half is missing", pair("oprf", "", "elsewhere", nil)},
		{"two public halves", "bkv/oprf/2", "twice", both(pair("oprf", "", "", nil), pair("oprf", "elsewhere", "", nil))},
		{"another key's public half (derive)", "bkv/oprf/2", "public half", both(pair("oprf", "", "elsewhere", nil), pair("server", "elsewhere", "", nil))},
		{"another key's public half (sign)", "bkv/audit/2", "does not verify", both(pair("audit", "", "elsewhere", nil), pair("identity", "elsewhere", "", nil))},
		{"twice", "bkv/master/1", "twice", aes("master")},
		{"a pair twice", "bkv/oprf/1", "twice", pair("oprf", "", "", nil)},
		{"odd generation", "bkv/master/02", "generation", aes("master")},
	} {
		t.Run(c.name, func(t *testing.T) {
			tok.Raw(t, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
				before := objects(t, p, s)
				if err := c.make(p, s, c.label); err != nil {
					return err
				}
				t.Cleanup(func() {
					tok.Raw(t, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
						for h := range objects(t, p, s) {
							if !before[h] {
								if err := p.DestroyObject(s, h); err != nil {
									return err
								}
							}
						}
						return nil
					})
				})
				return nil
			})
			keys, err := pkcs11util.Open(ctx, tok.Config())
			if err == nil {
				_ = keys.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.label) {
				t.Errorf("the error names neither %s nor %s: %v", c.label, c.says, err)
			}
		})
	}
	tok.OpenKeyset(t, tok.Config()) // with all of them gone
}

func changed(template []*pkcs11.Attribute, label string, change []*pkcs11.Attribute) []*pkcs11.Attribute {
	out := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}
	for _, a := range template {
		for _, c := range change {
			if c.Type == a.Type {
				a = c
			}
		}
		out = append(out, a)
	}
	return out
}

func objects(t *testing.T, p *pkcs11.Ctx, s pkcs11.SessionHandle) map[pkcs11.ObjectHandle]bool {
	t.Helper()
	if err := p.FindObjectsInit(s, nil); err != nil {
		t.Fatal(err)
	}
	found, _, err := p.FindObjects(s, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.FindObjectsFinal(s); err != nil {
		t.Fatal(err)
	}
	all := map[pkcs11.ObjectHandle]bool{}
	for _, h := range found {
		all[h] = true
	}
	return all
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	empty := tokentest.Empty(t)
	open := func(change func(*pkcs11util.Config)) error {
		cfg := tok.Config()
		change(&cfg)
		keys, err := pkcs11util.Open(ctx, cfg)
		if err == nil {
			_ = keys.Close()
		}
		return err
	}
	for _, c := range []struct {
		name   string
		change func(*pkcs11util.Config)
		says   []string
	}{
		{"no such module", func(c *pkcs11util.Config) { c.Module = "/nowhere/module.so" }, []string{"/nowhere/module.so", "no such file"}},
		{"a directory", func(c *pkcs11util.Config) { c.Module = tok.Directory.Path }, []string{"is not a file"}},
		{"no module at all", func(c *pkcs11util.Config) { c.Module = tok.Directory.Conf }, []string{tok.Directory.Conf, "cannot be loaded"}},
		{"no such label", func(c *pkcs11util.Config) { c.Label = "other" }, []string{`"other"`, tok.Label}},
		{"a token without keys", func(c *pkcs11util.Config) { c.Label = empty.Label }, []string{"bkv/master/1", "no such key"}},
		{"nothing given", func(c *pkcs11util.Config) { *c = pkcs11util.Config{Sessions: -1} }, []string{"module", "label", "PIN", "sessions"}},
		{"label too long", func(c *pkcs11util.Config) { c.Label = strings.Repeat("x", 33) }, []string{"32 bytes"}},
	} {
		err := open(c.change)
		if err == nil {
			t.Errorf("%s: opened", c.name)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: the error does not say %q: %v", c.name, s, err)
			}
		}
	}

	// The first token is logged in, and a login serves the whole process: a PIN is tried where
	// nobody is logged in.
	err := open(func(c *pkcs11util.Config) { c.Label = empty.Label; c.PIN = "1234-wrong" })
	var code pkcs11.Error
	if !errors.Is(err, pkcs11util.ErrPINRefused) || !errors.As(err, &code) || code != pkcs11.CKR_PIN_INCORRECT {
		t.Errorf("wrong PIN: %v", err)
	}
	if err != nil && strings.Contains(err.Error(), "1234-wrong") {
		t.Error("the error shows the PIN")
	}
}

func TestTwoTokensWithOneLabel(t *testing.T) {
	// Not parallel: for the moment, InitToken of other tests could take the same free slot.
	tok := tokentest.New(t)
	if created, err := pkcs11util.InitToken(tok.Directory.Module, tok.Label, tokentest.SOPIN, tokentest.PIN); err != nil || created {
		t.Fatalf("initialised it again: %v, %v", created, err)
	}
	tok.Raw(t, func(p *pkcs11.Ctx, _ pkcs11.SessionHandle) error {
		slots, err := p.GetSlotList(true)
		if err != nil {
			return err
		}
		for _, slot := range slots {
			if info, err := p.GetTokenInfo(slot); err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
				return p.InitToken(slot, string(tokentest.SOPIN), tok.Label)
			}
		}
		return errors.New("no free slot")
	})
	if _, err := pkcs11util.Open(ctx, tok.Config()); err == nil || !strings.Contains(err.Error(), "more than one token") {
		t.Errorf("got %v", err)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	tok := tokentest.New(t)
	other := tok.OpenKeyset(t, tok.Config())
	for range 2 {
		if err := tok.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := tok.Check(ctx); !errors.Is(err, pkcs11util.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := other.Check(ctx); err != nil {
		t.Errorf("closing one Keyset broke another on the same token: %v", err)
	}
}

func TestDeriveXAgainstSoftware(t *testing.T) {
	t.Parallel()
	scalar, err := ecdh.P256().GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	tok := tokentest.Import(t, map[string][32]byte{pkcs11util.Relay: [32]byte(scalar.Bytes())})
	for range 20 {
		peer, err := ecdh.P256().GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		want, err := scalar.ECDH(peer.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		x, err := tok.DeriveX(t.Context(), pkcs11util.Relay, 1, [65]byte(peer.PublicKey().Bytes()))
		if err != nil || !bytes.Equal(x[:], want) {
			t.Fatalf("%x, %v; want %x", x, err, want)
		}
	}
	var point [65]byte
	if _, err := tok.DeriveX(t.Context(), pkcs11util.Relay, 1, point); !errors.Is(err, pkcs11util.ErrInvalidPoint) {
		t.Errorf("what is no point: %v", err)
	}
	copy(point[:], scalar.PublicKey().Bytes())
	for _, name := range []pkcs11util.KeyName{{Purpose: pkcs11util.Relay, Generation: 9}, {Purpose: pkcs11util.OPRF, Generation: 1}, {Purpose: pkcs11util.Server, Generation: 1}} {
		if _, err := tok.DeriveX(t.Context(), name.Purpose, name.Generation, point); !errors.Is(err, pkcs11util.ErrNoKey) {
			t.Errorf("%v: %v", name, err)
		}
	}
	point[64] ^= 1
	if _, err := tok.DeriveX(t.Context(), pkcs11util.Relay, 1, point); !errors.Is(err, pkcs11util.ErrInvalidPoint) {
		t.Errorf("a point off the curve: %v", err)
	}
}
