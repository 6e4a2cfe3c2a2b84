package browsertest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// scripts/demo --chat, as a newcomer uses it: the address that it prints, a page that turns backup on
// and restores, and Ctrl-C, which leaves nothing.
func TestDemo(t *testing.T) {
	t.Parallel()
	needBrowser(t)
	demo := &process{exited: make(chan struct{})}
	demo.cmd = exec.Command(filepath.Join(root, "scripts", "demo"), "--chat")
	demo.cmd.Stdout, demo.cmd.Stderr = demo, demo
	demo.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM} // a group, as a terminal makes it
	if err := demo.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(demo.exited)
		_ = demo.cmd.Wait() // the state tells
	}()
	stop := func() { _ = syscall.Kill(-demo.cmd.Process.Pid, syscall.SIGINT) } // it may have ended
	t.Cleanup(func() {
		stop()
		<-demo.exited
		if t.Failed() {
			t.Logf("the demo wrote:\n%s", demo)
		}
	})
	printed := func(pattern string) string {
		t.Helper()
		var found []string
		eventually(t, "it prints "+pattern, func() bool {
			select {
			case <-demo.exited:
				t.Fatalf("it ended: %v", demo.cmd.ProcessState)
			default:
			}
			found = regexp.MustCompile(pattern).FindStringSubmatch(demo.String())
			return found != nil
		})
		return found[1]
	}
	d := &deployment{t: t, url: printed(`The chat app is at (http://localhost:\d+)`)}
	dir := printed(`Ctrl-C stops everything and removes (/tmp/bkv-demo-\w+)`)
	if running := processesOf(t, dir); len(running) < 3 { // vaultd, chatapp and Postgres
		t.Errorf("only %q run, so that a search says nothing", running)
	}

	alice := d.alice()
	alice.turnsOn(firstPassword)
	next := d.toRestore("alice")
	next.restores(firstPassword)
	next.reads("bob", secretMessage)

	stop()
	eventually(t, "it ends", func() bool {
		select {
		case <-demo.exited:
			return true
		default:
			return false
		}
	})
	if code := demo.cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("it ended with %d", code)
	}
	if strings.Contains(demo.String(), "did not stop cleanly") {
		t.Error("vaultd did not stop cleanly")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
	if left := processesOf(t, dir); len(left) > 0 {
		t.Errorf("these are left running: %q", left)
	}
}

// processesOf lists the processes that run from this directory or in it, or are told of it.
func processesOf(t *testing.T, dir string) (out []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		line, _ := os.ReadFile(p + "/cmdline") // it may have ended
		program, _ := os.Readlink(p + "/exe")
		cwd, _ := os.Readlink(p + "/cwd")
		if bytes.Contains(line, []byte(dir)) || strings.HasPrefix(program, dir) || strings.HasPrefix(cwd, dir) {
			out = append(out, string(bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte(" "))))
		}
	}
	return out
}
