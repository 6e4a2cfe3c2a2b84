package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/audit"
	"github.com/backup-key-vault/bkv/vault"
)

var _ vault.AuditStore = (*Store)(nil)

const (
	// takeLease takes or renews the lease of the sequencer. It writes only if there is need: a lease is renewed when a
	// third of it has passed.
	takeLease = `
lease AS (
	UPDATE audit_log SET holder = $1, held_until = statement_timestamp() + $2::interval
	WHERE holder IS NULL OR held_until <= statement_timestamp()
		OR holder = $1 AND held_until <= statement_timestamp() + $2::interval * 2 / 3
	RETURNING true
), held AS (
	SELECT EXISTS (SELECT FROM lease) OR EXISTS (SELECT FROM audit_log
		WHERE holder = $1 AND held_until > statement_timestamp() + $2::interval * 2 / 3) AS mine
)`
	noLease = `
held AS (SELECT false AS mine)`

	// auditState answers one row, of which all but the clock and the waiting events is empty before the first start.
	auditState = `
SELECT statement_timestamp(), held.mine, l.vault_id, l.identity_key, head.sequence, head.hash,
	c.sequence, c.hash, c.at, c.key_generation, c.signature, waiting.n, oldest.at
FROM held
LEFT JOIN audit_log AS l ON true
LEFT JOIN LATERAL (SELECT sequence, hash FROM event_seals ORDER BY sequence DESC LIMIT 1) AS head ON true
LEFT JOIN LATERAL (SELECT * FROM audit_checkpoints ORDER BY sequence DESC LIMIT 1) AS c ON true
LEFT JOIN LATERAL (SELECT count(*) AS n FROM (SELECT FROM unsealed_events LIMIT $3) AS first) AS waiting ON true
LEFT JOIN LATERAL (SELECT at FROM unsealed_events JOIN events USING (id) ORDER BY id LIMIT 1) AS oldest ON true`
)

// AuditState implements vault.AuditStore.
func (s *Store) AuditState(ctx context.Context, holder string, lease time.Duration) (vault.AuditState, error) {
	return s.auditState(ctx, "WITH "+takeLease+auditState, holder, lease, vault.MaxWaiting)
}

// ReadAuditState is AuditState for who only reads: it takes no lease.
func (s *Store) ReadAuditState(ctx context.Context) (vault.AuditState, error) {
	// The first two parameters keep their places.
	return s.auditState(ctx, "WITH given AS (SELECT $1::text, $2::interval), "+noLease+auditState, "", time.Duration(0), vault.MaxWaiting)
}

func (s *Store) auditState(ctx context.Context, sql string, args ...any) (state vault.AuditState, err error) {
	err = s.with(ctx, "reading the state of the audit log", func(ctx context.Context, conn *pgx.Conn) error {
		var (
			log                                audit.Log
			c                                  audit.Checkpoint
			vaultID                            *string
			sequence, checkpointed, generation *int64
			signedAt, oldest                   *time.Time
		)
		if err := conn.QueryRow(ctx, sql, args...).Scan(&state.Now, &state.Held, &vaultID, orZero(log.IdentityKey[:]), &sequence, orZero(state.Hash[:]),
			&checkpointed, orZero(c.Hash[:]), &signedAt, &generation, orZero(c.Signature[:]), &state.Waiting, &oldest); err != nil {
			return err
		}
		state.Now, state.Oldest = state.Now.UTC(), orZeroTime(oldest)
		if vaultID != nil {
			log.VaultID = *vaultID
			state.Log = &log
		}
		if sequence != nil {
			state.Sequence = uint64(*sequence)
		}
		if checkpointed != nil {
			c.Sequence, c.At, c.KeyGeneration = uint64(*checkpointed), signedAt.UTC(), uint32(*generation)
			state.Newest = &c
		}
		return nil
	})
	return state, err
}

const releaseAudit = `UPDATE audit_log SET holder = NULL, held_until = NULL WHERE holder = $1`

// ReleaseAudit implements vault.AuditStore.
func (s *Store) ReleaseAudit(ctx context.Context, holder string) error {
	return s.execute(ctx, "giving up the audit log's lease", releaseAudit, holder)
}

const startAudit = `INSERT INTO audit_log (vault_id, identity_key) VALUES ($1, $2) ON CONFLICT ON CONSTRAINT audit_log_pk DO NOTHING`

// StartAudit implements vault.AuditStore.
func (s *Store) StartAudit(ctx context.Context, log audit.Log) error {
	return s.execute(ctx, "starting the audit log", startAudit, log.VaultID, log.IdentityKey[:])
}

func (s *Store) execute(ctx context.Context, doing, sql string, args ...any) error {
	return s.with(ctx, doing, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, sql, args...)
		return err
	})
}

const (
	eventColumns = `e.id, e.at, e.kind, e.tenant, e.pseudonym, e.generation_id, e.attempt, e.reason, e.request_id,
	e.purpose, e.key_generation, e.operator, e.detail, e.login`

	unsealedEvents = `
SELECT ` + eventColumns + ` FROM unsealed_events AS u JOIN events AS e USING (id) WHERE e.id > $1 ORDER BY e.id LIMIT $2`

	sealedEvents = `
SELECT s.sequence, s.hash, ` + eventColumns + `
FROM event_seals AS s LEFT JOIN events AS e ON e.id = s.event_id
WHERE s.sequence > $1 ORDER BY s.sequence LIMIT $2`
)

// scanEvent scans eventColumns, after what goes before them. An event that is not there has the id 0.
func scanEvent(row pgx.CollectableRow, e *audit.Event, before ...any) error {
	var (
		at                                                              *time.Time
		id, attempt, keyGeneration                                      *int64
		kind, tenant, reason, request, purpose, operator, detail, login *string
	)
	if err := row.Scan(append(before, &id, &at, &kind, &tenant, &e.Pseudonym, &e.Generation, &attempt, &reason, &request,
		&purpose, &keyGeneration, &operator, &detail, &login)...); err != nil {
		return err
	}
	if id == nil {
		return nil
	}
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	e.ID, e.At, e.Kind, e.Tenant, e.Reason = uint64(*id), at.UTC(), text(kind), text(tenant), text(reason)
	e.RequestID, e.Purpose, e.Operator, e.Detail, e.Login = text(request), text(purpose), text(operator), text(detail), text(login)
	if attempt != nil {
		e.Attempt = uint32(*attempt)
	}
	if keyGeneration != nil {
		e.KeyGeneration = uint32(*keyGeneration)
	}
	return nil
}

// Unsealed implements vault.AuditStore.
func (s *Store) Unsealed(ctx context.Context, after uint64, limit int) ([]audit.Event, error) {
	return collect(ctx, s, "reading events that wait to be sealed", unsealedEvents, func(row pgx.CollectableRow) (e audit.Event, err error) {
		return e, scanEvent(row, &e)
	}, int64(after), limit)
}

// SealedEvents implements vault.AuditStore.
func (s *Store) SealedEvents(ctx context.Context, after uint64, limit int) ([]audit.Sealed, error) {
	return collect(ctx, s, "reading sealed events", sealedEvents, func(row pgx.CollectableRow) (e audit.Sealed, err error) {
		return e, scanEvent(row, &e.Event, &e.Sequence, exactly(e.Hash[:]))
	}, int64(after), limit)
}

func collect[T any](ctx context.Context, s *Store, doing, sql string, scan pgx.RowToFunc[T], args ...any) (all []T, err error) {
	err = s.with(ctx, doing, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		all, err = pgx.CollectRows(rows, scan)
		return err
	})
	return all, err
}

const sealEvents = `SELECT seal_events($1, $2, $3, $4)`

// Seal implements vault.AuditStore.
func (s *Store) Seal(ctx context.Context, after uint64, previous audit.Hash, sealed []audit.Sealed) error {
	var before []byte // null: the chain is empty
	if after > 0 {
		before = previous[:]
	}
	ids, hashes := make([]int64, len(sealed)), make([][]byte, len(sealed))
	for i := range sealed {
		ids[i], hashes[i] = int64(sealed[i].ID), sealed[i].Hash[:]
	}
	var done bool
	err := s.with(ctx, "sealing events", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, sealEvents, int64(after), before, ids, hashes).Scan(&done)
	})
	if err == nil && !done {
		return vault.ErrStale
	}
	return err
}

const addCheckpoint = `
INSERT INTO audit_checkpoints (sequence, hash, at, key_generation, signature) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT ON CONSTRAINT audit_checkpoints_pk DO NOTHING`

// AddCheckpoint implements vault.AuditStore.
func (s *Store) AddCheckpoint(ctx context.Context, c audit.Checkpoint) error {
	return s.execute(ctx, "writing a checkpoint", addCheckpoint, int64(c.Sequence), c.Hash[:], c.At, int64(c.KeyGeneration), c.Signature[:])
}

const checkpoints = `
SELECT sequence, hash, at, key_generation, signature FROM audit_checkpoints WHERE sequence > $1 ORDER BY sequence LIMIT $2`

// Checkpoints returns at most limit checkpoints after a sequence number.
func (s *Store) Checkpoints(ctx context.Context, after uint64, limit int) ([]audit.Checkpoint, error) {
	return collect(ctx, s, "reading checkpoints", checkpoints, func(row pgx.CollectableRow) (c audit.Checkpoint, err error) {
		err = row.Scan(&c.Sequence, exactly(c.Hash[:]), &c.At, &c.KeyGeneration, exactly(c.Signature[:]))
		c.At = c.At.UTC()
		return c, err
	}, int64(after), limit)
}

const (
	addAuditKey = `
INSERT INTO audit_keys (generation, public_key, signature) VALUES ($1, $2, $3) ON CONFLICT ON CONSTRAINT audit_keys_pk DO NOTHING`
	auditKeys = `SELECT generation, public_key, signature FROM audit_keys ORDER BY generation`
)

// AddAuditKey implements vault.AuditStore.
func (s *Store) AddAuditKey(ctx context.Context, k audit.Key) error {
	return s.execute(ctx, "writing an audit key", addAuditKey, int64(k.Generation), k.PublicKey[:], k.Signature[:])
}

// AuditKeys implements vault.AuditStore.
func (s *Store) AuditKeys(ctx context.Context) ([]audit.Key, error) {
	return collect(ctx, s, "reading the audit keys", auditKeys, func(row pgx.CollectableRow) (k audit.Key, err error) {
		return k, row.Scan(&k.Generation, exactly(k.PublicKey[:]), exactly(k.Signature[:]))
	})
}

// strayEvents looks at a page of events for those that are neither sealed nor wait for it.
const strayEvents = `
WITH page AS (SELECT id FROM events WHERE id > $1 ORDER BY id LIMIT $2)
SELECT max(page.id), count(*), array_agg(page.id ORDER BY page.id) FILTER (WHERE s.event_id IS NULL AND u.id IS NULL)
FROM page LEFT JOIN event_seals AS s ON s.event_id = page.id LEFT JOIN unsealed_events AS u ON u.id = page.id`

// StrayEvents looks at the next limit events after an id. It returns those that are neither sealed nor wait for it, which no vault
// leaves behind, and where the next page begins; 0: there is none.
func (s *Store) StrayEvents(ctx context.Context, after uint64, limit int) (stray []uint64, next uint64, err error) {
	err = s.with(ctx, "looking for events that nobody will seal", func(ctx context.Context, conn *pgx.Conn) error {
		var last *int64
		var seen int
		if err := conn.QueryRow(ctx, strayEvents, int64(after), limit).Scan(&last, &seen, &stray); err != nil {
			return err
		}
		if last != nil && seen == limit {
			next = uint64(*last)
		}
		return nil
	})
	return stray, next, err
}

const lostEvents = `
SELECT u.id FROM unsealed_events AS u LEFT JOIN events AS e USING (id) WHERE e.id IS NULL ORDER BY u.id LIMIT $1`

// LostEvents returns at most limit events that wait to be sealed and are gone.
func (s *Store) LostEvents(ctx context.Context, limit int) ([]uint64, error) {
	return collect(ctx, s, "looking for waiting events that are gone", lostEvents, pgx.RowTo[uint64], limit)
}

const pseudonymOf = `SELECT pseudonym FROM accounts WHERE tenant = $1 AND user_id = $2`

// Pseudonym is how events name an account; nil: there is none.
func (s *Store) Pseudonym(ctx context.Context, id vault.AccountID) ([]byte, error) {
	all, err := collect(ctx, s, "looking for a pseudonym", pseudonymOf, pgx.RowTo[[]byte], id.Tenant, []byte(id.User))
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[0], nil
}
