package interop_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/opaque"
)

// What each implementation stretches with when it enrols. No number is like another, so
// that none can pass in another's place.
var (
	foreignKSF = api.KSF{Algorithm: api.Argon2id, Time: 3, MemoryKiB: 64 * 1024, Threads: 2}
	ourKSF     = api.KSF{Algorithm: api.Argon2id, Time: 4, MemoryKiB: 65 * 1024, Threads: 1}
)

// One user, two devices, one of either implementation, in turn.
func TestDevicesOfEitherImplementation(t *testing.T) {
	for name, context := range map[string][]byte{
		"no context": nil,
		"a context":  []byte("backup of chats, \x00 and photos"),
	} {
		t.Run(name, func(t *testing.T) { story(t, newService(t, context), context) })
	}
}

func story(t *testing.T, s *service, context []byte) {
	const user = "Zoë/7 %2F"
	ctx := t.Context()
	foreign := s.foreign(user)
	ours := s.ours(user, opaque.Argon2id{Time: ourKSF.Time, MemoryKiB: ourKSF.MemoryKiB, Threads: uint8(ourKSF.Threads)})
	if !bytes.Equal(foreign.vault.Context, context) {
		t.Fatalf("the vault's context is %q, want %q", foreign.vault.Context, context)
	}
	wantKey := func(by string, got, want backup.Key) {
		t.Helper()
		if got != want {
			t.Fatalf("%s recovered another key", by)
		}
	}
	foreignRecovers := func(password string, k api.KSF, want backup.Key) {
		t.Helper()
		got, problem := foreign.recover(password, k)
		if problem != nil {
			t.Fatalf("the other implementation cannot recover: %s: %s", problem.Type, problem.Detail)
		}
		wantKey("the other implementation", got, want)
	}
	foreignRefused := func(password string, k api.KSF, kind string) *api.Problem {
		t.Helper()
		_, problem := foreign.recover(password, k)
		if problem == nil || problem.Type != kind {
			t.Fatalf("want the problem %s, got %+v", kind, problem)
		}
		return problem
	}
	foreignFails := func(password string, k api.KSF, left int) {
		t.Helper()
		switch got := foreignRefused(password, k, api.WrongPassword).AttemptsLeft; {
		case got == nil:
			t.Fatal("a wrong password without the attempts left")
		case *got != left:
			t.Fatalf("%d attempts left, want %d", *got, left)
		}
	}
	weRecover := func(password string, want backup.Key) {
		t.Helper()
		got, err := ours.Recover(ctx, password)
		must(t, err)
		wantKey("our client", got.Key, want)
	}
	weFail := func(password string, left int) {
		t.Helper()
		_, err := ours.Recover(ctx, password)
		var wrong *client.WrongPasswordError
		if !errors.As(err, &wrong) || wrong.AttemptsLeft != left {
			t.Fatalf("want a wrong password with %d attempts left, got: %v", left, err)
		}
	}

	foreignRefused("first", foreignKSF, api.NotEnrolled)

	// A record of the other implementation's, opened by both.
	key, err := backup.NewKey(rand.Reader)
	must(t, err)
	generation := foreign.enrol("first", key, foreignKSF)
	foreignRecovers("first", foreignKSF, key)
	weRecover("first", key)
	foreignFails("First", foreignKSF, maxAttempts-1)
	weFail("firs", maxAttempts-2)
	foreignRecovers("first", foreignKSF, key)

	// Our client puts the key under a new password. The owner key that the other device
	// enrolled is the one that our client derives, or the vault would refuse.
	changed, err := ours.ChangePassword(ctx, key, "zwölf, 二つ目")
	must(t, err)
	if changed.Generation == generation {
		t.Fatal("the password change made no new generation")
	}

	// A record of our client's, opened by both.
	foreignRecovers("zwölf, 二つ目", ourKSF, key)
	weRecover("zwölf, 二つ目", key)
	foreignFails("first", ourKSF, maxAttempts-1)
	foreignRecovers("zwölf, 二つ目", ourKSF, key)

	// The attempts are shared, and with the last one the key is gone, for both.
	foreignFails("wrong", ourKSF, maxAttempts-1)
	weFail("wrong", maxAttempts-2)
	foreignRefused("wrong", ourKSF, api.KeyDestroyed)
	foreignRefused("zwölf, 二つ目", ourKSF, api.KeyDestroyed)
	if _, err := ours.Recover(ctx, "zwölf, 二つ目"); !errors.Is(err, client.ErrKeyDestroyed) {
		t.Fatalf("recovering what is destroyed: %v", err)
	}

	// After that either can begin anew.
	fresh, err := ours.Enrol(ctx, "anew")
	must(t, err)
	foreignRecovers("anew", ourKSF, fresh.Key)
}
