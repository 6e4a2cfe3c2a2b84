package e2e_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// readiness is what /readyz says.
func readiness(t testing.TB, v *vaultd) (ready bool, failing []string) {
	t.Helper()
	r := get(t, v.admin+"/readyz")
	var answer struct {
		Ready   bool     `json:"ready"`
		Failing []string `json:"failing"`
	}
	if err := json.Unmarshal(r.body, &answer); err != nil {
		t.Fatal(err)
	}
	if answer.Ready != (r.status == 200) || !answer.Ready && r.status != 503 {
		t.Fatalf("/readyz: %v", r)
	}
	return answer.Ready, answer.Failing
}

// outage is what must hold where something that vaultd needs goes away and comes back:
// 503 with Retry-After and nothing charged meanwhile, an attempt that was charged before stays open to
// the same bytes, and service without a restart.
func outage(t *testing.T, d *deployment, problem, check string, gone, back func()) {
	ctx := t.Context()
	v := d.start(t)
	ann := d.phone(at(v), "ann")
	key, err := ann.enrol(ctx, "right")
	if err != nil {
		t.Fatal(err)
	}
	bob := d.device(t, "bob", at(v))
	enrolled, err := bob.Enrol(ctx, "bob's")
	if err != nil {
		t.Fatal(err)
	}
	for round := range uint32(2) {
		charged, err := newGuess("right")
		if err == nil {
			err = ann.start(ctx, charged)
		}
		if err != nil {
			t.Fatal(err)
		}
		before := *charged.started
		other, err := newGuess("wrong")
		if err != nil {
			t.Fatal(err)
		}

		gone()
		for what, err := range map[string]error{
			"the charged guess": ann.start(ctx, charged),
			"another guess":     ann.start(ctx, other),
			"the finish":        second(ann.end(ctx, charged)),
			"an enrolment":      second(d.phone(ann.at, "carl").prepare(ctx, "carl's")),
			"the status":        second(into[any](ann.send(ctx, "GET", "", nil))),
		} {
			var r *refused
			if !errors.As(err, &r) || r.status != 503 || r.problem() != problem || r.header.Get("Retry-After") == "" {
				t.Errorf("%s, without the %s: %v", what, check, err)
			}
		}
		if ready, failing := readiness(t, v); ready || !slices.Equal(failing, []string{check}) {
			t.Errorf("without the %s: ready is %v, failing are %v", check, ready, failing)
		}
		if r := get(t, v.admin+"/healthz"); r.status != 200 {
			t.Errorf("/healthz without the %s: %v", check, r)
		}
		if round == 0 { // once is enough: the SDK tries for seconds
			if _, err := bob.Recover(ctx, "bob's"); !errors.Is(err, client.ErrUnavailable) {
				t.Errorf("the SDK without the %s: %v", check, err)
			}
		}

		back()
		eventually(t, "readiness", func() bool { ready, _ := readiness(t, v); return ready })
		// The same bytes: the same attempt, its number, its time.
		if err := ann.start(ctx, charged); err != nil {
			t.Fatalf("the charged guess, sent again: %v", err)
		}
		if after := *charged.started; after.Attempt != before.Attempt || after.Generation != before.Generation || !after.ExpiresAt.Equal(before.ExpiresAt) {
			t.Errorf("the charged guess was attempt %d until %v, now it is %d until %v", before.Attempt, before.ExpiresAt, after.Attempt, after.ExpiresAt)
		}
		if n := d.started(t, "ann"); n != int64(round)+1 {
			t.Errorf("%d attempts are counted after %d guesses", n, round+1)
		}
		if got, err := ann.end(ctx, charged); err != nil || got != key {
			t.Errorf("finishing the charged guess: %v", err)
		}
		if got, err := bob.Recover(ctx, "bob's"); err != nil || got.Key != enrolled.Key {
			t.Errorf("the SDK with the %s back: %v", check, err)
		}
	}
	// It stops cleanly in the middle of it, too.
	gone()
	if err := second(ann.recover(ctx, "right")); !isRefused(err, problem) {
		t.Errorf("without the %s: %v", check, err)
	}
	v.stop(t)
	back()
	if log := v.log.String(); strings.Contains(log, `"level":"ERROR","msg":"panic"`) {
		t.Errorf("a panic:\n%s", log)
	}
	searchSecrets(t, v.log.String())
}

// second returns a call's error.
func second[T any](_ T, err error) error { return err }

func TestTokenGoneAndBack(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	outage(t, d, "token-unavailable", "token", func() { d.directory.Vanish(t) }, func() { d.directory.Return(t) })
}

func TestPostgresGoneAndBack(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	d := deploy(t, cluster.Database(t))
	outage(t, d, "store-unavailable", "store", func() { cluster.Stop(t) }, func() { cluster.Start(t) })
}
