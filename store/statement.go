package store

import (
	"context"
	"fmt"
	"regexp"

	"github.com/jackc/pgx/v5"
)

// statement is SQL with its parameters numbered once and for all. pgx.NamedArgs by
// itself reads the whole text again at every call, which cost a quarter of a write.
type statement struct {
	sql   string
	names []string // of $1, $2, …
}

var parameter = regexp.MustCompile(`@([a-z_]+)`)

// numbered turns @name into $n. It panics on SQL that cannot be read, at start.
func numbered(sql string) statement {
	named := pgx.NamedArgs{}
	for _, match := range parameter.FindAllStringSubmatch(sql, -1) {
		named[match[1]] = match[1]
	}
	text, order, err := named.RewriteQuery(context.Background(), nil, sql, nil)
	if err != nil {
		panic(fmt.Sprintf("store: numbering the parameters of a statement: %v", err))
	}
	s := statement{sql: text}
	for _, name := range order {
		s.names = append(s.names, name.(string))
	}
	return s
}

// args puts values in the order of the statement's parameters.
func (s statement) args(values map[string]any) []any {
	out := make([]any, len(s.names))
	for i, name := range s.names {
		value, ok := values[name]
		if !ok {
			panic("store: no value for @" + name) // every test of Write would meet it
		}
		out[i] = value
	}
	return out
}
