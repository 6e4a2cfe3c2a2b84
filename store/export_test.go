package store

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// Setting is a session's setting as the server sees it.
func (s *Store) Setting(ctx context.Context, name string) (value string, err error) {
	err = s.with(ctx, "reading a setting", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&value)
	})
	return value, err
}

// Occupy takes a connection away until release.
func (s *Store) Occupy(ctx context.Context) (release func(), err error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	return conn.Release, nil
}
