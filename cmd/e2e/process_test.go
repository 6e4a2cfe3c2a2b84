package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// bareEnv is all that programs inherit. The race detector would sleep a second at
// every exit.
var bareEnv = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir(), "GORACE=atexit_sleep_ms=0"}

// program makes a command of ours. It dies with the tests, whatever becomes of them,
// and knows of the environment only what it is given.
func program(ctx context.Context, env []string, name string, args ...string) *exec.Cmd {
	lookAtSources()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, name), args...)
	cmd.Env = append(slices.Clone(bareEnv), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// lookAtSources opens the folders that the programs are built from: go test's cache knows only what a test has
// opened, and would give yesterday's result to today's programs.
var lookAtSources = sync.OnceFunc(func() {
	_ = filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == ".git" || d.Name() == "artefacts") {
			return filepath.SkipDir
		}
		return nil
	})
})

// outcome is how a program ended.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs a program to its end.
func run(t testing.TB, env []string, name string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := program(ctx, env, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, errors.Join(err, ctx.Err()), &stderr)
	}
	o := outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	sane(t, o.stderr)
	return o
}

// mustRun is run for what succeeds; it returns the output.
func mustRun(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	o := run(t, env, name, args...)
	if o.code != 0 {
		t.Fatalf("%s %v: exit status %d\n%s", name, args, o.code, o.stderr)
	}
	return o.stdout
}

// sane fails if a program's output shows a crash or a data race.
func sane(t testing.TB, log string) {
	t.Helper()
	for _, sign := range []string{"DATA RACE", "goroutine ", "SIGSEGV", "fatal error", "panic"} {
		if strings.Contains(log, sign) {
			t.Errorf("%q in what the program wrote:\n%s", sign, log)
		}
	}
}

// vaultd is a running vaultd.
type vaultd struct {
	url, admin  string // of its listeners
	fingerprint string // as it says at start

	cmd    *exec.Cmd
	log    logbook
	exited chan struct{} // closed when it has ended
}

// startVaultd starts vaultd on free ports and waits until it serves.
func startVaultd(t testing.TB, env []string, more ...string) *vaultd {
	t.Helper()
	v := &vaultd{exited: make(chan struct{})}
	v.log.serving = make(chan struct{})
	env = append(append([]string{"BKV_LISTEN=127.0.0.1:0", "BKV_ADMIN_LISTEN=127.0.0.1:0"}, env...), more...)
	v.cmd = program(context.Background(), env, "vaultd")
	v.cmd.Stderr = &v.log
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(v.exited)
		_ = v.cmd.Wait() // the state tells
	}()
	t.Cleanup(func() {
		v.kill()
		sane(t, v.log.String())
		if t.Failed() {
			lines := strings.SplitAfter(v.log.String(), "\n")
			t.Logf("the end of vaultd's log:\n%s", strings.Join(lines[max(0, len(lines)-50):], ""))
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	select {
	case <-v.log.serving:
	case <-v.exited:
		t.Fatalf("vaultd did not start: %v\n%s", v.cmd.ProcessState, v.log.String())
	case <-ctx.Done():
		t.Fatalf("vaultd does not serve after %v\n%s", patience, v.log.String())
	}
	for _, r := range v.log.records(t) {
		if r["msg"] == "serving" {
			scheme := map[any]string{false: "http://", true: "https://"}
			v.url, v.admin = scheme[r["tls"]]+r["listen"].(string), scheme[r["admin_tls"]]+r["admin_listen"].(string)
			v.fingerprint = r["fingerprint"].(string)
		}
	}
	return v
}

// kill is kill -9: nothing is finished, nothing is closed.
func (v *vaultd) kill() {
	_ = v.cmd.Process.Kill() // it may have ended
	<-v.exited
}

// terminate asks it to stop. wait waits until it has.
func (v *vaultd) terminate(t testing.TB) {
	t.Helper()
	if err := v.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// wait waits for a clean end: exit status 0 and the word for it in the log.
func (v *vaultd) wait(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	select {
	case <-v.exited:
	case <-ctx.Done():
		t.Fatalf("vaultd did not stop within %v", patience)
	}
	if code := v.cmd.ProcessState.ExitCode(); code != 0 || !strings.Contains(v.log.String(), `"msg":"stopped"`) {
		t.Fatalf("vaultd ended with %v", v.cmd.ProcessState)
	}
}

func (v *vaultd) stop(t testing.TB) {
	t.Helper()
	v.terminate(t)
	v.wait(t)
}

// logbook is what a program writes to standard error, as it comes.
type logbook struct {
	serving chan struct{} // closed when vaultd serves

	mu   sync.Mutex
	text []byte
	seen bool
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if i := bytes.Index(l.text, []byte(`"msg":"serving"`)); !l.seen && i >= 0 && bytes.IndexByte(l.text[i:], '\n') >= 0 {
		l.seen = true
		close(l.serving)
	}
	return len(p), nil
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// records are the log's lines, each of which is JSON.
func (l *logbook) records(t testing.TB) (records []map[string]any) {
	t.Helper()
	for line := range strings.Lines(l.String()) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("a line of the log is no JSON: %s", line)
		}
		records = append(records, r)
	}
	return records
}
