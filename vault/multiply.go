package vault

import (
	"context"
	"fmt"
	"io"

	"github.com/backup-key-vault/bkv/opaque"
)

// oprf is a user's OPRF key k_u = t_u · k0: t_u lies sealed in the record, k0 never
// leaves the token. t_u multiplies first, so that the token never sees a point that
// a caller chose. A thief of the database has no t_u without the token; a thief of
// t_u has no k0; erasing t_u erases k_u.
func (v *Vault) oprf(share opaque.Scalar, key uint32) opaque.Evaluator {
	return userKey{v, share, key}
}

type userKey struct {
	v     *Vault
	share opaque.Scalar
	key   uint32
}

func (k userKey) Evaluate(ctx context.Context, blinded opaque.Element) (opaque.Element, error) {
	point, err := k.share.Multiply(blinded)
	if err != nil {
		return opaque.Element{}, err
	}
	out, err := k.v.token.Multiply(ctx, purposeOPRF, k.key, point)
	if err != nil {
		return opaque.Element{}, tokenFault("evaluating the OPRF", err)
	}
	return out, nil
}

// serverStatic is OPAQUE's static server key, in the token (RFC 9807 §10.12).
type serverStatic struct {
	v      *Vault
	key    uint32
	public [33]byte
}

func (k serverStatic) PublicKey() opaque.PublicKey { return opaque.PublicKey(k.public) }

func (k serverStatic) Multiply(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	out, err := k.v.token.Multiply(ctx, purposeServer, k.key, p)
	if err != nil {
		return opaque.Element{}, tokenFault("multiplying by the server key", err)
	}
	return out, nil
}

// tokenRandom reads from the token's generator.
func (v *Vault) tokenRandom(ctx context.Context) io.Reader { return tokenReader{ctx, v.token} }

type tokenReader struct {
	ctx   context.Context
	token Token
}

func (r tokenReader) Read(p []byte) (int, error) {
	b, err := r.token.Random(r.ctx, len(p))
	if err != nil {
		return 0, err
	}
	if len(b) != len(p) {
		return 0, fmt.Errorf("asked the token for %d random bytes, got %d", len(p), len(b))
	}
	return copy(p, b), nil
}
