package pkcs11util_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"testing"

	"filippo.io/nistec"
	"github.com/cloudflare/circl/group"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// inMemory is the profile of last resort.
var inMemory = profile(func(p *pkcs11util.Profile) { p.ECDH = pkcs11util.ECDHInMemory })

// underivable makes a token that does not derive for us, with keys of the profile of last resort.
func underivable(t *testing.T) *tokentest.Shim {
	t.Helper()
	shim := tokentest.EmptyShimmed(t)
	shim.Profile = inMemory
	shim.Set(tokentest.VendorKDF)
	shim.Fill(t)
	t.Cleanup(shim.Clear)
	return shim
}

// scalarOf asks the token, past all code of ours, for what the scalar of a key is made of.
func scalarOf(t *testing.T, tok *tokentest.Token, name pkcs11util.KeyName) (scalar []byte) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, name.String())}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(session, 2)
		if err := errors.Join(err, p.FindObjectsFinal(session)); err != nil {
			return err
		}
		if len(found) != 1 {
			t.Fatalf("%d objects are %s", len(found), name)
		}
		if err := p.SignInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}, found[0]); err != nil {
			return err
		}
		scalar, err = p.Sign(session, []byte("bkv/v1/scalar\x00"))
		return err
	})
	return scalar
}

// somePoint is a fresh point.
func somePoint(t *testing.T) [33]byte {
	t.Helper()
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := nistec.NewP256Point().SetBytes(peer.PublicKey().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return [33]byte(p.BytesCompressed())
}

// A token without a way to derive multiplies all the same, by the scalars that its secrets give, as another
// implementation of the group computes it; and it is not asked to derive.
func TestInMemory(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	shim := underivable(t)
	if shim.Strategy() != "in-memory" || !strings.Contains(shim.Weakness(), "offline") {
		t.Errorf("strategy %q, weakness %q", shim.Strategy(), shim.Weakness())
	}
	// multiplied is by circl, whose arithmetic is not ours.
	multiplied := func(scalar []byte, point group.Element) (compressed []byte) {
		t.Helper()
		k := group.P256.NewScalar()
		if err := k.UnmarshalBinary(scalar); err != nil {
			t.Fatal(err)
		}
		compressed, err := group.P256.NewElement().Mul(point, k).MarshalBinaryCompress()
		if err != nil {
			t.Fatal(err)
		}
		return compressed
	}
	var publics [][33]byte
	for _, purpose := range []string{pkcs11util.OPRF, pkcs11util.Server} {
		scalar := scalarOf(t, shim.Token, pkcs11util.KeyName{Purpose: purpose, Generation: 1})
		public, err := shim.PublicKey(purpose, 1)
		if err != nil || !bytes.Equal(public[:], multiplied(scalar, group.P256.Generator())) {
			t.Errorf("public half of %s: %x, %v", purpose, public, err)
		}
		publics = append(publics, public)
		for range 8 {
			point := somePoint(t)
			p := group.P256.NewElement()
			if err := p.UnmarshalBinary(point[:]); err != nil {
				t.Fatal(err)
			}
			got, err := shim.Multiply(ctx, purpose, 1, point)
			if err != nil || !bytes.Equal(got[:], multiplied(scalar, p)) {
				t.Errorf("%s: %x, %v", purpose, got, err)
			}
		}
	}
	// The relay channel derives x-coordinates alone.
	scalar := scalarOf(t, shim.Token, pkcs11util.KeyName{Purpose: pkcs11util.Relay, Generation: 1})
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdh.P256().NewPrivateKey(scalar)
	if err != nil {
		t.Fatal(err)
	}
	want, err := private.ECDH(peer.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	if x, err := shim.DeriveX(ctx, pkcs11util.Relay, 1, [65]byte(peer.PublicKey().Bytes())); err != nil || !bytes.Equal(x[:], want) {
		t.Errorf("relay: %x, %v", x, err)
	}
	if publics[0] == publics[1] {
		t.Error("two keys are one")
	}
	if n := shim.Calls("C_DeriveKey"); n != 0 {
		t.Errorf("the token was asked to derive %d times", n)
	}

	// What is no point to multiply is refused before the token is asked.
	asked := shim.Calls("C_Sign")
	g := nistec.NewP256Point().SetGenerator()
	minusG := g.Negate(g).BytesCompressed()
	for _, point := range [][33]byte{{}, {4, 1: 7}, [33]byte(minusG)} {
		if _, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point); !errors.Is(err, pkcs11util.ErrInvalidPoint) {
			t.Errorf("%x: %v", point, err)
		}
	}
	if shim.Calls("C_Sign") != asked {
		t.Error("the token was asked")
	}
	// The secret answers to nothing else.
	if _, err := shim.MAC(ctx, 2, []byte("text")); !errors.Is(err, pkcs11util.ErrNoKey) {
		t.Errorf("a MAC: %v", err)
	}

	// A secret that gives another scalar than before is a fault, not another product.
	point := somePoint(t)
	shim.Set(tokentest.BadSignatures)
	if got, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point); err == nil {
		t.Errorf("multiplied by another scalar: %x", got)
	}
}

// Keys of the profile of last resort rotate, are destroyed, and survive the token's vanishing as others do.
func TestInMemoryKeysLiveAsOthers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	shim := underivable(t)
	point := somePoint(t)
	first, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point)
	if err != nil {
		t.Fatal(err)
	}
	if err := shim.Keyset.MakeKey(ctx, pkcs11util.OPRF, 2); err != nil {
		t.Fatal(err)
	}
	second, err := shim.Multiply(ctx, pkcs11util.OPRF, 2, point)
	if err != nil || second == first {
		t.Fatalf("the next generation gives %x, the one before %x: %v", second, first, err)
	}
	proof, err := shim.Proof(pkcs11util.OPRF, 2)
	if err != nil {
		t.Fatal(err)
	}
	public, _ := shim.PublicKey(pkcs11util.OPRF, 2)
	if !bytes.Equal(proof, public[:]) {
		t.Errorf("proved by %x", proof)
	}

	for level := 1; level <= 3; level++ {
		shim.Vanish(level)
		if _, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point); !errors.Is(err, pkcs11util.ErrUnavailable) {
			t.Errorf("without the token: %v", err)
		}
		shim.Return()
		eventually(t, "service again", func() bool {
			got, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point)
			return err == nil && got == first
		})
	}

	if err := shim.SetCurrent(pkcs11util.OPRF, 2, 0); err != nil {
		t.Fatal(err)
	}
	if err := shim.Keyset.DestroyKey(ctx, pkcs11util.OPRF, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point); !errors.Is(err, pkcs11util.ErrNoKey) {
		t.Errorf("after its destruction: %v", err)
	}
	again := shim.OpenKeyset(t, shim.Config())
	if got, err := again.Multiply(ctx, pkcs11util.OPRF, 2, point); err != nil || got != second {
		t.Errorf("opened anew: %x, %v", got, err)
	}
}

// Keys are for the profile that they were made under, and a token that is opened under another says so.
func TestInMemoryAndPairsDoNotMix(t *testing.T) {
	t.Parallel()
	shim := underivable(t)
	cfg := shim.Config()
	shim.Clear() // so that it would derive
	cfg.Profile = pkcs11util.DefaultProfile()
	if _, err := pkcs11util.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), `profile with ecdh "derive", and was made under another`) {
		t.Errorf("secrets under a profile for pairs: %v", err)
	}
	pairs := shim.NewToken(t) // of the default profile
	cfg = pairs.Config()
	cfg.Profile = inMemory
	if _, err := pkcs11util.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), `profile with ecdh "in-memory", and was made under another`) {
		t.Errorf("pairs under the profile for secrets: %v", err)
	}
}

// The check proposes the profile of last resort to who asks for it, where nothing better works, and says what it costs.
func TestCheckProposesLowerAssurance(t *testing.T) {
	t.Parallel()
	shim := tokentest.EmptyShimmed(t)
	lower := func(p pkcs11util.Profile) pkcs11util.CheckReport {
		t.Helper()
		cfg := shim.Config()
		cfg.Profile = p
		admin, err := pkcs11util.OpenAdmin(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		report, err := admin.Check(t.Context(), pkcs11util.CheckConfig{LowerAssurance: true})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	for _, c := range []struct {
		name     string
		settings []tokentest.Setting
		hidden   []uint
		profile  pkcs11util.Profile
		failed   []string
	}{
		{"a token that derives", nil, nil, pkcs11util.DefaultProfile(), nil},
		{"one that wraps", []tokentest.Setting{tokentest.SensitiveRefused}, nil, profile(func(p *pkcs11util.Profile) { p.ECDH = pkcs11util.ECDHDeriveWrap }), nil},
		{"one with a key derivation of its own", []tokentest.Setting{tokentest.VendorKDF}, nil, inMemory, nil},
		{"one without", nil, []uint{pkcs11.CKM_ECDH1_DERIVE}, inMemory, nil},
		{"one that neither reads nor wraps", []tokentest.Setting{tokentest.SensitiveForced}, []uint{pkcs11.CKM_AES_KEY_WRAP}, inMemory, nil},
		{"one that derives wrongly", []tokentest.Setting{tokentest.OtherPoint}, nil, pkcs11util.DefaultProfile(), []string{"ECDH", "profile"}},
		{"one without HMAC", []tokentest.Setting{tokentest.VendorKDF}, []uint{pkcs11.CKM_SHA256_HMAC}, pkcs11util.DefaultProfile(), []string{"ECDH", "HMAC-SHA-256", "profile"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			shim.Clear()
			shim.Set(c.settings...)
			shim.Hide(c.hidden...)
			report := lower(pkcs11util.Profile{})
			if got := report.Failed(); !slices.Equal(got, c.failed) || report.Profile != c.profile {
				for _, l := range report.Lines {
					t.Logf("%+v", l)
				}
				t.Fatalf("failed %q, proposes %+v", got, report.Profile)
			}
			weak := c.profile == inMemory
			if said := strings.Contains(report.Verdict, "guess passwords offline"); said != weak {
				t.Errorf("verdict: %s", report.Verdict)
			}
			if warned := line(t, report, "ECDH").Result == pkcs11util.CheckWarn; warned != weak {
				t.Errorf("%+v", line(t, report, "ECDH"))
			}
			if !weak {
				return
			}
			// Not asked for, it is refused, and the way is said.
			if report := check(t, shim.Config()); report.Usable || !strings.Contains(line(t, report, "ECDH").Do, "--accept-lower-assurance") {
				t.Errorf("undeclared: %s, %+v", report.Verdict, line(t, report, "ECDH"))
			}
			// A profile that names it has asked for it.
			cfg := shim.Config()
			cfg.Profile = inMemory
			if report := check(t, cfg); !report.Usable || report.Profile != inMemory || line(t, report, "profile").Result != pkcs11util.CheckOK {
				t.Errorf("under its profile: %s", report.Verdict)
			}
		})
	}
	// Where the token could do better, it says so, and does not take the profile from keys that have been made.
	shim.Clear()
	cfg := shim.Config()
	cfg.Profile = inMemory
	report := check(t, cfg)
	if why := line(t, report, "ECDH").Why; !report.Usable || report.Profile != inMemory || !strings.Contains(why, "can do better: derive") {
		t.Errorf("%s: %s", report.Verdict, why)
	}
	if left := labels(t, shim.Token); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}
