package store

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/vault"
)

var _ vault.KeyStore = (*Store)(nil)

const (
	// readKeys answers a row for each key and token that held it, one if none did, and one, empty but
	// for the clock, if there is no key.
	readKeys = `
SELECT statement_timestamp(), k.purpose, k.generation, k.state, k.proof, k.created_at, k.current_since, k.retired_at,
	k.destroyed_at, k.rewrapped_at, k.holder, k.held_until, k.seals, p.token_serial, p.gone_at IS NOT NULL, p.left_at IS NOT NULL
FROM (VALUES (true)) AS always (here)
LEFT JOIN key_generations AS k ON true
LEFT JOIN token_proofs AS p USING (purpose, generation)
ORDER BY array_position(ARRAY['master', 'state', 'oprf', 'server', 'relay', 'mac', 'identity', 'audit'], k.purpose),
	k.generation, p.token_serial`

	writeKey = `
INSERT INTO key_generations (purpose, generation, state, proof, created_at, current_since, retired_at, destroyed_at,
	rewrapped_at, holder, held_until)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
ON CONFLICT ON CONSTRAINT key_generations_pk DO UPDATE SET
	state = excluded.state, proof = excluded.proof, current_since = excluded.current_since, retired_at = excluded.retired_at,
	destroyed_at = excluded.destroyed_at, rewrapped_at = excluded.rewrapped_at, holder = excluded.holder, held_until = excluded.held_until`

	writeHolding = `
INSERT INTO token_proofs (token_serial, purpose, generation, gone_at, left_at)
VALUES ($1, $2, $3, CASE WHEN $4 THEN statement_timestamp() END, CASE WHEN $5 THEN statement_timestamp() END)
ON CONFLICT ON CONSTRAINT token_proofs_pk DO UPDATE SET
	gone_at = CASE WHEN $4 THEN coalesce(token_proofs.gone_at, excluded.gone_at) END,
	left_at = CASE WHEN $5 THEN coalesce(token_proofs.left_at, excluded.left_at) END`

	writeKeyEvent = `INSERT INTO events (kind, purpose, key_generation, detail, operator) VALUES ($1, $2, $3, $4, $5)`

	// keyEditors is the key of the advisory lock that EditKeys takes: "bkvkeys" in ASCII.
	keyEditors = 0x626b766b657973
)

// Keys implements vault.KeyStore.
func (s *Store) Keys(ctx context.Context) (table vault.KeyTable, err error) {
	err = s.with(ctx, "reading the table of keys", func(ctx context.Context, conn *pgx.Conn) error {
		table, err = keyTable(ctx, conn)
		return err
	})
	return table, err
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func keyTable(ctx context.Context, q querier) (table vault.KeyTable, err error) {
	rows, err := q.Query(ctx, readKeys)
	if err != nil {
		return table, err
	}
	defer rows.Close()
	for rows.Next() {
		var (
			purpose, state, holder, serial                             *string
			generation, seals                                          *int64
			proof                                                      []byte
			created, current, retired, destroyed, rewrapped, heldUntil *time.Time
			gone, left                                                 bool
		)
		if err := rows.Scan(&table.Now, &purpose, &generation, &state, &proof, &created, &current, &retired,
			&destroyed, &rewrapped, &holder, &heldUntil, &seals, &serial, &gone, &left); err != nil {
			return table, err
		}
		if purpose == nil {
			continue
		}
		key := vault.Key{Purpose: *purpose, Generation: uint32(*generation)}
		if n := len(table.Keys); n == 0 || table.Keys[n-1].Key != key {
			table.Keys = append(table.Keys, vault.KeyGeneration{
				Key: key, State: vault.KeyState(*state), Proof: proof, CreatedAt: orZeroTime(created), CurrentSince: orZeroTime(current),
				RetiredAt: orZeroTime(retired), DestroyedAt: orZeroTime(destroyed), RewrappedAt: orZeroTime(rewrapped),
				HeldUntil: orZeroTime(heldUntil), Seals: uint64(*seals),
			})
			if holder != nil {
				table.Keys[n].Holder = *holder
			}
		}
		if serial != nil {
			g := &table.Keys[len(table.Keys)-1]
			g.Tokens = append(g.Tokens, vault.KeyHolding{Serial: *serial, Gone: gone, Left: left})
		}
	}
	table.Now = table.Now.UTC()
	return table, rows.Err()
}

func orZeroTime(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.UTC()
}

// EditKeys implements vault.KeyStore. Its transaction holds an advisory lock from its first statement on, so that what
// it reads in the second was committed by all editors before.
func (s *Store) EditKeys(ctx context.Context, purpose string, edit func(*vault.KeyEdit) error) error {
	var refused error
	err := s.with(ctx, "editing the table of keys", func(ctx context.Context, conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(keyEditors)); err != nil {
				return err
			}
			table, err := keyTable(ctx, tx)
			if err != nil {
				return err
			}
			before := slices.Clone(table.Keys)
			for i := range before {
				before[i].Tokens = slices.Clone(before[i].Tokens)
			}
			e := vault.KeyEdit{KeyTable: table}
			if refused = edit(&e); refused != nil {
				return refused
			}
			return writeKeys(ctx, tx, purpose, before, &e)
		})
	})
	if refused != nil {
		return refused
	}
	return err
}

func writeKeys(ctx context.Context, tx pgx.Tx, purpose string, before []vault.KeyGeneration, e *vault.KeyEdit) error {
	batch := &pgx.Batch{}
	var using []vault.KeyGeneration // is written last: of each purpose one key is current at any time
	for _, g := range e.Keys {
		i := slices.IndexFunc(before, func(old vault.KeyGeneration) bool { return old.Key == g.Key })
		if g.Purpose != purpose || i >= 0 && sameKey(before[i], g) {
			continue
		}
		if g.State == vault.KeyCurrent {
			using = append(using, g)
			continue
		}
		queueKey(batch, g)
	}
	for _, g := range using {
		queueKey(batch, g)
	}
	for _, event := range e.Events {
		var generation *int64 // null: about no key
		if event.Key != (vault.Key{}) {
			n := int64(event.Key.Generation)
			generation = &n
		}
		batch.Queue(writeKeyEvent, event.Kind, textOrNull(event.Key.Purpose), generation, textOrNull(event.Detail), textOrNull(event.Operator))
	}
	return tx.SendBatch(ctx, batch).Close()
}

func queueKey(batch *pgx.Batch, g vault.KeyGeneration) {
	batch.Queue(writeKey, g.Purpose, g.Generation, g.State, g.Proof, g.CreatedAt, timeOrNull(g.CurrentSince), timeOrNull(g.RetiredAt),
		timeOrNull(g.DestroyedAt), timeOrNull(g.RewrappedAt), textOrNull(g.Holder), timeOrNull(g.HeldUntil))
	for _, t := range g.Tokens {
		batch.Queue(writeHolding, t.Serial, g.Purpose, g.Generation, t.Gone, t.Left)
	}
}

func sameKey(a, b vault.KeyGeneration) bool {
	return a.State == b.State && bytes.Equal(a.Proof, b.Proof) && a.CurrentSince.Equal(b.CurrentSince) && a.RetiredAt.Equal(b.RetiredAt) &&
		a.DestroyedAt.Equal(b.DestroyedAt) && a.RewrappedAt.Equal(b.RewrappedAt) && a.Holder == b.Holder && a.HeldUntil.Equal(b.HeldUntil) &&
		slices.Equal(a.Tokens, b.Tokens)
}

const addSeals = `UPDATE key_generations SET seals = seals + $3 WHERE purpose = $1 AND generation = $2`

// AddSeals implements vault.KeyStore.
func (s *Store) AddSeals(ctx context.Context, key vault.Key, n uint64) error {
	return s.with(ctx, "counting seals", func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, addSeals, key.Purpose, key.Generation, int64(n))
		return err
	})
}

// countDependents counts what depends on each key, or on one of them. What is destroyed depends on nothing.
const countDependents = `
SELECT 'master', sealed_under(sealed), count(*) FROM generations
WHERE state <> 'destroyed' AND ($1 = '' OR $1 = 'master' AND sealed_under(sealed) = $2) GROUP BY 2
UNION ALL
SELECT 'oprf', oprf_key, count(*) FROM generations
WHERE state <> 'destroyed' AND ($1 = '' OR $1 = 'oprf' AND oprf_key = $2) GROUP BY 2
UNION ALL
SELECT 'server', server_key, count(*) FROM generations
WHERE state <> 'destroyed' AND ($1 = '' OR $1 = 'server' AND server_key = $2) GROUP BY 2
UNION ALL
SELECT 'mac', mac_key, count(*) FROM accounts
WHERE $1 = '' OR $1 = 'mac' AND mac_key = $2 GROUP BY 2`

// Dependents implements vault.KeyStore.
func (s *Store) Dependents(ctx context.Context, key vault.Key) (int64, error) {
	all, err := s.dependents(ctx, key)
	return all[key], err
}

// AllDependents implements vault.KeyStore.
func (s *Store) AllDependents(ctx context.Context) (map[vault.Key]int64, error) {
	return s.dependents(ctx, vault.Key{})
}

func (s *Store) dependents(ctx context.Context, key vault.Key) (counts map[vault.Key]int64, err error) {
	counts = map[vault.Key]int64{}
	err = s.with(ctx, "counting what depends on keys", func(ctx context.Context, conn *pgx.Conn) error {
		// Planned for these parameters: with them most of the statement falls away.
		rows, err := conn.Query(ctx, countDependents, pgx.QueryExecModeExec, key.Purpose, int64(key.Generation))
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var k vault.Key
			var n int64
			var generation *int64 // null: what no token sealed
			if err := rows.Scan(&k.Purpose, &generation, &n); err != nil {
				return err
			}
			if generation != nil {
				k.Generation = uint32(*generation)
			}
			counts[k] = n
		}
		return rows.Err()
	})
	return counts, err
}

// AwaitWrites implements vault.KeyStore.
func (s *Store) AwaitWrites(ctx context.Context) error {
	return s.with(ctx, "waiting for writes that run", func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `SELECT await_account_writes()`)
		return err
	})
}

const oldestDestruction = `SELECT min(destroyed_at) FROM generations WHERE state = 'destroyed' AND destroyed_at >= $1`

// OldestDestruction implements vault.KeyStore.
func (s *Store) OldestDestruction(ctx context.Context, since time.Time) (oldest time.Time, err error) {
	err = s.with(ctx, "looking for the oldest destruction", func(ctx context.Context, conn *pgx.Conn) error {
		var at *time.Time
		err := conn.QueryRow(ctx, oldestDestruction, since).Scan(&at)
		oldest = orZeroTime(at)
		return err
	})
	return oldest, err
}

const (
	accountsUnderMaster = `
SELECT DISTINCT tenant, user_id FROM generations
WHERE state <> 'destroyed' AND sealed_under(sealed) = $1 AND (tenant, user_id) > ($2, $3)
ORDER BY tenant, user_id LIMIT $4`
	accountsUnderMAC = `
SELECT tenant, user_id FROM accounts
WHERE mac_key = $1 AND (tenant, user_id) > ($2, $3)
ORDER BY tenant, user_id LIMIT $4`
)

// Under implements vault.Store.
func (s *Store) Under(ctx context.Context, key vault.Key, after vault.AccountID, limit int) (ids []vault.AccountID, err error) {
	sql := accountsUnderMaster
	if key.Purpose == "mac" {
		sql = accountsUnderMAC
	}
	err = s.with(ctx, "looking for what is under a key", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, int64(key.Generation), after.Tenant, []byte(after.User), limit)
		if err != nil {
			return err
		}
		ids, err = pgx.CollectRows(rows, scanID)
		return err
	})
	return ids, err
}
