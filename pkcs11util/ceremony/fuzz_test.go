package ceremony_test

import (
	"bytes"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
)

// The decoders never panic, and what they accept encodes to the same bytes. The seeds are whole files, and
// such as break one rule each.

func seed(f *testing.F) (ceremony.Request, ceremony.Bundle) {
	r := softwareRequest(f).request
	other := softwareRequest(f).request
	other.Token.Serial, other.Nonce = "s1", bytes.Repeat([]byte{8}, 16)
	return r, newSource(f).bundle(f, []ceremony.Request{r, other}, nil)
}

func FuzzParseRequest(f *testing.F) {
	r, _ := seed(f)
	f.Add(r.Encode())
	r.TransportKey = nil
	f.Add(r.Encode())
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ceremony.ParseRequest(b); err == nil && !bytes.Equal(r.Encode(), b) {
			t.Errorf("%q encodes to %q", b, r.Encode())
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	_, b := seed(f)
	f.Add(b.Record.Encode())
	b.Record.Identity.PublicKey = []byte{0}
	f.Add(b.Record.Encode())
	b.Record.Requests = nil
	f.Add(b.Record.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ceremony.ParseRecord(b); err == nil && !bytes.Equal(r.Encode(), b) {
			t.Errorf("%q encodes to %q", b, r.Encode())
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	_, b := seed(f)
	f.Add(b.Encode())
	b.Shares = b.Shares[:1]
	f.Add(b.Encode())
	b.Shares = nil
	f.Add(b.Encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		if b, err := ceremony.ParseBundle(raw); err == nil && !bytes.Equal(b.Encode(), raw) {
			t.Errorf("%q encodes to %q", raw, b.Encode())
		}
	})
}
