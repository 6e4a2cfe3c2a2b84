package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// needs skips a test where a program is missing, and fails in CI.
func needs(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is missing", p)
			}
			t.Skipf("%s is missing: scripts/test installs it", p)
		}
	}
}

// others builds the programs of the module in others, once, and returns where they are.
var others = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(bin, "others")
	build := exec.Command("go", "build", "-o", dir+"/", "filippo.io/age/cmd/age", "github.com/johannesboyne/gofakes3/cmd/gofakes3")
	build.Dir = "others"
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building what is in others: %w\n%s", err, out)
	}
	return dir, nil
})

// TestBkvWithOthers runs testdata/bkv-others: bkv beside the programs that its users have.
func TestBkvWithOthers(t *testing.T) {
	t.Parallel()
	needs(t, "restic", "rclone", "zstd", "tar")
	dir, err := others()
	if err != nil {
		t.Fatal(err)
	}
	runBkvScripts(t, "testdata/bkv-others", func(e *testscript.Env) []string {
		return append(offline(e.WorkDir), "PATH="+dir+":"+os.Getenv("PATH"))
	})
}

// startS3 starts an S3 server with a bucket called "bucket", and returns its address. Its files
// are below dir.
func startS3(t testing.TB, dir string) string {
	t.Helper()
	programs, err := others()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(programs, "gofakes3"), "-host=127.0.0.1:0", "-backend=fs", "-fs.create",
		"-fs.path="+filepath.Join(dir, "s3"), "-initialbucket=bucket")
	cmd.Env = bareEnv
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has no other way to end
		_ = cmd.Wait()
	})
	lines := bufio.NewReader(log)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("the S3 server does not start: %v", err)
		}
		if port := regexp.MustCompile("using port: ([0-9]+)").FindStringSubmatch(line); port != nil {
			go func() { _, _ = io.Copy(io.Discard, lines) }()
			return "http://127.0.0.1:" + port[1]
		}
	}
}

// The whole life of a backup in S3, over HTTP.
func TestBkvOnS3(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := startS3(t, dir)
	env := append(offline(dir), "AWS_ACCESS_KEY_ID=user", "AWS_SECRET_ACCESS_KEY=secret-Narwhal", "AWS_EC2_METADATA_DISABLED=true")
	where := "s3://bucket?endpoint=" + server + "&use_path_style=true&region=us-east-1&prefix=phone/"
	mustRun(t, env, "bkv", "setup", "--mode=digits", "--yes")
	if err := os.Mkdir(dir+"/tree", 0o755); err != nil {
		t.Fatal(err)
	}
	// More than one part of an upload, of what does not become smaller.
	big := make([]byte, 40<<20)
	fillRandom(big)
	write(t, dir+"/tree", "big", string(big))
	write(t, dir+"/tree", "small", "first")
	refused := func(want string, args ...string) {
		t.Helper()
		if o := run(t, env, "bkv", args...); o.code != 1 || !strings.Contains(o.stderr, want) || strings.Contains(o.stderr, "Narwhal") {
			t.Fatalf("bkv %v: %+v, want %q", args, o, want)
		}
	}
	refused("there is no backup here", "restore", where, dir+"/back")
	mustRun(t, env, "bkv", "backup", dir+"/tree", where)
	write(t, dir+"/tree", "small", "second")
	mustRun(t, env, "bkv", "backup", dir+"/tree", where, "--keep=2")
	listed := strings.Split(strings.TrimSpace(mustRun(t, env, "bkv", "restore", "--list", where)), "\n")
	if len(listed) != 2 {
		t.Fatalf("listed: %q", listed)
	}
	objects, err := filepath.Glob(dir + "/s3/buckets/bucket/phone/*")
	if err != nil || len(objects) != 3 {
		t.Fatalf("at the server: %q, %v", objects, err)
	}
	mustRun(t, env, "bkv", "restore", where, dir+"/back")
	if got, err := os.ReadFile(dir + "/back/tree/big"); err != nil || string(got) != string(big) {
		t.Errorf("the big file differs, %v", err)
	}
	first, _, _ := strings.Cut(listed[0], " ")
	mustRun(t, env, "bkv", "restore", where, dir+"/back", "--overwrite", "--archive="+first)
	if got, err := os.ReadFile(dir + "/back/tree/small"); err != nil || string(got) != "first" {
		t.Errorf("%q, %v", got, err)
	}
	mustRun(t, env, "bkv", "backup", dir+"/tree", where)
	if objects, err = filepath.Glob(dir + "/s3/buckets/bucket/phone/*.age"); err != nil || len(objects) != 1 {
		t.Fatalf("at the server: %q, %v", objects, err)
	}
	status := mustRun(t, env, "bkv", "status")
	if !strings.Contains(status, "in s3://bucket?prefix=phone/") || strings.Contains(status, "127.0.0.1") {
		t.Errorf("status: %s", status)
	}

	// The server changes a byte of the archive, and then has none.
	content, err := os.ReadFile(objects[0])
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(objects[0], content, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("the archive is damaged", "restore", where, dir+"/damaged")
	if err := os.Remove(objects[0]); err != nil {
		t.Fatal(err)
	}
	refused("somebody deleted it", "restore", where, dir+"/damaged")
	refused("bucket", "backup", dir+"/tree", strings.Replace(where, "//bucket", "//nobucket", 1))
	for _, left := range []string{"damaged", "damaged.bkv-partial-*"} {
		if found, _ := filepath.Glob(dir + "/" + left); len(found) > 0 {
			t.Errorf("%q is left", found)
		}
	}
}

// The key is in the system's keyring where there is one: a real one, of a session of its own.
func TestBkvWithAKeyring(t *testing.T) {
	t.Parallel()
	needs(t, "dbus-run-session", "gnome-keyring-daemon")
	dir := t.TempDir()
	script := `set -e
printf unlocked | gnome-keyring-daemon --unlock --components=secrets >/dev/null
bkv setup --mode=digits --yes >shown
bkv key | cmp - shown
grep -q '"key_store": "keyring"' device/settings.json
[ ! -e device/key ]
! grep -rq "$(head -c 4 shown) $(head -c 9 shown | tail -c 4)" device
bkv status | grep "in the system's keyring"
bkv backup tree there
bkv restore there back
cmp back/tree/file tree/file
bkv off --yes
if bkv key; then exit 1; fi
bkv setup --mode=digits --yes --key-store=file >other 2>warning
grep WARNING warning
[ -e device/key ]
`
	if err := os.Mkdir(dir+"/tree", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/tree", "file", "content")
	if err := os.Mkdir(dir+"/run", 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-run-session", "--", "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(append(offline(dir), bareEnv...), "PATH="+bin+":"+os.Getenv("PATH"), "XDG_RUNTIME_DIR="+dir+"/run", "XDG_DATA_HOME="+dir+"/data")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
