package pkcs11util_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// profile is the default profile, changed.
func profile(change func(p *pkcs11util.Profile)) pkcs11util.Profile {
	p := pkcs11util.DefaultProfile()
	change(&p)
	return p
}

// vendors are behaviours of tokens, each with the profile that fits it.
var vendors = []struct {
	name     string
	settings []tokentest.Setting
	profile  pkcs11util.Profile
}{
	{"plain", nil, pkcs11util.DefaultProfile()},
	{"IV written back", []tokentest.Setting{tokentest.IVWrittenBack}, profile(func(p *pkcs11util.Profile) { p.IV = pkcs11util.IVWrittenBack })},
	{"IV appended", []tokentest.Setting{tokentest.IVAppended}, profile(func(p *pkcs11util.Profile) { p.IV, p.IVBytes = pkcs11util.IVAppended, 16 })},
	{"IV prepended", []tokentest.Setting{tokentest.IVPrepended}, profile(func(p *pkcs11util.Profile) { p.IV = pkcs11util.IVPrepended })},
	{"vendor's GCM", []tokentest.Setting{tokentest.VendorGCM(0x80001087)}, profile(func(p *pkcs11util.Profile) { p.GCM, p.IV = 0x80001087, pkcs11util.IVPrepended })},
	{"no readable secrets", []tokentest.Setting{tokentest.SensitiveRefused}, profile(func(p *pkcs11util.Profile) { p.ECDH = pkcs11util.ECDHDeriveWrap })},
	{"secrets made sensitive", []tokentest.Setting{tokentest.SensitiveForced}, profile(func(p *pkcs11util.Profile) { p.ECDH = pkcs11util.ECDHDeriveWrap })},
	{"no length of derived secrets", []tokentest.Setting{tokentest.DeriveValueLenRefused}, profile(func(p *pkcs11util.Profile) { p.DeriveValueLen = pkcs11util.ValueLenLeftOut })},
	{"length of derived secrets", []tokentest.Setting{tokentest.DeriveValueLenRequired}, pkcs11util.DefaultProfile()},
	{"points in DER", []tokentest.Setting{tokentest.PeerPointDER, tokentest.PointDER}, profile(func(p *pkcs11util.Profile) { p.PeerPoint = pkcs11util.PointDER })},
	{"points raw", []tokentest.Setting{tokentest.PeerPointRaw, tokentest.PointRaw}, pkcs11util.DefaultProfile()},
	{"small values", []tokentest.Setting{tokentest.DataLimit(1000)}, profile(func(p *pkcs11util.Profile) { p.MaxDataBytes = 1000 })},
	{"all at once", []tokentest.Setting{
		tokentest.IVAppended, tokentest.SensitiveRefused, tokentest.DeriveValueLenRefused, tokentest.PeerPointDER, tokentest.DataLimit(2048),
	}, pkcs11util.Profile{
		GCM: pkcs11util.GCMStandard, IV: pkcs11util.IVAppended, IVBytes: 16, ECDH: pkcs11util.ECDHDeriveWrap,
		DeriveValueLen: pkcs11util.ValueLenLeftOut, PeerPoint: pkcs11util.PointDER, MaxDataBytes: 2048,
	}},
}

// Under its profile, each token serves as any other, and what one sealed the others open.
func TestProfiles(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	shim := tokentest.NewShimmed(t)
	id, associated := [16]byte{7}, []byte("associated")
	plaintext := bytes.Repeat([]byte("data"), 250)

	var point [33]byte
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	copy(point[1:], peer.PublicKey().Bytes()[1:33])
	point[0] = 2 + peer.PublicKey().Bytes()[64]&1
	product, err := shim.Multiply(ctx, pkcs11util.OPRF, 1, point)
	if err != nil {
		t.Fatal(err)
	}

	sealed := map[string][]byte{}
	for _, v := range vendors {
		t.Run(v.name, func(t *testing.T) {
			shim.Clear()
			shim.Set(v.settings...)
			cfg := shim.Config()
			cfg.Profile = v.profile
			keys, err := pkcs11util.Open(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer keys.Close()
			if keys.Strategy() != v.profile.ECDH {
				t.Errorf("strategy %q", keys.Strategy())
			}
			if got, err := keys.Multiply(ctx, pkcs11util.OPRF, 1, point); err != nil || got != product {
				t.Errorf("multiplied to %x, %v; the same key gave %x before", got, err, product)
			}
			if _, err := keys.Seal(ctx, pkcs11util.Master, id, make([]byte, v.profile.MaxDataBytes+1), associated); err == nil {
				t.Error("sealed more than the profile allows")
			}
			if sealed[v.name], err = keys.Seal(ctx, pkcs11util.Master, id, plaintext, associated); err != nil {
				t.Fatal(err)
			}
			again, err := keys.Seal(ctx, pkcs11util.Master, id, plaintext, associated)
			if err != nil || bytes.Equal(again, sealed[v.name]) {
				t.Errorf("sealed the same twice: %v", err)
			}
			for by, b := range sealed {
				if by == "IV appended" && v.profile.GCM != pkcs11util.GCMStandard {
					// A vendor's mechanism that takes no IV of this length: it does not open, and that is no fault.
					if _, ok, err := keys.Open(ctx, pkcs11util.Master, id, b, associated); ok || err != nil {
						t.Errorf("sealed under %q: %v %v", by, ok, err)
					}
					continue
				}
				if got, ok, err := keys.Open(ctx, pkcs11util.Master, id, b, associated); err != nil || !ok || !bytes.Equal(got, plaintext) {
					t.Errorf("sealed under %q: %v %v", by, ok, err)
				}
				for _, i := range []int{5, 22, 40, len(b) - 1} { // IV scheme, IV, ciphertext, tag
					forged := bytes.Clone(b)
					forged[i] ^= 1
					if _, ok, err := keys.Open(ctx, pkcs11util.Master, id, forged, associated); ok || err != nil {
						t.Errorf("sealed under %q, byte %d changed: %v %v", by, i, ok, err)
					}
				}
			}
		})
	}
	if shim.Calls("C_WrapKey") == 0 {
		t.Error("nothing was wrapped out")
	}
}

// A profile that does not fit is refused when the token is opened, before anything is sealed.
func TestProfileThatDoesNotFit(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	shim := tokentest.NewShimmed(t)
	for _, v := range vendors {
		shim.Clear()
		shim.Set(v.settings...)
		for _, other := range vendors {
			p := other.profile
			p.MaxDataBytes = v.profile.MaxDataBytes // it is not a matter of opening
			fits := fits(v.name, v.profile, p)
			cfg := shim.Config()
			cfg.Profile = p
			keys, err := pkcs11util.Open(ctx, cfg)
			if err == nil {
				_ = keys.Close()
			}
			if (err == nil) != fits {
				t.Errorf("%s with the profile of %s: %v", v.name, other.name, err)
			}
		}
	}
}

// fits says whether a token that behaves like this, and has that profile, works under p as well: SoftHSM
// takes both where the behaviour does not say.
func fits(name string, its, p pkcs11util.Profile) bool {
	if p.GCM != its.GCM || p.IV != its.IV || p.IVBytes != its.IVBytes {
		return false
	}
	wraps, given, raw := p.ECDH == pkcs11util.ECDHDeriveWrap, p.DeriveValueLen == pkcs11util.ValueLenGiven, p.PeerPoint == pkcs11util.PointRaw
	switch name {
	case "no readable secrets", "secrets made sensitive":
		return wraps
	case "no length of derived secrets":
		return !given
	case "length of derived secrets":
		return given
	case "points in DER":
		return !raw
	case "points raw":
		return raw
	case "all at once":
		return wraps && !given && !raw
	}
	return true
}

func TestReadProfile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "profile.json")
	read := func(text string) (pkcs11util.Profile, error) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return pkcs11util.ReadProfile(path)
	}
	for _, v := range vendors {
		b, err := v.profile.File()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := read(string(b)); err != nil || got != v.profile {
			t.Errorf("%s: reads back as %+v, %v", v.name, got, err)
		}
	}
	good, err := pkcs11util.DefaultProfile().File()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, from, to, says string }{
		{"no JSON", "{", "[", "profile.json: "},
		{"something after it", "}", "}{}", "profile.json: "},
		{"unknown member", `"iv":`, `"color": "red", "iv":`, "color"},
		{"other case", `"ecdh"`, `"ECDH"`, "ECDH"},
		{"twice", `"iv":`, `"iv": "ours", "iv":`, "duplicate"},
		{"mechanism in decimal", `"0x00001087"`, `"4231"`, "gcm_mechanism"},
		{"number of a mechanism", `"0x00001087"`, `4231`, "gcm_mechanism"},
		{"another mechanism", `"0x00001087"`, `"0x00001082"`, "gcm_mechanism: want 0x00001087 (CKM_AES_GCM), or a vendor's"},
		{"too large a mechanism", `"0x00001087"`, `"0x180001087"`, "gcm_mechanism"},
		{"no mechanism", "\"gcm_mechanism\": \"0x00001087\",\n", "", "gcm_mechanism: "},
		{"unknown IV", `"ours"`, `"theirs"`, "iv: "},
		{"number for a word", `"ours"`, `1`, "iv"},
		{"IV length", `: 12`, `: 13`, "iv_bytes: "},
		{"long IV of ours", `: 12`, `: 16`, "iv_bytes: "},
		{"sealed scalar", `"derive"`, `"sealed-scalar"`, "ecdh: "},
		{"value length", `"given"`, `"taken"`, "derive_value_len: "},
		{"point", `"raw"`, `"compressed"`, "peer_point: "},
		{"too much data", `8192`, `8193`, "max_data_bytes: "},
		{"too little data", `8192`, `511`, "max_data_bytes: "},
		{"missing member", "\"peer_point\": \"raw\",\n", "", "peer_point: "},
		{"too long", "{", "{" + strings.Repeat(" ", 5000), "4096"},
	} {
		text := strings.Replace(string(good), c.from, c.to, 1)
		if text == string(good) {
			t.Fatalf("%s: nothing changed", c.name)
		}
		if _, err := read(text); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := pkcs11util.ReadProfile(path + ".none"); err == nil {
		t.Error("read a file that is not there")
	}
}

// A wrapping key that vanished is made again with the next session, and nothing is answered wrongly.
func TestWrappingFails(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	shim := tokentest.NewShimmed(t)
	shim.Set(tokentest.SensitiveRefused)
	cfg := shim.Config()
	cfg.Profile = profile(func(p *pkcs11util.Profile) { p.ECDH = pkcs11util.ECDHDeriveWrap })
	keys := shim.OpenKeyset(t, cfg)
	q, err := keys.PublicKey(pkcs11util.OPRF, 1)
	if err != nil {
		t.Fatal(err)
	}
	want, err := keys.Multiply(ctx, pkcs11util.OPRF, 1, q)
	if err != nil {
		t.Fatal(err)
	}
	for _, function := range []string{"C_WrapKey", "C_CreateObject", "C_DestroyObject"} {
		shim.Fail(function, pkcs11.CKR_KEY_HANDLE_INVALID, 1)
		for range 20 {
			if got, err := keys.Multiply(ctx, pkcs11util.OPRF, 1, q); err == nil && got != want {
				t.Errorf("%s failed, and the product changed", function)
			}
		}
		if got, err := keys.Multiply(ctx, pkcs11util.OPRF, 1, q); err != nil || got != want {
			t.Errorf("after %s failed once: %v", function, err)
		}
		shim.Fail(function, 0, 0)
	}
}

// Keys are made and used under a profile as without one.
func TestKeysAreMadeUnderAProfile(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	shim := tokentest.NewShimmed(t)
	v := vendors[len(vendors)-1] // all at once
	shim.Set(v.settings...)
	cfg := shim.Config()
	cfg.Profile = v.profile
	keys := shim.OpenKeyset(t, cfg)
	for _, purpose := range []string{pkcs11util.Master, pkcs11util.OPRF} {
		if err := keys.MakeKey(ctx, purpose, 2); err != nil {
			t.Errorf("making a key for %s: %v", purpose, err)
		}
	}
	q, err := keys.PublicKey(pkcs11util.OPRF, 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Multiply(ctx, pkcs11util.OPRF, 2, q); err != nil {
		t.Error(err)
	}
}
