package vault_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/audit"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
)

// sequencer is one at a node of its own connections, which signs at every opportunity.
func (s *site) sequencer(t testing.TB, n *node, wrap func(vault.AuditStore) vault.AuditStore) *vault.Sequencer {
	t.Helper()
	var st vault.AuditStore = s.db.Store(t)
	if wrap != nil {
		st = wrap(st)
	}
	q, err := vault.NewSequencer(vault.SequencerConfig{Store: st, Token: n.keys, VaultID: vaultID, CheckpointEvery: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// prove verifies the whole log, against what the token says is the vault.
func (s *site) prove(t testing.TB, n *node, remembered *audit.Checkpoint) *audit.Result {
	t.Helper()
	identity, err := n.Identity(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	db := s.db.Store(t)
	state, err := db.ReadAuditState(t.Context())
	if err != nil || state.Log == nil {
		t.Fatalf("%+v, %v", state, err)
	}
	result, err := audit.VerifySource(t.Context(), db, *state.Log, identity.Fingerprint, remembered, nil)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// proved fails unless the log verifies with n events, all sealed and signed; n < 0: any number.
func (s *site) proved(t testing.TB, n *node, events int) *audit.Result {
	t.Helper()
	r := s.prove(t, n, nil)
	for _, f := range r.Findings {
		t.Errorf("found: %v", f)
	}
	if total := s.db.Exec(t, `SELECT FROM events`); r.Last != uint64(total) || events >= 0 && int(r.Last) != events {
		t.Errorf("%d events are sealed of %d, want %d", r.Last, total, events)
	}
	if r.Newest == nil || r.Newest.Sequence != r.Last {
		t.Errorf("signed up to %+v", r.Newest)
	}
	if left := s.db.Exec(t, `SELECT FROM unsealed_events`); left > 0 {
		t.Errorf("%d events wait", left)
	}
	return r
}

func mustSeal(t testing.TB, q *vault.Sequencer) {
	t.Helper()
	if err := q.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// insertEvents puts events into the database as statements of the service do.
const insertEvents = `INSERT INTO events (kind, tenant, pseudonym, generation_id, attempt)
	SELECT 'attempt', 'app', sha256('p'), decode(repeat('ab', 16), 'hex'), n FROM generate_series(1, %d) AS n`

func TestSequencerSealsAndSigns(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	q := s.sequencer(t, n, nil)
	mustSeal(t, q)
	before := int(s.proved(t, n, -1).Last)
	// What a user does: staged, activated, attempt, success, attempt, failure, turned-off and frozen, reinstated, turned-off and destroyed.
	d := deviceOf(n.Vault, "ann")
	e := d.MustEnrol(t, "right", nil)
	if _, err := d.Recover(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	_, _ = d.Recover(t.Context(), "wrong")
	if _, err := n.TurnOff(t.Context(), d.Caller, e.Generation, nil); err != nil {
		t.Fatal(err)
	}
	mustSeal(t, q)
	s.proved(t, n, before+8)
	status := q.Status()
	if !status.Sealing || status.Fault != "" || status.Waiting != 0 || status.Lag != 0 || status.Sequence != uint64(before+8) || status.Signed != status.Sequence {
		t.Errorf("%+v", status)
	}
	rows := kinds(t, s.db, before)
	if want := "staged activated attempt success attempt failure turned-off frozen"; strings.Join(rows, " ") != want {
		t.Errorf("%v, want %s", rows, want)
	}
	// With nothing new there is neither seal nor signature.
	checkpoints := s.db.Exec(t, `SELECT FROM audit_checkpoints`)
	mustSeal(t, q)
	if again := s.db.Exec(t, `SELECT FROM audit_checkpoints`); again != checkpoints {
		t.Errorf("%d checkpoints more", again-checkpoints)
	}
}

// kinds are those of the sealed events after one, by sequence.
func kinds(t testing.TB, db *storetest.Database, after int) (kinds []string) {
	t.Helper()
	sealed, err := db.Store(t).SealedEvents(t.Context(), uint64(after), 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range sealed {
		kinds = append(kinds, e.Kind)
	}
	return kinds
}

// The audit key rotates, and the old one is destroyed: what it signed verifies all the same.
func TestCheckpointsOutliveTheirKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	q := s.sequencer(t, n, nil)
	mustSeal(t, q)
	old := s.proved(t, n, -1).Newest
	ctx := vault.WithOperator(t.Context(), "ann\x00@host")
	if _, err := n.rotation.Rotate(ctx, pkcs11util.Audit); err != nil {
		t.Fatal(err)
	}
	mustSeal(t, q)
	if err := n.rotation.Destroy(ctx, vault.Key{Purpose: pkcs11util.Audit, Generation: 1}); err != nil {
		t.Fatal(err)
	}
	mustSeal(t, q)
	r := s.proved(t, n, -1)
	if old.KeyGeneration != 1 || r.Newest.KeyGeneration != 2 {
		t.Errorf("signed by %d, then %d", old.KeyGeneration, r.Newest.KeyGeneration)
	}
	if got := kinds(t, s.db, int(old.Sequence)); strings.Join(got, " ") != "key-made key-current key-closing key-erased key-destroyed" {
		t.Errorf("%v", got)
	}
	if n := s.db.Exec(t, `SELECT FROM events WHERE operator = 'ann?@host' AND login = 'bkv_service' AND purpose = 'audit'`); n != 5 {
		t.Errorf("%d events say who asked", n)
	}
	if r := s.prove(t, n, old); len(r.Findings) > 0 {
		t.Errorf("%v", r.Findings)
	}
	// An instance that starts now goes on from there.
	other := s.start(t, nil)
	if err := q.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, fmt.Sprintf(insertEvents, 3))
	mustSeal(t, s.sequencer(t, other, nil))
	s.proved(t, other, int(r.Last)+3)
}

// Ids are given out in another order than transactions commit: a late one is sealed all the same.
func TestLateCommit(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	q := s.sequencer(t, n, nil)
	late, err := pgx.Connect(t.Context(), s.db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close(context.Background())
	tx, err := late.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var low uint64
	if err := tx.QueryRow(t.Context(), fmt.Sprintf(insertEvents, 1)+` RETURNING id`).Scan(&low); err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, fmt.Sprintf(insertEvents, 5))
	mustSeal(t, q)
	before := q.Status().Sequence
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustSeal(t, q)
	s.proved(t, n, int(before)+1)
	sealed, err := s.db.Store(t).SealedEvents(t.Context(), before-1, 2)
	if err != nil || len(sealed) != 2 || sealed[1].ID != low || sealed[0].ID < low {
		t.Errorf("%+v, %v", sealed, err)
	}
}

// Several instances seal while others write: one at a time, and everything once.
func TestSequencersRace(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	// These take no heed of the lease, so that nothing but the store keeps them apart.
	heedless := func(st vault.AuditStore) vault.AuditStore { return heedless{st} }
	var sequencers []*vault.Sequencer
	for range 4 {
		sequencers = append(sequencers, s.sequencer(t, n, heedless))
	}
	writing, done := context.WithCancel(t.Context())
	var writers, sealers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			d := deviceOf(n.Vault, fmt.Sprint("user ", w))
			d.MustEnrol(t, "right", nil)
			for range 8 {
				if _, err := d.Recover(t.Context(), "right"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, q := range sequencers {
		sealers.Go(func() {
			for writing.Err() == nil {
				if err := q.Seal(t.Context()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	done()
	sealers.Wait()
	mustSeal(t, sequencers[0])
	s.proved(t, n, -1)
}

type heedless struct{ vault.AuditStore }

func (h heedless) AuditState(ctx context.Context, holder string, lease time.Duration) (vault.AuditState, error) {
	state, err := h.AuditStore.AuditState(ctx, holder, lease)
	state.Held = true
	return state, err
}

func TestLease(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	a, b := s.sequencer(t, n, nil), s.sequencer(t, n, nil)
	mustSeal(t, a)
	s.db.Exec(t, fmt.Sprintf(insertEvents, 2))
	mustSeal(t, b)
	if sa, sb := a.Status(), b.Status(); !sa.Sealing || sb.Sealing || sb.Waiting != 2 || sb.Lag <= 0 || sb.Fault != "" {
		t.Errorf("%+v, %+v", sa, sb)
	}
	// The holder dies, and its lease runs out.
	s.db.Exec(t, `UPDATE audit_log SET held_until = statement_timestamp() WHERE holder IS NOT NULL`)
	mustSeal(t, b)
	s.proved(t, n, -1)
	s.db.Exec(t, fmt.Sprintf(insertEvents, 2))
	mustSeal(t, a)
	if a.Status().Sealing || a.Status().Waiting != 2 {
		t.Errorf("%+v", a.Status())
	}
	// It stops, and gives the lease up.
	if err := b.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustSeal(t, a)
	s.proved(t, n, -1)
	running, stop := context.WithCancel(t.Context())
	stop()
	a.Run(running)
	mustSeal(t, b)
	if !b.Status().Sealing {
		t.Errorf("%+v", b.Status())
	}
}

// dying fails at the nth call and every one after it, as a process does that is killed there: before the call or after it.
type dying struct {
	vault.AuditStore
	left  int
	after bool
}

var errKilled = errors.New("killed")

func (d *dying) step(do func() error) error {
	d.left--
	switch {
	case d.left > 0:
		return do()
	case d.left == 0 && d.after:
		_ = do()
	}
	return errKilled
}

func (d *dying) AuditState(ctx context.Context, holder string, lease time.Duration) (state vault.AuditState, err error) {
	err = d.step(func() error { state, err = d.AuditStore.AuditState(ctx, holder, lease); return err })
	return state, err
}
func (d *dying) StartAudit(ctx context.Context, log audit.Log) error {
	return d.step(func() error { return d.AuditStore.StartAudit(ctx, log) })
}
func (d *dying) Seal(ctx context.Context, after uint64, previous audit.Hash, sealed []audit.Sealed) error {
	return d.step(func() error { return d.AuditStore.Seal(ctx, after, previous, sealed) })
}
func (d *dying) AddCheckpoint(ctx context.Context, c audit.Checkpoint) error {
	return d.step(func() error { return d.AuditStore.AddCheckpoint(ctx, c) })
}
func (d *dying) AddAuditKey(ctx context.Context, k audit.Key) error {
	return d.step(func() error { return d.AuditStore.AddAuditKey(ctx, k) })
}
func (d *dying) ReleaseAudit(ctx context.Context, holder string) error {
	return d.step(func() error { return d.AuditStore.ReleaseAudit(ctx, holder) })
}

// The sequencer dies before and after each thing that it writes; another one completes its work.
func TestSequencerDiesAnywhere(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	s.db.Exec(t, fmt.Sprintf(insertEvents, 2500)) // three batches
	for step := 1; ; step++ {
		survived := false
		for _, after := range []bool{false, true} {
			s.db.Exec(t, `UPDATE audit_log SET held_until = statement_timestamp() WHERE holder IS NOT NULL`)
			q := s.sequencer(t, n, func(st vault.AuditStore) vault.AuditStore { return &dying{st, step, after} })
			switch err := q.Seal(t.Context()); {
			case err == nil:
				survived = true
			case !errors.Is(err, errKilled):
				t.Fatal(err)
			}
			if s.db.Exec(t, `SELECT FROM unsealed_events`) == 0 {
				s.db.Exec(t, fmt.Sprintf(insertEvents, 2500))
			}
		}
		if survived {
			if step < 5 {
				t.Errorf("it took %d steps", step)
			}
			break
		}
	}
	s.db.Exec(t, `UPDATE audit_log SET held_until = statement_timestamp() WHERE holder IS NOT NULL`)
	mustSeal(t, s.sequencer(t, n, nil))
	s.proved(t, n, -1)
}

// Without the token events are sealed, and signed when it is back.
func TestSealingWithoutTheToken(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	broken := &unsigning{Token: n.keys}
	q, err := vault.NewSequencer(vault.SequencerConfig{Store: s.db.Store(t), Token: broken, VaultID: vaultID, CheckpointEvery: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	broken.fails = true
	if err := q.Seal(t.Context()); !errors.Is(err, vault.ErrTokenUnavailable) {
		t.Fatal(err)
	}
	if status := q.Status(); status.Waiting != 0 || status.Signed != 0 || status.Sequence == 0 || status.Fault != "" {
		t.Errorf("%+v", status)
	}
	broken.fails = false
	mustSeal(t, q)
	s.proved(t, n, -1)
}

type unsigning struct {
	vault.Token
	fails bool
}

func (u *unsigning) Sign(ctx context.Context, purpose string, generation uint32, digest [32]byte) ([64]byte, error) {
	if u.fails {
		return [64]byte{}, errors.New("no token")
	}
	return u.Token.Sign(ctx, purpose, generation, digest)
}

// A superuser tampers with what is sealed, as the row-level rules of the database do not bind him. What follows is
// not sealed and signed over it, and whoever verifies is told where it is.
func TestTamperingInTheDatabase(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	first := s.sequencer(t, n, nil)
	s.db.Exec(t, `DELETE FROM unsealed_events; DELETE FROM events`) // so that events are numbered as they are written here
	fill := func(q *vault.Sequencer, events int) {
		t.Helper()
		s.db.Exec(t, fmt.Sprintf(insertEvents, events))
		mustSeal(t, q)
	}
	fill(first, 10)
	fill(first, 10)
	remembered := s.prove(t, n, nil).Newest
	fill(first, 5)
	s.proved(t, n, 25)

	for _, c := range []struct {
		name, tamper, want string
		// sealing goes on: what was changed lies before the newest checkpoint, which alone the sequencer starts from
		unseen bool
	}{
		{"edited", `UPDATE events SET kind = 'success' WHERE id = (SELECT event_id FROM event_seals WHERE sequence = 13)`,
			"event 13: not what was sealed here: edited, or put in another's place", true},
		{"edited login", `UPDATE events SET login = 'other' WHERE id = (SELECT event_id FROM event_seals WHERE sequence = 25)`,
			"event 25: not what was sealed here: edited, or put in another's place", true},
		{"deleted whole", `DELETE FROM events WHERE id = (SELECT event_id FROM event_seals WHERE sequence = 13); DELETE FROM event_seals WHERE sequence = 13`,
			"event 13: missing: deleted after being sealed", true},
		{"the row deleted", `DELETE FROM events WHERE id = (SELECT event_id FROM event_seals WHERE sequence = 13)`,
			"event 13: its row is gone: deleted after being sealed", true},
		{"unsealed", `DELETE FROM event_seals WHERE sequence = 13`, "event 13: missing: deleted after being sealed\nrows of events were neither sealed nor do they wait for it: 1, ids from", true},
		{"two changed places", `UPDATE event_seals SET event_id = -event_id WHERE sequence IN (13, 15);
				UPDATE event_seals AS s SET event_id = -o.event_id FROM event_seals AS o WHERE s.sequence + o.sequence = 28 AND s.sequence IN (13, 15)`,
			"event 13: out of order: it was sealed as number 15\nevent 15: out of order: it was sealed as number 13", true},
		{"put in, and renumbered", `UPDATE event_seals SET sequence = -sequence WHERE sequence > 12; UPDATE event_seals SET sequence = 1 - sequence WHERE sequence < 0;
				INSERT INTO events (kind, tenant, pseudonym, generation_id, attempt) VALUES ('attempt', 'app', sha256('p'), decode(repeat('ab', 16), 'hex'), 99);
				INSERT INTO event_seals SELECT 13, max(id), sha256('x') FROM events`,
			"event 13: not what was sealed here: edited, or put in another's place\nevents 14 to 26: sealed as 13 to 25, and renumbered: 1 before them were put in", false},
		{"cut off", `DELETE FROM audit_checkpoints WHERE sequence > 10; DELETE FROM event_seals WHERE sequence > 15; DELETE FROM events WHERE id > (SELECT max(event_id) FROM event_seals)`,
			"events 16 to 20: missing: the log was cut off at its end; the remembered checkpoint was signed at", true},
		{"cut off behind a checkpoint", `DELETE FROM event_seals WHERE sequence > 22; DELETE FROM events WHERE id > (SELECT max(event_id) FROM event_seals)`,
			"events 23 to 25: missing: the log ends before a checkpoint that was signed at", false},
		{"a waiting event deleted", fmt.Sprintf(insertEvents, 1) + `; DELETE FROM events WHERE id = (SELECT max(id) FROM events)`,
			"rows of events that waited to be sealed are gone: ids [", true},
		{"an event that does not wait", fmt.Sprintf(insertEvents, 1),
			"rows of events were neither sealed nor do they wait for it: 1", true},
		{"a checkpoint edited", `UPDATE audit_checkpoints SET at = at - interval '1 day' WHERE sequence = 25`, "checkpoint at 25: the signature does not verify", false},
		{"another key", `UPDATE audit_keys SET public_key = (SELECT identity_key FROM audit_log)`,
			"audit key 1: the identity key has not certified it\ncheckpoint at 10: no certificate", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			// A database of its own, with the same content, and the token that signed it.
			copied := *s
			copied.db = s.db.Copy(t)
			super, err := pgx.Connect(t.Context(), copied.db.SuperuserURL())
			if err != nil {
				t.Fatal(err)
			}
			defer super.Close(context.Background())
			for _, sql := range []string{`UPDATE audit_log SET held_until = statement_timestamp() WHERE holder IS NOT NULL`,
				// Superusers can have no constraint and no trigger hold.
				`ALTER TABLE event_seals DROP CONSTRAINT event_seals_sequence_bounds`, `SET session_replication_role = replica`,
				c.tamper} {
				if strings.HasPrefix(c.name, "a waiting") && strings.HasPrefix(sql, "SET session") {
					continue // its trigger puts it into the queue
				}
				if _, err := super.Exec(t.Context(), sql); err != nil {
					t.Fatalf("%s: %v", sql, err)
				}
			}
			memory := remembered
			if c.name == "another key" {
				memory = nil
			}
			r := copied.prove(t, n, memory)
			var lines []string
			for _, f := range r.Findings {
				lines = append(lines, f.String())
			}
			if got := strings.Join(lines, "\n"); !strings.HasPrefix(got, c.want) {
				t.Errorf("found:\n%s\nwant:\n%s", got, c.want)
			}
			// A new instance goes on from the newest checkpoint, or refuses to.
			q := copied.sequencer(t, n, nil)
			copied.db.Exec(t, fmt.Sprintf(insertEvents, 1))
			var fault *vault.AuditFault
			if err := q.Seal(t.Context()); errors.As(err, &fault) == c.unseen {
				t.Errorf("sealing on: %v", err)
			}
			if status := q.Status(); (status.Fault != "") == c.unseen || fault != nil && status.Waiting == 0 {
				t.Errorf("%+v", status)
			}
		})
	}

	// The instance that sealed it itself notices more: a log that was cut off, or put back from a dump.
	before := s.db.Exec(t, `SELECT FROM event_seals`)
	super, err := pgx.Connect(t.Context(), s.db.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(context.Background())
	if _, err := super.Exec(t.Context(), `SET session_replication_role = replica; DELETE FROM audit_checkpoints WHERE sequence > 10; DELETE FROM event_seals WHERE sequence > 15`); err != nil {
		t.Fatal(err)
	}
	var fault *vault.AuditFault
	if err := first.Seal(t.Context()); !errors.As(err, &fault) || !strings.Contains(fault.What, fmt.Sprintf("it ends with event 15, and event %d was sealed", before)) {
		t.Errorf("got %v", err)
	}
	if err := first.Seal(t.Context()); err != nil || first.Status().Fault != fault.What { // not looked at again at once
		t.Errorf("%v, %+v", err, first.Status())
	}
}

// Whose log it is cannot change.
func TestAnotherVaultsLog(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	mustSeal(t, s.sequencer(t, n, nil))
	q, err := vault.NewSequencer(vault.SequencerConfig{Store: s.db.Store(t), Token: n.keys, VaultID: "another"})
	if err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, `UPDATE audit_log SET held_until = statement_timestamp() WHERE holder IS NOT NULL`)
	var fault *vault.AuditFault
	if err := q.Seal(t.Context()); !errors.As(err, &fault) || !strings.Contains(fault.What, `the log of vault "`+vaultID) {
		t.Errorf("got %v", err)
	}
}

// The service's role cannot seal what does not wait, nor elsewhere than at the head.
func TestSealingByHand(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	mustSeal(t, s.sequencer(t, n, nil))
	db := s.db.Store(t)
	state, err := db.ReadAuditState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.db.Exec(t, fmt.Sprintf(insertEvents, 1))
	waiting, err := db.Unsealed(t.Context(), 0, 10)
	if err != nil || len(waiting) != 1 {
		t.Fatalf("%v, %v", waiting, err)
	}
	one := []audit.Sealed{{Event: waiting[0]}}
	sealed, err := db.SealedEvents(t.Context(), 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"after another number": db.Seal(t.Context(), state.Sequence+1, state.Hash, one),
		"after another hash":   db.Seal(t.Context(), state.Sequence, audit.Hash{}, one),
		"as the first":         db.Seal(t.Context(), 0, audit.Hash{}, one),
	} {
		if !errors.Is(err, vault.ErrStale) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, events := range map[string][]audit.Sealed{"sealed already": sealed, "twice": slices.Concat(one, one), "not there": {{Event: audit.Event{ID: 1 << 40}}}} {
		if err := db.Seal(t.Context(), state.Sequence, state.Hash, events); err == nil || errors.Is(err, vault.ErrStale) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left := s.db.Exec(t, `SELECT FROM unsealed_events`); left != 1 {
		t.Errorf("%d events wait", left)
	}
	var _ *store.Store = db
}
