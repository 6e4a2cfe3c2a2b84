package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
)

func masterKey(generation uint32) vault.Key {
	return vault.Key{Purpose: "master", Generation: generation}
}

func editKeys(t *testing.T, s *store.Store, edit func(*vault.KeyEdit)) {
	t.Helper()
	if err := s.EditKeys(t.Context(), "master", func(e *vault.KeyEdit) error { edit(e); return nil }); err != nil {
		t.Fatal(err)
	}
}

func addKey(state vault.KeyState, generation uint32) func(*vault.KeyEdit) {
	return func(e *vault.KeyEdit) {
		g := vault.KeyGeneration{
			Key: masterKey(generation), State: state, Proof: make([]byte, 33), CreatedAt: e.Now, CurrentSince: e.Now, RetiredAt: e.Now,
			Tokens: []vault.KeyHolding{{Serial: "a"}, {Serial: "b", Gone: true}},
		}
		if state == vault.KeyDestroyed {
			g.DestroyedAt = e.Now
		}
		e.Keys = append(e.Keys, g)
	}
}

func TestKeyTableReadsBack(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	if table, err := s.Keys(t.Context()); err != nil || len(table.Keys) != 0 || table.Now.IsZero() {
		t.Fatalf("empty: %+v, %v", table, err)
	}
	editKeys(t, s, addKey(vault.KeyCurrent, 1))
	editKeys(t, s, func(e *vault.KeyEdit) {
		// The next one comes into use in the same transaction.
		addKey(vault.KeyCurrent, 2)(e)
		e.Keys[0].State = vault.KeyRetired
		e.Keys[0].Tokens[0].Gone = true
		e.Events = append(e.Events, vault.KeyEvent{Kind: vault.EventKeyCurrent, Key: masterKey(2)})
		// Of another purpose: not written.
		e.Keys = append(e.Keys, vault.KeyGeneration{Key: vault.Key{Purpose: "mac", Generation: 1}, State: vault.KeyMaking, CreatedAt: e.Now})
	})
	if err := s.AddSeals(t.Context(), masterKey(2), 1<<40); err != nil {
		t.Fatal(err)
	}
	table, err := s.Keys(t.Context())
	if err != nil || len(table.Keys) != 2 {
		t.Fatalf("%+v, %v", table, err)
	}
	old, current := table.Find(masterKey(1)), table.Current("master")
	if old.State != vault.KeyRetired || !old.Tokens[0].Gone || current.Generation != 2 || current.Seals != 1<<40 || len(current.Proof) != 33 ||
		!current.Tokens[1].Gone || current.CurrentSince.After(table.Now) || !current.DestroyedAt.IsZero() {
		t.Errorf("%+v", table)
	}
	if n := db.Exec(t, `SELECT FROM events WHERE kind = 'key-current' AND purpose = 'master' AND key_generation = 2 AND tenant IS NULL`); n != 1 {
		t.Errorf("%d events", n)
	}
	// What is refused changes nothing, whoever refuses.
	refusal := errors.New("no")
	if err := s.EditKeys(t.Context(), "master", func(e *vault.KeyEdit) error { e.Keys[0].State = vault.KeyClosing; return refusal }); err != refusal {
		t.Errorf("got %v, want the refusal itself", err)
	}
	for name, edit := range map[string]func(*vault.KeyEdit){
		"two in use":               func(e *vault.KeyEdit) { e.Keys[0].State = vault.KeyCurrent },
		"destroyed without a time": func(e *vault.KeyEdit) { e.Keys[0].State = vault.KeyDestroyed },
		"made without a proof":     func(e *vault.KeyEdit) { e.Keys[0].Proof = nil },
		"an event without generation": func(e *vault.KeyEdit) {
			e.Events = []vault.KeyEvent{{Kind: vault.EventKeyMade}}
			e.Keys[0].State = vault.KeyClosing
		},
	} {
		if err := s.EditKeys(t.Context(), "master", func(e *vault.KeyEdit) error { edit(e); return nil }); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	for _, key := range []string{"'mac', 1", "'identity', 3"} {
		if err := tryExec(t, db.OwnerURL, `INSERT INTO key_generations (purpose, generation, state, destroyed_at) VALUES (`+key+`, 'destroyed', now())`); err == nil {
			t.Errorf("%s was destroyed", key)
		}
	}
	if again, err := s.Keys(t.Context()); err != nil || again.Keys[0].State != vault.KeyRetired {
		t.Errorf("%+v, %v", again, err)
	}
}

func tryExec(t *testing.T, url, sql string) error {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), sql)
	return err
}

// Of many editors at once each sees what the one before wrote.
func TestKeyEditsAreSerial(t *testing.T) {
	t.Parallel()
	db := database(t)
	stores := []*store.Store{db.Store(t), db.Store(t)}
	const edits = 40
	var wg sync.WaitGroup
	for i := range edits {
		wg.Go(func() {
			if err := stores[i%2].EditKeys(t.Context(), "master", func(e *vault.KeyEdit) error {
				addKey(vault.KeyMade, uint32(len(e.Keys)+1))(e)
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if table, err := stores[0].Keys(t.Context()); err != nil || len(table.Keys) != edits {
		t.Errorf("%d keys, want %d; %v", len(table.Keys), edits, err)
	}
}

func TestWritesUnderClosingKeys(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	editKeys(t, s, addKey(vault.KeyCurrent, 1))
	write := func(user string, create bool, keys ...vault.Key) error {
		id := vault.AccountID{Tenant: "alpha", User: user}
		change := vault.Change{Create: create, Keys: keys, Account: vault.Account{ID: id, Policy: vault.DefaultPolicy(), NextNumber: 1, MACKey: 1}}
		if !create {
			snap, err := s.Account(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			change.Previous, change.Account = snap.Account.MAC, snap.Account
			change.Account.MAC[0]++
		}
		return s.Write(t.Context(), change)
	}
	// Keys that the table does not know are no reason to refuse: it may not be filled yet.
	if err := write("ann", true, masterKey(1), masterKey(9)); err != nil {
		t.Fatal(err)
	}
	for _, state := range []vault.KeyState{vault.KeyRetired, vault.KeyClosing, vault.KeyDestroyed} {
		editKeys(t, s, func(e *vault.KeyEdit) {
			e.Keys[0].State = state
			if state == vault.KeyDestroyed {
				e.Keys[0].DestroyedAt = e.Now
			}
		})
		for name, err := range map[string]error{"update": write("ann", false, masterKey(9), masterKey(1)), "create": write(string(state), true, masterKey(1))} {
			var closing *vault.ClosingKey
			if refused := errors.As(err, &closing); refused != (state != vault.KeyRetired) || refused && closing.Key != masterKey(1) || !refused && err != nil {
				t.Errorf("%s under a %s key: %v", name, state, err)
			}
		}
		if err := write("ann", false); err != nil {
			t.Errorf("a write that depends on nothing new: %v", err)
		}
	}
}

// AwaitWrites waits for a write that runs, and holds no later one up for longer than that.
func TestAwaitWrites(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	conn, err := pgx.Connect(t.Context(), db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `UPDATE accounts SET mac_key = 2 WHERE user_id = 'nobody'`); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.AwaitWrites(t.Context()) }()
	for waiting := false; !waiting; time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-done:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		if err := tx.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'accounts'::regclass
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.AwaitWrites(t.Context()); err != nil { // with nothing to wait for
		t.Fatal(err)
	}
}

func TestDependentsAndDestructions(t *testing.T) {
	t.Parallel()
	db := database(t)
	s := db.Store(t)
	for i := range 5 {
		id := fmt.Sprintf("user-%d", i)
		db.Exec(t, `INSERT INTO accounts (tenant, user_id, pseudonym, max_attempts, delays, grace, next_number, mac_key, mac)
			VALUES ('alpha', $1::bytea, sha256('p'), 10, '{}', '7 days', 2, 1 + $2::integer % 2, sha256($1::bytea))`, []byte(id), i)
		db.Exec(t, `INSERT INTO generations (tenant, user_id, number, generation_id, state, reason, created_at, digest, owner_key, destroyed_at,
				ksf_time, ksf_memory_kib, ksf_threads, sealed, oprf_key, server_key, strategy, started, last_success, successes, attempts)
			VALUES ('alpha', $1::bytea, 1, decode(repeat('ab', 16), 'hex'), CASE WHEN $2 THEN 'destroyed' ELSE 'active' END,
				CASE WHEN $2 THEN 'replaced' END, now(), sha256('d'), sha256('o'), CASE WHEN $2 THEN timestamptz '2026-01-01' + $3 * interval '1 day' END,
				3, 65536, 4, CASE WHEN NOT $2 THEN '\x01fffffffe00'::bytea END, 7, 8, 'derive', 3, 0, 0, '[]')`, []byte(id), i >= 3, i)
	}
	want := map[vault.Key]int64{
		{Purpose: "master", Generation: 1<<32 - 2}: 3, {Purpose: "oprf", Generation: 7}: 3, {Purpose: "server", Generation: 8}: 3,
		{Purpose: "mac", Generation: 1}: 3, {Purpose: "mac", Generation: 2}: 2,
	}
	all, err := s.AllDependents(t.Context())
	if err != nil || len(all) != len(want) {
		t.Fatalf("%v, %v", all, err)
	}
	for key, n := range want {
		one, err := s.Dependents(t.Context(), key)
		if err != nil || one != n || all[key] != n {
			t.Errorf("%v: %d, and %d in all, want %d; %v", key, one, all[key], n, err)
		}
	}
	for _, key := range []vault.Key{masterKey(1), {Purpose: "state", Generation: 1}, {Purpose: "oprf", Generation: 8}} {
		if n, err := s.Dependents(t.Context(), key); err != nil || n != 0 {
			t.Errorf("%v: %d, %v", key, n, err)
		}
	}
	for since, want := range map[string]string{"2025-12-31": "2026-01-04", "2026-01-04": "2026-01-04", "2026-01-05": "2026-01-05", "2026-01-06": ""} {
		at, err := time.Parse(time.DateOnly, since)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.OldestDestruction(t.Context(), at)
		if err != nil || got.IsZero() != (want == "") || want != "" && got.Format(time.DateOnly) != want {
			t.Errorf("since %s: %v, want %s; %v", since, got, want, err)
		}
	}
}
