package vault

import (
	"context"
	"time"
)

// Store keeps accounts. The domain decides; a store records, and holds the law a
// second time where it writes. Implementations are safe for concurrent use.
//
// Errors other than those named are faults of the store; the domain reports
// them as ErrStoreUnavailable. Times are the store's own clock, in microseconds.
type Store interface {
	// Account reads an account in one statement: the generations that are not
	// destroyed, the head whatever its state, and the clock. An account that does
	// not exist is no error: Exists is false, and Now is set. A row that no
	// vault can have written is ErrAccountFault.
	Account(ctx context.Context, id AccountID) (Snapshot, error)

	// Write records a change in one statement, or nothing of it.
	//
	// It answers ErrStale, having written nothing, if the account does not carry
	// Change.Previous any more (or, for a new account, exists already), or if a
	// new generation's id is taken. It answers
	// ErrLaw, having written nothing, if a counter would go back, an attempt be
	// forgiven without a success, a tombstone or anything fixed at staging change, a
	// state be left for an earlier one or taken by two generations, the policy
	// change while an attempt or a second live generation depends on it, or the
	// attempts used by the live generations exceed the cap.
	//
	// It answers ClosingKey, having written nothing, if it knows of a key of Change.Keys that nothing new may depend on it.
	//
	// After any other error it is unknown whether the change was written; the
	// domain reads again before it decides anything.
	Write(ctx context.Context, change Change) error

	// Due returns at most limit accounts, in the order of their ids and after the
	// given one, that Sweep has something to do for (see Account.Due).
	Due(ctx context.Context, after AccountID, limit int) ([]AccountID, error)

	// Taken reports whether a generation of this id was ever stored for the
	// account, tombstones included.
	Taken(ctx context.Context, id AccountID, generation GenerationID) (bool, error)

	// Under returns at most limit accounts, in the order of their ids and after the given
	// one, that depend on a key: of the master key, those with a generation that is
	// not destroyed and sealed under it (see SealedUnder); of the mac key, those whose
	// MAC is made with it.
	Under(ctx context.Context, key Key, after AccountID, limit int) ([]AccountID, error)

	// RelaySeeds returns the sealed seed of each generation of the relay key that has one.
	RelaySeeds(ctx context.Context) (map[uint32][]byte, error)

	// SwapRelaySeed puts a sealed seed in the place of another. old is nil if the generation never had one. sealed is nil to
	// erase; an erased one does not come back. It answers ErrStale, having written nothing, if another is there than old, and
	// ClosingKey if the master key that sealed it is about to be destroyed.
	SwapRelaySeed(ctx context.Context, generation uint32, old, sealed []byte) error
}

// Snapshot is an account as it was read, not yet verified.
type Snapshot struct {
	Account Account
	Exists  bool
	Now     time.Time // the database's clock
}

// Change is an account as it is to be.
type Change struct {
	// Previous is the MAC that the account was read with. It is meaningless if Create.
	Previous RowMAC
	Create   bool
	Account  Account
	// Changed are the generations that differ from what was read, new ones
	// included, by number; all of them are in Account.Generations too, except
	// that tombstones other than the head are only here.
	Changed []Generation
	// Keys are those that the row did not depend on before, or may not have.
	Keys   []Key
	Events []Event
}

// Token is what the domain asks of the PKCS#11 token. Implementations are safe
// for concurrent use. An error means that the token could not answer (reported
// as ErrTokenUnavailable); a repeated call is always safe.
type Token interface {
	// Seal encrypts under the generation of purpose ("master", "state") that is in
	// use. What it makes begins with one byte of version and the generation in four, big endian.
	Seal(ctx context.Context, purpose string, id [16]byte, plaintext, associated []byte) ([]byte, error)
	// Open decrypts. authentic is false, without an error, for whatever Seal did
	// not make with this purpose, id and associated data.
	Open(ctx context.Context, purpose string, id [16]byte, sealed, associated []byte) (plaintext []byte, authentic bool, err error)
	// Multiply returns k·point, compressed, for the key k of purpose ("oprf", "server").
	Multiply(ctx context.Context, purpose string, generation uint32, point [33]byte) ([33]byte, error)
	// DeriveX returns the x-coordinate of k·point (uncompressed), for the key k of purpose ("relay").
	DeriveX(ctx context.Context, purpose string, generation uint32, point [65]byte) ([32]byte, error)
	// PublicKey returns the compressed public key of purpose.
	PublicKey(purpose string, generation uint32) ([33]byte, error)
	// MAC is HMAC-SHA-256 under the mac key of this generation.
	MAC(ctx context.Context, generation uint32, message []byte) ([32]byte, error)
	// Sign is ECDSA over P-256 (r and s, 32 bytes each) by the key of purpose ("identity", "audit").
	Sign(ctx context.Context, purpose string, generation uint32, digest [32]byte) ([64]byte, error)
	// Newest is the generation of purpose that new work uses.
	Newest(purpose string) uint32
	// Generations are those of purpose that the token holds, the lowest first.
	Generations(purpose string) []uint32
	// Strategy is how the token multiplies, for records to keep: 1 to 64 bytes.
	Strategy() string
	// Random returns n bytes from the token's generator.
	Random(ctx context.Context, n int) ([]byte, error)
}

// Purposes of the token's keys.
const (
	purposeMaster   = "master"
	purposeState    = "state"
	purposeOPRF     = "oprf"
	purposeServer   = "server"
	purposeRelay    = "relay"
	purposeMAC      = "mac"
	purposeIdentity = "identity"
	purposeAudit    = "audit"
)
