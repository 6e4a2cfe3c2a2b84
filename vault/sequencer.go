package vault

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/backup-key-vault/bkv/audit"
)

// This file seals events into the audit log, as package audit defines it. Of all instances that share a
// database one does so at a time, under a lease. The lease saves work and no more: what two instances
// did at once is caught by the store, which seals only after the head that the caller names.
//
// The database is not trusted. The sequencer goes on only from a head that it proved: from the newest checkpoint that
// the vault signed, or from what it sealed itself. So it never signs over what somebody else changed
// since; it stops, reports a fault, and events wait.

const (
	sequencerLease = 15 * time.Second
	sealEvery      = time.Second // how long an event waits at most, if all is well
	sealBatch      = 1000
	// faultPause is between two looks at a log that does not prove.
	faultPause = time.Minute
	// MaxWaiting bounds the count of events that wait to be sealed.
	MaxWaiting = 100_000
)

// AuditStore keeps the sealed log. Implementations are safe for concurrent use, by several processes.
type AuditStore interface {
	// AuditState reads the state of the log, and takes the lease of the sequencer or renews it, if it is free.
	AuditState(ctx context.Context, holder string, lease time.Duration) (AuditState, error)
	// ReleaseAudit gives the lease up.
	ReleaseAudit(ctx context.Context, holder string) error
	// StartAudit writes down whose log it is, unless that is written already.
	StartAudit(ctx context.Context, log audit.Log) error
	// Unsealed returns at most limit events that wait to be sealed, by id and after the given one.
	Unsealed(ctx context.Context, after uint64, limit int) ([]audit.Event, error)
	// Seal writes the seals of waiting events, all or none. It answers ErrStale, having written nothing, if the head is not the
	// one that the caller names. After any other error it is unknown whether it was written.
	Seal(ctx context.Context, after uint64, previous audit.Hash, sealed []audit.Sealed) error
	// SealedEvents returns at most limit sealed events after a sequence number.
	SealedEvents(ctx context.Context, after uint64, limit int) ([]audit.Sealed, error)
	// AddCheckpoint and AddAuditKey leave what is there; AuditKeys returns all.
	AddCheckpoint(ctx context.Context, c audit.Checkpoint) error
	AddAuditKey(ctx context.Context, k audit.Key) error
	AuditKeys(ctx context.Context) ([]audit.Key, error)
}

// AuditState is what a store knows of the log.
type AuditState struct {
	Now      time.Time // the database's clock
	Held     bool      // the caller has the lease
	Log      *audit.Log
	Sequence uint64     // of the event that was sealed last; 0: none
	Hash     audit.Hash // stored with it; if there is none, meaningless
	Newest   *audit.Checkpoint
	Waiting  int       // events that are not sealed, up to MaxWaiting
	Oldest   time.Time // when the oldest of them happened; zero: none waits
}

// SequencerConfig is what a Sequencer is made of. Log may be nil.
type SequencerConfig struct {
	Store AuditStore
	Token Token
	// VaultID is the vault's.
	VaultID string
	Log     *slog.Logger
	// CheckpointEvery is the least time between two checkpoints; 0: 10 seconds. Without new events there is none.
	CheckpointEvery time.Duration
}

// Sequencer seals events. Any number of instances can run one. Its methods are safe for concurrent use.
type Sequencer struct {
	store    AuditStore
	token    Token
	vaultID  string
	log      *slog.Logger
	every    time.Duration
	instance string // this one, in the lease

	working sync.Mutex // held by Seal: one round at a time; guards the next four
	proved  *head
	checked *audit.Checkpoint // the newest whose signature was verified here
	retry   time.Time
	ring    *audit.Keyring

	mu     sync.Mutex // guards status
	status AuditStatus
}

// head is a place in the chain that this instance has proved or made.
type head struct {
	sequence uint64
	hash     audit.Hash
}

// AuditStatus is how far the log is sealed.
type AuditStatus struct {
	// At is when it was looked at last, by the database's clock; zero: not yet.
	At time.Time
	// Sealing says whether it is this instance that seals.
	Sealing bool
	// Sequence is that of the event sealed last, and Signed of the newest checkpoint; SignedAt is when that was made.
	Sequence, Signed uint64
	SignedAt         time.Time
	// Waiting is how many events are not sealed, up to MaxWaiting, and Lag how long the oldest of them has waited.
	Waiting int
	Lag     time.Duration
	// Fault is what is wrong with the log; empty: nothing that this instance has seen. It needs an operator.
	Fault string
}

// NewSequencer checks the configuration. It calls neither store nor token.
func NewSequencer(c SequencerConfig) (*Sequencer, error) {
	if c.Store == nil || c.Token == nil || c.VaultID == "" {
		return nil, errors.New("a sequencer needs a store, a token and the vault's id")
	}
	if c.CheckpointEvery == 0 {
		c.CheckpointEvery = 10 * time.Second
	}
	if c.CheckpointEvery < 0 {
		return nil, errors.New("the time between checkpoints must be positive")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // crypto/rand never fails: it ends the process first
	return &Sequencer{
		store: c.Store, token: c.Token, vaultID: c.VaultID, log: c.Log, every: c.CheckpointEvery, instance: hex.EncodeToString(id[:]),
	}, nil
}

// AuditFault says that the log in the store is not the one that the vault made.
type AuditFault struct{ What string }

func (e *AuditFault) Error() string { return "the audit log is not as the vault wrote it: " + e.What }

func auditFault(format string, args ...any) error { return &AuditFault{fmt.Sprintf(format, args...)} }

// Status reports from memory; while Run runs it is at most a few seconds old.
func (s *Sequencer) Status() AuditStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Run seals what waits, every second, until ctx is over. It then seals and signs what is left, and gives up the lease, so that another
// instance goes on at once.
func (s *Sequencer) Run(ctx context.Context) {
	ticker := time.NewTicker(sealEvery)
	defer ticker.Stop()
	last := ""
	for ctx.Err() == nil {
		err := s.Seal(ctx)
		if err != nil && ctx.Err() == nil && err.Error() != last {
			s.log.ErrorContext(ctx, "sealing events", "error", err)
		}
		if last = ""; err != nil {
			last = err.Error()
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
	leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := s.round(leaving, true); err != nil {
		s.log.ErrorContext(leaving, "sealing the last events", "error", err)
	}
	if err := s.Release(leaving); err != nil {
		s.log.ErrorContext(leaving, "giving up the audit log's lease", "error", err)
	}
}

// Release gives up the lease, if this instance has it.
func (s *Sequencer) Release(ctx context.Context) error {
	if err := s.store.ReleaseAudit(ctx, s.instance); err != nil {
		return storeFault("giving up the lease", err)
	}
	return nil
}

// Seal seals all that waits now and signs a checkpoint if one is due, unless another instance does so. It can be cut
// short anywhere, and called again after any error.
//
// Errors: AuditFault, ErrStoreUnavailable, ErrTokenUnavailable.
func (s *Sequencer) Seal(ctx context.Context) error { return s.round(ctx, false) }

// round is Seal. The last one does not wait for a checkpoint to be due.
func (s *Sequencer) round(ctx context.Context, last bool) error {
	s.working.Lock()
	defer s.working.Unlock()
	state, err := s.read(ctx)
	if err == nil && state.Log == nil {
		if err := s.start(ctx); err != nil {
			return err
		}
		state, err = s.read(ctx)
	}
	if err != nil {
		return err
	}
	s.report(&state)
	if !state.Held {
		return nil
	}
	if state.Now.Before(s.retry) {
		return nil // a fault was found, and reported
	}
	err = s.seal(ctx, &state, last)
	var fault *AuditFault
	if errors.As(err, &fault) {
		s.retry = state.Now.Add(faultPause)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if fault != nil {
		s.status.Fault = fault.What
	} else if err == nil {
		s.status.Fault = ""
	}
	return err
}

func (s *Sequencer) read(ctx context.Context) (AuditState, error) {
	state, err := s.store.AuditState(ctx, s.instance, sequencerLease)
	if err != nil {
		return state, storeFault("reading the state of the audit log", err)
	}
	if state.Sequence == 0 {
		state.Hash = audit.Start(s.vaultID)
	}
	return state, nil
}

func (s *Sequencer) report(state *AuditState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fault := s.status.Fault
	s.status = AuditStatus{At: state.Now, Sealing: state.Held, Sequence: state.Sequence, Waiting: state.Waiting, Fault: fault}
	if !state.Oldest.IsZero() {
		s.status.Lag = max(0, state.Now.Sub(state.Oldest))
	}
	if state.Newest != nil {
		s.status.Signed, s.status.SignedAt = state.Newest.Sequence, state.Newest.At
	}
	if !state.Held {
		s.status.Fault = "" // it is for the one that seals to say
	}
}

// start writes down whose log it is.
func (s *Sequencer) start(ctx context.Context) error {
	log, err := s.own()
	if err != nil {
		return err
	}
	if err := s.store.StartAudit(ctx, log); err != nil {
		return storeFault("starting the audit log", err)
	}
	return nil
}

func (s *Sequencer) own() (audit.Log, error) {
	identity, err := s.token.PublicKey(purposeIdentity, identityGeneration)
	if err != nil {
		return audit.Log{}, tokenFault("reading the identity key", err)
	}
	return audit.Log{VaultID: s.vaultID, IdentityKey: identity}, nil
}

// seal goes on from the head that state has, after proving it.
func (s *Sequencer) seal(ctx context.Context, state *AuditState, last bool) error {
	own, err := s.own()
	if err != nil {
		return err
	}
	if *state.Log != own {
		return auditFault("it is the log of vault %q with fingerprint %v", state.Log.VaultID, state.Log.Fingerprint())
	}
	if err := s.prove(ctx, state); err != nil {
		return err
	}
	for {
		events, err := s.store.Unsealed(ctx, 0, sealBatch)
		if err != nil {
			return storeFault("reading what waits to be sealed", err)
		}
		if len(events) == 0 {
			break
		}
		next, sealed := *s.proved, make([]audit.Sealed, len(events))
		for i := range events {
			next.hash = audit.Next(next.hash, next.sequence+1, &events[i])
			next.sequence++
			sealed[i] = audit.Sealed{Sequence: next.sequence, Hash: next.hash, Event: events[i]}
		}
		previous := *s.proved
		switch err := s.store.Seal(ctx, previous.sequence, previous.hash, sealed); {
		case errors.Is(err, ErrStale):
			return nil // another instance was faster; what it did is proved the next time
		case err != nil:
			return storeFault("sealing events", err)
		}
		s.proved = &next
		fresh, err := s.read(ctx)
		if err != nil {
			return err
		}
		s.report(&fresh)
		if !fresh.Held {
			return nil
		}
		if fresh.Sequence != next.sequence || fresh.Hash != next.hash {
			return nil // likewise
		}
		*state = fresh
		if len(events) < sealBatch {
			break
		}
	}
	c := state.Newest
	if state.Sequence == 0 || c != nil && (c.Sequence == state.Sequence || !last && state.Now.Before(c.At.Add(s.every))) {
		return nil
	}
	return s.checkpoint(ctx, state)
}

// prove makes sure that the head which the store has follows from one that this instance knows.
func (s *Sequencer) prove(ctx context.Context, state *AuditState) error {
	if s.proved != nil && *s.proved == (head{state.Sequence, state.Hash}) && s.checkedNewest(state) {
		return nil
	}
	if err := s.loadKeys(ctx, state.Log); err != nil {
		return err
	}
	if c := state.Newest; c != nil && !s.checkedNewest(state) {
		if err := s.ring.Verify(c); err != nil {
			return auditFault("checkpoint at %d: %v", c.Sequence, err)
		}
		s.checked = c
	}
	from := s.proved
	if from == nil {
		from = &head{0, audit.Start(s.vaultID)}
		if c := state.Newest; c != nil {
			from = &head{c.Sequence, c.Hash}
			at, err := s.store.SealedEvents(ctx, c.Sequence-1, 1)
			if err != nil {
				return storeFault("reading sealed events", err)
			}
			if len(at) != 1 || at[0].Sequence != c.Sequence || at[0].Hash != c.Hash {
				return auditFault("event %d is not the one that the newest checkpoint signed", c.Sequence)
			}
		}
	}
	if state.Sequence < from.sequence {
		return auditFault("it ends with event %d, and event %d was sealed", state.Sequence, from.sequence)
	}
	at := *from
	for at.sequence < state.Sequence {
		page, err := s.store.SealedEvents(ctx, at.sequence, sealBatch)
		if err != nil {
			return storeFault("reading sealed events", err)
		}
		if len(page) == 0 {
			return auditFault("event %d is missing", at.sequence+1)
		}
		for i := range page {
			e := &page[i]
			if e.Sequence != at.sequence+1 || e.ID == 0 {
				return auditFault("event %d is missing", at.sequence+1)
			}
			if audit.Next(at.hash, e.Sequence, &e.Event) != e.Hash {
				return auditFault("event %d is not the one that was sealed", e.Sequence)
			}
			if c := state.Newest; c != nil && c.Sequence == e.Sequence && c.Hash != e.Hash {
				return auditFault("event %d is not the one that the newest checkpoint signed", e.Sequence)
			}
			at = head{e.Sequence, e.Hash}
			if at.sequence == state.Sequence {
				break
			}
		}
	}
	if at != (head{state.Sequence, state.Hash}) {
		return auditFault("event %d is not the one that was sealed", state.Sequence)
	}
	s.proved = &at
	return nil
}

func (s *Sequencer) checkedNewest(state *AuditState) bool {
	return state.Newest == nil || s.checked != nil && *s.checked == *state.Newest
}

// loadKeys reads the certified keys.
func (s *Sequencer) loadKeys(ctx context.Context, log *audit.Log) error {
	ring, err := audit.NewKeyring(*log)
	if err != nil {
		return auditFault("%v", err)
	}
	keys, err := s.store.AuditKeys(ctx)
	if err != nil {
		return storeFault("reading the audit keys", err)
	}
	for _, k := range keys {
		if err := ring.Add(k); err != nil {
			return auditFault("audit key %d: %v", k.Generation, err)
		}
	}
	s.ring = ring
	return nil
}

// checkpoint signs the head.
func (s *Sequencer) checkpoint(ctx context.Context, state *AuditState) error {
	generation := s.token.Newest(purposeAudit)
	if err := s.certify(ctx, state.Log, generation); err != nil {
		return err
	}
	c := audit.Checkpoint{Sequence: s.proved.sequence, Hash: s.proved.hash, At: state.Now, KeyGeneration: generation}
	var err error
	if c.Signature, err = s.token.Sign(ctx, purposeAudit, generation, c.Digest(s.vaultID)); err != nil {
		return tokenFault("signing a checkpoint", err)
	}
	if err := s.ring.Verify(&c); err != nil {
		return tokenFault("signing a checkpoint", err)
	}
	if err := s.store.AddCheckpoint(ctx, c); err != nil {
		return storeFault("writing a checkpoint", err)
	}
	s.checked = &c
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Signed, s.status.SignedAt = c.Sequence, c.At
	return nil
}

// certify has the identity key sign an audit key before it signs for the first time.
func (s *Sequencer) certify(ctx context.Context, log *audit.Log, generation uint32) error {
	public, err := s.token.PublicKey(purposeAudit, generation)
	if err != nil {
		return tokenFault("reading the audit key", err)
	}
	if s.ring == nil || !s.ring.Has(generation) {
		if err := s.loadKeys(ctx, log); err != nil {
			return err
		}
	}
	if !s.ring.Has(generation) {
		k := audit.Key{Generation: generation, PublicKey: public}
		if k.Signature, err = s.token.Sign(ctx, purposeIdentity, identityGeneration, k.Digest(s.vaultID)); err != nil {
			return tokenFault("certifying the audit key", err)
		}
		if err := s.store.AddAuditKey(ctx, k); err != nil {
			return storeFault("writing the audit key", err)
		}
		if err := s.loadKeys(ctx, log); err != nil {
			return err
		}
	}
	return nil
}
