package migrations_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store/storetest"
)

var quiet = slog.New(slog.DiscardHandler)

func TestFilesAreGaplessForwardOnlyAndSayWhy(t *testing.T) {
	t.Parallel()
	files, err := fs.Glob(migrations.Embedded, "sql/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	name := regexp.MustCompile(`^sql/(\d{5})_[a-z0-9_]+\.sql$`)
	for i, file := range files {
		m := name.FindStringSubmatch(file)
		if m == nil || m[1] != fmt.Sprintf("%05d", i+1) {
			t.Errorf("%s: want number %05d and a name in a-z, 0-9 and _", file, i+1)
		}
		text, err := migrations.Embedded.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(text, []byte("-- Why: ")) {
			t.Errorf("%s does not open with why", file)
		}
		if bytes.Contains(text, []byte("+goose Down")) {
			t.Errorf("%s goes down", file)
		}
	}
	if latest, err := migrations.Latest(); err != nil || latest != int64(len(files)) {
		t.Errorf("latest is %d, %v", latest, err)
	}
}

func TestFromEmptyToLatestAndAgain(t *testing.T) {
	t.Parallel()
	db := storetest.Empty(t)
	if err := migrations.Check(t.Context(), db.OwnerURL); !errors.Is(err, migrations.ErrNoSchema) || !strings.Contains(err.Error(), "vaultctl migrate") {
		t.Fatalf("empty: %v", err)
	}
	var log bytes.Buffer
	for range 2 {
		if err := migrations.Up(t.Context(), db.OwnerURL, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Fatal(err)
		}
	}
	latest, _ := migrations.Latest()
	if n := strings.Count(log.String(), "migration applied"); n != int(latest) {
		t.Errorf("%d migrations logged, want %d", n, latest)
	}
	for _, url := range []string{db.OwnerURL, db.RuntimeURL} {
		if err := migrations.Check(t.Context(), url); err != nil {
			t.Error(err)
		}
	}
}

func TestConcurrentRuns(t *testing.T) {
	t.Parallel()
	db := storetest.Empty(t)
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = migrations.Up(t.Context(), db.OwnerURL, quiet) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if err := migrations.Check(t.Context(), db.RuntimeURL); err != nil {
		t.Fatal(err)
	}
}

func TestOtherVersions(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	db.Exec(t, `INSERT INTO schema_version (version_id, is_applied) VALUES (9999, true)`)
	for _, err := range []error{migrations.Check(t.Context(), db.RuntimeURL), migrations.Up(t.Context(), db.OwnerURL, quiet)} {
		if !errors.Is(err, migrations.ErrAhead) || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("newer: %v", err)
		}
	}
	latest, _ := migrations.Latest()
	db.Exec(t, `DELETE FROM schema_version WHERE version_id >= $1`, latest)
	if err := migrations.Check(t.Context(), db.RuntimeURL); !errors.Is(err, migrations.ErrBehind) || !strings.Contains(err.Error(), "vaultctl migrate") {
		t.Errorf("older: %v", err)
	}
	db.Exec(t, `DELETE FROM schema_version`)
	if err := migrations.Check(t.Context(), db.RuntimeURL); !errors.Is(err, migrations.ErrNoSchema) {
		t.Errorf("nothing applied: %v", err)
	}
}

// Rows of the schema before the latest migration come through it.
func TestFromPreviousToLatestWithRows(t *testing.T) {
	t.Parallel()
	db := storetest.Empty(t)
	config, err := pgx.ParseConfig(db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	files, err := fs.Sub(migrations.Embedded, "sql")
	if err != nil {
		t.Fatal(err)
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, stdlib.OpenDB(*config), files, goose.WithTableName(migrations.VersionTable))
	if err != nil {
		t.Fatal(err)
	}
	defer provider.Close()
	latest, _ := migrations.Latest()
	if _, err := provider.UpTo(t.Context(), latest-1); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, `INSERT INTO tenants (id, max_attempts, delays, grace) VALUES ('app', 10, '{0,1 min}', '7 days')`)
	db.Exec(t, `INSERT INTO accounts (tenant, user_id, pseudonym, max_attempts, delays, grace, next_number, mac_key, mac)
		VALUES ('app', 'ann', sha256('p'), 10, '{0,1 min}', '7 days', 2, 1, sha256('m'))`)
	db.Exec(t, `INSERT INTO generations (tenant, user_id, number, generation_id, state, created_at, digest, owner_key,
			ksf_time, ksf_memory_kib, ksf_threads, sealed, oprf_key, server_key, strategy, started, last_success, successes, attempts)
		VALUES ('app', 'ann', 1, decode(repeat('ab', 16), 'hex'), 'active', now(), sha256('d'), sha256('o'),
			3, 65536, 4, 'sealed', 1, 1, 'derive', 3, 0, 0, '[]')`)
	db.Exec(t, `INSERT INTO events (kind, tenant, pseudonym, generation_id, attempt)
		VALUES ('attempt', 'app', sha256('p'), decode(repeat('ab', 16), 'hex'), 3)`)
	if err := migrations.Up(t.Context(), db.OwnerURL, quiet); err != nil {
		t.Fatal(err)
	}
	if n := db.Exec(t, `SELECT FROM events JOIN unsealed_events USING (id) WHERE kind = 'attempt' OR detail = 'schema version ' || $1::text`, fmt.Sprint(latest)); n != 2 {
		t.Errorf("%d events wait to be sealed, want that of before and the migration's", n)
	}
	if n := db.Exec(t, `SELECT FROM accounts JOIN generations USING (tenant, user_id) JOIN tenants ON id = tenant WHERE started = 3`); n != 1 {
		t.Fatalf("%d rows came through", n)
	}
}

// An owner who may not create roles learns what an administrator has to run.
func TestRuntimeRole(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.Empty(t)
	super, err := pgx.Connect(t.Context(), db.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(t.Context())
	do := func(sql string) {
		t.Helper()
		if _, err := super.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	do(`ALTER ROLE bkv_runtime RENAME TO another`)
	do(`ALTER ROLE bkv_owner NOCREATEROLE`)
	const remedy = "CREATE ROLE bkv_runtime NOLOGIN"
	if err := migrations.Up(t.Context(), db.OwnerURL, quiet); err == nil || !strings.Contains(err.Error(), remedy) {
		t.Fatalf("without the role: %v", err)
	}
	do(remedy)
	if err := migrations.Up(t.Context(), db.OwnerURL, quiet); err != nil {
		t.Fatal(err)
	}
	// A login that was not granted the role is told what is missing.
	err = migrations.Check(t.Context(), db.RuntimeURL)
	if err == nil || !strings.Contains(err.Error(), `GRANT bkv_runtime TO "bkv_service"`) {
		t.Fatalf("without the grant: %v", err)
	}
	do(`GRANT bkv_runtime TO bkv_service`)
	if err := migrations.Check(t.Context(), db.RuntimeURL); err != nil {
		t.Fatal(err)
	}
}

func TestServiceMayDoNothingElse(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	conn, err := pgx.Connect(t.Context(), db.RuntimeURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var statements []string
	for _, table := range []string{"accounts", "generations", "events", "unsealed_events", "event_seals", "audit_checkpoints", "audit_keys", "audit_log",
		"tenants", "tenant_keys", "key_generations", "token_proofs", "relay_seeds", "schema_version"} {
		statements = append(statements, "DELETE FROM "+table, "TRUNCATE "+table, "DROP TABLE "+table,
			"ALTER TABLE "+table+" ADD x integer")
	}
	for table, columns := range map[string]string{
		"accounts":        "tenant user_id pseudonym created_at",
		"generations":     "tenant user_id number generation_id follows created_at digest owner_key ksf_time ksf_memory_kib ksf_threads oprf_key server_key strategy",
		"events":          "at kind tenant pseudonym generation_id attempt reason request_id purpose key_generation operator detail login",
		"unsealed_events": "id", "event_seals": "sequence event_id hash", "audit_log": "vault_id identity_key",
		"audit_checkpoints": "sequence hash at key_generation signature", "audit_keys": "generation public_key signature",
		"relay_seeds":     "generation made_at",
		"tenants":         "id max_attempts delays grace created_at direct_enrolment",
		"tenant_keys":     "tenant kid public_key created_at revoked_at",
		"key_generations": "purpose generation created_at",
		"token_proofs":    "token_serial purpose generation proved_at",
		"schema_version":  "version_id is_applied",
	} {
		for column := range strings.FieldsSeq(columns) {
			statements = append(statements, fmt.Sprintf("UPDATE %s SET %s = %[2]s", table, column))
		}
	}
	statements = append(statements,
		"INSERT INTO events (kind, login) VALUES ('attempt', 'another')",
		"INSERT INTO events (kind, at) VALUES ('attempt', now())",
		"INSERT INTO unsealed_events VALUES (1)",
		"INSERT INTO event_seals VALUES (1, 1, sha256('x'))",
		"SELECT queue_event()",
		"SELECT nextval(pg_get_serial_sequence('events', 'id'))",
		"DO 'BEGIN LOCK TABLE accounts IN SHARE MODE; END'",
		"INSERT INTO tenants SELECT * FROM tenants",
		"INSERT INTO tenant_keys SELECT * FROM tenant_keys",
		"INSERT INTO schema_version SELECT * FROM schema_version",
		"CREATE TABLE mine (x integer)",
		"CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
		"CREATE SCHEMA mine",
		"CREATE ROLE mine",
		"SET ROLE bkv_owner",
		"GRANT bkv_runtime TO bkv_owner",
	)
	for _, sql := range statements {
		_, err := conn.Exec(t.Context(), sql)
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != "42501" { // insufficient_privilege
			t.Errorf("%s: got %v, want it refused", sql, err)
		}
	}
}

func TestErrorsKeepThePassword(t *testing.T) {
	t.Parallel()
	const password = "hunter2hunter2"
	for _, url := range []string{
		"postgres://u:" + password + "@/db?host=/nowhere",
		"postgres://u:" + password + "@/db?host=/nowhere&connect_timeout=x",
		"postgres://u:" + password + "%zz@/db",
		"postgres://u:" + password + "@[::1/db",
		"host=/nowhere user=u password=" + password + " dbname=db port=x",
		"host=/nowhere user=u password='" + password + " dbname=db",
	} {
		for _, err := range []error{migrations.Check(t.Context(), url), migrations.Up(t.Context(), url, quiet)} {
			if err == nil || strings.Contains(err.Error(), password) {
				t.Errorf("%v", err)
			}
		}
	}
}
