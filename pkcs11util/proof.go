package pkcs11util

import (
	"bytes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"
)

// knownAnswer is what a key gave when it was first proven. It tells a token that
// fails from a value that was never sealed, and the same key from another one after a recovery.
type knownAnswer struct {
	sealed []byte           // master, state: probeText
	mac    [macBytes]byte   // mac: over probeText
	public [pointBytes]byte // the others
}

var (
	probeText       = []byte("bkv/probe")
	probeOther      = []byte("bkv/probe/other")
	probeID         = [idBytes]byte{'p', 'r', 'o', 'b', 'e'}
	probeAssociated = []byte("bkv/probe/associated")
)

// prove shows that a key works, and returns a known answer. For key pairs it shows
// that the private half belongs to the public one, by computations outside the token.
func (s session) prove(k *key) (knownAnswer, error) {
	switch k.name.Purpose {
	case Master, State:
		sealed, err := s.seal(k, probeID, probeText, probeAssociated)
		if err != nil {
			return knownAnswer{}, err
		}
		known := knownAnswer{sealed: sealed}
		return known, s.confirm(k, known)
	case MAC:
		mac, err := s.mac(k, probeText)
		if err != nil {
			return knownAnswer{}, err
		}
		other, err := s.mac(k, probeOther)
		if err != nil {
			return knownAnswer{}, err
		}
		if mac == other || mac == [macBytes]byte{} {
			return knownAnswer{}, fmt.Errorf("%w: %s makes the same MAC for all", errFaulty, k.name)
		}
		known := knownAnswer{mac: mac}
		return known, s.confirm(k, known)
	case Identity, Audit:
		_, err := s.signVerified(k, sha256.Sum256(probeText))
		return knownAnswer{public: k.public.compressed}, err
	default:
		return knownAnswer{public: k.public.compressed}, s.proveDerive(k)
	}
}

// confirm shows that k still gives a known answer.
func (s session) confirm(k *key, known knownAnswer) error {
	switch k.name.Purpose {
	case Master, State:
		h, iv, ciphertext, ok := parseSealed(known.sealed)
		if !ok {
			return fmt.Errorf("%w: %s: the known answer is no sealed value", errFaulty, k.name)
		}
		plaintext, refused, err := s.decrypt(k, iv, ciphertext, h.associated(k.name.Purpose, probeAssociated))
		if err != nil {
			return err
		}
		if refused != nil {
			return fmt.Errorf("opening a known value: %w", refused)
		}
		if !bytes.Equal(plaintext, probeText) {
			return fmt.Errorf("%w: %s opens a known value to another one", errFaulty, k.name)
		}
	case MAC:
		mac, err := s.mac(k, probeText)
		if err != nil {
			return err
		}
		if subtle.ConstantTimeCompare(mac[:], known.mac[:]) != 1 {
			return fmt.Errorf("%w: %s makes another MAC than before", errFaulty, k.name)
		}
	default:
		if k.public.compressed != known.public {
			return fmt.Errorf("%w: %s is another key than before", errFaulty, k.name)
		}
	}
	return nil
}

// proveDerive agrees on a secret with a fresh peer and compares with the peer's own
// computation.
func (s session) proveDerive(k *key) error {
	peer, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("making a peer: %w", err)
	}
	public, err := ecdh.P256().NewPublicKey(k.public.point.Bytes())
	if err != nil {
		return fmt.Errorf("public half of %s: %w", k.name, err)
	}
	want, err := peer.ECDH(public)
	if err != nil {
		return fmt.Errorf("agreeing with %s: %w", k.name, err)
	}
	got, err := s.x(k, peer.PublicKey().Bytes())
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(got[:], want) != 1 {
		return fmt.Errorf("%w: %s does not belong to its public half", errFaulty, k.name)
	}
	return nil
}

// signVerified signs, and verifies under the public half: a faulty ECDSA signature
// may give its key away, so that none leaves this package.
func (s session) signVerified(k *key, digest [32]byte) ([signatureBytes]byte, error) {
	signature, err := s.sign(k, digest)
	if err != nil {
		return signature, err
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), k.public.point.Bytes())
	if err != nil {
		return [signatureBytes]byte{}, fmt.Errorf("public half of %s: %w", k.name, err)
	}
	r, v := new(big.Int).SetBytes(signature[:fieldBytes]), new(big.Int).SetBytes(signature[fieldBytes:])
	if !ecdsa.Verify(public, digest[:], r, v) {
		return [signatureBytes]byte{}, fmt.Errorf("%w: %s made a signature that does not verify", errFaulty, k.name)
	}
	return signature, nil
}

// proveGCM shows that CKM_AES_GCM is AES-GCM with the associated data that it was given
// and the IV that it was given or gave: Go's GCM over the token's bare AES makes the same. A token that
// ignored either would still open what it sealed.
func (s session) proveGCM(k *key) error {
	iv, got, err := s.encrypt(k, probeText, probeAssociated)
	if err != nil {
		return err
	}
	block := &tokenBlock{s: s, k: k}
	gcm, err := cipher.NewGCMWithNonceSize(block, len(iv))
	if err != nil {
		return fmt.Errorf("GCM over %s: %w", k.name, err)
	}
	want := gcm.Seal(nil, iv, probeText, probeAssociated)
	if block.err != nil {
		return block.err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: what C_Encrypt makes under %s is not AES-GCM of its input", errFaulty, k.name)
	}
	return nil
}

// tokenBlock is the token's AES on single blocks (CKM_AES_ECB). It encrypts only,
// which is all that GCM does.
type tokenBlock struct {
	s   session
	k   *key
	err error // of the first call that failed
}

func (b *tokenBlock) BlockSize() int { return 16 }

func (b *tokenBlock) Encrypt(dst, src []byte) {
	if b.err != nil {
		return
	}
	if b.err = b.s.p.EncryptInit(b.s.handle, mechanism(pkcs11.CKM_AES_ECB, nil), b.k.handle); b.err != nil {
		b.err = fmt.Errorf("C_EncryptInit (CKM_AES_ECB) under %s: %w", b.k.name, b.err)
		return
	}
	out, err := b.s.p.Encrypt(b.s.handle, src[:b.BlockSize()])
	if err == nil && len(out) != b.BlockSize() {
		err = errFaulty
	}
	if err != nil {
		b.err = fmt.Errorf("C_Encrypt (CKM_AES_ECB) under %s: %w", b.k.name, err)
		return
	}
	copy(dst, out)
}

func (b *tokenBlock) Decrypt(_, _ []byte) {
	b.err = fmt.Errorf("%w: GCM asked to decrypt a block", errFaulty)
}
