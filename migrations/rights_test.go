package migrations_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// catalogued is every grant to the service and to everybody, as the catalogue has it: on every relation and column, function and
// type of its own, schema and database, and by default for what is yet to be made.
const catalogued = `
WITH grants AS (
	SELECT CASE c.relkind WHEN 'S' THEN 'sequence ' ELSE 'table ' END || c.relname AS object, '' AS part, c.relacl AS acl, c.relkind::text AS kind, c.relowner AS owner
	FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind <> 'i'
	UNION ALL
	SELECT 'table ' || c.relname, ' ' || a.attname, a.attacl, '', c.relowner
	FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid WHERE c.relnamespace = 'public'::regnamespace AND a.attacl IS NOT NULL
	UNION ALL
	SELECT format('function %s(%s)', f.proname, pg_get_function_arguments(f.oid)), '', coalesce(f.proacl, acldefault('f', f.proowner)), '', f.proowner
	FROM pg_proc AS f WHERE f.pronamespace = 'public'::regnamespace
	UNION ALL
	SELECT 'schema ' || n.nspname, '', n.nspacl, '', n.nspowner FROM pg_namespace AS n WHERE n.nspname NOT LIKE 'pg\_%' AND n.nspname <> 'information_schema'
	UNION ALL
	SELECT 'default for ' || d.defaclobjtype::text, '', d.defaclacl, '', d.defaclrole FROM pg_default_acl AS d
)
SELECT object, privilege_type || part FROM grants, aclexplode(acl) AS g
WHERE g.grantee IN (0, 'bkv_runtime'::regrole) ORDER BY 1, 2`

// The service may do what rights.txt says, and nothing else: what is granted, and what its login can do in effect.
func TestRightsAreTheGoldenList(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	conn, err := pgx.Connect(t.Context(), db.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), catalogued)
	if err != nil {
		t.Fatal(err)
	}
	granted := map[string][]string{}
	var object, right string
	if _, err := pgx.ForEachRow(rows, []any{&object, &right}, func() error {
		granted[object] = append(granted[object], right)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := migrations.Rights()
	if len(want) != 18 {
		t.Errorf("rights.txt has %d objects", len(want))
	}
	for object, rights := range want {
		slices.Sort(rights)
		if got := granted[object]; !slices.Equal(got, rights) {
			t.Errorf("%s: granted %v, want %v", object, got, rights)
		}
		delete(granted, object)
	}
	for object, rights := range granted {
		t.Errorf("%s: granted %v, and rights.txt does not know it", object, rights)
	}
	if err := migrations.CheckRights(t.Context(), db.RuntimeURL); err != nil {
		t.Error(err)
	}
}

func TestCheckRights(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	db := cluster.Database(t)
	super, err := pgx.Connect(t.Context(), db.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(context.Background())
	do := func(sql string) {
		t.Helper()
		if _, err := super.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	for _, c := range []struct {
		grant, undo string
		want        error
		says        string
	}{
		{"ALTER ROLE bkv_service SUPERUSER", "ALTER ROLE bkv_service NOSUPERUSER", migrations.ErrTooManyRights, `role "bkv_service" is a superuser; log in as another role, made with: CREATE ROLE vaultd LOGIN IN ROLE bkv_runtime`},
		{"GRANT bkv_owner TO bkv_service", "REVOKE bkv_owner FROM bkv_service", migrations.ErrTooManyRights, "owns the vault's tables"},
		{"ALTER ROLE bkv_service CREATEROLE", "ALTER ROLE bkv_service NOCREATEROLE", migrations.ErrTooManyRights, `ALTER ROLE "bkv_service" NOCREATEROLE`},
		{"ALTER ROLE bkv_service BYPASSRLS", "ALTER ROLE bkv_service NOBYPASSRLS", migrations.ErrTooManyRights, "NOBYPASSRLS"},
		{"GRANT pg_write_all_data TO bkv_service", "REVOKE pg_write_all_data FROM bkv_service", migrations.ErrTooManyRights, `REVOKE pg_write_all_data FROM "bkv_service"`},
		{"GRANT CREATE ON DATABASE test_1 TO bkv_service", "REVOKE CREATE ON DATABASE test_1 FROM bkv_service", migrations.ErrTooManyRights, "CREATE on it"},
		{"GRANT CREATE ON SCHEMA public TO PUBLIC", "REVOKE CREATE ON SCHEMA public FROM PUBLIC", migrations.ErrTooManyRights, "CREATE on schema public"},
		{"GRANT DELETE ON events TO bkv_service", "REVOKE DELETE ON events FROM bkv_service", migrations.ErrTooManyRights, "may DELETE on table events; have the owner take that away"},
		{"GRANT UPDATE (kind) ON events TO bkv_runtime", "REVOKE UPDATE (kind) ON events FROM bkv_runtime", migrations.ErrTooManyRights, "may UPDATE kind on table events;"},
		{"GRANT UPDATE ON event_seals TO PUBLIC", "REVOKE UPDATE ON event_seals FROM PUBLIC", migrations.ErrTooManyRights, "may UPDATE on table event_seals;"},
		{"GRANT TRIGGER ON events TO bkv_service", "REVOKE TRIGGER ON events FROM bkv_service", migrations.ErrTooManyRights, "TRIGGER on table events"},
		{"GRANT UPDATE ON SEQUENCE events_id_seq TO bkv_service", "REVOKE ALL ON SEQUENCE events_id_seq FROM bkv_service", migrations.ErrTooManyRights, "UPDATE on sequence events_id_seq"},
		{"GRANT EXECUTE ON FUNCTION queue_event() TO bkv_service", "REVOKE EXECUTE ON FUNCTION queue_event() FROM bkv_service", migrations.ErrTooManyRights, "EXECUTE on function queue_event()"},
		{"REVOKE bkv_runtime FROM bkv_service; GRANT SELECT ON schema_version TO bkv_service", "GRANT bkv_runtime TO bkv_service; REVOKE SELECT ON schema_version FROM bkv_service", migrations.ErrTooFewRights, `GRANT bkv_runtime TO "bkv_service"`},
		{"REVOKE EXECUTE ON FUNCTION seal_events FROM bkv_runtime", "GRANT EXECUTE ON FUNCTION seal_events TO bkv_runtime", migrations.ErrTooFewRights, "may not EXECUTE on function seal_events("},
		{"REVOKE INSERT (kind) ON events FROM bkv_runtime", "GRANT INSERT (kind) ON events TO bkv_runtime", migrations.ErrTooFewRights, "may not INSERT kind on table events"},
		{"REVOKE SELECT ON accounts FROM bkv_runtime", "GRANT SELECT ON accounts TO bkv_runtime", migrations.ErrTooFewRights, "may not SELECT on table accounts"},
	} {
		do(c.grant)
		err := migrations.CheckRights(t.Context(), db.RuntimeURL)
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v", c.grant, err)
		}
		do(c.undo)
		if err := migrations.CheckRights(t.Context(), db.RuntimeURL); err != nil {
			t.Errorf("%s: %v", c.undo, err)
		}
	}
	if err := migrations.CheckRights(t.Context(), db.OwnerURL); !errors.Is(err, migrations.ErrTooManyRights) {
		t.Errorf("the owner: %v", err)
	}
	// What else is in the database is not the vault's.
	do("CREATE TABLE others (x integer); GRANT ALL ON others TO PUBLIC")
	if err := migrations.CheckRights(t.Context(), db.RuntimeURL); err != nil {
		t.Error(err)
	}
	for _, url := range []string{"postgres://u:hunter2hunter2@/db?host=/nowhere", "host=/nowhere password='hunter2hunter2 dbname=db"} {
		if err := migrations.CheckRights(t.Context(), url); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
	}
}
