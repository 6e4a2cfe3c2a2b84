// Package api is the wire: the JSON bodies of the vault's HTTP interface, shared
// by the server and the clients, so that neither can drift from the other.
//
// Field names are snake_case. Bytes travel as base64url without padding (RFC 4648
// §5), times as RFC 3339 in UTC, durations as whole seconds, sizes in bytes. An
// unknown or repeated member is refused. The package has no logic but the
// strictness of Bytes, imports nothing of the project, and is safe for concurrent use.
package api

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"time"
)

// Bytes is a byte string in JSON: base64url, no padding, no white space, and
// no stray bits in its last letter, so that each value has exactly one spelling.
type Bytes []byte

// MarshalText writes base64url without padding.
func (b Bytes) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, b), nil
}

// UnmarshalText reads what MarshalText writes, and nothing else.
func (b *Bytes) UnmarshalText(text []byte) error {
	// encoding/base64 passes over line breaks, even when strict.
	for _, c := range text {
		if c == '\r' || c == '\n' {
			return fmt.Errorf("not base64url without padding")
		}
	}
	out, err := base64.RawURLEncoding.Strict().AppendDecode([]byte{}, text) // not nil, which is absent
	if err != nil {
		return fmt.Errorf("not base64url without padding")
	}
	*b = out
	return nil
}

// GenerationID names one generation of an account's backup key: 16 random bytes,
// written as 32 lower-case hexadecimal digits. The zero value means "none".
type GenerationID [16]byte

// IsZero reports whether the id names no generation.
func (g GenerationID) IsZero() bool { return g == GenerationID{} }

// String writes 32 hexadecimal digits.
func (g GenerationID) String() string { return hex.EncodeToString(g[:]) }

// MarshalText writes 32 hexadecimal digits.
func (g GenerationID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText reads exactly 32 lower-case hexadecimal digits.
func (g *GenerationID) UnmarshalText(text []byte) error {
	if len(text) != 2*len(g) {
		return fmt.Errorf("want %d hexadecimal digits, got %d characters", 2*len(g), len(text))
	}
	for _, c := range text {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("not a lower-case hexadecimal digit: %q", c)
		}
	}
	_, err := hex.Decode(g[:], text)
	return err
}

// Suite is the one OPAQUE suite that the vault speaks (RFC 9807 §7).
const Suite = "OPAQUE-3DH/P256-SHA256/HKDF-SHA-256/HMAC-SHA-256/SHA-256"

// Vault is the answer to GET /v1/vault: who the vault is and what it asks of clients.
type Vault struct {
	ID          string    `json:"id" doc:"The vault's id: the audience of tokens and OPAQUE's server identity."`
	Suite       string    `json:"suite" doc:"The OPAQUE suite (RFC 9807 section 7)."`
	Context     Bytes     `json:"context" doc:"OPAQUE's context; usually empty."`
	IdentityKey Bytes     `json:"identity_key" minLength:"44" maxLength:"44" doc:"The identity key, a compressed P-256 point (33 bytes). Clients pin the fingerprint of id and identity key."`
	Fingerprint string    `json:"fingerprint" doc:"The fingerprint that clients pin, ten groups of four."`
	Keys        KeyList   `json:"keys" doc:"The vault's public keys, signed by the identity key."`
	KSFFloor    KSF       `json:"ksf_floor" doc:"The least key stretching that the vault accepts in a record."`
	KSFCeiling  KSF       `json:"ksf_ceiling" doc:"The most key stretching that the vault accepts in a record."`
	Lifetimes   Lifetimes `json:"lifetimes" doc:"How long states, staged generations and attempts live."`
}

// Lifetimes says how long things live, in seconds.
type Lifetimes struct {
	EnrolmentState   int64 `json:"enrolment_state_seconds" doc:"From enrolment start to staging."`
	StagedGeneration int64 `json:"staged_generation_seconds" doc:"From staging to activation."`
	Attempt          int64 `json:"attempt_seconds" doc:"From recovery start to finish."`
}

// KeyList is the signed list of a vault's keys.
type KeyList struct {
	Serial    uint64    `json:"serial" doc:"Grows with every new key. A client refuses a serial older than one it has seen."`
	NotBefore time.Time `json:"not_before"`
	Expires   time.Time `json:"expires"`
	Keys      []Key     `json:"keys"`
	Signature Bytes     `json:"signature" minLength:"86" maxLength:"86" doc:"ECDSA P-256 with SHA-256 by the identity key: r and s, 32 bytes each."`
}

// Key is one public key of the vault.
type Key struct {
	Purpose    string `json:"purpose" enum:"server,relay"`
	Generation uint32 `json:"generation"`
	PublicKey  Bytes  `json:"public_key" doc:"Of server a compressed P-256 point, 33 bytes; of relay a key configuration (RFC 9458 section 3.1)."`
}

// KSF is the key stretching function of a record: Argon2id (RFC 9106) with a
// salt of 16 zero bytes, version 0x13, and 32 bytes of output.
type KSF struct {
	Algorithm string `json:"algorithm" enum:"argon2id"`
	Time      uint32 `json:"time" doc:"Passes."`
	MemoryKiB uint32 `json:"memory_kib" doc:"Memory in KiB."`
	Threads   uint32 `json:"threads" doc:"Lanes."`
}

// Argon2id is KSF's one algorithm.
const Argon2id = "argon2id"

// StartEnrolmentRequest begins an enrolment or a password change.
type StartEnrolmentRequest struct {
	RegistrationRequest Bytes `json:"registration_request" minLength:"44" maxLength:"44" doc:"OPAQUE RegistrationRequest, 33 bytes."`
}

// StartEnrolmentResponse is kept by nobody but the client; sending the request
// again gives another answer that serves as well.
type StartEnrolmentResponse struct {
	RegistrationResponse Bytes        `json:"registration_response" minLength:"88" maxLength:"88" doc:"OPAQUE RegistrationResponse, 66 bytes."`
	State                Bytes        `json:"state" doc:"To be sent back with the record. Sealed by the vault."`
	Generation           GenerationID `json:"generation" doc:"The id of the generation to come."`
	Follows              GenerationID `json:"follows" doc:"The generation that it follows; zero if it is the first."`
	ExpiresAt            time.Time    `json:"expires_at" doc:"Until when the record can be staged."`
}

// StageRequest brings the record. The same request again gets the same answer.
type StageRequest struct {
	State      Bytes `json:"state" doc:"The state that enrolment start returned."`
	Record     Bytes `json:"record" minLength:"172" maxLength:"172" doc:"OPAQUE RegistrationRecord, 129 bytes."`
	WrappedKey Bytes `json:"wrapped_key" minLength:"80" maxLength:"80" doc:"The backup key, wrapped by the client: 60 bytes."`
	KSF        KSF   `json:"ksf"`
	OwnerKey   Bytes `json:"owner_key" minLength:"43" maxLength:"43" doc:"Ed25519 public key, 32 bytes."`
}

// StageResponse confirms a staged generation. Nobody can attempt it yet.
type StageResponse struct {
	Generation GenerationID `json:"generation"`
	Follows    GenerationID `json:"follows"`
	Digest     Bytes        `json:"digest" minLength:"43" maxLength:"43" doc:"SHA-256 over record, wrapped key, KSF, owner key and server key, as statements name it."`
	ExpiresAt  *time.Time   `json:"expires_at,omitempty" doc:"Until when the generation can be activated; absent if it has been."`
}

// ActivateRequest makes a staged generation the active one.
type ActivateRequest struct {
	Generation        GenerationID `json:"generation"`
	Signature         Bytes        `json:"signature" minLength:"86" maxLength:"86" doc:"By the owner key of this generation: Ed25519, 64 bytes."`
	PreviousSignature Bytes        `json:"previous_signature,omitempty" minLength:"86" maxLength:"86" doc:"By the owner key of the active generation, which is then destroyed at once. Without it that generation stays recoverable, frozen, for the grace time."`
}

// StartRecoveryRequest makes an attempt. It is counted before it is answered.
type StartRecoveryRequest struct {
	KE1        Bytes         `json:"ke1" minLength:"131" maxLength:"131" doc:"OPAQUE KE1, 98 bytes."`
	Generation *GenerationID `json:"generation,omitempty" doc:"Which generation; the active one if absent."`
	Attempt    *uint32       `json:"attempt,omitempty" doc:"The attempt number that the client expects. Another number is a conflict and is not charged."`
}

// StartRecoveryResponse carries the evaluation. The same KE1, sent again while
// its attempt is open, is answered again and not charged.
type StartRecoveryResponse struct {
	KE2          Bytes        `json:"ke2" minLength:"346" maxLength:"346" doc:"OPAQUE KE2, 259 bytes."`
	State        Bytes        `json:"state" doc:"To be sent back with KE3. Sealed by the vault."`
	Generation   GenerationID `json:"generation"`
	Attempt      uint32       `json:"attempt" doc:"This attempt's number."`
	AttemptsLeft int          `json:"attempts_left" doc:"Attempts left if this one fails."`
	ExpiresAt    time.Time    `json:"expires_at" doc:"Until when this attempt can be finished."`
	KSF          KSF          `json:"ksf"`
}

// FinishRecoveryRequest proves the password. Sending it again is harmless.
type FinishRecoveryRequest struct {
	KE3   Bytes `json:"ke3" minLength:"43" maxLength:"43" doc:"OPAQUE KE3, 32 bytes. A client that could not open KE2 sends 32 random bytes."`
	State Bytes `json:"state" doc:"The state that recovery start returned."`
}

// FinishRecoveryResponse returns the wrapped key, sealed under the session key.
type FinishRecoveryResponse struct {
	Generation    GenerationID `json:"generation"`
	SealedKey     Bytes        `json:"sealed_key" minLength:"118" maxLength:"118" doc:"The wrapped key under the session key: 88 bytes."`
	FailuresSince uint32       `json:"failures_since_success" doc:"Attempts on this generation since its last success, this one not counted. A client shows those that are not its own."`
	FailuresTotal uint32       `json:"failures_total" doc:"Attempts on this generation that never succeeded, in all."`
}

// ReinstateRequest brings a frozen generation back.
type ReinstateRequest struct {
	Generation GenerationID `json:"generation" doc:"The frozen generation."`
	Replaces   GenerationID `json:"replaces" doc:"The active generation, which is destroyed; zero if there is none."`
	// FrozenUntil makes a signature good for one freezing only.
	FrozenUntil time.Time `json:"frozen_until" doc:"When the frozen generation would be destroyed: its expires_at in the status, to the microsecond. The signature covers it, so that one that somebody recorded does not end a later freezing."`
	Signature   Bytes     `json:"signature" minLength:"86" maxLength:"86" doc:"By the owner key of the frozen generation: Ed25519, 64 bytes."`
}

// Status is what the vault knows of an account.
type Status struct {
	Tenant        string       `json:"tenant" doc:"Whose token this was. A password proves itself under this name: a client that has another one would waste attempts, and must make none."`
	Generations   []Generation `json:"generations" doc:"Those that live, and the last one if it was destroyed; oldest first."`
	Follow        GenerationID `json:"follow" doc:"The generation that a next enrolment follows."`
	AttemptsLeft  int          `json:"attempts_left" doc:"Attempts left, shared by all live generations."`
	MaxAttempts   int          `json:"max_attempts"`
	NextAttemptAt *time.Time   `json:"next_attempt_at,omitempty" doc:"No attempt is answered before; absent if one can be made now or none at all."`
}

// Generation is one generation of an account's backup key.
type Generation struct {
	ID            GenerationID `json:"id"`
	State         string       `json:"state" enum:"staged,active,frozen,destroyed"`
	Reason        string       `json:"reason,omitempty" doc:"Why it was destroyed."`
	Digest        Bytes        `json:"digest" minLength:"43" maxLength:"43" doc:"As statements name it."`
	KSF           KSF          `json:"ksf"`
	NextAttempt   uint32       `json:"next_attempt" doc:"The number of the next attempt."`
	FailuresSince uint32       `json:"failures_since_success"`
	FailuresTotal uint32       `json:"failures_total"`
	CreatedAt     time.Time    `json:"created_at"`
	ExpiresAt     *time.Time   `json:"expires_at,omitempty" doc:"Staged: until when it can be activated. Frozen: when it is destroyed."`
}

// Problem is an RFC 9457 problem. Type is ProblemPrefix and one of the names below, or OHTTPKey.
type Problem struct {
	Type          string     `json:"type"`
	Title         string     `json:"title"`
	Status        int        `json:"status"`
	Detail        string     `json:"detail,omitempty" doc:"What is wrong and what to do."`
	Instance      string     `json:"instance,omitempty" doc:"The request id, as the logs have it."`
	Field         string     `json:"field,omitempty" doc:"The member or parameter that was refused."`
	AttemptsLeft  *int       `json:"attempts_left,omitempty" doc:"wrong-password: attempts left."`
	NextAttemptAt *time.Time `json:"next_attempt_at,omitempty" doc:"wrong-password and too-early: no attempt is answered before."`
	RetryAfter    *int64     `json:"retry_after,omitempty" doc:"Seconds, as in the header Retry-After."`
}

// ProblemPrefix begins every problem's type.
const ProblemPrefix = "urn:bkv:problem:"

// Problem types.
const (
	InvalidRequest   = ProblemPrefix + "invalid-request"
	Unauthenticated  = ProblemPrefix + "unauthenticated"
	Forbidden        = ProblemPrefix + "forbidden"
	RelayRequired    = ProblemPrefix + "relay-required"
	WrongPassword    = ProblemPrefix + "wrong-password"
	NotEnrolled      = ProblemPrefix + "not-enrolled"
	NotFound         = ProblemPrefix + "not-found"
	MethodNotAllowed = ProblemPrefix + "method-not-allowed"
	Conflict         = ProblemPrefix + "conflict"
	KeyDestroyed     = ProblemPrefix + "key-destroyed"
	TooLarge         = ProblemPrefix + "too-large"
	MediaType        = ProblemPrefix + "media-type"
	TooEarly         = ProblemPrefix + "too-early"
	RateLimited      = ProblemPrefix + "rate-limited"
	Internal         = ProblemPrefix + "internal"
	TokenUnavailable = ProblemPrefix + "token-unavailable"
	StoreUnavailable = ProblemPrefix + "store-unavailable"
	Busy             = ProblemPrefix + "busy"
	AccountFault     = ProblemPrefix + "account-fault"
)

// OHTTPKey is the problem of a capsule that is sealed to a relay key which the vault does not have, or not any
// more (RFC 9458 section 5.3). It is not in an answer's capsule: there was none to open.
const OHTTPKey = "https://iana.org/assignments/http-problem-types#ohttp-key"

// ProblemMediaType is the content type of a problem (RFC 9457 §3).
const ProblemMediaType = "application/problem+json"
