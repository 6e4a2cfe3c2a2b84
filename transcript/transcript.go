// Package transcript builds the byte strings that a vault and its clients must
// build alike: identities, associated data, digests, and the statements that an
// owner signs. It holds no secrets and decides nothing.
//
// Every string begins with a label of its own, so that no string made for one
// purpose can be taken for another, and every field of variable length carries
// its length as four bytes, big endian, so that no two lists of fields give the
// same string. All functions are pure and safe for concurrent use.
package transcript

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"fmt"
)

// Labels. None is a prefix of another once its length is written before it.
const (
	labelClientIdentity = "bkv/v1/client-identity"
	labelWrap           = "bkv/v1/wrapped-key"
	labelDelivery       = "bkv/v1/delivery"
	labelDigest         = "bkv/v1/generation-digest"
	labelOwner          = "bkv/v1/owner-statement"
	labelKeyList        = "bkv/v1/key-list"
	labelIdentity       = "bkv/v1/identity"
)

// Sizes in bytes of what is sent with a record.
const (
	GenerationIDSize = 16
	DigestSize       = sha256.Size
	// WrappedKeySize is a 12-byte nonce, the 32-byte backup key and a 16-byte
	// tag: AES-256-GCM (NIST SP 800-38D) under a key from the OPAQUE export key.
	WrappedKeySize = 12 + 32 + 16
	// DeliverySize is the wrapped key sealed once more, under the session key.
	DeliverySize = 12 + WrappedKeySize + 16
)

// Fields joins a label and fields, each with its length before it.
func Fields(label string, fields ...[]byte) []byte {
	size := 4 + len(label)
	for _, f := range fields {
		size += 4 + len(f)
	}
	out := make([]byte, 0, size)
	out = binary.BigEndian.AppendUint32(out, uint32(len(label)))
	out = append(out, label...)
	for _, f := range fields {
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}

// ClientIdentity is OPAQUE's client_identity (RFC 9807 §6): the tenant and the
// user, byte-exact. The server_identity is the vault id as it is.
func ClientIdentity(tenant, user string) []byte {
	return Fields(labelClientIdentity, []byte(tenant), []byte(user))
}

// WrapContext is the associated data under which a client wraps its backup key.
func WrapContext(vaultID, tenant, user string) []byte {
	return Fields(labelWrap, []byte(vaultID), []byte(tenant), []byte(user))
}

// DeliveryContext is the associated data of the wrapped key on its way back to
// the client, sealed under the session key of one attempt.
func DeliveryContext(vaultID, tenant, user string, generation [GenerationIDSize]byte) []byte {
	return Fields(labelDelivery, []byte(vaultID), []byte(tenant), []byte(user), generation[:])
}

// DeliveryKeyInfo is the HKDF info that turns OPAQUE's session key into the key
// which seals a delivery.
const DeliveryKeyInfo = "bkv/v1/delivery-key"

// WrapKeyInfo is the HKDF info that turns OPAQUE's export key into the key which
// wraps the backup key.
const WrapKeyInfo = "bkv/v1/wrap-key"

// Material is what a generation is made of, as its digest covers it.
type Material struct {
	Record     []byte // OPAQUE registration record, 129 bytes
	WrappedKey []byte // WrappedKeySize bytes
	// Argon2id's parameters (RFC 9106): passes, memory in KiB, lanes.
	Time, MemoryKiB, Threads uint32
	OwnerKey                 []byte // Ed25519 public key, 32 bytes
	ServerKey                []byte // OPAQUE static server key, 33 bytes compressed
}

// Digest is H(record, wrapped key, KSF parameters, owner key, server key).
func (m Material) Digest() [DigestSize]byte {
	var ksf [12]byte
	binary.BigEndian.PutUint32(ksf[0:], m.Time)
	binary.BigEndian.PutUint32(ksf[4:], m.MemoryKiB)
	binary.BigEndian.PutUint32(ksf[8:], m.Threads)
	return sha256.Sum256(Fields(labelDigest, m.Record, m.WrappedKey, ksf[:], m.OwnerKey, m.ServerKey))
}

// Action is what an owner's signature asks for.
type Action string

// Actions. A signature made for one is worthless for another.
const (
	// Activate is signed by the owner key of the new generation.
	Activate Action = "activate"
	// Replace is signed by the owner key of the active generation, which is
	// destroyed when New becomes active.
	Replace Action = "replace"
	// TurnOff is signed by the owner key of Old, which is destroyed. New is zero.
	TurnOff Action = "turn-off"
	// Reinstate is signed by the owner key of New, a frozen generation, which
	// becomes active again. Old is the active generation, which is destroyed, or zero.
	// FrozenUntil says which freezing it ends: without it, a signature that somebody
	// recorded would bring the generation back after every later one, too.
	Reinstate Action = "reinstate"
)

// Statement is what an owner signs with Ed25519 (RFC 8032). Digest is that of the
// generation that the action is about: New, or Old where New is zero.
type Statement struct {
	Action              Action
	Vault, Tenant, User string
	Old, New            [GenerationIDSize]byte
	Digest              [DigestSize]byte
	// FrozenUntil is when New, frozen, would be destroyed, in Unix microseconds: of
	// Reinstate. Zero for the other actions.
	FrozenUntil int64
}

// Bytes is the signed message.
func (s Statement) Bytes() []byte {
	return Fields(labelOwner, []byte(s.Action), []byte(s.Vault), []byte(s.Tenant), []byte(s.User),
		s.Old[:], s.New[:], s.Digest[:], binary.BigEndian.AppendUint64(nil, uint64(s.FrozenUntil)))
}

// Sign makes the owner's signature.
func (s Statement) Sign(owner ed25519.PrivateKey) []byte { return ed25519.Sign(owner, s.Bytes()) }

// VerifiedBy reports whether signature is owner's for this statement. A key or
// signature of a wrong length verifies nothing.
func (s Statement) VerifiedBy(owner, signature []byte) bool {
	return len(owner) == ed25519.PublicKeySize && ed25519.Verify(owner, s.Bytes(), signature)
}

// ListedKey is one public key of a vault: its purpose, its generation, and what it is: of "server" a compressed
// P-256 point, of "relay" a key configuration (RFC 9458 section 3.1).
type ListedKey struct {
	Purpose    string
	Generation uint32
	Key        []byte
}

// KeyList is the list of keys that the vault's identity key signs (ECDSA over
// P-256, SHA-256), so that clients need to pin the identity alone. Serial grows
// with every new key; a client refuses a serial older than one it has seen, and
// a list outside its validity (Unix seconds).
type KeyList struct {
	Vault              string
	Serial             uint64
	NotBefore, Expires int64
	Keys               []ListedKey
}

// Digest is what the identity key signs.
func (l KeyList) Digest() [sha256.Size]byte {
	var fixed [24]byte
	binary.BigEndian.PutUint64(fixed[0:], l.Serial)
	binary.BigEndian.PutUint64(fixed[8:], uint64(l.NotBefore))
	binary.BigEndian.PutUint64(fixed[16:], uint64(l.Expires))
	fields := [][]byte{[]byte(l.Vault), fixed[:]}
	for _, k := range l.Keys {
		fields = append(fields, []byte(k.Purpose), binary.BigEndian.AppendUint32(nil, k.Generation), k.Key)
	}
	return sha256.Sum256(Fields(labelKeyList, fields...))
}

// A fingerprint is 25 bytes: 21 of the hash and 4 that check it, which base32
// writes as exactly 40 letters and digits.
const (
	fingerprintHash  = 21
	fingerprintCheck = 4
)

// base32Lower is RFC 4648's alphabet in lower case, without padding.
var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Fingerprint is what a client pins of a vault: a hash, cut to 168 bits, of the
// vault's id and identity key. Its text form carries a checksum, so that a slip
// in copying it is found before anything is sent.
type Fingerprint [fingerprintHash]byte

// FingerprintOf hashes the vault id and its identity key (compressed P-256 point).
func FingerprintOf(vaultID string, identityKey []byte) Fingerprint {
	sum := sha256.Sum256(Fields(labelIdentity, []byte(vaultID), identityKey))
	return Fingerprint(sum[:fingerprintHash])
}

// String writes ten groups of four: base32 (RFC 4648) in lower case.
func (f Fingerprint) String() string {
	check := sha256.Sum256(f[:])
	text := base32Lower.EncodeToString(append(append([]byte{}, f[:]...), check[:fingerprintCheck]...))
	out := make([]byte, 0, len(text)+len(text)/4)
	for i := range len(text) {
		if i > 0 && i%4 == 0 {
			out = append(out, '-')
		}
		out = append(out, text[i])
	}
	return string(out)
}

// ParseFingerprint reads what String wrote, in either case, with or without
// dashes and spaces. It refuses a wrong length, a foreign letter and a checksum
// that does not fit.
func ParseFingerprint(s string) (Fingerprint, error) {
	letters := make([]byte, 0, 40)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '-' || c == ' ':
		case c >= 'A' && c <= 'Z':
			letters = append(letters, c-'A'+'a')
		case c >= 'a' && c <= 'z' || c >= '2' && c <= '7':
			letters = append(letters, c)
		default:
			return Fingerprint{}, fmt.Errorf("vault fingerprint: %q at position %d is not one of its letters (a-z, 2-7)", c, i+1)
		}
	}
	if len(letters) != 40 {
		return Fingerprint{}, fmt.Errorf("vault fingerprint: want 40 letters and digits, got %d", len(letters))
	}
	raw, err := base32Lower.DecodeString(string(letters))
	if err != nil {
		return Fingerprint{}, fmt.Errorf("vault fingerprint: %w", err)
	}
	f := Fingerprint(raw[:fingerprintHash])
	if check := sha256.Sum256(f[:]); string(check[:fingerprintCheck]) != string(raw[fingerprintHash:]) {
		return Fingerprint{}, fmt.Errorf("vault fingerprint: its checksum does not fit; it was copied with a mistake")
	}
	return f, nil
}
