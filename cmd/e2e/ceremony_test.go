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
