package migrations

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// What CheckRights finds wrong. Each error that wraps one says what to do.
var (
	ErrTooManyRights = errors.New("vaultd's database login may do more than the service needs")
	ErrTooFewRights  = errors.New("vaultd's database login may do less than the service needs")
)

// rights is the list of what the service may do, one line for each object. A test compares it with
// what the migrations grant.
//
//go:embed rights.txt
var rights string

// Rights is what RuntimeRole may do: for each object, named with its sort, the rights on it.
func Rights() map[string][]string {
	all := map[string][]string{}
	for line := range strings.Lines(rights) {
		object, list, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		all[object] = splitRights(list)
	}
	return all
}

// splitRights takes "INSERT (a, b), SELECT" apart: INSERT a, INSERT b, SELECT.
func splitRights(list string) (out []string) {
	for list != "" {
		right, rest, _ := strings.Cut(list, ",")
		if name, _, ok := strings.Cut(right, " ("); ok {
			columns, after, _ := strings.Cut(list[len(name)+2:], ")")
			for column := range strings.SplitSeq(columns, ", ") {
				out = append(out, name+" "+column)
			}
			rest = strings.TrimPrefix(after, ",")
			list = strings.TrimSpace(rest)
			continue
		}
		out = append(out, right)
		list = strings.TrimSpace(rest)
	}
	return out
}

const (
	// loginPowers are what no grant on an object tells of.
	loginPowers = `
SELECT current_user, r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolreplication, r.rolbypassrls,
	EXISTS (SELECT FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace AND pg_has_role(c.relowner, 'MEMBER')),
	has_database_privilege(current_database(), 'CREATE'),
	ARRAY(SELECT p.rolname::text FROM pg_roles AS p WHERE p.rolname LIKE 'pg\_%' AND p.rolname <> 'pg_database_owner'
		AND pg_has_role(p.oid, 'MEMBER') ORDER BY 1)
FROM pg_roles AS r WHERE r.rolname = current_user`

	// grantedRights are what the login may do with the vault's tables, their columns and sequences, its functions and its
	// schema, from whomever it has it: by itself, as a member of roles, as everybody.
	grantedRights = `
WITH relations AS (
	SELECT c.oid, c.relname::text AS name, c.relkind = 'S' AS sequence FROM pg_class AS c
	WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
	AND c.relowner = (SELECT relowner FROM pg_class WHERE oid = 'public.schema_version'::regclass)
)
SELECT 'table ' || name, p FROM relations, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p
WHERE NOT sequence AND has_table_privilege(relations.oid, p)
UNION ALL
SELECT 'table ' || name, p || ' ' || a.attname FROM relations JOIN pg_attribute AS a ON a.attrelid = relations.oid AND a.attnum > 0 AND NOT a.attisdropped,
	unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS p
WHERE NOT sequence AND NOT has_table_privilege(relations.oid, p) AND has_column_privilege(relations.oid, a.attnum, p)
UNION ALL
SELECT 'sequence ' || name, p FROM relations, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS p
WHERE sequence AND has_sequence_privilege(relations.oid, p)
UNION ALL
SELECT format('function %s(%s)', f.proname, pg_get_function_arguments(f.oid)), 'EXECUTE' FROM pg_proc AS f
WHERE f.pronamespace = 'public'::regnamespace AND has_function_privilege(f.oid, 'EXECUTE')
AND f.proowner = (SELECT relowner FROM pg_class WHERE oid = 'public.schema_version'::regclass)
UNION ALL
SELECT 'schema public', p FROM unnest(ARRAY['USAGE', 'CREATE']) AS p WHERE has_schema_privilege('public', p)`
)

// CheckRights reports whether the role that url logs in with may do what the service needs, and no more:
// ErrTooFewRights or ErrTooManyRights if not. Whoever takes over the service can do in the database what this
// role may: with the right rights he can neither remove nor change an event. It changes nothing.
func CheckRights(ctx context.Context, url string) error {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return fmt.Errorf("database URL: %w", err)
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return fmt.Errorf("connecting to the database: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var (
		role                                                               string
		super, createRole, createDB, replication, bypass, owns, createHere bool
		builtIn                                                            []string
	)
	if err := conn.QueryRow(ctx, loginPowers).Scan(&role, &super, &createRole, &createDB, &replication, &bypass, &owns, &createHere, &builtIn); err != nil {
		return fmt.Errorf("reading what the login may do: %w", err)
	}
	name := pgx.Identifier{role}.Sanitize()
	another := fmt.Sprintf("log in as another role, made with: CREATE ROLE vaultd LOGIN IN ROLE %s", RuntimeRole)
	switch {
	case super:
		return fmt.Errorf("%w: role %s is a superuser; %s", ErrTooManyRights, name, another)
	case owns:
		return fmt.Errorf("%w: role %s owns the vault's tables; %s", ErrTooManyRights, name, another)
	case createRole || createDB || replication || bypass:
		return fmt.Errorf("%w: role %s is more than a login; have an administrator run: ALTER ROLE %[2]s NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS", ErrTooManyRights, name)
	case len(builtIn) > 0:
		return fmt.Errorf("%w: role %s is a member of %s; have an administrator run: REVOKE %[3]s FROM %[2]s", ErrTooManyRights, name, strings.Join(builtIn, ", "))
	case createHere:
		return fmt.Errorf("%w: role %s may create schemas in the database; have its owner take CREATE on it away", ErrTooManyRights, name)
	}
	granted, err := readRights(ctx, conn)
	if err != nil {
		return err
	}
	want := Rights()
	if more := beyond(granted, want); len(more) > 0 {
		return fmt.Errorf("%w: role %s may %s; have the owner take that away (REVOKE … FROM %[2]s, or from PUBLIC or the role that it has it from)",
			ErrTooManyRights, name, strings.Join(more, ", "))
	}
	if less := beyond(want, granted); len(less) > 0 {
		return fmt.Errorf("%w: role %s may not %s; have the owner run: GRANT %s TO %[2]s; if that does not help, the grants of the migrations were taken away",
			ErrTooFewRights, name, strings.Join(less, ", "), RuntimeRole)
	}
	return nil
}

func readRights(ctx context.Context, conn *pgx.Conn) (map[string][]string, error) {
	rows, err := conn.Query(ctx, grantedRights)
	if err != nil {
		return nil, fmt.Errorf("reading what the login may do: %w", err)
	}
	granted := map[string][]string{}
	var object, right string
	_, err = pgx.ForEachRow(rows, []any{&object, &right}, func() error {
		granted[object] = append(granted[object], right)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading what the login may do: %w", err)
	}
	return granted, nil
}

// beyond lists what is in a and not in b: "DELETE on table events", the right on a column as "UPDATE kind on table events". A
// right on the whole table holds for each column.
func beyond(a, b map[string][]string) (out []string) {
	for object, rights := range a {
		for _, right := range rights {
			whole, _, _ := strings.Cut(right, " ")
			if !slices.Contains(b[object], right) && !slices.Contains(b[object], whole) {
				out = append(out, right+" on "+object)
			}
		}
	}
	slices.Sort(out)
	return out
}
