package tokentest_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// bench is a session with a shimmed token and two known scratch keys in it.
type bench struct {
	*tokentest.Shim
	p       *pkcs11.Ctx
	session pkcs11.SessionHandle
	aes, ec pkcs11.ObjectHandle
	public  pkcs11.ObjectHandle
	gcm     cipher.AEAD // Go's, with the same key as aes
	private *ecdh.PrivateKey
}

func mech(m uint, params any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, params)}
}

func attr(t uint, v any) *pkcs11.Attribute { return pkcs11.NewAttribute(t, v) }

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// on runs f with a bench.
func on(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	t.Parallel()
	b := &bench{Shim: tokentest.EmptyShimmed(t)}
	b.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		b.p, b.session = p, session
		key := make([]byte, 32)
		rand.Read(key)
		block := must[cipher.Block](t)(aes.NewCipher(key))
		b.gcm = must[cipher.AEAD](t)(cipher.NewGCM(block))
		b.aes = must[pkcs11.ObjectHandle](t)(p.CreateObject(session, []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE, key),
			attr(pkcs11.CKA_ENCRYPT, true), attr(pkcs11.CKA_DECRYPT, true), attr(pkcs11.CKA_WRAP, true),
			attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
		}))
		b.private = must[*ecdh.PrivateKey](t)(ecdh.P256().GenerateKey(rand.Reader))
		curve := must[[]byte](t)(asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}))
		b.ec = must[pkcs11.ObjectHandle](t)(p.CreateObject(session, []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
			attr(pkcs11.CKA_EC_PARAMS, curve), attr(pkcs11.CKA_VALUE, b.private.Bytes()),
			attr(pkcs11.CKA_DERIVE, true), attr(pkcs11.CKA_SIGN, true),
			attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
		}))
		b.public = must[pkcs11.ObjectHandle](t)(p.CreateObject(session, []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
			attr(pkcs11.CKA_EC_PARAMS, curve), attr(pkcs11.CKA_EC_POINT, must[[]byte](t)(asn1.Marshal(b.private.PublicKey().Bytes()))),
		}))
		f(t, b)
		return nil
	})
}

var text, aad = []byte("some text, longer than a block"), []byte("associated")

func (b *bench) encrypt(iv []byte) (ciphertext, ivAfter []byte, err error) {
	params := pkcs11.NewGCMParams(iv, aad, 128)
	defer params.Free()
	if err := b.p.EncryptInit(b.session, mech(pkcs11.CKM_AES_GCM, params), b.aes); err != nil {
		return nil, nil, err
	}
	ciphertext, err = b.p.Encrypt(b.session, text)
	return ciphertext, params.IV(), err
}

func (b *bench) decrypt(iv, ciphertext []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(iv, aad, 128)
	defer params.Free()
	if err := b.p.DecryptInit(b.session, mech(pkcs11.CKM_AES_GCM, params), b.aes); err != nil {
		return nil, err
	}
	return b.p.Decrypt(b.session, ciphertext)
}

func wantCode(t *testing.T, err error, code uint) {
	t.Helper()
	if !errors.Is(err, pkcs11.Error(code)) {
		t.Errorf("got %v, want %v", err, pkcs11.Error(code))
	}
}

func TestShimIVs(t *testing.T) {
	on(t, func(t *testing.T, b *bench) {
		zeros := make([]byte, 12)
		given := []byte("twelve bytes")
		// As SoftHSM: the IV is the caller's.
		ciphertext, iv, err := b.encrypt(given)
		if err != nil || !bytes.Equal(iv, given) || !bytes.Equal(ciphertext, b.gcm.Seal(nil, given, text, aad)) {
			t.Fatalf("forwarded: %x %x %v", ciphertext, iv, err)
		}

		b.Set(tokentest.IVWrittenBack)
		if _, _, err := b.encrypt(given); err == nil {
			t.Error("written back: took the caller's IV")
		}
		ciphertext, iv, err = b.encrypt(zeros)
		if err != nil || bytes.Equal(iv, zeros) || !bytes.Equal(ciphertext, b.gcm.Seal(nil, iv, text, aad)) {
			t.Errorf("written back: %x %x %v", ciphertext, iv, err)
		}
		if plain, err := b.decrypt(iv, ciphertext); err != nil || !bytes.Equal(plain, text) {
			t.Errorf("written back: opening: %q %v", plain, err)
		}

		b.Set(tokentest.IVAppended)
		ciphertext, _, err = b.encrypt(given)
		if err != nil || len(ciphertext) != len(text)+16+16 {
			t.Fatalf("appended: %x %v", ciphertext, err)
		}
		body, iv := ciphertext[:len(text)+16], ciphertext[len(text)+16:]
		if plain, err := b.decrypt(iv, body); err != nil || !bytes.Equal(plain, text) {
			t.Errorf("appended: opening: %q %v", plain, err)
		}
		if _, err := b.decrypt(given, body); err == nil {
			t.Error("appended: the caller's IV was used")
		}

		b.Set(tokentest.IVPrepended)
		ciphertext, _, err = b.encrypt(nil)
		if err != nil || len(ciphertext) != 12+len(text)+16 {
			t.Fatalf("prepended: %x %v", ciphertext, err)
		}
		if !bytes.Equal(ciphertext[12:], b.gcm.Seal(nil, ciphertext[:12], text, aad)) {
			t.Error("prepended: not AES-GCM under the IV in front")
		}
		for _, try := range []struct{ iv, in []byte }{{nil, ciphertext}, {ciphertext[:12], ciphertext[12:]}} {
			if plain, err := b.decrypt(try.iv, try.in); err != nil || !bytes.Equal(plain, text) {
				t.Errorf("prepended: opening: %q %v", plain, err)
			}
		}
		ciphertext[len(ciphertext)-1] ^= 1
		if _, err := b.decrypt(nil, ciphertext); err == nil {
			t.Error("prepended: a bad tag opened")
		}
		b.Set(tokentest.IVPrepended.Off())

		zeroed := b.gcm.Seal(nil, zeros, text, aad)
		b.Set(tokentest.NilIVIsZero)
		if ciphertext, _, err := b.encrypt(nil); err != nil || !bytes.Equal(ciphertext, zeroed) {
			t.Errorf("no IV: %x %v", ciphertext, err)
		}
		b.Set(tokentest.NilIVRefused)
		_, _, err = b.encrypt(nil)
		wantCode(t, err, pkcs11.CKR_MECHANISM_PARAM_INVALID)

		b.Set(tokentest.BadTagOpens)
		forged := append([]byte(nil), zeroed...)
		forged[len(forged)-1] ^= 1
		if plain, err := b.decrypt(zeros, forged); err != nil || !bytes.Equal(plain, text) {
			t.Errorf("bad tag: %q %v", plain, err)
		}
		b.Set(tokentest.BadTagOpens.Off(), tokentest.DataLimit(len(text)-1))
		if _, err := b.decrypt(zeros, forged); err == nil {
			t.Error("SoftHSM opened a bad tag")
		}
		_, _, err = b.encrypt(zeros)
		wantCode(t, err, pkcs11.CKR_DATA_LEN_RANGE)
		b.Set(tokentest.DataLimit(len(text)))
		if _, _, err = b.encrypt(zeros); err != nil {
			t.Error(err)
		}
	})
}

// derive agrees with a fresh peer, given by raw point or DER, and says whether the secret is right.
func (b *bench) derive(t *testing.T, der bool, more ...*pkcs11.Attribute) (right bool, secret pkcs11.ObjectHandle, err error) {
	t.Helper()
	peer := must[*ecdh.PrivateKey](t)(ecdh.P256().GenerateKey(rand.Reader))
	point := peer.PublicKey().Bytes()
	if der {
		point = must[[]byte](t)(asn1.Marshal(point))
	}
	secret, err = b.p.DeriveKey(b.session, mech(pkcs11.CKM_ECDH1_DERIVE, pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, point)), b.ec,
		append([]*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), attr(pkcs11.CKA_EXTRACTABLE, true),
		}, more...))
	if err != nil {
		return false, 0, err
	}
	values, err := b.p.GetAttributeValue(b.session, secret, []*pkcs11.Attribute{attr(pkcs11.CKA_VALUE, nil)})
	if err != nil {
		return false, secret, err
	}
	return bytes.Equal(values[0].Value, must[[]byte](t)(b.private.ECDH(peer.PublicKey()))), secret, nil
}

func TestShimDerives(t *testing.T) {
	on(t, func(t *testing.T, b *bench) {
		open, length := attr(pkcs11.CKA_SENSITIVE, false), attr(pkcs11.CKA_VALUE_LEN, 32)
		right := func(der bool, more ...*pkcs11.Attribute) {
			t.Helper()
			if ok, _, err := b.derive(t, der, more...); !ok || err != nil {
				t.Errorf("derive: %v %v", ok, err)
			}
		}
		refused := func(code uint, der bool, more ...*pkcs11.Attribute) {
			t.Helper()
			_, _, err := b.derive(t, der, more...)
			wantCode(t, err, code)
		}
		right(false, open, length)
		right(true, open, length)

		b.Set(tokentest.SensitiveRefused)
		refused(pkcs11.CKR_TEMPLATE_INCONSISTENT, false, open, length)
		b.Set(tokentest.SensitiveForced)
		refused(pkcs11.CKR_ATTRIBUTE_SENSITIVE, false, open, length)
		_, secret, _ := b.derive(t, false, open, length)
		if wrapped, err := b.p.WrapKey(b.session, mech(pkcs11.CKM_AES_KEY_WRAP, nil), b.aes, secret); err != nil || len(wrapped) != 40 {
			t.Errorf("wrapping out what was derived: %x %v", wrapped, err)
		}
		b.Set(tokentest.SensitiveForced.Off())

		b.Set(tokentest.DeriveValueLenRequired)
		refused(pkcs11.CKR_TEMPLATE_INCOMPLETE, false, open)
		right(false, open, length)
		b.Set(tokentest.DeriveValueLenRefused)
		refused(pkcs11.CKR_TEMPLATE_INCONSISTENT, false, open, length)
		right(false, open)
		b.Set(tokentest.DeriveValueLenRefused.Off())

		b.Set(tokentest.PeerPointDER)
		refused(pkcs11.CKR_MECHANISM_PARAM_INVALID, false, open, length)
		right(true, open, length)
		b.Set(tokentest.PeerPointRaw)
		refused(pkcs11.CKR_MECHANISM_PARAM_INVALID, true, open, length)
		right(false, open, length)
		b.Set(tokentest.PeerPointRaw.Off())

		b.Set(tokentest.VendorKDF)
		refused(pkcs11.CKR_MECHANISM_PARAM_INVALID, false, open, length)
		b.Set(tokentest.VendorKDF.Off())

		b.Hide(pkcs11.CKM_ECDH1_DERIVE)
		refused(pkcs11.CKR_MECHANISM_INVALID, false, open, length)
		b.Hide()

		for _, lie := range []tokentest.Setting{tokentest.SameSecret, tokentest.OtherPoint} {
			b.Set(lie, tokentest.LieEvery(3))
			lies := 0
			for range 9 {
				if ok, _, err := b.derive(t, false, open, length); err != nil {
					t.Fatal(err)
				} else if !ok {
					lies++
				}
			}
			if lies != 3 {
				t.Errorf("%+v: %d lies of 9", lie, lies)
			}
			b.Set(lie.Off())
		}
		right(false, open, length)
	})
}

func TestShimObjects(t *testing.T) {
	on(t, func(t *testing.T, b *bench) {
		read := func(object pkcs11.ObjectHandle, a uint) ([]byte, error) {
			values, err := b.p.GetAttributeValue(b.session, object, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, nil), attr(a, nil)})
			if err != nil {
				return nil, err
			}
			return values[1].Value, nil
		}
		raw := b.private.PublicKey().Bytes()
		der := must[[]byte](t)(asn1.Marshal(raw))
		for setting, want := range map[tokentest.Setting][]byte{
			tokentest.PointRaw: raw, tokentest.PointDER: der, tokentest.PointRaw.Off(): der,
		} {
			b.Set(setting)
			if got, err := read(b.public, pkcs11.CKA_EC_POINT); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%v: the point reads %x, %v", setting, got, err)
			}
		}
		b.Set(tokentest.PointRaw.Off())

		for _, key := range []pkcs11.ObjectHandle{b.aes, b.ec} {
			_, err := read(key, pkcs11.CKA_VALUE)
			wantCode(t, err, pkcs11.CKR_ATTRIBUTE_SENSITIVE)
			_, err = b.p.WrapKey(b.session, mech(pkcs11.CKM_AES_KEY_WRAP, nil), b.aes, key)
			wantCode(t, err, pkcs11.CKR_KEY_UNEXTRACTABLE)
			b.Set(tokentest.Extraction)
			if v, err := read(key, pkcs11.CKA_VALUE); err != nil || len(v) != 32 {
				t.Errorf("extraction: %x %v", v, err)
			}
			if v, err := b.p.WrapKey(b.session, mech(pkcs11.CKM_AES_KEY_WRAP, nil), b.aes, key); err != nil || len(v) != 40 {
				t.Errorf("extraction by wrapping: %x %v", v, err)
			}
			b.Set(tokentest.Extraction.Off())
		}

		b.Set(tokentest.Duplicates)
		if err := b.p.FindObjectsInit(b.session, []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}); err != nil {
			t.Fatal(err)
		}
		found, _, err := b.p.FindObjects(b.session, 10)
		if err != nil || len(found) != 2 || found[0] != found[1] {
			t.Errorf("duplicates: %v %v", found, err)
		}
		if err := b.p.FindObjectsFinal(b.session); err != nil {
			t.Fatal(err)
		}

		b.Set(tokentest.SameRandom, tokentest.BadSignatures)
		one, err1 := b.p.GenerateRandom(b.session, 32)
		two, err2 := b.p.GenerateRandom(b.session, 32)
		if err1 != nil || err2 != nil || !bytes.Equal(one, two) {
			t.Error("random numbers differ", err1, err2)
		}
		if err := b.p.SignInit(b.session, mech(pkcs11.CKM_ECDSA, nil), b.ec); err != nil {
			t.Fatal(err)
		}
		signature, err := b.p.Sign(b.session, make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		// The token's own word on it.
		verifier := must[pkcs11.ObjectHandle](t)(b.p.CopyObject(b.session, b.public, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "v")}))
		verify := func() error {
			if err := b.p.VerifyInit(b.session, mech(pkcs11.CKM_ECDSA, nil), verifier); err != nil {
				t.Fatal(err)
			}
			return b.p.Verify(b.session, make([]byte, 32), signature)
		}
		wantCode(t, verify(), pkcs11.CKR_SIGNATURE_INVALID)
		signature[63] ^= 1
		if err := verify(); err != nil {
			t.Error(err)
		}
	})
}

func TestShimFaults(t *testing.T) {
	on(t, func(t *testing.T, b *bench) {
		random := func() error {
			_, err := b.p.GenerateRandom(b.session, 8)
			return err
		}
		before := b.Calls("C_GenerateRandom")
		b.Fail("C_GenerateRandom", pkcs11.CKR_DEVICE_ERROR, 2)
		for range 2 {
			wantCode(t, random(), pkcs11.CKR_DEVICE_ERROR)
		}
		if err := random(); err != nil {
			t.Error(err)
		}
		b.Fail("C_GenerateRandom", pkcs11.CKR_HOST_MEMORY, tokentest.Always)
		for range 5 {
			wantCode(t, random(), pkcs11.CKR_HOST_MEMORY)
		}
		b.Fail("C_GenerateRandom", 0, 0)
		if err := random(); err != nil {
			t.Error(err)
		}
		if n := b.Calls("C_GenerateRandom") - before; n != 9 {
			t.Errorf("%d calls, want 9", n)
		}

		b.Hang("C_GenerateRandom", 1)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := random(); err != nil {
				t.Error(err)
			}
		})
		for b.Held("C_GenerateRandom") == 0 {
			time.Sleep(time.Millisecond)
		}
		b.Release("C_GenerateRandom")
		wg.Wait()
	})
}

func TestShimVanishes(t *testing.T) {
	for level := 1; level <= 3; level++ {
		t.Run("", func(t *testing.T) {
			on(t, func(t *testing.T, b *bench) {
				slots := must[[]uint](t)(b.p.GetSlotList(true))
				slot := slots[0]
				state := func(s pkcs11.SessionHandle) (uint, error) {
					info, err := b.p.GetSessionInfo(s)
					return info.State, err
				}
				b.Vanish(level)
				_, err := state(b.session)
				wantCode(t, err, pkcs11.CKR_DEVICE_REMOVED)
				_, err = b.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
				wantCode(t, err, pkcs11.CKR_TOKEN_NOT_PRESENT)
				if slots, err := b.p.GetSlotList(true); err != nil || len(slots) != 0 {
					t.Errorf("%v %v", slots, err)
				}
				b.Return()
				if level == 3 {
					_, err := b.p.GetTokenInfo(slot)
					wantCode(t, err, pkcs11.CKR_DEVICE_ERROR)
					_, err = b.p.GetSlotList(true)
					wantCode(t, err, pkcs11.CKR_DEVICE_ERROR)
					if err := errors.Join(b.p.Finalize(), b.p.Initialize()); err != nil {
						t.Fatal(err)
					}
				}
				_, err = state(b.session)
				wantCode(t, err, pkcs11.CKR_SESSION_HANDLE_INVALID)
				slot = must[[]uint](t)(b.p.GetSlotList(true))[0] // SoftHSM gave it another number
				s := must[pkcs11.SessionHandle](t)(b.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION))
				want := uint(pkcs11.CKS_RO_PUBLIC_SESSION)
				if level == 1 {
					want = pkcs11.CKS_RO_USER_FUNCTIONS
				}
				if got, err := state(s); err != nil || got != want {
					t.Errorf("state %d, %v, want %d", got, err, want)
				}
				if err := b.p.CloseSession(s); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
