// Package store keeps the vault's accounts, events and tenants in Postgres.
//
// It decides nothing: the vault decides, and the store records it, in one
// statement for each change, and holds the guess law once more where it writes
// (see writeAccount). What it reads it does not trust either: the account's MAC,
// which only the token can make, is the vault's to verify. It counts on Postgres
// for one thing, that a committed change is durable and never undone; whoever can
// replay old rows is beyond it.
//
// Calls honour their context while they wait for a connection. A statement, once
// begun, runs to its end within Config.Timeout: to cut it off would cost the
// connection, and leave it unknown whether a write was made. No transaction is held
// from one call to the next. A Store is safe for concurrent use.
package store

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/backup-key-vault/bkv/vault"
)

// Config says how to reach Postgres.
type Config struct {
	// URL is a connection string (postgres://…). It may hold a password, so it
	// comes from a file or the environment, never from an argument. The service logs
	// in as a member of bkv_runtime. Between it and Postgres there may be no pooler
	// that gives a connection's statements to different sessions.
	URL string
	// MaxConns bounds the open connections; 0 is 16. One is held for one statement
	// at a time, about a millisecond.
	MaxConns int
	// Timeout bounds each wait: for a connection, for a new connection to be made,
	// and for a statement, at both ends; for a row's lock half of it. 0 is 5 s.
	Timeout time.Duration
}

// Store is a vault.Store. Make it with Open.
type Store struct {
	pool    *pgxpool.Pool
	timeout time.Duration
}

var _ vault.Store = (*Store)(nil)

// Open connects to Postgres and proves that it answers. Close ends it. It does not
// look at the schema: migrations.Check does.
func Open(ctx context.Context, config Config) (*Store, error) {
	if config.MaxConns == 0 {
		config.MaxConns = 16
	}
	if config.Timeout == 0 {
		config.Timeout = 5 * time.Second
	}
	pc, err := pgxpool.ParseConfig(config.URL)
	if err != nil {
		return nil, fmt.Errorf("store: database URL: %w", err) // without the password
	}
	pc.MaxConns = int32(min(max(config.MaxConns, 1), 10_000))
	pc.ConnConfig.ConnectTimeout = config.Timeout
	session := pc.ConnConfig.RuntimeParams
	session["statement_timeout"] = milliseconds(config.Timeout)
	session["lock_timeout"] = milliseconds(config.Timeout / 2)
	// An attempt counts once it is on disk; no setting of the server or the role
	// makes that less.
	session["synchronous_commit"] = "on"
	// What writeAccount relies on.
	session["default_transaction_isolation"] = "read committed"
	session["timezone"] = "UTC"
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, failed("opening the pool", err)
	}
	s := &Store{pool: pool, timeout: config.Timeout}
	if err := s.Ping(ctx); err != nil {
		pool.Close()
		return nil, err
	}
	return s, nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(max(1, d.Milliseconds()), 10) }

// Close waits for running statements and closes all connections.
func (s *Store) Close() { s.pool.Close() }

// Stats is how the pool of connections fares. The counts begin with Open.
type Stats struct {
	// Max connections may be open; Open are, and InUse of them run a statement.
	Max, Open, InUse int
	// Acquired counts how often a connection was taken, Waited how often of these one had to be waited
	// for or made, and WaitedFor how long all that took. GaveUp counts those who got none in time.
	Acquired, Waited, GaveUp int64
	WaitedFor                time.Duration
}

// Stats answers from memory.
func (s *Store) Stats() Stats {
	p := s.pool.Stat()
	return Stats{
		Max: int(p.MaxConns()), Open: int(p.TotalConns()), InUse: int(p.AcquiredConns()),
		Acquired: p.AcquireCount(), Waited: p.EmptyAcquireCount(), GaveUp: p.CanceledAcquireCount(), WaitedFor: p.EmptyAcquireWaitTime(),
	}
}

// ServerStatus is what Postgres says of itself.
type ServerStatus struct {
	Server  string // its version
	Schema  int64  // the number of the last migration
	Standby bool   // it replays another server's log, and takes no writes
	// Synchronous: a commit is acknowledged when replicas hold it, too (synchronous_standby_names).
	Synchronous bool
	// Replicas are connected, and Lag is how far the last of them is behind in replaying. Visible says whether this login may
	// see the lag, which the service's rights do not include.
	Replicas int
	Lag      time.Duration
	Visible  bool
}

const serverStatus = `
SELECT current_setting('server_version'), pg_is_in_recovery(),
	(SELECT coalesce(max(version_id) FILTER (WHERE is_applied), 0) FROM schema_version),
	current_setting('synchronous_standby_names') <> '', count(r.pid),
	coalesce(max(r.replay_lag), interval '0'), coalesce(bool_and(r.pid IS NULL OR r.state IS NOT NULL), true)
FROM (VALUES (true)) AS always (here) LEFT JOIN pg_stat_replication AS r ON true`

// ServerStatus asks Postgres for it.
func (s *Store) ServerStatus(ctx context.Context) (status ServerStatus, err error) {
	err = s.with(ctx, "asking the database for its status", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, serverStatus).Scan(&status.Server, &status.Standby, &status.Schema,
			&status.Synchronous, &status.Replicas, &status.Lag, &status.Visible)
	})
	return status, err
}

// Ping reports whether Postgres answers.
func (s *Store) Ping(ctx context.Context) error {
	return s.with(ctx, "asking whether the database answers", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.Ping(ctx)
	})
}

// with runs one statement on a connection of the pool.
func (s *Store) with(ctx context.Context, doing string, statement func(context.Context, *pgx.Conn) error) error {
	waiting, cancel := context.WithTimeoutCause(ctx, s.timeout, errNoConnection)
	defer cancel()
	conn, err := s.pool.Acquire(waiting)
	if err != nil {
		if ctx.Err() == nil && waiting.Err() != nil {
			err = context.Cause(waiting)
		}
		return failed(doing, err)
	}
	defer conn.Release()
	// The server gives up at s.timeout; the second on top is for its answer.
	running, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), s.timeout+time.Second, errNoAnswer)
	defer cancel()
	if err := statement(running, conn.Conn()); err != nil {
		if running.Err() != nil {
			err = context.Cause(running)
		}
		return failed(doing, err)
	}
	return nil
}

var (
	errNoConnection = errors.New("no connection in time")
	errNoAnswer     = errors.New("no answer in time")
)

// fault is an error of Postgres or on the way there. Its text has no values and no
// parameters: pgx's own may.
type fault struct {
	doing string
	err   error
}

func failed(doing string, err error) error { return &fault{doing, err} }

func (f *fault) Unwrap() error { return f.err }

func (f *fault) Error() string {
	var (
		pgErr      *pgconn.PgError
		connectErr *pgconn.ConnectError
		netErr     net.Error
		text       string
	)
	switch {
	case errors.Is(f.err, vault.ErrAccountFault):
		text = "the row is not as the vault writes it"
	case errors.As(f.err, &connectErr):
		text = connectErr.Error() // names host, user and database
	case errors.As(f.err, &pgErr):
		text = "SQLSTATE " + pgErr.Code
		if pgErr.ConstraintName != "" {
			text += ", constraint " + pgErr.ConstraintName
		}
		// Messages of classes 22 (data) and 23 (constraints) may quote values.
		if !strings.HasPrefix(pgErr.Code, "22") && !strings.HasPrefix(pgErr.Code, "23") {
			text += ": " + pgErr.Message
		}
	case errors.Is(f.err, context.Canceled), errors.Is(f.err, context.DeadlineExceeded),
		errors.Is(f.err, errNoConnection), errors.Is(f.err, errNoAnswer), errors.As(f.err, &netErr):
		text = f.err.Error()
	case pgconn.SafeToRetry(f.err):
		text = "the connection is lost, nothing was sent"
	default:
		text = fmt.Sprintf("%T", f.err)
	}
	return "store: " + f.doing + ": " + text
}

// violates reports whether err is the violation of a constraint with this prefix, of
// the given SQLSTATEs.
func violates(err error, prefix string, codes ...string) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || !strings.HasPrefix(pgErr.ConstraintName, prefix) {
		return false
	}
	for _, code := range codes {
		if pgErr.Code == code {
			return true
		}
	}
	return false
}

// SQLSTATEs (Postgres documentation, appendix A) that mean something to the store.
const (
	foreignKeyViolation = "23503"
	uniqueViolation     = "23505"
	checkViolation      = "23514"
	exclusionViolation  = "23P01"
)
