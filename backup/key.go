// Package backup is the backup key K: how it is made, how it is shown and read
// as 64 digits, what is derived from it, and how it seals a backup that fits into memory.
//
// K is 32 random bytes, made on the device. Whoever holds it can read the backup
// and can prove to a vault that he is its owner, so the type hides itself from
// every kind of printing; [Key.Digits] is the one way to show it. Keys lie in
// ordinary memory and are not wiped: Go's runtime may have copied them.
//
// The package trusts its caller with K and nothing else with anything: what a
// person typed is hostile input to [ParseDigits], which never panics and whose
// errors never contain what was typed. All functions are pure but those that draw from random, and all
// are safe for concurrent use.
package backup

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// KeySize is the size of a backup key in bytes.
const KeySize = 32

// Labels of the derivations, one for each purpose: no key made for one can be
// another's. They can never change, or old backups lose what was derived.
const (
	labelOwnerKey       = "bkv/v1/owner-key"
	labelAgeIdentity    = "bkv/v1/age-identity"
	labelManifest       = "bkv/v1/manifest"
	labelResticPassword = "bkv/v1/restic-password"
	labelRclonePassword = "bkv/v1/rclone-password"
	labelBlob           = "bkv/v1/blob"
	labelWrap           = "bkv/v1/wrap"
)

// Key is a backup key. It prints as "[redacted]" and refuses to be marshalled.
type Key [KeySize]byte

// NewKey draws a key from random, which is crypto/rand.Reader outside of tests.
func NewKey(random io.Reader) (Key, error) {
	var k Key
	if _, err := io.ReadFull(random, k[:]); err != nil {
		return Key{}, fmt.Errorf("drawing a backup key: %w", err)
	}
	return k, nil
}

// OwnerKey derives the key that proves to a vault who made a generation: Ed25519
// (RFC 8032), its seed by HKDF-SHA-256 (RFC 5869) from K, without salt, the info
// naming vault, tenant and user. So a proof for one account is worthless for another,
// even where the same K is kept in both.
func (k Key) OwnerKey(vaultID, tenant, user string) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(k.derive(ed25519.SeedSize, labelOwnerKey, vaultID, tenant, user))
}

// AgeSeed derives the secret from which archives' age identity is made: the 32-byte
// seed of MLKEM768-X25519 (X-Wing, draft-connolly-cfrg-xwing-kem §5.2). It opens every
// archive, and says nothing of K.
func (k Key) AgeSeed() [32]byte { return [32]byte(k.derive(32, labelAgeIdentity)) }

// ManifestKey derives the HMAC-SHA-256 key that authenticates the list of archives at a
// destination. It opens none of them.
func (k Key) ManifestKey() [32]byte { return [32]byte(k.derive(32, labelManifest)) }

// ResticPassword derives a password for a restic repository: 32 bytes as 64 hexadecimal
// digits, which say nothing of K.
func (k Key) ResticPassword() string {
	return hex.EncodeToString(k.derive(32, labelResticPassword))
}

// RclonePassword is ResticPassword for rclone, and another one.
func (k Key) RclonePassword() string {
	return hex.EncodeToString(k.derive(32, labelRclonePassword))
}

func (k Key) derive(size int, label string, fields ...string) []byte {
	return derive(k[:], size, label, fields...)
}

// derive is HKDF-SHA-256 with an info of label and fields, each with its length
// before it as four bytes, big endian, so that no two lists of fields are the same info.
func derive(secret []byte, size int, label string, fields ...string) []byte {
	var info []byte
	for _, f := range append([]string{label}, fields...) {
		info = binary.BigEndian.AppendUint32(info, uint32(len(f)))
		info = append(info, f...)
	}
	out, err := hkdf.Key(sha256.New, secret, nil, string(info), size)
	if err != nil {
		// It fails for more than 255 hashes of output (RFC 5869 §2.3), which no
		// caller asks for: size never comes from input.
		panic(fmt.Sprintf("deriving %s: %v", label, err))
	}
	return out
}

const redacted = "[redacted]"

// String, Format and LogValue hide the key from fmt, under every verb, and from slog.
func (Key) String() string { return redacted }

// Format hides the key.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue hides the key.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText refuses. Writing "[redacted]" would lose a key where somebody meant
// to save it, and writing the key would put it where nobody meant to have it.
func (Key) MarshalText() ([]byte, error) {
	return nil, errors.New("a backup key is not marshalled; call Digits to show it")
}
