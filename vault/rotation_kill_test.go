package vault_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
)

// A rotation is cut short by kill -9 before each step that leaves something behind, in a
// process of its own; another one then completes it.

// What the operator's process is told by its environment.
const (
	killLabel = "BKV_TEST_TOKEN_LABEL"
	killURL   = "BKV_TEST_DATABASE_URL"
	killFrom  = "BKV_TEST_FROM"    // the master generation that is to be replaced
	killAt    = "BKV_TEST_KILL_AT" // the step before which the process is killed; 0: none
)

// mortal kills the process before its nth step.
type mortal struct {
	at, steps atomic.Int64
}

func (m *mortal) step() {
	if m.steps.Add(1) == m.at.Load() {
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		select {}
	}
}

type mortalStore struct {
	*store.Store
	*mortal
}

func (m mortalStore) Write(ctx context.Context, c vault.Change) error {
	m.step()
	return m.Store.Write(ctx, c)
}

func (m mortalStore) EditKeys(ctx context.Context, purpose string, edit func(*vault.KeyEdit) error) error {
	m.step()
	return m.Store.EditKeys(ctx, purpose, edit)
}

func (m mortalStore) AwaitWrites(ctx context.Context) error {
	m.step()
	return m.Store.AwaitWrites(ctx)
}

type mortalToken struct {
	*pkcs11util.Keyset
	*mortal
}

func (m mortalToken) MakeKey(ctx context.Context, purpose string, generation uint32) error {
	m.step()
	return m.Keyset.MakeKey(ctx, purpose, generation)
}

func (m mortalToken) DestroyKey(ctx context.Context, purpose string, generation uint32) error {
	m.step()
	return m.Keyset.DestroyKey(ctx, purpose, generation)
}

// TestOperatorProcess is the process that is killed: it replaces a master key and destroys it.
func TestOperatorProcess(t *testing.T) {
	label := os.Getenv(killLabel)
	if label == "" {
		t.Skip("it is run by TestRotationSurvivesKills")
	}
	from, err1 := strconv.Atoi(os.Getenv(killFrom))
	at, err2 := strconv.Atoi(os.Getenv(killAt))
	keys, err3 := pkcs11util.Open(t.Context(), pkcs11util.Config{Module: tokentest.Module(t), Label: label, PIN: tokentest.PIN})
	db, err4 := store.Open(t.Context(), store.Config{URL: os.Getenv(killURL)})
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	life := &mortal{}
	life.at.Store(int64(at))
	s, k := mortalStore{db, life}, mortalToken{keys, life}
	v, err := vault.New(vault.Config{ID: vaultID, Store: s, Token: keys})
	if err != nil {
		t.Fatal(err)
	}
	r, err := vault.NewRotation(vault.RotationConfig{Store: s, Token: k, Vault: v, RewrapsPerSecond: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if keys.Newest("master") == uint32(from) {
		if _, err := r.Rotate(t.Context(), "master"); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Rewrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	status, err := r.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range status.Keys {
		if g.Purpose == "master" && g.Generation < keys.Newest("master") && g.State != vault.KeyDestroyed {
			if err := r.Destroy(t.Context(), g.Key); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("completed, %d steps\n", life.steps.Load())
}

func TestRotationSurvivesKills(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.start(t, nil)
	var users []string
	owned := map[string][32]byte{}
	for i := range 3 {
		user := fmt.Sprintf("user-%d", i)
		users = append(users, user)
		owned[user] = deviceOf(n.Vault, user).MustEnrol(t, "right", nil).Key
	}
	from := n.keys.Newest("master")
	operate := func(at int) (completed bool, output string) {
		t.Helper()
		cmd := exec.Command(os.Args[0], "-test.run=^TestOperatorProcess$", "-test.v")
		cmd.Env = append(os.Environ(), s.tok.Directory.Env(), killLabel+"="+s.tok.Label, killURL+"="+s.db.RuntimeURL,
			fmt.Sprintf("%s=%d", killFrom, from), fmt.Sprintf("%s=%d", killAt, at))
		out, err := cmd.CombinedOutput()
		completed = strings.Contains(string(out), "completed")
		var exit *exec.ExitError
		killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if completed == killed || err != nil && !killed {
			t.Fatalf("killed before step %d: %v\n%s", at, err, out)
		}
		return completed, string(out)
	}
	survived := 0
	for at := 1; ; at++ {
		from = n.keys.Newest("master")
		completed, _ := operate(at)
		if !completed {
			survived++
			// Others wait until its leases are over.
			s.db.Exec(t, `UPDATE key_generations SET held_until = now() WHERE holder IS NOT NULL`)
			// Whatever it left, service goes on.
			if err := n.rotation.Start(t.Context()); err != nil {
				t.Fatalf("in step after a kill before step %d: %v", at, err)
			}
			if key, err := deviceOf(n.Vault, users[at%3]).Recover(t.Context(), "right"); err != nil || key != owned[users[at%3]] {
				t.Fatalf("after a kill before step %d: %v", at, err)
			}
			if completed, out := operate(0); !completed {
				t.Fatalf("after a kill before step %d:\n%s", at, out)
			}
		}
		if err := n.rotation.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, user := range users {
			if key, err := deviceOf(n.Vault, user).Recover(t.Context(), "right"); err != nil || key != owned[user] {
				t.Fatalf("killed before step %d, and completed: %s: %v", at, user, err)
			}
		}
		want := fmt.Sprintf("bkv/master/%d", n.keys.Newest("master"))
		masters := slices.DeleteFunc(s.labels(t), func(l string) bool { return !strings.Contains(l, "/master/") })
		if !slices.Equal(masters, []string{want}) {
			t.Fatalf("killed before step %d, and completed: master keys %v, want %s alone", at, masters, want)
		}
		if completed {
			break
		}
	}
	if survived < 12 { // claim, make, prove, use, lease, 3 records, done, close, wait, destroy, gone
		t.Errorf("it was killed before %d steps only", survived)
	}
	t.Logf("killed before %d steps", survived)
}
