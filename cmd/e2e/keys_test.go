package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// An operator rotates the master key of two vaultds on one token and database, under traffic, and
// destroys the old one. Nobody who is alive notices; records of before open no more.
func TestOperatorRotatesKeys(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v, w := d.start(t), d.start(t)
	admin := []string{"BKV_ADMIN_URL=" + v.admin}
	users := []string{"ann", "bob", "cat"}
	keys := map[string][32]byte{}
	for _, user := range users {
		key, err := d.phone(at(v), user).enrol(t.Context(), "right")
		if err != nil {
			t.Fatal(err)
		}
		keys[user] = key
	}
	status := func() (s api.KeyStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(mustRun(t, admin, "vaultctl", "key", "status", "--json")), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := status(); len(s.Keys) != 8 || len(s.Tokens) != 1 || s.Tokens[0] != s.Token || s.RewrapLeft != 0 || s.OldestUncovered != nil || len(s.Warnings) != 0 {
		t.Errorf("before: %+v", s)
	}
	dump := query[[]byte](t, d.database, `SELECT sealed FROM generations WHERE user_id = 'ann'::bytea`)

	ctx, enough := context.WithCancel(t.Context())
	var traffic sync.WaitGroup
	for i, user := range users {
		traffic.Go(func() {
			n := 0
			for ctx.Err() == nil || n < 3 {
				key, err := d.phone(at([]*vaultd{v, w}[(i+n)%2]), user).recover(t.Context(), "right")
				if err != nil || key != keys[user] {
					t.Errorf("%s, recovery %d: %v", user, n, err)
					return
				}
				n++
			}
		})
	}
	out := mustRun(t, admin, "vaultctl", "key", "rotate", "master", "--destroy-old", "--poll=20ms")
	if !strings.Contains(out, "master/2 is in use\n") || !strings.HasSuffix(out, "master/1 is destroyed in this vaultd's token\n") {
		t.Errorf("it says:\n%s", out)
	}
	mustRun(t, []string{"BKV_ADMIN_URL=" + w.admin}, "vaultctl", "key", "rotate", "state")
	enough()
	traffic.Wait()

	table := strings.Join(strings.Fields(mustRun(t, admin, "vaultctl", "key", "status")), " ")
	for _, want := range []string{"master/1 destroyed", "master/2 current", "state/1 retired", "state/2 current",
		"all records are under the keys in use", "every destroyed record is gone from all dumps"} {
		if !strings.Contains(table, want) {
			t.Errorf("status lacks %q:\n%s", want, table)
		}
	}
	for _, k := range status().Keys {
		if k.Purpose == "master" && k.Generation == 2 && (k.Records != 3 || k.Seals < 3) {
			t.Errorf("%+v", k)
		}
	}
	// The record of before, put back by hand.
	d.database.Exec(t, `UPDATE generations SET sealed = $1 WHERE user_id = 'ann'::bytea`, dump)
	if _, err := d.phone(at(v), "ann").recover(t.Context(), "right"); !isRefused(err, "account-fault") {
		t.Errorf("the record of before: %v", err)
	}
	v.stop(t)
	w.stop(t)
	again := d.start(t)
	if key, err := d.phone(at(again), "bob").recover(t.Context(), "right"); err != nil || key != keys["bob"] {
		t.Errorf("after a new start: %v", err)
	}
	again.stop(t)
}

// What operators get wrong: one sentence, exit status 1, nothing changed.
func TestKeyCommandsRefuse(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	admin := "BKV_ADMIN_URL=" + v.admin
	before := mustRun(t, []string{admin}, "vaultctl", "key", "status", "--json")
	for args, want := range map[string]string{
		"rotate identity":                              "the identity key never rotates",
		"rotate nothing":                               "there is no such key; there are [master state",
		"rotate ../healthz":                            "there is no such key",
		"rotate master --poll=1ns":                     "--poll: want 10ms to 1m",
		"destroy master 1":                             "key master/1 is in use: rotate first",
		"destroy master 7":                             "there is no such key",
		"destroy master 0":                             "want a number from 1 on",
		"destroy mac 1":                                "never destroyed: it makes the pseudonyms",
		"forget-token nothing":                         "no token \"nothing\" is in service",
		"status --admin-url=http://[::":                "--admin-url",
		"rotate master --admin-url=http://127.0.0.1:1": "asking vaultd, which must be running",
		"status --admin-url=" + v.url:                  "is that vaultd's admin listener?",
	} {
		o := run(t, []string{admin}, "vaultctl", append([]string{"key"}, strings.Fields(args)...)...)
		if o.code != 1 || o.stdout != "" || !strings.HasPrefix(o.stderr, "vaultctl: ") || !strings.Contains(o.stderr, want) || strings.Count(o.stderr, "\n") != 1 {
			t.Errorf("%s: exit status %d, %q %q; want %q", args, o.code, o.stdout, o.stderr, want)
		}
	}
	// A page in an operator's browser.
	for header, value := range map[string]string{"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, v.admin+"/keys/master/rotate", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set(header, value)
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, response.Body)
		if err := errors.Join(err, response.Body.Close()); err != nil || response.StatusCode != http.StatusForbidden {
			t.Errorf("%s: status %d, %v", header, response.StatusCode, err)
		}
	}
	after := mustRun(t, []string{admin}, "vaultctl", "key", "status", "--json")
	if strip(t, after) != strip(t, before) {
		t.Errorf("something changed:\n%s\n%s", before, after)
	}
	v.stop(t)
}

// strip leaves of a status what does not change by itself.
func strip(t *testing.T, status string) string {
	t.Helper()
	var s api.KeyStatus
	if err := json.Unmarshal([]byte(status), &s); err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, k := range s.Keys {
		text += k.Purpose + " " + k.State + " " + strings.Join(k.Tokens, ",") + "\n"
	}
	return text
}
