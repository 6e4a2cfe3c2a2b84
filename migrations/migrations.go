// Package migrations brings a database to the schema that this program knows, and
// tells whether a database is there.
//
// Migrations are embedded SQL, numbered without gaps, forward only, and never changed
// once merged. They are run by the role that owns the tables; the service logs in
// as a member of RuntimeRole, which may do only what the migrations grant it.
// Nothing here touches a row's content.
//
// All functions are safe for concurrent use, by several processes too: an advisory
// lock lets one of them work while the others wait.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// RuntimeRole is the group role that holds the service's rights. It cannot log in;
// operators grant it to the role that can: GRANT bkv_runtime TO vaultd.
const RuntimeRole = "bkv_runtime"

// What Check finds wrong. Each error that wraps one says what to do.
var (
	ErrNoSchema = errors.New("the database has no vault schema")
	ErrBehind   = errors.New("the database is older than this program")
	ErrAhead    = errors.New("the database is newer than this program")
)

// versionTable is goose's record of what was applied.
const versionTable = "schema_version"

//go:embed sql/*.sql
var embedded embed.FS

// Up applies what is missing, each migration in a transaction of its own, as the owner
// role that url logs in with. With nothing missing it changes nothing. It waits up to
// five minutes for another run to end. Repeating it is always safe; after an error
// the migrations before the failed one stay applied. It answers ErrAhead, having changed
// nothing, if the database is newer than this program.
func Up(ctx context.Context, url string, log *slog.Logger) error {
	provider, err := open(url)
	if err != nil {
		return err
	}
	defer provider.Close()
	results, err := provider.Up(ctx)
	var partial *goose.PartialError
	if errors.As(err, &partial) {
		results = partial.Applied
	}
	for _, r := range results {
		log.Info("migration applied", "version", r.Source.Version, "duration", r.Duration.Round(time.Millisecond))
	}
	if partial != nil {
		return fmt.Errorf("applying migration %d: %w", partial.Failed.Source.Version, plain(partial.Err))
	}
	if err != nil {
		return fmt.Errorf("migrating: %w", plain(err))
	}
	current, latest, err := provider.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("reading the schema's version: %w", plain(err))
	}
	return compare(current, latest)
}

// Check reports whether the database is at this program's schema: ErrNoSchema, ErrBehind
// or ErrAhead if not. The runtime role suffices. It changes nothing.
func Check(ctx context.Context, url string) error {
	latest, err := Latest()
	if err != nil {
		return err
	}
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return fmt.Errorf("database URL: %w", err)
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return fmt.Errorf("connecting to the database: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var current int64
	// max over no row is null: somebody made the table and nothing else.
	err = conn.QueryRow(ctx, `SELECT coalesce(max(version_id) FILTER (WHERE is_applied), 0) FROM `+versionTable).Scan(&current)
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "42P01": // undefined_table
		return compare(0, latest)
	case errors.As(err, &pgErr) && pgErr.Code == "42501": // insufficient_privilege
		return fmt.Errorf("reading the schema's version: role %s may not; have the owner run: GRANT %s TO %[1]s", pgx.Identifier{config.User}.Sanitize(), RuntimeRole)
	case err != nil:
		return fmt.Errorf("reading the schema's version: %w", err)
	}
	return compare(current, latest)
}

// Latest is the version of this program's schema.
func Latest() (int64, error) {
	files, err := fs.Glob(embedded, "sql/*.sql")
	return int64(len(files)), err // numbered from 1 without gaps, as a test asserts
}

func compare(current, latest int64) error {
	switch {
	case current == 0:
		return fmt.Errorf("%w: run vaultctl migrate", ErrNoSchema)
	case current < latest:
		return fmt.Errorf("%w: it is at version %d of %d; run vaultctl migrate", ErrBehind, current, latest)
	case current > latest:
		return fmt.Errorf("%w: it is at version %d, and %d is the last one known; upgrade this program", ErrAhead, current, latest)
	}
	return nil
}

func open(url string) (*goose.Provider, error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("database URL: %w", err)
	}
	files, err := fs.Sub(embedded, "sql")
	if err != nil {
		return nil, err
	}
	// One look a second, for five minutes.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300))
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(goose.DialectPostgres, stdlib.OpenDB(*config), files,
		goose.WithTableName(versionTable), goose.WithSessionLocker(locker), goose.WithDisableGlobalRegistry(true))
}

// plain leaves Postgres's own message, where there is one, without the statement
// that goose puts around it.
func plain(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr
	}
	return err
}
