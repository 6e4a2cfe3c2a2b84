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
