package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// killedBkv starts bkv and kills it after a while, unless it ends before; done says that it ended well.
func killedBkv(t testing.TB, after time.Duration, env []string, args ...string) (done bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), after)
	defer cancel()
	cmd := program(ctx, env, "bkv", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	sane(t, stderr.String())
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		t.Fatalf("after a kill, bkv %v: %s", args, &stderr)
	}
	return err == nil
}

// Whenever backup or restore is killed: nothing that passes for whole, and the last good copy is
// there. Each is killed again and again, a little later each time, until it ends by itself.
func TestKilledBkv(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := offline(dir)
	mustRun(t, env, "bkv", "setup", "--mode=digits", "--yes")
	tree, there := filepath.Join(dir, "tree"), filepath.Join(dir, "there")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	// A version is a whole only if all of its files are of it.
	const files = 12
	version := func(v string) {
		t.Helper()
		for i := range files {
			content := make([]byte, 1<<20)
			fillRandom(content)
			copy(content, v)
			if err := os.WriteFile(filepath.Join(tree, string(rune('a'+i))), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	whole := func(back string) string {
		t.Helper()
		seen := map[string]bool{}
		for i := range files {
			content, err := os.ReadFile(filepath.Join(back, "tree", string(rune('a'+i))))
			if err != nil || len(content) != 1<<20 {
				t.Fatalf("%d bytes, %v", len(content), err)
			}
			seen[string(content[:2])] = true
		}
		if len(seen) != 1 {
			t.Fatalf("a mixture of %v", seen)
		}
		for v := range seen {
			return v
		}
		return ""
	}
	version("v1")
	mustRun(t, env, "bkv", "backup", tree, there)
	version("v2")
	const step = 25 * time.Millisecond
	kills := 0
	for after := step; !killedBkv(t, after, env, "backup", tree, there); after += step {
		back := filepath.Join(dir, "after-kill")
		mustRun(t, env, "bkv", "restore", there, back)
		if v := whole(back); v != "v1" && v != "v2" {
			t.Fatalf("after a kill at %v: %q", after, v)
		}
		if err := os.RemoveAll(back); err != nil {
			t.Fatal(err)
		}
		kills++
	}
	if kills < 3 {
		t.Errorf("killed %d times, which is too few to say anything", kills)
	}
	// What the killed ones left is gone, and one backup is there.
	left, err := os.ReadDir(there)
	if err != nil {
		t.Fatal(err)
	}
	archives := 0
	for _, e := range left {
		switch {
		case strings.HasSuffix(e.Name(), ".tar.zst.age"):
			archives++
		case e.Name() != "bkv-manifest" && e.Name() != ".bkv-lock":
			t.Errorf("%s is left", e.Name())
		}
	}
	if archives != 1 {
		t.Errorf("%d archives are left", archives)
	}

	back := filepath.Join(dir, "back")
	kills = 0
	for after := step; !killedBkv(t, after, env, "restore", there, back); after += step {
		// The name is there only if all of it is: a kill can come just after the end.
		if _, err := os.Stat(back); err == nil {
			whole(back)
			if err := os.RemoveAll(back); err != nil {
				t.Fatal(err)
			}
		}
		kills++
	}
	if v := whole(back); v != "v2" || kills < 2 {
		t.Errorf("%s after %d kills", v, kills)
	}
	// Over a folder that is there: it is the old one or the new one, and one of them is always there.
	write(t, back, "mine", "x")
	for after := step; !killedBkv(t, after, env, "restore", there, back, "--overwrite"); after += step {
		whole(back)
	}
	if _, err := os.Stat(filepath.Join(back, "mine")); err == nil {
		t.Error("what was to be replaced is there")
	}
	o := run(t, env, "bkv", "restore", there, back, "--overwrite")
	if partial, _ := filepath.Glob(back + ".bkv-partial-*"); len(partial) > 0 && !strings.Contains(o.stderr, "left from a restore that was interrupted") {
		t.Errorf("%v are left and not told", partial)
	}
}

// A stop in the middle takes what was half-written away itself.
func TestStoppedBkv(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := offline(dir)
	mustRun(t, env, "bkv", "setup", "--mode=digits", "--yes")
	// A file that is endless for practical purposes.
	f, err := os.Create(filepath.Join(dir, "hole"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(1<<42), f.Close()); err != nil {
		t.Fatal(err)
	}
	there := filepath.Join(dir, "there")
	cmd := program(t.Context(), env, "bkv", "backup", f.Name(), there)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an archive to be written", func() bool {
		partial, _ := filepath.Glob(there + "/.bkv-partial-*")
		return len(partial) > 0
	})
	// While it runs nobody else writes there.
	if o := run(t, env, "bkv", "backup", f.Name(), there); o.code != 1 || !strings.Contains(o.stderr, "another bkv is writing") {
		t.Errorf("%+v", o)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the state tells
	sane(t, stderr.String())
	if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(stderr.String(), "bkv: stopped; what was there before is unchanged") {
		t.Errorf("exit status %d: %s", code, &stderr)
	}
	left, err := os.ReadDir(there)
	if err != nil || len(left) != 2 { // lock and manifest
		t.Errorf("left: %v, %v", left, err)
	}
	if o := run(t, env, "bkv", "restore", there, dir+"/back"); o.code != 1 || !strings.Contains(o.stderr, "no backup there was ever finished") {
		t.Errorf("%+v", o)
	}
}

// fillRandom fills b with what does not compress.
func fillRandom(b []byte) { _, _ = rand.Read(b) }

// A backup that lacks something says so, and keeps the older copies.
func TestIncompleteBackup(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("/tmp", "bkv-incomplete-") // open to somebody who is not root
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.MkdirAll(dir+"/tree/closed", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/tree", "good", "content")
	write(t, dir+"/tree", "secret", "content")
	asNobody := func(args ...string) outcome {
		t.Helper()
		cmd := program(t.Context(), offline(dir), "bkv", args...)
		if os.Geteuid() == 0 { // root reads everything
			const nobody = 65534
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
			for _, p := range []string{dir, dir + "/tree", dir + "/tree/good", dir + "/tree/secret", dir + "/tree/closed"} {
				if err := os.Lchown(p, nobody, nobody); err != nil {
					t.Fatal(err)
				}
			}
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // the state tells
		sane(t, stderr.String())
		return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	}
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"setup", "--mode=digits", "--yes"}, {"backup", dir + "/tree", dir + "/there"}} {
		if o := asNobody(args...); o.code != 0 {
			t.Fatalf("%v: %+v", args, o)
		}
	}
	for _, p := range []string{"/tree/secret", "/tree/closed"} {
		if err := os.Chmod(dir+p, 0); err != nil {
			t.Fatal(err)
		}
	}
	o := asNobody("backup", dir+"/tree", dir+"/there")
	if o.code != 1 || !strings.Contains(o.stderr, "tree/secret: permission denied\n") || !strings.Contains(o.stderr, "tree/closed: permission denied\n") ||
		!strings.Contains(o.stderr, "without what could not be read (2 files or folders, named above); older copies were kept") {
		t.Errorf("%+v", o)
	}
	o = asNobody("restore", "--list", dir+"/there")
	if strings.Count(o.stdout, "bkv-") != 2 || strings.Count(o.stdout, ", incomplete\n") != 1 {
		t.Errorf("%+v", o)
	}
	o = asNobody("restore", dir+"/there", dir+"/back")
	if o.code != 0 || !strings.Contains(o.stderr, "NOTE: 2 files or folders could not be read when this backup was made") {
		t.Errorf("%+v", o)
	}
	if got, err := os.ReadFile(dir + "/back/tree/good"); string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
	for _, p := range []string{"/tree/secret", "/tree/closed"} {
		if err := os.Chmod(dir+p, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if o = asNobody("backup", dir+"/tree", dir+"/there"); o.code != 0 {
		t.Errorf("%+v", o)
	}
	if o = asNobody("restore", "--list", dir+"/there"); strings.Count(o.stdout, "bkv-") != 1 {
		t.Errorf("%+v", o)
	}
}

// Where there is no room, nothing half-written stays, what was there still is, and bkv says what to do.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	needs(t, "unshare", "mount")
	dir := t.TempDir()
	for _, name := range []string{"disk", "small", "big"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	content := make([]byte, 4<<20)
	fillRandom(content)
	write(t, dir+"/small", "file", "content")
	write(t, dir+"/big", "file", string(content))
	// A file system of two megabytes, which nobody else sees.
	script := `set -eu
mount -t tmpfs -o size=2m tmpfs disk
fails() { if "$@" 2>said; then exit 1; fi; cat said >&2; grep -q "no space left on device" said; grep -q "^Make room there" said; }
bkv setup --mode=digits --yes >digits
bkv backup small disk/there
bkv backup big there
before=$(ls disk/there)
fails bkv backup big disk/there
[ "$(ls disk/there)" = "$before" ]
bkv restore disk/there back
cmp back/small/file small/file
fails bkv restore there disk/back
[ "$(ls disk)" = there ]
cp -r device disk/device
dd if=/dev/zero of=disk/rest bs=1k 2>/dev/null || true
export BKV_CONFIG_DIR=disk/device
fails bkv backup small there
grep -q "the backup is whole, but this device could not note it" said
rm -rf back
fails bkv restore there back
grep -q "all is restored, but this device could not note where the backup is" said
cmp back/small/file small/file
rm disk/rest
bkv backup small there
bkv backup small disk/there
mount -o remount,ro disk
if bkv backup small disk/there 2>said; then exit 1; fi
grep "mount the disk for writing" said
`
	cmd := exec.Command("unshare", "--mount", "--map-root-user", "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(append(offline(dir), bareEnv...), "PATH="+bin+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	sane(t, string(out))
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
