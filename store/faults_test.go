package store_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
)

var ann = vault.AccountID{Tenant: "alpha", User: "ann"}

// newAccount is an account with one active generation, as a change.
func newAccount(id vault.AccountID) vault.Change {
	now := time.Date(2026, 5, 6, 7, 8, 9, 1000, time.UTC)
	g := vault.Generation{
		Number: 1, ID: vault.GenerationID{1}, State: vault.Active, CreatedAt: now, KSF: vault.KSF{Time: 3, MemoryKiB: 65536, Threads: 4},
		Sealed: []byte(strings.Repeat("sealed", 50)), OPRFKey: 1, ServerKey: 1, Strategy: "derive",
	}
	a := vault.Account{
		ID: id, Pseudonym: [32]byte{1}, Policy: vault.DefaultPolicy(), Head: g.ID, NextNumber: 2, MACKey: 1, MAC: vault.RowMAC{1},
		Generations: []vault.Generation{g},
	}
	return vault.Change{Create: true, Account: a, Changed: a.Generations}
}

// charged is the change that charges an attempt on the account's only generation.
func charged(a vault.Account) vault.Change {
	g := a.Generations[0]
	g.Started++
	at := g.CreatedAt.Add(time.Duration(g.Started) * time.Second)
	g.Attempts = append(g.Attempts[:len(g.Attempts):len(g.Attempts)], vault.Attempt{
		Number: g.Started, Claim: vault.Claim{byte(g.Started)}, Outcome: vault.Open, ChargedAt: at, ExpiresAt: at.Add(vault.AttemptLifetime),
	})
	ch := vault.Change{Previous: a.MAC, Account: a, Changed: []vault.Generation{g}, Events: []vault.Event{{
		Kind: vault.EventAttempt, Tenant: a.ID.Tenant, Pseudonym: a.Pseudonym, Generation: g.ID, Attempt: g.Started, RequestID: "r",
	}}}
	ch.Account.Generations = ch.Changed
	ch.Account.MAC[31]++
	return ch
}

// credited is the change that credits the last attempt.
func credited(a vault.Account) vault.Change {
	g := a.Generations[0]
	g.LastSuccess, g.Successes = g.Started, g.Successes+1
	last := g.Attempts[len(g.Attempts)-1]
	last.Outcome = vault.Succeeded
	g.Attempts = []vault.Attempt{last}
	ch := vault.Change{Previous: a.MAC, Account: a, Changed: []vault.Generation{g}, Events: []vault.Event{{
		Kind: vault.EventSuccess, Tenant: a.ID.Tenant, Pseudonym: a.Pseudonym, Generation: g.ID, Attempt: g.Started, RequestID: "r",
	}}}
	ch.Account.Generations = ch.Changed
	ch.Account.MAC[31]++
	return ch
}

func mustWrite(t testing.TB, s *store.Store, ch vault.Change) {
	t.Helper()
	if err := s.Write(t.Context(), ch); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, s *store.Store, id vault.AccountID) vault.Snapshot {
	t.Helper()
	snap, err := s.Account(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func known(err error) bool { return errors.Is(err, vault.ErrStale) || errors.Is(err, vault.ErrLaw) }

// Every call is one statement, and no transaction is held.
func TestOneStatementForEachCall(t *testing.T) {
	t.Parallel()
	db := database(t)
	proxy := storetest.NewProxy(t, db.RuntimeURL)
	s := open(t, store.Config{URL: proxy.URL(), MaxConns: 1})
	ch := newAccount(ann)
	for name, call := range map[string]func() error{
		"read":    func() error { _, err := s.Account(t.Context(), ann); return err },
		"due":     func() error { _, err := s.Due(t.Context(), vault.AccountID{}, 10); return err },
		"taken":   func() error { _, err := s.Taken(t.Context(), ann, vault.GenerationID{}); return err },
		"tenants": func() error { _, err := s.Tenants(t.Context()); return err },
		"create":  func() error { return s.Write(t.Context(), newAccount(vault.AccountID{Tenant: "alpha", User: "new"})) },
	} {
		before := proxy.Statements()
		if err := call(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if n := proxy.Statements() - before; n != 1 {
			t.Errorf("%s: %d statements", name, n)
		}
	}
	mustWrite(t, s, ch)
	before := proxy.Statements()
	mustWrite(t, s, charged(ch.Account))
	if n := proxy.Statements() - before; n != 1 {
		t.Errorf("write: %d statements", n)
	}
}

func open(t testing.TB, config store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// A connection lost on the way there leaves nothing, one lost on the way back leaves
// everything; the caller cannot tell, and learns it by reading again.
func TestConnectionLostAroundAWrite(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		cut     func(*storetest.Proxy)
		written bool
	}{
		"before": {func(p *storetest.Proxy) { p.CutBefore(1) }, false},
		"after":  {func(p *storetest.Proxy) { p.CutAfter(1) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			db := database(t)
			proxy := storetest.NewProxy(t, db.RuntimeURL)
			s := open(t, store.Config{URL: proxy.URL()})
			a := newAccount(ann)
			for _, change := range []vault.Change{a, charged(a.Account)} {
				c.cut(proxy)
				if err := s.Write(t.Context(), change); err == nil || known(err) {
					t.Fatalf("got %v, want a fault", err)
				}
				snap := mustRead(t, s, ann)
				if got := snap.Account.MAC == change.Account.MAC; got != c.written {
					t.Fatalf("written: %v", got)
				}
				// The same again, by a caller that did not look.
				err := s.Write(t.Context(), change)
				if c.written && !errors.Is(err, vault.ErrStale) || !c.written && err != nil {
					t.Fatalf("the same again: %v", err)
				}
			}
			if n := db.Exec(t, `SELECT FROM events WHERE pseudonym IS NOT NULL`); n != 1 {
				t.Fatalf("%d events", n)
			}
		})
	}
}

func TestPostgresGoneAndBack(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.Database(t)
	if err := db.OwnerStore(t).AddTenant(t.Context(), vault.Tenant{ID: ann.Tenant, Policy: vault.DefaultPolicy()}); err != nil {
		t.Fatal(err)
	}
	s := db.Store(t)
	ch := newAccount(ann)
	mustWrite(t, s, ch)
	next := charged(ch.Account)
	cluster.Stop(t)
	if _, err := s.Account(t.Context(), ann); err == nil || errors.Is(err, vault.ErrAccountFault) {
		t.Fatalf("read: %v", err)
	}
	if err := s.Write(t.Context(), next); err == nil || known(err) {
		t.Fatalf("write: %v", err)
	}
	if err := s.Ping(t.Context()); err == nil {
		t.Fatal("it answers")
	}
	if _, err := store.Open(t.Context(), store.Config{URL: db.RuntimeURL}); err == nil {
		t.Fatal("opened")
	}
	cluster.Start(t)
	// The same store, without being opened again.
	if got := mustRead(t, s, ann).Account.MAC; got != ch.Account.MAC {
		t.Fatal("the committed row is gone, or another")
	}
	mustWrite(t, s, next)
}

// A writer waits for another's uncommitted change to the row, and then finds that
// it read an older one: the law was not looked at with the other's numbers, the MAC was.
func TestWriteWaitsForTheRow(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := open(t, store.Config{URL: db.RuntimeURL, Timeout: time.Minute})
	ch := newAccount(ann)
	mustWrite(t, s, ch)
	a := ch.Account
	for range 9 {
		next := charged(a)
		mustWrite(t, s, next)
		a = next.Account
	}
	other, err := pgx.Connect(t.Context(), db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close(context.Background())
	tx, err := other.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`UPDATE accounts SET mac = sha256('other')`,
		`UPDATE generations SET started = 10`, // the tenth attempt is somebody else's
	} {
		if _, err := tx.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	answer := make(chan error, 1)
	go func() { answer <- s.Write(t.Context(), charged(a)) }()
	// Clusters are shared: the transaction that is waited for must be this one.
	for waits := `SELECT FROM pg_locks WHERE NOT granted AND transactionid = (SELECT transactionid FROM pg_locks WHERE granted AND pid = $1 AND transactionid IS NOT NULL)`; db.Exec(t, waits, other.PgConn().PID()) == 0; {
		select {
		case err := <-answer:
			t.Fatalf("it did not wait: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; !errors.Is(err, vault.ErrStale) {
		t.Fatalf("got %v", err)
	}
	if n := db.Exec(t, `SELECT FROM generations WHERE jsonb_array_length(attempts) = 9`); n != 1 {
		t.Fatal("the generation was written all the same")
	}
	if n := db.Exec(t, `SELECT FROM events WHERE pseudonym IS NOT NULL`); n != 9 {
		t.Fatalf("%d events", n)
	}
}

// A row that somebody keeps locked is a fault in time, and nothing is written.
func TestLockedRow(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := open(t, store.Config{URL: db.RuntimeURL, Timeout: 200 * time.Millisecond})
	ch := newAccount(ann)
	mustWrite(t, db.Store(t), ch)
	other, err := pgx.Connect(t.Context(), db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close(context.Background())
	tx, err := other.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM accounts FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	var pgErr *pgconn.PgError
	if err := s.Write(t.Context(), charged(ch.Account)); !errors.As(err, &pgErr) || pgErr.Code != "55P03" { // lock_not_available
		t.Fatalf("got %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, db.Store(t), charged(ch.Account))
}

// With all connections taken a call waits for one as long as its context lets it, and
// no longer than its time-out.
func TestNoConnectionFree(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := open(t, store.Config{URL: db.RuntimeURL, MaxConns: 1, Timeout: 300 * time.Millisecond})
	release, err := s.Occupy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = s.Ping(t.Context())
	if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no connection in time") {
		t.Errorf("got %v: the time-out is the store's, not the caller's", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := s.Account(ctx, ann); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	release()
	if err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

// A server or role that was told to hurry or to isolate otherwise is overruled.
func TestSessionSettings(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.Database(t)
	for _, set := range []string{"synchronous_commit = off", "default_transaction_isolation = 'serializable'", "statement_timeout = 0", "timezone = 'Asia/Tokyo'"} {
		super, err := pgx.Connect(t.Context(), db.SuperuserURL())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := super.Exec(t.Context(), "ALTER ROLE bkv_service SET "+set); err != nil {
			t.Fatal(err)
		}
		super.Close(t.Context())
	}
	s := open(t, store.Config{URL: db.RuntimeURL, Timeout: 4 * time.Second})
	for name, want := range map[string]string{
		"synchronous_commit": "on", "default_transaction_isolation": "read committed",
		"statement_timeout": "4s", "lock_timeout": "2s", "TimeZone": "UTC",
	} {
		if got, err := s.Setting(t.Context(), name); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

// Rows that no vault wrote, where no constraint stopped them, are faults of the
// account and not of the store.
func TestRowsThatDoNotDecode(t *testing.T) {
	t.Parallel()
	for _, edit := range []string{
		`UPDATE generations SET attempts = '[{}]'`,
		`UPDATE generations SET attempts = jsonb_set(attempts, '{0,outcome}', '"refunded"')`,
		`UPDATE generations SET attempts = jsonb_set(attempts, '{0,claim}', '"secret-looking text"')`,
		`UPDATE generations SET created_at = 'infinity'`,
		`ALTER TABLE accounts DROP CONSTRAINT accounts_mac_length; UPDATE accounts SET mac = mac || mac`,
		`ALTER TABLE generations DROP CONSTRAINT generations_started_bounds; UPDATE generations SET started = 4294967296, last_success = 4294967296, successes = 4294967296`,
	} {
		db := database(t)
		s := db.Store(t)
		ch := newAccount(ann)
		mustWrite(t, s, ch)
		mustWrite(t, s, charged(ch.Account))
		for one := range strings.SplitSeq(edit, ";") {
			db.Exec(t, one)
		}
		_, err := s.Account(t.Context(), ann)
		if !errors.Is(err, vault.ErrAccountFault) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %v", edit, err)
		}
	}
}

// Errors name the operation and the constraint, and nothing that was sent.
func TestErrorsHaveNoValues(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	const secret = "hunter2hunter2"
	tooLong := newAccount(ann)
	tooLong.Changed[0].Sealed = []byte(strings.Repeat(secret, 1000))
	oddEvent := newAccount(ann)
	oddEvent.Events = []vault.Event{{Kind: secret, Tenant: "alpha", Generation: vault.GenerationID{1}}}
	notText := newAccount(ann)
	notText.Events = []vault.Event{{Kind: vault.EventStaged, Tenant: "alpha", Generation: vault.GenerationID{1}, RequestID: secret + "\x00\xff"}}
	taken := newAccount(vault.AccountID{Tenant: "alpha", User: secret})
	mustWrite(t, s, taken)
	g := taken.Changed[0]
	g.Number, g.State, g.ExpiresAt = 2, vault.Staged, g.CreatedAt
	taken = vault.Change{Previous: taken.Account.MAC, Account: taken.Account, Changed: []vault.Generation{g}}
	taken.Account.NextNumber = 3
	for name, c := range map[string]struct {
		change vault.Change
		want   error
	}{
		"a record too long": {tooLong, vault.ErrLaw},
		"an unknown event":  {oddEvent, nil},
		"not text":          {notText, nil},
		"an unknown tenant": {newAccount(vault.AccountID{Tenant: secret, User: secret}), store.ErrUnknownTenant},
		"a taken id":        {taken, vault.ErrStale},
	} {
		err := s.Write(t.Context(), c.change)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || c.want == nil && known(err) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "68756e74") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, url := range []string{
		"postgres://u:" + secret + "@/db?host=/nowhere",
		"postgres://u:" + secret + "%zz@/db",
		"host=/nowhere user=u password='" + secret + " dbname=db",
	} {
		if _, err := store.Open(t.Context(), store.Config{URL: url}); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%v", err)
		}
	}
	// The service's role may not do what operators do, and hears that it is for want of a right.
	err := s.SetPolicy(t.Context(), "alpha", vault.DefaultPolicy())
	if err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("got %v", err)
	}
}

// Events are there if and only if their change is.
func TestEvents(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	ch := newAccount(ann)
	ch.Events = []vault.Event{{Kind: vault.EventStaged, Tenant: "alpha", Pseudonym: ch.Account.Pseudonym, Generation: ch.Changed[0].ID}}
	mustWrite(t, s, ch)
	first := charged(ch.Account)
	mustWrite(t, s, first)
	if err := s.Write(t.Context(), charged(ch.Account)); !errors.Is(err, vault.ErrStale) {
		t.Fatal(err)
	}
	back := charged(first.Account)
	back.Changed[0].Started = 0
	if err := s.Write(t.Context(), back); !errors.Is(err, vault.ErrLaw) {
		t.Fatal(err)
	}
	gone := charged(first.Account)
	g := &gone.Changed[0]
	g.State, g.Reason, g.Sealed = vault.Destroyed, vault.TurnedOff, nil
	gone.Events = []vault.Event{{Kind: vault.EventDestroyed, Tenant: "alpha", Pseudonym: ch.Account.Pseudonym, Generation: g.ID, Reason: vault.TurnedOff, RequestID: "r2"}}
	mustWrite(t, s, gone)
	if n := db.Exec(t, `SELECT FROM events WHERE pseudonym IS NOT NULL`); n != 3 {
		t.Fatalf("%d events", n)
	}
	for _, want := range []string{
		`kind = 'staged' AND attempt IS NULL AND reason IS NULL AND request_id IS NULL`,
		`kind = 'attempt' AND attempt = 1 AND reason IS NULL AND request_id = 'r'`,
		`kind = 'destroyed' AND attempt IS NULL AND reason = 'turned-off' AND request_id = 'r2'`,
	} {
		if n := db.Exec(t, `SELECT FROM events WHERE tenant = 'alpha' AND pseudonym = $1 AND generation_id = $2 AND `+want,
			ch.Account.Pseudonym[:], ch.Changed[0].ID[:]); n != 1 {
			t.Errorf("%d events with %s", n, want)
		}
	}
	if n := db.Exec(t, `SELECT FROM generations WHERE sealed IS NOT NULL`); n != 0 {
		t.Errorf("%d sealed records left", n)
	}
}
