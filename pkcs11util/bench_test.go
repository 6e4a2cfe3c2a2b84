package pkcs11util_test

import (
	"testing"

	"filippo.io/nistec"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// The operations beside the bare token calls that each needs (Raw...). Every derivation makes
// SoftHSM 2.6.1 keep some hundred bytes until the module is finalised.

var point = [33]byte(nistec.NewP256Point().SetGenerator().BytesCompressed())

func BenchmarkMultiply(b *testing.B) {
	tok := tokentest.New(b)
	for b.Loop() {
		if _, err := tok.Multiply(ctx, pkcs11util.OPRF, 1, point); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSeal(b *testing.B) {
	tok := tokentest.New(b)
	plaintext, associated := make([]byte, 250), make([]byte, 60)
	for b.Loop() {
		if _, err := tok.Seal(ctx, pkcs11util.Master, id, plaintext, associated); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	tok := tokentest.New(b)
	associated := make([]byte, 60)
	sealed, err := tok.Seal(ctx, pkcs11util.Master, id, make([]byte, 250), associated)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, sealed, associated); err != nil || !authentic {
			b.Fatal(authentic, err)
		}
	}
}

func BenchmarkOpenForged(b *testing.B) {
	tok := tokentest.New(b)
	sealed, err := tok.Seal(ctx, pkcs11util.Master, id, make([]byte, 250), nil)
	if err != nil {
		b.Fatal(err)
	}
	sealed[len(sealed)-1] ^= 1
	for b.Loop() {
		if _, authentic, err := tok.Open(ctx, pkcs11util.Master, id, sealed, nil); err != nil || authentic {
			b.Fatal(authentic, err)
		}
	}
}

func BenchmarkMAC(b *testing.B) {
	tok := tokentest.New(b)
	message := make([]byte, 600)
	for b.Loop() {
		if _, err := tok.MAC(ctx, 1, message); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	tok := tokentest.New(b)
	for b.Loop() {
		if _, err := tok.Sign(ctx, pkcs11util.Identity, 1, [32]byte{}); err != nil {
			b.Fatal(err)
		}
	}
}

// raw runs f with a key's handle in a bare session.
func raw(b *testing.B, class uint, label string, f func(p *pkcs11.Ctx, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error) {
	tok := tokentest.New(b)
	tok.Raw(b, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(s, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(s, 1)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(s); err != nil {
			return err
		}
		for b.Loop() {
			if err := f(p, s, found[0]); err != nil {
				return err
			}
		}
		return nil
	})
}

// BenchmarkRawDerive is one x-only derivation: derive, read, destroy. Multiply needs two.
func BenchmarkRawDerive(b *testing.B) {
	uncompressed := nistec.NewP256Point().SetGenerator().Bytes()
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
	}
	raw(b, pkcs11.CKO_PRIVATE_KEY, "bkv/oprf/1", func(p *pkcs11.Ctx, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
		params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, uncompressed)
		h, err := p.DeriveKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, params)}, key, template)
		if err != nil {
			return err
		}
		if _, err := p.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err != nil {
			return err
		}
		return p.DestroyObject(s, h)
	})
}

func BenchmarkRawSeal(b *testing.B) {
	iv, associated, plaintext := make([]byte, 12), make([]byte, 92), make([]byte, 250)
	raw(b, pkcs11.CKO_SECRET_KEY, "bkv/master/1", func(p *pkcs11.Ctx, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
		params := pkcs11.NewGCMParams(iv, associated, 128)
		defer params.Free()
		if err := p.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
			return err
		}
		_, err := p.Encrypt(s, plaintext)
		return err
	})
}

func BenchmarkRawMAC(b *testing.B) {
	message := make([]byte, 600)
	raw(b, pkcs11.CKO_SECRET_KEY, "bkv/mac/1", func(p *pkcs11.Ctx, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
		if err := p.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}, key); err != nil {
			return err
		}
		_, err := p.Sign(s, message)
		return err
	})
}

func BenchmarkRawSign(b *testing.B) {
	digest := make([]byte, 32)
	raw(b, pkcs11.CKO_PRIVATE_KEY, "bkv/identity/1", func(p *pkcs11.Ctx, s pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
		if err := p.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, key); err != nil {
			return err
		}
		_, err := p.Sign(s, digest)
		return err
	})
}
