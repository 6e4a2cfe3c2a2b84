package backup_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"

	"github.com/backup-key-vault/bkv/backup"
)

func TestSeal(t *testing.T) {
	t.Parallel()
	key, other := newKey(t), newKey(t)
	for _, size := range []int{0, 1, 16, 100_000} {
		plain := make([]byte, size)
		_, _ = rand.Read(plain)
		blob, err := key.Seal(rand.Reader, plain)
		if err != nil {
			t.Fatal(err)
		}
		again, err := key.Seal(rand.Reader, plain)
		if err != nil || bytes.Equal(blob, again) {
			t.Fatalf("sealed twice, it is the same (%v)", err)
		}
		if got, err := key.Unseal(blob); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if got, err := other.Unseal(blob); !errors.Is(err, backup.ErrWrongKey) || got != nil {
			t.Fatalf("another key: %v", err)
		}
		for i := 0; i < len(blob); i += 1 + len(blob)/100 {
			broken := bytes.Clone(blob)
			broken[i] ^= 1
			if got, err := key.Unseal(broken); err == nil || got != nil {
				t.Fatalf("byte %d altered: %v", i, err)
			}
			if got, err := key.Unseal(blob[:i]); err == nil || got != nil {
				t.Fatalf("cut at %d: %v", i, err)
			}
		}
	}
}

func FuzzUnseal(f *testing.F) {
	key := backup.Key{1}
	blob, err := key.Seal(rand.Reader, []byte("history"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(blob)
	f.Add(blob[:len(blob)-1])
	f.Add([]byte("bkv-blob\x02"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, err := key.Unseal(b); err == nil && !bytes.Equal(plain, []byte("history")) {
			t.Errorf("a blob that nobody sealed opens to %q", plain)
		}
	})
}

func TestWrapUnder(t *testing.T) {
	t.Parallel()
	key, secret := newKey(t), bytes.Repeat([]byte{7}, 32)
	wrapped, err := key.WrapUnder(rand.Reader, secret, "chat", "alice")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := backup.UnwrapUnder(wrapped, secret, "chat", "alice"); err != nil || got != key {
		t.Fatalf("unwrapping: %v", err)
	}
	for name, unwrap := range map[string]func() (backup.Key, error){
		"another secret":  func() (backup.Key, error) { return backup.UnwrapUnder(wrapped, secret[1:], "chat", "alice") },
		"another account": func() (backup.Key, error) { return backup.UnwrapUnder(wrapped, secret, "chat", "bob") },
		"other fields":    func() (backup.Key, error) { return backup.UnwrapUnder(wrapped, secret, "chatalice") },
		"no context":      func() (backup.Key, error) { return backup.UnwrapUnder(wrapped, secret) },
		"altered": func() (backup.Key, error) {
			broken := bytes.Clone(wrapped)
			broken[40] ^= 1
			return backup.UnwrapUnder(broken, secret, "chat", "alice")
		},
	} {
		if got, err := unwrap(); !errors.Is(err, backup.ErrWrongKey) || got != (backup.Key{}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range wrapped {
		if _, err := backup.UnwrapUnder(wrapped[:n], secret, "chat", "alice"); !errors.Is(err, backup.ErrNotSealed) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
	if _, err := key.WrapUnder(rand.Reader, secret[1:]); err == nil {
		t.Error("a secret of 31 bytes is taken")
	}
}

func newKey(t *testing.T) backup.Key {
	t.Helper()
	key, err := backup.NewKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
