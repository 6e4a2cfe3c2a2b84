package browsertest

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// dumpDatabase returns every value of every table: bytes as they are, and whatever is base64
// within texts decoded too.
func dumpDatabase(t *testing.T, db *storetest.Database) []byte {
	t.Helper()
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(ctx) }()
	rows, err := conn.Query(ctx, `SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables
		WHERE schemaname NOT IN ('pg_catalog', 'information_schema')`)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(tables) == 0 {
		t.Fatalf("%d tables: %v", len(tables), err)
	}
	var out bytes.Buffer
	for _, table := range tables {
		rows, err := conn.Query(ctx, "SELECT * FROM "+table)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			values, err := rows.Values()
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range values {
				flatten(&out, v)
			}
		}
		if rows.Err() != nil {
			t.Fatal(rows.Err())
		}
	}
	return out.Bytes()
}

func flatten(out *bytes.Buffer, v any) {
	switch v := v.(type) {
	case []byte:
		out.Write(v)
		out.WriteByte('\n')
	case string:
		out.WriteString(v)
		out.WriteByte('\n')
		if raw, err := base64.StdEncoding.DecodeString(v); err == nil {
			out.Write(raw)
			out.WriteByte('\n')
		}
	case map[string]any:
		for k, v := range v {
			flatten(out, k)
			flatten(out, v)
		}
	case []any:
		for _, v := range v {
			flatten(out, v)
		}
	default:
		if text, err := json.Marshal(v); err == nil {
			out.Write(text)
		} else {
			fmt.Fprint(out, v)
		}
		out.WriteByte('\n')
	}
}
