package opaque_test

import (
	"encoding/hex"
	"errors"
	"testing"

	"github.com/backup-key-vault/bkv/opaque"
)

// The answers are those of the reference implementation in C (libargon2, the
// function argon2id_hash_raw), with a salt of 16 zero bytes and a tag of 32.
func TestArgon2idKnownAnswers(t *testing.T) {
	input := []byte("0123456789abcdef0123456789abcdef")
	for _, c := range []struct {
		parameters opaque.Argon2id
		want       string
	}{
		{opaque.DefaultArgon2id, "a22cae40bfae874e4cd842665a2dfcf0eafa10be3809a473b0ecf369f5777606"},
		{opaque.Argon2id{Time: 4, MemoryKiB: 65541, Threads: 3}, "c52aa7250b9855f14bbb40ae894576a1572d7858ec10f856c51441498eff958a"},
	} {
		got, err := c.parameters.Stretch(input)
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(got) != c.want {
			t.Errorf("%+v:\n got %x\nwant %s", c.parameters, got, c.want)
		}
	}
}

func TestArgon2idBounds(t *testing.T) {
	for _, a := range []opaque.Argon2id{
		{3, 65536, 4}, // the default
		{3, 65536, 1}, // the floor
		{16, 1048576, 16},
		{4, 65537, 3},
	} {
		if err := a.Validate(); err != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
	for _, a := range []opaque.Argon2id{
		{}, {0, 65536, 4}, {2, 65536, 4}, {17, 65536, 4}, {1<<32 - 1, 65536, 4},
		{3, 0, 4}, {3, 65535, 4}, {3, 1048577, 4}, {3, 1<<32 - 1, 4},
		{3, 65536, 0}, {3, 65536, 17}, {3, 65536, 255},
		{1, 1048576, 4}, // more memory does not make up for fewer passes
	} {
		if err := a.Validate(); !errors.Is(err, opaque.ErrArgon2idBounds) {
			t.Errorf("%+v: %v, want ErrArgon2idBounds", a, err)
		}
		if out, err := a.Stretch([]byte("input")); !errors.Is(err, opaque.ErrArgon2idBounds) || out != nil {
			t.Errorf("%+v stretched: %v", a, err)
		}
	}
	if opaque.DefaultArgon2id != (opaque.Argon2id{Time: 3, MemoryKiB: 64 * 1024, Threads: 4}) {
		t.Errorf("default is %+v", opaque.DefaultArgon2id)
	}
}

// A whole enrolment and recovery with the stretching that is really used.
func TestLoginWithArgon2id(t *testing.T) {
	a := register(t, named)
	stretched := a.config
	stretched.KSF = opaque.DefaultArgon2id
	login, ke2, _ := a.start(t, a.password)
	// Registered without stretching, the record is another one.
	result, err := login.Finish(ke2, stretched)
	failed(t, result, err, opaque.ErrWrongPasswordOrServer)

	b := registerWith(t, named, opaque.DefaultArgon2id)
	login, ke2, expected := b.start(t, b.password)
	result, err = login.Finish(ke2, b.config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := expected.Verify(result.KE3); err != nil {
		t.Error(err)
	}
	if result.ExportKey != b.registration.ExportKey {
		t.Error("login yields another export key than registration")
	}
}
