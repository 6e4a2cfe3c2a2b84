package e2e_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// person sits at a terminal in which bkv runs.
type person struct {
	t       testing.TB
	cmd     *exec.Cmd
	pty     *os.File
	exited  chan struct{} // closed when bkv has ended and all that it wrote was read
	read    int           // up to where the screen was looked at
	mu      sync.Mutex
	written []byte
}

// sitDown starts bkv in a terminal.
func sitDown(t testing.TB, env []string, args ...string) *person {
	t.Helper()
	p := &person{t: t, cmd: exec.Command(filepath.Join(bin, "bkv"), args...), exited: make(chan struct{})}
	p.cmd.Env = append(append(env, bareEnv...), "TERM=xterm")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if p.pty, err = pty.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		for buffer := make([]byte, 4096); ; {
			n, err := p.pty.Read(buffer)
			p.mu.Lock()
			p.written = append(p.written, buffer[:n]...)
			p.mu.Unlock()
			if err != nil { // EIO: nobody has the other end open any more
				break
			}
		}
		_ = p.cmd.Wait() // the state tells
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.exited
		_ = p.pty.Close()
		sane(t, p.screen())
		if t.Failed() {
			t.Logf("bkv %v at the terminal:\n%s", args, p.screen())
		}
	})
	return p
}

// screen is all that was to be seen.
func (p *person) screen() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.written)
}

// sees waits for something to come after what was seen before, and returns its groups.
func (p *person) sees(pattern string) []string {
	p.t.Helper()
	re := regexp.MustCompile(pattern)
	var found []string
	ended := false
	eventually(p.t, pattern, func() bool {
		select {
		case <-p.exited:
			ended = true
		default:
		}
		screen := p.screen()[p.read:]
		if at := re.FindStringSubmatchIndex(screen); at != nil {
			found = re.FindStringSubmatch(screen)
			p.read += at[1]
			return true
		}
		if ended {
			p.t.Fatalf("bkv ended before %q", pattern)
		}
		return false
	})
	return found
}

// types types a line.
func (p *person) types(line string) {
	p.t.Helper()
	if _, err := io.WriteString(p.pty, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
}

// hidden is types for what must not be seen: it waits until the terminal shows nothing.
func (p *person) hidden(line string) {
	p.t.Helper()
	p.notSeen()
	p.types(line)
}

func (p *person) echoes() bool {
	p.t.Helper()
	state, err := unix.IoctlGetTermios(int(p.pty.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

// ends waits for bkv to end with this status.
func (p *person) ends(status int) {
	p.t.Helper()
	eventually(p.t, "bkv to end", func() bool {
		select {
		case <-p.exited:
			return true
		default:
			return false
		}
	})
	if got := p.cmd.ProcessState.ExitCode(); got != status {
		p.t.Fatalf("bkv ended with %d, want %d", got, status)
	}
	if !p.echoes() {
		p.t.Error("bkv left a terminal that does not show what is typed")
	}
}

// Keys that are no characters.
const (
	ctrlC = "\x03"
	ctrlD = "\x04" // the end of the input
)

// presses presses a key where bkv asks for something hidden.
func (p *person) presses(key string) {
	p.t.Helper()
	p.notSeen()
	if _, err := io.WriteString(p.pty, key); err != nil {
		p.t.Fatal(err)
	}
}

// notSeen waits until the terminal shows nothing of what is typed.
func (p *person) notSeen() {
	p.t.Helper()
	eventually(p.t, "a terminal that does not show what is typed", func() bool { return !p.echoes() })
}

// neverSaw fails if something was to be seen.
func (p *person) neverSaw(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		if strings.Contains(p.screen(), text) {
			p.t.Errorf("%q was to be seen", text)
		}
	}
}

// offline is the environment of a bkv that has no vault.
func offline(dir string) []string {
	return []string{"BKV_CONFIG_DIR=" + filepath.Join(dir, "device"), "HOME=" + dir, "TZ=UTC"}
}

func TestDigitsAtATerminal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := offline(dir)
	p := sitDown(t, env, "setup")
	p.sees("1 or 2: ")
	p.types("3")
	p.sees("1 or 2: ")
	p.types("2")
	shown := p.sees(`(?s)Write these 64 digits down.*?((?: +[0-9a-f]{4} [0-9a-f]{4} [0-9a-f]{4} [0-9a-f]{4}\r\n){4})`)
	groups := strings.Fields(shown[1])
	p.sees("Without them NOBODY can restore your backup")
	group := func() string {
		t.Helper()
		n := p.sees(`type group ([0-9]+) of 16: `)[1]
		if i, err := strconv.Atoi(n); err == nil && i >= 1 && i <= len(groups) {
			return groups[i-1]
		}
		t.Fatalf("group %s", n)
		return ""
	}
	group()
	p.types("0000")
	first := group()
	p.types(first)
	p.sees("That is not what stands there")
	if _, err := os.Stat(filepath.Join(dir, "device")); err == nil {
		t.Error("the device has a key before its owner has shown to have it")
	}
	p.sees("Without them NOBODY")
	a := group()
	p.types(strings.ToUpper(a))
	b := group()
	if a == b {
		t.Error("the same group twice")
	}
	p.types(" " + b + " ")
	p.sees("That is right. Once more: without these digits nobody can restore the backup.")
	p.sees("WARNING: the key lies in ")
	p.sees("Done.")
	p.ends(0)

	// It is the key that was shown. Practising it takes any lines, and says what is no digit.
	p = sitDown(t, env, "key")
	p.sees("Whoever sees these 64 digits can read your backup")
	if got := p.sees(`(?s)\n((?:[0-9a-f]{4}\s+){16})`)[1]; strings.Join(strings.Fields(got), " ") != strings.Join(groups, " ") {
		t.Error("the key is another one than was shown")
	}
	p.ends(0)
	p = sitDown(t, env, "verify")
	p.sees("> ")
	p.types(strings.Join(groups[:7], " "))
	p.sees("> ")
	p.types("oh no")
	p.sees("is not a hexadecimal digit.*type it again")
	p.sees("> ")
	p.types(strings.Join(groups[7:], ""))
	p.sees("The 64 digits are right")
	p.ends(0)
	p = sitDown(t, env, "verify")
	p.sees("> ")
	p.types(strings.Repeat("0", 64))
	p.sees("these are 64 digits, but not this backup's")
	p.ends(1)
	p = sitDown(t, env, "key", "--raw")
	p.sees("would upset the terminal")
	p.ends(1)
	p = sitDown(t, env, "off")
	p.sees(`Type "off" to go on: `)
	p.types("no")
	p.sees("nothing was done")
	p.ends(1)
	p = sitDown(t, env, "off")
	p.sees("written the digits down, stop here")
	p.sees(`Type "off" to go on: `)
	p.types("off")
	p.sees("This device has forgotten the key")
	p.ends(0)
}

func passwordAtATerminal(t *testing.T, d *served) {
	dir := t.TempDir()
	env := d.bkvEnv(d.vault, dir, "at-a-terminal")
	const password, other = "blue teapot on a tuesday", "blue teapot on a thursday"

	p := sitDown(t, env, "setup")
	p.sees("1 or 2: ")
	p.types("1")
	p.sees("the only way to your backup")
	p.sees("New password: ")
	p.hidden("password")
	p.sees("among the first that anybody would try")
	p.sees("New password: ")
	p.hidden(password)
	p.sees("The same once more: ")
	p.hidden(other)
	p.sees("They differ")
	p.sees("New password: ")
	p.hidden(password)
	p.sees("The same once more: ")
	p.hidden(password)
	p.sees("WARNING: the key lies in ")
	p.sees("Done. Your backup key is in the vault under your password")
	p.ends(0)
	p.neverSaw(password, other)

	// Attempts are told before they are made.
	p = sitDown(t, env, "verify")
	p.sees("It is a real attempt:\\s+a wrong password costs one")
	p.sees("10 attempts left of 10. A wrong password costs one")
	p.sees("Password: ")
	p.hidden(other)
	p.sees("That password is wrong")
	p.sees("9 attempts left of 10")
	p.sees("Password: ")
	p.hidden(password)
	p.sees("The password is right, and it recovers this device's key")
	p.ends(0)
	p.neverSaw("did not make") // its own wrong attempt is not told as another's
	p = sitDown(t, env, "verify")
	p.sees("Password: ")
	p.presses(ctrlC)
	p.sees("bkv: stopped")
	p.ends(130)

	// The last attempt is asked for twice.
	wrong := write(t, dir, "wrong", other)
	for range 9 {
		if o := run(t, env, "bkv", "verify", "--password-file="+wrong); o.code != 1 || !strings.Contains(o.stderr, "wrong password") {
			t.Fatalf("%+v", o)
		}
	}
	p = sitDown(t, env, "verify")
	p.sees("1 attempt left of 10")
	p.sees("THIS IS THE LAST ATTEMPT")
	p.sees(`Type "last attempt" to go on: `)
	p.types("yes")
	p.sees("nothing was done")
	p.ends(1)
	p = sitDown(t, env, "verify")
	p.sees(`Type "last attempt" to go on: `)
	p.types("last attempt")
	p.sees("Password: ")
	p.hidden(other)
	p.sees("The same once more: ")
	p.hidden(password)
	p.sees("They differ. Nothing was tried")
	p.sees("Password: ")
	p.hidden(password)
	p.sees("The same once more: ")
	p.hidden(password)
	p.sees("tried wrongly 9 times that you did not make")
	p.sees("The password is right")
	p.ends(0)
}

// A restore on a new device asks for the password; a backup shows how far it is, unless it is to be quiet.
func backupAtATerminal(t *testing.T, d *served) {
	dir := t.TempDir()
	env := d.bkvEnv(d.vault, dir, "with-a-meter")
	password := write(t, dir, "password", "blue teapot on a tuesday")
	mustRun(t, env, "bkv", "setup", "--mode=password", "--password-file="+password)
	if err := os.Mkdir(dir+"/tree", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/tree", "file", strings.Repeat("content\n", 1<<20))

	p := sitDown(t, env, "backup", dir+"/tree", dir+"/there")
	p.sees(`backing up: `)
	p.sees(`Backed up: 1 file, 8.0 MiB in `)
	p.ends(0)
	write(t, dir+"/there", "old.zip", "in clear")
	p = sitDown(t, env, "backup", dir+"/tree", dir+"/there", "--replaces=old.zip")
	p.sees(`To be deleted when this backup is whole: old.zip \(1 file, 8 B\)`)
	p.sees(`They cannot be brought back. Type "delete" to go on: `)
	p.types("no")
	p.sees("nothing was done")
	p.ends(1)
	p = sitDown(t, env, "backup", dir+"/tree", dir+"/there", "--replaces=old.zip")
	p.sees(`Type "delete" to go on: `)
	p.types("delete")
	p.sees("Deleting the older backup of .*, bkv-")
	p.sees("Deleting old.zip, which this backup replaces")
	p.ends(0)
	p = sitDown(t, env, "--quiet", "backup", dir+"/tree", dir+"/there")
	p.ends(0)
	if s := p.screen(); s != "" {
		t.Errorf("quiet, it says %q", s)
	}

	if err := os.RemoveAll(dir + "/device"); err != nil {
		t.Fatal(err)
	}
	p = sitDown(t, env, "restore", dir+"/there", dir+"/back")
	p.sees("10 attempts left of 10")
	p.sees("Password: ")
	p.hidden("blue teapot on a tuesday")
	p.sees("WARNING: the key lies in")
	p.sees("restoring: ")
	p.sees("Restored: 1 file, 8.0 MiB")
	p.ends(0)
	if got, err := os.ReadFile(dir + "/back/tree/file"); err != nil || len(got) != 8<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// A token that the vault refuses is asked for again.
func tokenAskedForAgain(t *testing.T, d *served) {
	dir := t.TempDir()
	env := d.bkvEnv(d.vault, dir, "token-again")
	fresh, err := d.mint("token-again")
	if err != nil {
		t.Fatal(err)
	}
	password := write(t, dir, "password", "blue teapot on a tuesday")
	good := write(t, dir, "good", fresh+"\n")
	// The command gives an old token first, and the good one afterwards.
	command := "if [ -e " + dir + "/asked ]; then cat " + good + "; else touch " + dir + "/asked; echo a.b.c; fi"
	env = append(env, "BKV_TOKEN_COMMAND="+command)
	mustRun(t, env, "bkv", "setup", "--mode=password", "--password-file="+password)
	if _, err := os.Stat(dir + "/asked"); err != nil {
		t.Error("the first token was not asked for")
	}
	for name, test := range map[string]struct{ command, file, want string }{
		"refused for good":     {"echo a.b.c", "", "the vault does not accept the token"},
		"a command that fails": {"echo no such thing >&2; exit 3", "", "exit status 3: no such thing"},
		"no token":             {"true", "", "what should be a token is none"},
		"several lines":        {"echo a; echo b", "", "what should be a token is none"},
		"both":                 {"true", good, "not both"},
		"a file":               {"", good, ""},
		"no file":              {"", dir + "/nowhere", "no such file"},
	} {
		o := run(t, append(env, "BKV_TOKEN_COMMAND="+test.command, "BKV_TOKEN_FILE="+test.file), "bkv", "status")
		if (o.code == 0) != (test.want == "") || !strings.Contains(o.stderr, test.want) {
			t.Errorf("%s: %+v", name, o)
		}
		if strings.Contains(o.stdout+o.stderr, fresh) {
			t.Errorf("%s: shows the token", name)
		}
	}
}
