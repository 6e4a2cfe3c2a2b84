package vault

import (
	"context"
	"strings"
	"unicode/utf8"
)

// operatorKey is the key of a context's operator.
type operatorKey struct{}

// WithOperator says who asks for what is done under this context, for the events of operators' actions. who is
// as far to be believed as whoever calls this says: a certificate's subject, or what an operator's tool claims.
func WithOperator(ctx context.Context, who string) context.Context {
	return context.WithValue(ctx, operatorKey{}, who)
}

// maxOperatorBytes bounds what events keep of a name.
const maxOperatorBytes = 256

// OperatorOf is who asks: printable, and of at most 256 bytes; empty: not known, or the vault acts by itself.
func OperatorOf(ctx context.Context) string {
	who, _ := ctx.Value(operatorKey{}).(string)
	who = strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r <= 0x9f || r == utf8.RuneError {
			return '?'
		}
		return r
	}, who)
	for len(who) > maxOperatorBytes {
		_, size := utf8.DecodeLastRuneInString(who)
		who = who[:len(who)-size]
	}
	return who
}
