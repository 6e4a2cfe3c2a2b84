package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/vault"
)

// readAccount answers one row for each generation, one if there is none, and one,
// empty but for the clock, if there is no account.
const readAccount = `
SELECT statement_timestamp(),
	a.pseudonym, a.max_attempts, a.delays, a.grace, a.head, a.next_number, a.mac_key, a.mac,
	g.number, g.generation_id, g.follows, g.state, g.reason, g.created_at, g.expires_at, g.digest, g.owner_key,
	g.ksf_time, g.ksf_memory_kib, g.ksf_threads, g.sealed, g.oprf_key, g.server_key, g.strategy,
	g.started, g.last_success, g.successes, g.attempts
FROM (VALUES (true)) AS always (here)
LEFT JOIN accounts AS a ON a.tenant = $1 AND a.user_id = $2
LEFT JOIN LATERAL (
	SELECT * FROM generations WHERE tenant = a.tenant AND user_id = a.user_id AND state <> 'destroyed'
	UNION ALL
	SELECT * FROM generations WHERE tenant = a.tenant AND user_id = a.user_id AND generation_id = a.head AND state = 'destroyed'
) AS g ON true
ORDER BY g.number`

// Where readAccount's tables begin.
const (
	columnPseudonym = 1
	columnNumber    = 9
	columns         = 29
)

// Account implements vault.Store. A row that no vault could have written, and no
// constraint stopped, is reported as vault.ErrAccountFault.
func (s *Store) Account(ctx context.Context, id vault.AccountID) (vault.Snapshot, error) {
	var snap vault.Snapshot
	err := s.with(ctx, "reading an account", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, readAccount, id.Tenant, []byte(id.User))
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := scanAccount(rows, &snap); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	if err != nil {
		return vault.Snapshot{}, err
	}
	if snap.Exists {
		snap.Account.ID = id
	}
	return snap, nil
}

// scanAccount adds one row of readAccount to snap.
func scanAccount(rows pgx.Rows, snap *vault.Snapshot) error {
	raw := rows.RawValues()
	first := snap.Now.IsZero()
	into := make([]any, columns) // what is nil is skipped
	into[0] = &snap.Now
	if first && raw[columnPseudonym] != nil {
		a := &snap.Account
		snap.Exists = true
		copy(into[columnPseudonym:], []any{
			exactly(a.Pseudonym[:]), &a.Policy.MaxAttempts, &a.Policy.Delays, &a.Policy.Grace,
			orZero(a.Head[:]), &a.NextNumber, &a.MACKey, exactly(a.MAC[:]),
		})
	}
	var (
		g         vault.Generation
		reason    *vault.Reason
		expiresAt *time.Time
		attempts  []byte
	)
	found := raw[columnNumber] != nil
	if found {
		copy(into[columnNumber:], []any{
			&g.Number, exactly(g.ID[:]), orZero(g.Follows[:]), &g.State, &reason, &g.CreatedAt, &expiresAt,
			exactly(g.Digest[:]), exactly(g.OwnerKey[:]), &g.KSF.Time, &g.KSF.MemoryKiB, &g.KSF.Threads,
			&g.Sealed, &g.OPRFKey, &g.ServerKey, &g.Strategy, &g.Started, &g.LastSuccess, &g.Successes, &attempts,
		})
	}
	if err := rows.Scan(into...); err != nil {
		return fmt.Errorf("%w: %w", vault.ErrAccountFault, err)
	}
	snap.Now = snap.Now.UTC()
	if len(snap.Account.Policy.Delays) == 0 {
		snap.Account.Policy.Delays = nil
	}
	if !found {
		return nil
	}
	g.CreatedAt = g.CreatedAt.UTC()
	if reason != nil {
		g.Reason = *reason
	}
	if expiresAt != nil {
		g.ExpiresAt = expiresAt.UTC()
	}
	var err error
	if g.Attempts, err = decodeAttempts(attempts); err != nil {
		return fmt.Errorf("%w: %w", vault.ErrAccountFault, err)
	}
	snap.Account.Generations = append(snap.Account.Generations, g)
	return nil
}

// fixedBytes scans a bytea of exactly its own length.
type fixedBytes struct {
	into     []byte
	nullable bool // null is all zeros
}

func exactly(into []byte) *fixedBytes { return &fixedBytes{into: into} }
func orZero(into []byte) *fixedBytes  { return &fixedBytes{into: into, nullable: true} }

// ScanBytes implements pgtype.BytesScanner.
func (f *fixedBytes) ScanBytes(v []byte) error {
	if v == nil && f.nullable {
		clear(f.into)
		return nil
	}
	if len(v) != len(f.into) {
		return fmt.Errorf("want %d bytes, got %d", len(f.into), len(v))
	}
	copy(f.into, v)
	return nil
}

// The parameters of writes: the account, its changed generations and the events, the
// last two as arrays with one element for each row.
const changedRows = `
changed AS MATERIALIZED (
	SELECT * FROM unnest(
		@number::bigint[], @generation_id::bytea[], @follows::bytea[], @state::text[], @reason::text[],
		@created_at::timestamptz[], @expires_at::timestamptz[], @digest::bytea[], @owner_key::bytea[],
		@ksf_time::bigint[], @ksf_memory_kib::bigint[], @ksf_threads::bigint[], @sealed::bytea[],
		@oprf_key::bigint[], @server_key::bigint[], @strategy::text[],
		@started::bigint[], @last_success::bigint[], @successes::bigint[], @attempts::jsonb[])
	AS c (number, generation_id, follows, state, reason, created_at, expires_at, digest, owner_key,
		ksf_time, ksf_memory_kib, ksf_threads, sealed, oprf_key, server_key, strategy,
		started, last_success, successes, attempts)
)`

// storeRows needs the row of account to be written, else it does nothing.
const storeRows = `
stored AS (
	INSERT INTO generations AS g (tenant, user_id,
		number, generation_id, follows, state, reason, created_at, expires_at, digest, owner_key,
		ksf_time, ksf_memory_kib, ksf_threads, sealed, oprf_key, server_key, strategy,
		started, last_success, successes, attempts, destroyed_at)
	SELECT account.tenant, account.user_id, changed.*, CASE WHEN changed.state = 'destroyed' THEN statement_timestamp() END
	FROM account, changed
	ON CONFLICT ON CONSTRAINT generations_pk DO UPDATE SET
		state = excluded.state, reason = excluded.reason, expires_at = excluded.expires_at, sealed = excluded.sealed,
		started = excluded.started, last_success = excluded.last_success, successes = excluded.successes,
		attempts = excluded.attempts, destroyed_at = excluded.destroyed_at
), recorded AS (
	INSERT INTO events (kind, tenant, pseudonym, generation_id, attempt, reason, request_id)
	SELECT e.* FROM account, unnest(@event_kind::text[], @event_tenant::text[], @event_pseudonym::bytea[],
		@event_generation::bytea[], @event_attempt::bigint[], @event_reason::text[], @event_request::text[]) AS e
)
SELECT count(*) FROM account`

// noKeyCloses holds unless the row is to depend on a key that is about to be destroyed. A write whose
// statement began before the key was marked is waited for before dependents are counted (see AwaitWrites).
const noKeyCloses = `NOT EXISTS (
		SELECT FROM unnest(@key_purpose::text[], @key_generation::bigint[]) AS new (purpose, generation)
		JOIN key_generations AS k USING (purpose, generation) WHERE k.state IN ('closing', 'destroyed')
	)`

// createAccount writes a new account, if there is none and it keeps within its cap.
var createAccount = numbered(`
WITH ` + changedRows + `, account AS (
	INSERT INTO accounts (tenant, user_id, pseudonym, max_attempts, delays, grace, head, next_number, mac_key, mac, due_at)
	SELECT @tenant, @user::bytea, @pseudonym::bytea, @max_attempts::integer, @delays::interval[], @grace::interval,
		@head::bytea, @next_number::bigint, @mac_key::bigint, @mac::bytea, @due::timestamptz
	WHERE @max_attempts >= (SELECT coalesce(sum(started - last_success), 0) FROM changed WHERE state IN ('active', 'frozen'))
	AND NOT EXISTS (SELECT FROM changed WHERE number >= @next_number)
	AND ` + noKeyCloses + `
	ON CONFLICT ON CONSTRAINT accounts_pk DO NOTHING
	RETURNING tenant, user_id
), ` + storeRows)

// writeAccount is the compare-and-swap that attempts are counted with, and holds
// the guess law. The account's row is written only if it carries the MAC that was
// read, and
//
//   - no counter goes back: not the next number of the account, nor what a
//     generation has started, credited or last credited; and what is forgiven
//     (last_success) moves together with a success and not otherwise;
//   - a destroyed generation never changes, no generation returns to an earlier state,
//     and what was fixed when it was staged stays as it was;
//   - the attempts used since the last success, summed over the live
//     generations as they will be, do not exceed the cap;
//   - the policy stays, unless just one live generation will be left, with no
//     attempt used: else a looser one could give attempts back;
//   - nothing that it newly depends on is a key about to be destroyed.
//
// The generations and events are written only if that row is.
//
// The subqueries see what was committed when the statement began (READ COMMITTED), and that
// is enough. Every write changes the account's MAC in the statement that changes
// its generations. So if this row still carries the MAC that was read, then either
// no write came between, and the generations seen are its own; or one was
// committed after this statement began, and then the UPDATE waits for that
// row, looks at its newest version, finds another MAC, and changes nothing.
// A MAC does not come back either: it covers counters that only grow.
var writeAccount = numbered(`
WITH ` + changedRows + `, live AS MATERIALIZED (
	SELECT count(*) AS generations, coalesce(sum(started - last_success), 0) AS used
	FROM (
		SELECT state, started, last_success FROM changed
		UNION ALL
		SELECT g.state, g.started, g.last_success FROM generations AS g
		WHERE g.tenant = @tenant AND g.user_id = @user AND g.state <> 'destroyed'
		AND NOT EXISTS (SELECT FROM changed WHERE changed.number = g.number)
	) AS afterwards
	WHERE state IN ('active', 'frozen')
), account AS (
	UPDATE accounts AS a SET
		max_attempts = @max_attempts, delays = @delays, grace = @grace, head = @head,
		next_number = @next_number, mac_key = @mac_key, mac = @mac, due_at = @due, updated_at = statement_timestamp()
	WHERE a.tenant = @tenant AND a.user_id = @user AND a.mac = @previous
	AND a.pseudonym = @pseudonym
	AND a.next_number <= @next_number
	AND (SELECT used FROM live) <= @max_attempts
	AND ((a.max_attempts, a.delays, a.grace) = (@max_attempts, @delays, @grace)
		OR (SELECT generations = 1 AND used = 0 FROM live))
	AND NOT EXISTS (SELECT FROM changed WHERE changed.number >= @next_number)
	AND NOT EXISTS (
		SELECT FROM changed AS c JOIN generations AS g ON g.tenant = @tenant AND g.user_id = @user AND g.number = c.number
		WHERE g.state = 'destroyed'
		OR c.started < g.started OR c.last_success < g.last_success OR c.successes < g.successes
		OR (c.last_success > g.last_success) <> (c.successes > g.successes)
		OR c.state = 'staged' AND g.state <> 'staged'
		OR c.state = 'frozen' AND g.state = 'staged'
		OR (c.generation_id, c.created_at, c.digest, c.owner_key, c.ksf_time, c.ksf_memory_kib, c.ksf_threads,
			c.oprf_key, c.server_key, c.strategy)
		<> (g.generation_id, g.created_at, g.digest, g.owner_key, g.ksf_time, g.ksf_memory_kib, g.ksf_threads,
			g.oprf_key, g.server_key, g.strategy)
		OR c.follows IS DISTINCT FROM g.follows
	)
	AND ` + noKeyCloses + `
	RETURNING a.tenant, a.user_id
), ` + storeRows)

// whyNot tells why nothing was written: the account's MAC, and a key that is closing, null for none.
const whyNot = `
SELECT a.mac, k.purpose, k.generation
FROM (VALUES (true)) AS always (here)
LEFT JOIN accounts AS a ON a.tenant = $1 AND a.user_id = $2
LEFT JOIN LATERAL (
	SELECT purpose, generation FROM unnest($3::text[], $4::bigint[]) AS new (purpose, generation)
	JOIN key_generations USING (purpose, generation) WHERE state IN ('closing', 'destroyed') LIMIT 1
) AS k ON true`

// Write implements vault.Store. It refuses, having written nothing, a change that would
// not read back as it was written: times and delays finer than a microsecond.
func (s *Store) Write(ctx context.Context, change vault.Change) error {
	write, doing := writeAccount, "writing an account"
	if change.Create {
		write, doing = createAccount, "creating an account"
	}
	values, err := writeArgs(change)
	if err != nil {
		return fmt.Errorf("store: %s: %w", doing, err)
	}
	var written int
	err = s.with(ctx, doing, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, write.sql, write.args(values)...).Scan(&written)
	})
	switch {
	case violates(err, "generations_id_key", uniqueViolation):
		return fmt.Errorf("%w: the generation id is taken", vault.ErrStale)
	case violates(err, "accounts_", checkViolation), violates(err, "generations_", checkViolation, exclusionViolation):
		return fmt.Errorf("%w: %w", vault.ErrLaw, err)
	case violates(err, "accounts_tenant_fk", foreignKeyViolation):
		return fmt.Errorf("store: %s: %w", doing, ErrUnknownTenant)
	case err != nil:
		return err
	case written == 1:
		return nil
	}
	// Nothing was written. A key that is closing never opens again. Else, if the MAC is
	// the one that was read, it was the law: the same MAC means that nothing was written since.
	var (
		mac        []byte
		purpose    *string
		generation *uint32
	)
	err = s.with(ctx, "finding out why nothing was written", func(ctx context.Context, conn *pgx.Conn) error {
		id := change.Account.ID
		return conn.QueryRow(ctx, whyNot, id.Tenant, []byte(id.User), values["key_purpose"], values["key_generation"]).
			Scan(&mac, &purpose, &generation)
	})
	switch {
	case err != nil:
		return err
	case purpose != nil:
		return &vault.ClosingKey{Key: vault.Key{Purpose: *purpose, Generation: *generation}}
	case change.Create && mac == nil, !change.Create && bytes.Equal(mac, change.Previous[:]):
		return vault.ErrLaw
	}
	return vault.ErrStale
}

// writeArgs lays a change out as the parameters of the statements above.
func writeArgs(change vault.Change) (map[string]any, error) {
	a := &change.Account
	var inexact error
	whole := func(field string, d time.Duration) {
		if d%time.Microsecond != 0 {
			inexact = fmt.Errorf("%s is finer than a microsecond", field)
		}
	}
	whole("grace", a.Policy.Grace)
	for _, d := range a.Policy.Delays {
		whole("a delay", d)
	}
	due := a.Due()
	args := map[string]any{
		"tenant": a.ID.Tenant, "user": []byte(a.ID.User), "previous": change.Previous[:], "pseudonym": a.Pseudonym[:],
		"max_attempts": a.Policy.MaxAttempts, "delays": delaysOf(a.Policy), "grace": a.Policy.Grace,
		"head": orNull(a.Head), "next_number": a.NextNumber, "mac_key": a.MACKey, "mac": a.MAC[:], "due": timeOrNull(due),
	}

	n := len(change.Changed)
	var (
		number, ksfTime, ksfMemory, ksfThreads = make([]int64, n), make([]int64, n), make([]int64, n), make([]int64, n)
		oprfKey, serverKey                     = make([]int64, n), make([]int64, n)
		started, lastSuccess, successes        = make([]int64, n), make([]int64, n), make([]int64, n)
		id, follows, digest, ownerKey, sealed  = make([][]byte, n), make([][]byte, n), make([][]byte, n), make([][]byte, n), make([][]byte, n)
		state, strategy, attempts              = make([]string, n), make([]string, n), make([]string, n)
		reason                                 = make([]*string, n)
		createdAt                              = make([]time.Time, n)
		expiresAt                              = make([]*time.Time, n)
	)
	for i := range change.Changed {
		g := &change.Changed[i]
		if i > 0 && g.Number <= change.Changed[i-1].Number {
			return nil, errors.New("the changed generations are not in the order of their numbers")
		}
		for _, t := range append([]time.Time{g.CreatedAt, g.ExpiresAt}, attemptTimes(g.Attempts)...) {
			whole("a time", time.Duration(t.Nanosecond()))
		}
		number[i], id[i], follows[i] = int64(g.Number), g.ID[:], orNull(g.Follows)
		state[i], reason[i] = string(g.State), textOrNull(string(g.Reason))
		createdAt[i], expiresAt[i] = g.CreatedAt, timeOrNull(g.ExpiresAt)
		digest[i], ownerKey[i], sealed[i] = g.Digest[:], g.OwnerKey[:], g.Sealed
		ksfTime[i], ksfMemory[i], ksfThreads[i] = int64(g.KSF.Time), int64(g.KSF.MemoryKiB), int64(g.KSF.Threads)
		oprfKey[i], serverKey[i], strategy[i] = int64(g.OPRFKey), int64(g.ServerKey), g.Strategy
		started[i], lastSuccess[i], successes[i] = int64(g.Started), int64(g.LastSuccess), int64(g.Successes)
		var err error
		if attempts[i], err = encodeAttempts(g.Attempts); err != nil {
			return nil, err
		}
	}
	if inexact != nil {
		return nil, inexact
	}
	args["number"], args["generation_id"], args["follows"], args["state"], args["reason"] = number, id, follows, state, reason
	args["created_at"], args["expires_at"], args["digest"], args["owner_key"] = createdAt, expiresAt, digest, ownerKey
	args["ksf_time"], args["ksf_memory_kib"], args["ksf_threads"], args["sealed"] = ksfTime, ksfMemory, ksfThreads, sealed
	args["oprf_key"], args["server_key"], args["strategy"] = oprfKey, serverKey, strategy
	args["started"], args["last_success"], args["successes"], args["attempts"] = started, lastSuccess, successes, attempts

	keyPurpose, keyGeneration := make([]string, len(change.Keys)), make([]int64, len(change.Keys))
	for i, k := range change.Keys {
		keyPurpose[i], keyGeneration[i] = k.Purpose, int64(k.Generation)
	}
	args["key_purpose"], args["key_generation"] = keyPurpose, keyGeneration

	m := len(change.Events)
	var (
		kind, tenant          = make([]string, m), make([]string, m)
		pseudonym, generation = make([][]byte, m), make([][]byte, m)
		number2               = make([]*int64, m)
		why, request          = make([]*string, m), make([]*string, m)
	)
	for i := range change.Events {
		e := &change.Events[i]
		kind[i], tenant[i], pseudonym[i], generation[i] = string(e.Kind), e.Tenant, e.Pseudonym[:], e.Generation[:]
		if e.Attempt != 0 {
			n := int64(e.Attempt)
			number2[i] = &n
		}
		why[i], request[i] = textOrNull(string(e.Reason)), textOrNull(e.RequestID)
	}
	args["event_kind"], args["event_tenant"], args["event_pseudonym"], args["event_generation"] = kind, tenant, pseudonym, generation
	args["event_attempt"], args["event_reason"], args["event_request"] = number2, why, request
	return args, nil
}

func attemptTimes(attempts []vault.Attempt) []time.Time {
	times := make([]time.Time, 0, 2*len(attempts))
	for _, a := range attempts {
		times = append(times, a.ChargedAt, a.ExpiresAt)
	}
	return times
}

func orNull(id vault.GenerationID) []byte {
	if id.IsZero() {
		return nil
	}
	return id[:]
}

func textOrNull(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func timeOrNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

const dueAccounts = `
SELECT tenant, user_id FROM accounts
WHERE due_at <= statement_timestamp() AND (tenant, user_id) > ($1, $2)
ORDER BY tenant, user_id LIMIT $3`

// Due implements vault.Store.
func (s *Store) Due(ctx context.Context, after vault.AccountID, limit int) ([]vault.AccountID, error) {
	var due []vault.AccountID
	err := s.with(ctx, "looking for what is due", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, dueAccounts, after.Tenant, []byte(after.User), limit)
		if err != nil {
			return err
		}
		due, err = pgx.CollectRows(rows, scanID)
		return err
	})
	return due, err
}

func scanID(row pgx.CollectableRow) (id vault.AccountID, err error) {
	var user []byte
	err = row.Scan(&id.Tenant, &user)
	id.User = string(user)
	return id, err
}

const generationTaken = `SELECT EXISTS (SELECT FROM generations WHERE tenant = $1 AND user_id = $2 AND generation_id = $3)`

// Taken implements vault.Store.
func (s *Store) Taken(ctx context.Context, id vault.AccountID, generation vault.GenerationID) (taken bool, err error) {
	err = s.with(ctx, "looking for a generation", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, generationTaken, id.Tenant, []byte(id.User), generation[:]).Scan(&taken)
	})
	return taken, err
}
