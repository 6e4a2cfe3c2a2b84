// Package audit defines the vault's audit log: how events are chained, what a checkpoint
// signs, how an export is written, and how all of it is proved.
//
// Every change that matters is an event, written in the statement that makes the change.
// A sequencer seals events: each gets the next sequence number and a hash over itself and the
// hash before it, so that a sealed event cannot be edited, moved, removed or slipped in without
// every later hash changing. From time to time the newest hash is signed in the token, by the
// audit key; the vault's identity key, which clients pin, certifies the audit keys. Whoever can write to the
// database can make up events that are not sealed yet, and recompute hashes, but cannot sign them.
//
//	start ──▶ hash 1 ──▶ hash 2 ──▶ … ──▶ hash n ◀── checkpoint n, signed by audit/2
//	            ▲          ▲                ▲                      ▲
//	          event      event            event            certified by identity/1
//
// Trust boundary: verification trusts the vault's fingerprint and, for what was cut off at the end, a
// checkpoint that was kept elsewhere. Neither database, export nor audit keys are trusted.
//
// This file is the definition. Everything in it is pure and safe for concurrent use.
package audit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"time"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/transcript"
)

// Labels of what is hashed and signed. Another encoding gets other labels.
const (
	labelStart      = "bkv/v1/audit-start"
	labelEvent      = "bkv/v1/audit-event"
	labelCheckpoint = "bkv/v1/audit-checkpoint"
	labelKey        = "bkv/v1/audit-key"
)

// Hash is SHA-256.
type Hash [sha256.Size]byte

// Event is what happened, as it is stored. What does not apply is zero.
type Event struct {
	ID            uint64    // of the row; it grows with time, but not without gaps
	At            time.Time // the database's clock, in microseconds
	Kind          string
	Tenant        string
	Pseudonym     []byte // 32 bytes: the account, by a MAC that only the token can make
	Generation    []byte // 16 bytes: of the account's key
	Attempt       uint32
	Reason        string // of a destruction
	RequestID     string // empty: the vault or an operator acted
	Purpose       string // of a key of the token
	KeyGeneration uint32
	Operator      string // who asked, as an operator's tool or certificate says
	Detail        string // of an operator's action
	Login         string // the database role that wrote the event
}

// number is how numbers are hashed and signed: 8 bytes, big endian. Times are microseconds since 1970.
func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// Start is what the first event follows, as if it were the hash of event 0.
func Start(vaultID string) Hash {
	return sha256.Sum256(transcript.Fields(labelStart, []byte(vaultID)))
}

// Next is the hash of an event that gets this sequence number, after the hash before it.
func Next(previous Hash, sequence uint64, e *Event) Hash {
	return sha256.Sum256(transcript.Fields(labelEvent, previous[:], number(sequence),
		number(e.ID), number(uint64(e.At.UnixMicro())), []byte(e.Kind), []byte(e.Tenant), e.Pseudonym, e.Generation,
		number(uint64(e.Attempt)), []byte(e.Reason), []byte(e.RequestID), []byte(e.Purpose), number(uint64(e.KeyGeneration)),
		[]byte(e.Operator), []byte(e.Detail), []byte(e.Login)))
}

// Sealed is an event with its place in the chain. Sequence numbers count from 1 without gaps.
type Sealed struct {
	Sequence uint64
	Hash     Hash
	Event
}

// Checkpoint says that the chain had this hash at this place.
type Checkpoint struct {
	Sequence      uint64
	Hash          Hash
	At            time.Time // the database's clock when it was signed, in microseconds
	KeyGeneration uint32    // of the audit key that signed
	Signature     [64]byte
}

// Digest is what the audit key signs, with ECDSA over P-256.
func (c *Checkpoint) Digest(vaultID string) [32]byte {
	return sha256.Sum256(transcript.Fields(labelCheckpoint, []byte(vaultID), number(c.Sequence), c.Hash[:],
		number(uint64(c.At.UnixMicro())), number(uint64(c.KeyGeneration))))
}

// Key is a generation of the audit key, certified by the identity key. It is enough to verify what the
// key signed, for ever, also when the key itself is destroyed.
type Key struct {
	Generation uint32
	PublicKey  [33]byte // compressed
	Signature  [64]byte // by the identity key
}

// Digest is what the identity key signs.
func (k *Key) Digest(vaultID string) [32]byte {
	return sha256.Sum256(transcript.Fields(labelKey, []byte(vaultID), number(uint64(k.Generation)), k.PublicKey[:]))
}

// Log names a log: the vault's id and identity key, of which its fingerprint is made.
type Log struct {
	VaultID     string
	IdentityKey [33]byte
}

// Fingerprint is what clients and auditors pin.
func (l *Log) Fingerprint() transcript.Fingerprint {
	return transcript.FingerprintOf(l.VaultID, l.IdentityKey[:])
}

// Keyring holds the certified audit keys of a log.
type Keyring struct {
	log      Log
	identity *ecdsa.PublicKey
	keys     map[uint32]*ecdsa.PublicKey
}

// NewKeyring makes one that holds no keys yet.
func NewKeyring(log Log) (*Keyring, error) {
	identity, err := parseKey(log.IdentityKey)
	if err != nil {
		return nil, fmt.Errorf("identity key: %w", err)
	}
	return &Keyring{log, identity, map[uint32]*ecdsa.PublicKey{}}, nil
}

// Errors of a Keyring.
var (
	errNotCertified = errors.New("the identity key has not certified it")
	errUnknownKey   = errors.New("no certificate of the key that signed it")
	errSignature    = errors.New("the signature does not verify")
)

// Add takes a key whose certificate verifies.
func (r *Keyring) Add(k Key) error {
	key, err := parseKey(k.PublicKey)
	if err != nil {
		return err
	}
	if !verify(r.identity, k.Digest(r.log.VaultID), k.Signature) {
		return errNotCertified
	}
	r.keys[k.Generation] = key
	return nil
}

// Has reports whether the keyring holds a generation.
func (r *Keyring) Has(generation uint32) bool { return r.keys[generation] != nil }

// Verify proves that the vault signed a checkpoint.
func (r *Keyring) Verify(c *Checkpoint) error {
	key := r.keys[c.KeyGeneration]
	if key == nil {
		return fmt.Errorf("%w (audit/%d)", errUnknownKey, c.KeyGeneration)
	}
	if !verify(key, c.Digest(r.log.VaultID), c.Signature) {
		return errSignature
	}
	return nil
}

func parseKey(compressed [33]byte) (*ecdsa.PublicKey, error) {
	point, err := nistec.NewP256Point().SetBytes(compressed[:])
	if err != nil {
		return nil, errors.New("it is no point of P-256")
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point.Bytes())
}

// verify checks r and s, 32 bytes each, as PKCS #11 has them (v2.40, mechanisms, section 2.3.1).
func verify(key *ecdsa.PublicKey, digest [32]byte, signature [64]byte) bool {
	r, s := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])
	return ecdsa.Verify(key, digest[:], r, s)
}
