package pkcs11util_test

import (
	"context"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

func TestSmoke(t *testing.T) {
	tok := tokentest.New(t)
	ctx := context.Background()
	sealed, err := tok.Seal(ctx, pkcs11util.Master, [16]byte{1}, []byte("hi"), nil)
	if err != nil {
		t.Fatal(err)
	}
	p, ok, err := tok.Open(ctx, pkcs11util.Master, [16]byte{1}, sealed, nil)
	t.Log(string(p), ok, err)
	q, err := tok.PublicKey(pkcs11util.OPRF, 1)
	t.Log(q, err, tok.Model(), tok.Keys())
	r, err := tok.Multiply(ctx, pkcs11util.OPRF, 1, q)
	t.Log(r, err)
}
