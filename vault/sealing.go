package vault

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
)

// Labels of what is sealed and MACed. Each purpose has its own, so that nothing
// made for one is taken for another.
const (
	labelRow            = "bkv/v1/row"
	labelPseudonym      = "bkv/v1/audit-pseudonym"
	labelRecord         = "bkv/v1/sealed-record"
	labelEnrolmentState = "bkv/v1/enrolment-state"
	labelRecoveryState  = "bkv/v1/recovery-state"
)

// pseudonymKey is the mac key that makes pseudonyms: always the first, so that an
// account keeps its pseudonym.
const pseudonymKey = 1

func pseudonymInput(vaultID string, id AccountID) []byte {
	return transcript.Fields(labelPseudonym, []byte(vaultID), []byte(id.Tenant), []byte(id.User))
}

func (m RowMAC) equal(other RowMAC) bool { return hmac.Equal(m[:], other[:]) }

// rowMAC is the MAC over an account and its generations: those that are not
// destroyed, and the head. It covers every stored column that decides anything.
func (v *Vault) rowMAC(ctx context.Context, a *Account) (RowMAC, error) {
	mac, err := v.token.MAC(ctx, a.MACKey, a.macInput(v.id))
	if err != nil {
		return RowMAC{}, tokenFault("making the row's MAC", err)
	}
	return mac, nil
}

func (a *Account) macInput(vaultID string) []byte {
	w := writer{}
	w.uint32(a.MACKey)
	w.raw(a.Pseudonym[:])
	w.raw(a.Head[:])
	w.uint32(a.NextNumber)
	w.uint32(uint32(a.Policy.MaxAttempts))
	w.uint64(uint64(a.Policy.Grace / time.Microsecond))
	w.uint32(uint32(len(a.Policy.Delays)))
	for _, d := range a.Policy.Delays {
		w.uint64(uint64(d / time.Microsecond))
	}
	for i := range a.Generations {
		g := &a.Generations[i]
		if g.State == Destroyed && g.ID != a.Head {
			continue
		}
		w.uint32(g.Number)
		w.raw(g.ID[:])
		w.raw(g.Follows[:])
		w.bytes([]byte(g.State))
		w.bytes([]byte(g.Reason))
		w.time(g.CreatedAt)
		w.time(g.ExpiresAt)
		w.raw(g.Digest[:])
		w.raw(g.OwnerKey[:])
		w.uint32(g.KSF.Time)
		w.uint32(g.KSF.MemoryKiB)
		w.uint32(g.KSF.Threads)
		w.bytes(g.Sealed)
		w.uint32(g.OPRFKey)
		w.uint32(g.ServerKey)
		w.bytes([]byte(g.Strategy))
		w.uint32(g.Started)
		w.uint32(g.LastSuccess)
		w.uint32(g.Successes)
		w.uint32(uint32(len(g.Attempts)))
		for _, t := range g.Attempts {
			w.uint32(t.Number)
			w.raw(t.Claim[:])
			w.bytes([]byte(t.Outcome))
			w.time(t.ChargedAt)
			w.time(t.ExpiresAt)
		}
	}
	return transcript.Fields(labelRow, []byte(vaultID), []byte(a.ID.Tenant), []byte(a.ID.User), w.buf)
}

// secrets is what a generation seals under the master key.
type secrets struct {
	share   opaque.Scalar // t_u, the record's half of its user's OPRF key
	record  opaque.RegistrationRecord
	wrapped [transcript.WrappedKeySize]byte
}

const secretsSize = len(opaque.Scalar{}) + opaque.RecordSize + transcript.WrappedKeySize

func (v *Vault) associated(label string, id AccountID) []byte {
	return transcript.Fields(label, []byte(v.id), []byte(id.Tenant), []byte(id.User))
}

func (v *Vault) sealSecrets(ctx context.Context, id AccountID, generation GenerationID, s *secrets) ([]byte, error) {
	plain := make([]byte, 0, secretsSize)
	defer func() { clear(plain) }()
	plain = append(plain, s.share[:]...)
	plain = append(plain, s.record[:]...)
	plain = append(plain, s.wrapped[:]...)
	sealed, err := v.token.Seal(ctx, purposeMaster, generation, plain, v.associated(labelRecord, id))
	if err != nil {
		return nil, tokenFault("sealing the record", err)
	}
	return sealed, nil
}

// SealedUnder is the generation of the key that sealed a value, 0 for what no token sealed.
func SealedUnder(sealed []byte) uint32 {
	if len(sealed) < 5 {
		return 0
	}
	return binary.BigEndian.Uint32(sealed[1:])
}

// openSecrets opens a generation's secrets. The row's MAC has been verified, so
// secrets that do not open are a fault of the token's keys or of the row; unless they
// were sealed anew meanwhile, under a newer master key, and the older one is gone.
func (v *Vault) openSecrets(ctx context.Context, a *Account, g *Generation) (*secrets, error) {
	s, err := v.tryOpenSecrets(ctx, a, g)
	if s != nil {
		return s, nil
	}
	if now, _, readErr := v.read(ctx, a.ID); readErr == nil {
		if fresh := now.Find(g.ID); fresh != nil && fresh.Sealed != nil && !bytes.Equal(fresh.Sealed, g.Sealed) {
			s, err = v.tryOpenSecrets(ctx, now, fresh)
		}
	}
	if s == nil && err == nil {
		err = v.accountFault(ctx, a, "the sealed record does not open")
	}
	return s, err
}

// tryOpenSecrets answers nil, without an error, if the secrets do not open.
func (v *Vault) tryOpenSecrets(ctx context.Context, a *Account, g *Generation) (*secrets, error) {
	plain, authentic, err := v.token.Open(ctx, purposeMaster, g.ID, g.Sealed, v.associated(labelRecord, a.ID))
	if err != nil {
		return nil, tokenFault("opening the record", err)
	}
	if !authentic || len(plain) != secretsSize {
		return nil, nil
	}
	defer clear(plain)
	s := &secrets{}
	n := copy(s.share[:], plain)
	n += copy(s.record[:], plain[n:])
	copy(s.wrapped[:], plain[n:])
	return s, nil
}

// enrolmentState goes to the client and back, sealed, so that any instance can go
// on and nothing is stored before there is a record.
type enrolmentState struct {
	share              opaque.Scalar
	follows            GenerationID
	oprfKey, serverKey uint32
	expires            time.Time
}

// recoveryState likewise.
type recoveryState struct {
	claim                        Claim
	attempt                      uint32
	failuresSince, failuresTotal uint32
	expect                       opaque.ExpectedFinish
	expires                      time.Time
}

// A state on the wire is its generation's id, in clear, and the sealed rest, which the id is bound to.
func (v *Vault) sealState(ctx context.Context, label string, id AccountID, generation GenerationID, plain []byte) ([]byte, error) {
	defer clear(plain)
	sealed, err := v.token.Seal(ctx, purposeState, generation, plain, v.associated(label, id))
	if err != nil {
		return nil, tokenFault("sealing the state", err)
	}
	return append(generation[:len(generation):len(generation)], sealed...), nil
}

// maxStateBytes bounds a state on the wire; ours are a third of it.
const maxStateBytes = 1024

var errBadState = &InvalidRequest{Field: "state", Reason: "not a state that this vault gave for this user and this step; start again"}

func (v *Vault) openState(ctx context.Context, label string, id AccountID, state []byte) (GenerationID, *reader, error) {
	var generation GenerationID
	if len(state) <= len(generation) || len(state) > maxStateBytes {
		return generation, nil, errBadState
	}
	sealed := state[copy(generation[:], state):]
	plain, authentic, err := v.token.Open(ctx, purposeState, generation, sealed, v.associated(label, id))
	if err != nil {
		return generation, nil, tokenFault("opening the state", err)
	}
	if !authentic {
		return generation, nil, errBadState
	}
	return generation, &reader{buf: plain}, nil
}

func (s *enrolmentState) encode() []byte {
	w := writer{}
	w.raw(s.share[:])
	w.raw(s.follows[:])
	w.uint32(s.oprfKey)
	w.uint32(s.serverKey)
	w.time(s.expires)
	return w.buf
}

func (s *enrolmentState) decode(r *reader) error {
	r.raw(s.share[:])
	r.raw(s.follows[:])
	s.oprfKey, s.serverKey = r.uint32(), r.uint32()
	s.expires = r.time()
	return r.done()
}

func (s *recoveryState) encode() []byte {
	w := writer{}
	w.raw(s.claim[:])
	w.uint32(s.attempt)
	w.uint32(s.failuresSince)
	w.uint32(s.failuresTotal)
	w.raw(s.expect.ClientMAC[:])
	w.raw(s.expect.SessionKey[:])
	w.time(s.expires)
	return w.buf
}

func (s *recoveryState) decode(r *reader) error {
	r.raw(s.claim[:])
	s.attempt, s.failuresSince, s.failuresTotal = r.uint32(), r.uint32(), r.uint32()
	r.raw(s.expect.ClientMAC[:])
	r.raw(s.expect.SessionKey[:])
	s.expires = r.time()
	return r.done()
}

// writer and reader are the fixed encoding of what is sealed and MACed: integers
// big endian, byte strings of variable length with theirs before them.
type writer struct{ buf []byte }

func (w *writer) raw(b []byte)    { w.buf = append(w.buf, b...) }
func (w *writer) uint32(n uint32) { w.buf = binary.BigEndian.AppendUint32(w.buf, n) }
func (w *writer) uint64(n uint64) { w.buf = binary.BigEndian.AppendUint64(w.buf, n) }
func (w *writer) bytes(b []byte)  { w.uint32(uint32(len(b))); w.raw(b) }

// time writes microseconds since 1970, which is what the store keeps; the zero time is 0.
func (w *writer) time(t time.Time) {
	if t.IsZero() {
		w.uint64(0)
		return
	}
	w.uint64(uint64(t.UnixMicro()))
}

type reader struct {
	buf []byte
	bad bool
}

func (r *reader) raw(into []byte) {
	if r.bad = r.bad || len(r.buf) < len(into); r.bad {
		return
	}
	r.buf = r.buf[copy(into, r.buf):]
}

func (r *reader) uint32() uint32 {
	var b [4]byte
	r.raw(b[:])
	return binary.BigEndian.Uint32(b[:])
}

func (r *reader) time() time.Time {
	var b [8]byte
	r.raw(b[:])
	return time.UnixMicro(int64(binary.BigEndian.Uint64(b[:]))).UTC()
}

// done reports a state of the right seal but the wrong shape: one from another version.
func (r *reader) done() error {
	if r.bad || len(r.buf) != 0 {
		return fmt.Errorf("%w (made by another version)", errBadState)
	}
	return nil
}
