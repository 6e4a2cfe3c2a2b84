package store

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/vault"
)

const readRelaySeeds = `SELECT generation, sealed FROM relay_seeds WHERE sealed IS NOT NULL`

// RelaySeeds implements vault.Store.
func (s *Store) RelaySeeds(ctx context.Context) (seeds map[uint32][]byte, err error) {
	err = s.with(ctx, "reading the relay key's seeds", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, readRelaySeeds)
		if err != nil {
			return err
		}
		seeds = map[uint32][]byte{}
		var generation int64
		var sealed []byte
		_, err = pgx.ForEachRow(rows, []any{&generation, &sealed}, func() error {
			seeds[uint32(generation)] = append([]byte(nil), sealed...)
			return nil
		})
		return err
	})
	return seeds, err
}

const (
	insertRelaySeed = `INSERT INTO relay_seeds (generation, sealed) VALUES ($1, $2) ON CONFLICT ON CONSTRAINT relay_seeds_pk DO NOTHING`
	// updateRelaySeed leaves an erased one as it is: null equals nothing.
	updateRelaySeed = `UPDATE relay_seeds SET sealed = $2 WHERE generation = $1 AND sealed = $3`
	closingMaster   = `SELECT count(*) FROM key_generations WHERE purpose = 'master' AND generation = sealed_under($1) AND state IN ('closing', 'destroyed')`
)

// SwapRelaySeed implements vault.Store. It shares the lock of those who edit the table of keys, so that a master key is not marked as
// closing between the look at its state and the write.
func (s *Store) SwapRelaySeed(ctx context.Context, generation uint32, old, sealed []byte) error {
	var refused error
	err := s.with(ctx, "writing a relay key's seed", func(ctx context.Context, conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock_shared($1)`, int64(keyEditors)); err != nil {
				return err
			}
			if sealed != nil {
				var closing int
				if err := tx.QueryRow(ctx, closingMaster, sealed).Scan(&closing); err != nil {
					return err
				}
				if closing > 0 {
					refused = &vault.ClosingKey{Key: vault.Key{Purpose: "master", Generation: vault.SealedUnder(sealed)}}
					return refused
				}
			}
			sql, args := updateRelaySeed, []any{int64(generation), sealed, old}
			if old == nil {
				sql, args = insertRelaySeed, args[:2]
			}
			tag, err := tx.Exec(ctx, sql, args...)
			if err == nil && tag.RowsAffected() == 0 {
				refused = vault.ErrStale
				return refused
			}
			return err
		})
	})
	if refused != nil && errors.Is(err, refused) {
		return refused
	}
	return err
}
