package backup

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
)

// What is wrong with a blob.
var (
	// ErrNotSealed: not written by Seal or WrapUnder, by a later version, or cut off.
	ErrNotSealed = errors.New("this is not a backup that can be read")
	// ErrWrongKey: made under another key, or altered since.
	ErrWrongKey = errors.New("the backup was made under another key, or has been altered")
)

// A sealed blob is
//
//	"bkv-blob" | version 1 | salt (32) | AES-256-GCM ciphertext and tag (16)
//
// under HKDF-SHA-256 of the backup key, the salt being part of the info. The GCM key
// seals this blob and no other, so its nonce is 12 zero bytes. What comes before the
// ciphertext is associated data.
const (
	blobMagic   = "bkv-blob\x01"
	blobSalt    = 32
	blobHeader  = len(blobMagic) + blobSalt
	gcmTag      = 16
	gcmKey      = 32
	gcmNonce    = 12
	wrapSalt    = 32
	wrappedSize = wrapSalt + KeySize + gcmTag
	// MinSecretSize is the least that a key is wrapped under: a WebAuthn PRF's output.
	MinSecretSize = 32
)

// Seal encrypts a backup that fits into memory: for a page, a message history. It draws
// its salt from random, crypto/rand.Reader outside of tests. (Files are for package archive,
// whose compressed age files would make what a browser loads larger than 8 MiB.)
func (k Key) Seal(random io.Reader, plain []byte) ([]byte, error) {
	out := make([]byte, blobHeader, blobHeader+len(plain)+gcmTag)
	copy(out, blobMagic)
	salt := out[len(blobMagic):]
	if _, err := io.ReadFull(random, salt); err != nil {
		return nil, fmt.Errorf("drawing a salt: %w", err)
	}
	return onceAEAD(k.derive(gcmKey, labelBlob, string(salt))).Seal(out, make([]byte, gcmNonce), plain, out), nil
}

// Unseal undoes Seal. Nothing of a blob that is not authentic is returned.
//
// Errors: ErrNotSealed, ErrWrongKey.
func (k Key) Unseal(blob []byte) ([]byte, error) {
	if len(blob) < blobHeader+gcmTag || string(blob[:len(blobMagic)]) != blobMagic {
		return nil, ErrNotSealed
	}
	header := blob[:blobHeader]
	plain, err := onceAEAD(k.derive(gcmKey, labelBlob, string(header[len(blobMagic):]))).
		Open([]byte{}, make([]byte, gcmNonce), blob[blobHeader:], header)
	if err != nil {
		return nil, ErrWrongKey
	}
	return plain, nil
}

// WrapUnder encrypts the key itself under a secret that nobody can guess, such as what a
// passkey's PRF returns (WebAuthn level 3, section 10.1.4), so that it can be kept where
// others read. Never a password: this has no stretching, and nobody counts guesses. The
// context, of which the account should be part, has to be the same again to unwrap. The
// wrapped key is a salt of 32 bytes, then ciphertext and tag of AES-256-GCM under
// HKDF-SHA-256 of the secret with salt and context.
func (k Key) WrapUnder(random io.Reader, secret []byte, context ...string) ([]byte, error) {
	if len(secret) < MinSecretSize {
		return nil, fmt.Errorf("wrapping a backup key: a secret of %d bytes, and at least %d are needed", len(secret), MinSecretSize)
	}
	out := make([]byte, wrapSalt, wrappedSize)
	if _, err := io.ReadFull(random, out); err != nil {
		return nil, fmt.Errorf("drawing a salt: %w", err)
	}
	return wrapAEAD(secret, out, context).Seal(out, make([]byte, gcmNonce), k[:], nil), nil
}

// UnwrapUnder undoes WrapUnder.
//
// Errors: ErrNotSealed, ErrWrongKey.
func UnwrapUnder(wrapped, secret []byte, context ...string) (Key, error) {
	if len(wrapped) != wrappedSize {
		return Key{}, ErrNotSealed
	}
	plain, err := wrapAEAD(secret, wrapped[:wrapSalt], context).Open(nil, make([]byte, gcmNonce), wrapped[wrapSalt:], nil)
	if err != nil {
		return Key{}, ErrWrongKey
	}
	return Key(plain), nil
}

func wrapAEAD(secret, salt []byte, context []string) cipher.AEAD {
	return onceAEAD(derive(secret, gcmKey, labelWrap, append([]string{string(salt)}, context...)...))
}

// onceAEAD is AES-256-GCM under a key that is used once.
func onceAEAD(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err == nil {
		var gcm cipher.AEAD
		if gcm, err = cipher.NewGCM(block); err == nil {
			return gcm
		}
	}
	panic(fmt.Sprintf("AES-256-GCM under a key of %d bytes: %v", len(key), err)) // gcmKey fits
}
