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
	build := exec.Command("go", "build", "-o", dir+"/", "filippo.io/age/cmd/age", "github.com/johannesboyne/gofakes3/cmd/gofakes3", "./gcs")
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

// startBucket starts a cloud's server of those in others, and returns what of its output says is the address.
func startBucket(t testing.TB, address *regexp.Regexp, name string, args ...string) string {
	t.Helper()
	programs, err := others()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(programs, name), args...)
	cmd.Env = bareEnv
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = in, in
	err = cmd.Start()
	_ = in.Close() // the server has its own
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has no other way to end
		_ = cmd.Wait()
		<-read
		_ = out.Close()
	})
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			close(read)
			t.Fatalf("%s does not start: %v", name, err)
		}
		if found := address.FindStringSubmatch(line); found != nil {
			go func() {
				defer close(read)
				_, _ = io.Copy(io.Discard, lines)
			}()
			return found[1]
		}
	}
}

// The whole life of a backup in S3, over HTTP.
func TestBkvOnS3(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	port := startBucket(t, regexp.MustCompile("using port: ([0-9]+)"), "gofakes3", "-host=127.0.0.1:0", "-backend=fs", "-fs.create",
		"-fs.path="+filepath.Join(dir, "s3"), "-initialbucket=bucket")
	env := append(offline(dir), "AWS_ACCESS_KEY_ID=user", "AWS_SECRET_ACCESS_KEY=secret-Narwhal", "AWS_EC2_METADATA_DISABLED=true")
	lifeInABucket(t, dir, env, "s3://bucket?endpoint=http://127.0.0.1:"+port+"&use_path_style=true&region=us-east-1&prefix=phone/", dir+"/s3/buckets/bucket/phone")
}

// And in Google Cloud Storage, over HTTP.
func TestBkvOnGoogleCloudStorage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/gcs/bucket", 0o755); err != nil {
		t.Fatal(err)
	}
	server := startBucket(t, regexp.MustCompile("(127.0.0.1:.*)\n"), "gcs", dir+"/gcs")
	lifeInABucket(t, dir, append(offline(dir), "STORAGE_EMULATOR_HOST="+server), "gs://bucket?prefix=phone/", dir+"/gcs/bucket/phone")
}

// lifeInABucket is a backup's life at a URL of a bucket called "bucket", whose server keeps its objects as files
// in a folder.
func lifeInABucket(t *testing.T, dir string, env []string, where, folder string) {
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
	objects, err := filepath.Glob(folder + "/*")
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
	if objects, err = filepath.Glob(folder + "/*.age"); err != nil || len(objects) != 1 {
		t.Fatalf("at the server: %q, %v", objects, err)
	}
	status := mustRun(t, env, "bkv", "status")
	if !regexp.MustCompile(`in [a-z0-9]+://bucket\?prefix=phone/\n`).MatchString(status) || strings.Contains(status, "127.0.0.1") {
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
