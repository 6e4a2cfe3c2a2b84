package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// killed starts vaultctl and kills it after a while, unless it ends before; done says that it ended well.
func killed(t testing.TB, after time.Duration, env []string, args ...string) (done bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	cmd := program(ctx, env, "vaultctl", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	sane(t, stderr.String())
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		t.Fatalf("after a kill, vaultctl %v: %s", args, &stderr)
	}
	if err == nil {
		t.Logf("%s ended by itself, with %d keys that were there and %d new ones", args[2],
			strings.Count(stdout.String(), "kept "), strings.Count(stdout.String(), "stored "))
	}
	return err == nil
}

func last(lines string) string {
	fields := strings.Fields(lines)
	return fields[len(fields)-1]
}

// Each step of a ceremony is killed again and again, a little later each time, and repeated until it
// ends by itself. Both tokens then hold the same set, and nothing else.
func TestKilledCeremony(t *testing.T) {
	dir := t.TempDir()
	source, site := tokentest.NewDirectory(t), tokentest.NewDirectory(t)
	atSource, atSite := tokenEnv(t, dir, source), tokenEnv(t, dir, site)
	// The tokens themselves are made in peace: a token that was half initialised is not
	// SoftHSM's to repair.
	for _, env := range [][]string{atSource, atSite} {
		if o := run(t, env, "vaultctl", "token", "ceremony", "join", "--out="+dir+"/in-peace", "--oaep-hash=sha1"); o.code != 0 {
			t.Fatal(o.stderr)
		}
		if err := os.Remove(dir + "/in-peace"); err != nil {
			t.Fatal(err)
		}
	}
	insist := func(env []string, step time.Duration, args ...string) {
		t.Helper()
		for after := step; !killed(t, after, env, append([]string{"token", "ceremony"}, args...)...); after += step {
			if after > patience {
				t.Fatalf("%v does not end", args)
			}
		}
	}
	const step = 60 * time.Millisecond
	request, bundle := dir+"/request", dir+"/bundle"
	insist(atSite, step, "join", "--out="+request, "--oaep-hash=sha1")
	confirm := "--confirm=" + last(mustRun(t, atSite, "vaultctl", "token", "ceremony", "join", "--out="+request, "--oaep-hash=sha1"))

	// make is repeated until it wrote its bundle; from there on accept goes on.
	makeArgs := []string{"token", "ceremony", "make", "--request=" + request, confirm, "--out=" + bundle, "--who=Ann", "--oaep-hash=sha1"}
	for after := step; !killed(t, after, atSource, makeArgs...); after += step {
		if _, err := os.Stat(bundle); err == nil {
			break
		}
		if err := os.Remove(bundle + ".record"); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	shown, _, _ := strings.Cut(mustRun(t, nil, "vaultctl", "token", "ceremony", "verify", "--record="+bundle+".record"), ",")
	confirm = "--confirm=" + last(shown)
	if o := run(t, atSource, "vaultctl", makeArgs...); o.code != 1 || !strings.Contains(o.stderr, "to go on with its keys, run: vaultctl token ceremony accept") {
		t.Fatalf("make after it wrote its bundle: exit status %d\n%s", o.code, o.stderr)
	}
	for _, env := range [][]string{atSource, atSite} {
		insist(env, step, "accept", "--bundle="+bundle, confirm)
	}
	a, b := mustRun(t, atSource, "vaultctl", "identity"), mustRun(t, atSite, "vaultctl", "identity")
	if a != b {
		t.Errorf("the sites have the identities %s and %s", a, b)
	}
	record := dir + "/record"
	mustRun(t, atSource, "vaultctl", "token", "ceremony", "accept", "--bundle="+bundle, confirm, "--record="+record)
	for _, env := range [][]string{atSource, atSite} {
		if out := mustRun(t, env, "vaultctl", "token", "ceremony", "verify", "--record="+record, "--compare"); strings.Count(out, " in the token\n") != 8 {
			t.Errorf("a token holds another set:\n%s", out)
		}
		if o := run(t, env, "vaultctl", "token", "init"); strings.Contains(o.stdout, "made") || o.code != 0 {
			t.Errorf("the set is not whole: %s%s", o.stdout, o.stderr)
		}
	}
}

// Two sites have a token each, with the keys of one ceremony, and a vaultd each on one database. What is enrolled at
// one site recovers at the other, and attempts are counted over both.
func TestTwoSites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source, site := tokentest.NewDirectory(t), tokentest.NewDirectory(t)
	atSource, atSite := tokenEnv(t, dir, source), tokenEnv(t, dir, site)
	ceremony := func(env []string, args ...string) string {
		t.Helper()
		return "--confirm=" + last(mustRun(t, env, "vaultctl", append([]string{"token", "ceremony"}, args...)...))
	}
	confirm := ceremony(atSite, "join", "--out="+dir+"/request", "--oaep-hash=sha1")
	confirm = ceremony(atSource, "make", "--request="+dir+"/request", confirm, "--out="+dir+"/bundle", "--who=Ann", "--oaep-hash=sha1")
	ceremony(atSite, "accept", "--bundle="+dir+"/bundle", confirm)

	d := deployOn(t, storetest.New(t), source)
	here := at(d.start(t))
	there := at(d.start(t, site.Env()))
	ctx := t.Context()
	for _, way := range []struct {
		user     string
		from, to *address
	}{{"ann", here, there}, {"bob", there, here}} {
		key, err := d.phone(way.from, way.user).enrol(ctx, right)
		if err != nil {
			t.Fatal(err)
		}
		for range 9 {
			if _, err := d.phone(way.from, way.user).recover(ctx, wrong); !isRefused(err, "wrong-password") {
				t.Fatalf("a wrong password: %v", err)
			}
		}
		if got, err := d.phone(way.to, way.user).recover(ctx, right); err != nil || got != key {
			t.Fatalf("%s at the other site: %v", way.user, err)
		}
		for i := range 10 {
			if _, err := d.phone([]*address{way.from, way.to}[i%2], way.user).recover(ctx, wrong); err == nil {
				t.Fatal("a wrong password recovers")
			}
		}
		for _, site := range []*address{way.from, way.to} {
			if _, err := d.phone(site, way.user).recover(ctx, right); !isRefused(err, "key-destroyed") {
				t.Fatalf("after ten wrong passwords: %v", err)
			}
		}
	}
}

// With two tokens, rotating the master key means switching to a generation that a ceremony has put into both. Until both
// vaultds have shown that theirs holds it, it is refused; then it goes as with one token, each destroying the old key in its own.
func TestTwoSitesRotate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source, site := tokentest.NewDirectory(t), tokentest.NewDirectory(t)
	atSource, atSite := tokenEnv(t, dir, source), tokenEnv(t, dir, site)
	ceremony := func(env []string, args ...string) string {
		t.Helper()
		return "--confirm=" + last(mustRun(t, env, "vaultctl", append([]string{"token", "ceremony"}, args...)...))
	}
	confirm := ceremony(atSite, "join", "--out="+dir+"/request", "--oaep-hash=sha1")
	confirm = ceremony(atSource, "make", "--request="+dir+"/request", confirm, "--out="+dir+"/bundle", "--who=Ann", "--oaep-hash=sha1")
	ceremony(atSite, "accept", "--bundle="+dir+"/bundle", confirm)
	d := deployOn(t, storetest.New(t), source)

	here, there := d.start(t), d.start(t, site.Env())
	key := func(v *vaultd, args ...string) outcome {
		t.Helper()
		return run(t, []string{"BKV_ADMIN_URL=" + v.admin}, "vaultctl", append([]string{"key"}, args...)...)
	}
	refused := func(v *vaultd, want string, args ...string) {
		t.Helper()
		if o := key(v, args...); o.code != 1 || o.stdout != "" || strings.Count(o.stderr, "\n") != 1 || !strings.Contains(o.stderr, want) {
			t.Errorf("%v: exit status %d, %s%s; want %q", args, o.code, o.stdout, o.stderr, want)
		}
	}
	ctx := t.Context()
	keys := map[string][32]byte{}
	for user, v := range map[string]*vaultd{"ann": here, "bob": there} {
		var err error
		if keys[user], err = d.phone(at(v), user).enrol(ctx, right); err != nil {
			t.Fatal(err)
		}
	}
	recover := func() {
		t.Helper()
		for user, key := range keys {
			for _, v := range []*vaultd{here, there} {
				if got, err := d.phone(at(v), user).recover(ctx, right); err != nil || got != key {
					t.Errorf("%s: %v", user, err)
				}
			}
		}
	}
	recover()
	const noneInBoth = "2 tokens are in service"
	refused(here, noneInBoth, "rotate", "master")
	refused(there, noneInBoth, "rotate", "master")

	// The next generation is made; one site has it, and then both.
	here.stop(t)
	there.stop(t)
	confirm = ceremony(atSite, "join", "--out="+dir+"/request2", "--oaep-hash=sha1")
	confirm = ceremony(atSource, "make", "--request="+dir+"/request2", confirm, "--out="+dir+"/bundle2", "--who=Ann", "--oaep-hash=sha1",
		"--purpose=master", "--generation=2")
	here, there = d.start(t), d.start(t, site.Env())
	refused(here, noneInBoth, "rotate", "master")
	if o := key(here, "status"); o.code != 0 || !strings.Contains(o.stdout, "WARNING: key master/2 is not in token [") {
		t.Errorf("the status while one token lacks it: %s%s", o.stdout, o.stderr)
	}
	recover()
	there.stop(t)
	ceremony(atSite, "accept", "--bundle="+dir+"/bundle2", confirm)
	refused(here, noneInBoth, "rotate", "master") // it is there, and has not been shown
	there = d.start(t, site.Env())

	if o := key(there, "rotate", "master"); o.code != 0 || o.stdout != "master/2 is in use\n" {
		t.Fatalf("rotating: %s%s", o.stdout, o.stderr)
	}
	recover()
	moved := func() bool {
		return query[int64](t, d.database, `SELECT count(*) FROM generations WHERE state <> 'destroyed' AND sealed_under(sealed) <> 2`) == 0
	}
	eventually(t, "the records moved", moved)
	refused(here, "there is no next master key that all of them hold", "rotate", "master")
	state := func() string {
		return query[string](t, d.database, `SELECT state FROM key_generations WHERE purpose = 'master' AND generation = 1`)
	}
	for i, v := range []*vaultd{here, there} {
		if o := key(v, "destroy", "master", "1"); o.code != 0 {
			t.Fatalf("destroying at site %d: %s", i, o.stderr)
		}
		if want := []string{"closing", "destroyed"}[i]; state() != want {
			t.Errorf("after %d of two tokens the key is %s", i+1, state())
		}
		recover()
	}
	here.stop(t)
	there.stop(t)
	here, there = d.start(t), d.start(t, site.Env())
	recover()
}
