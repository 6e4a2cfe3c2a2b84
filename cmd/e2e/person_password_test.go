package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
)

const (
	bluePassword   = "blue teapot on a tuesday"
	greenPassword  = "green kettle of a friday"
	yellowPassword = "yellow spoons every sunday"
)

// withPassword is the environment of a device that was set up with a password, and that of another device of
// the same user's, which has nothing.
func (s *served) withPassword(t *testing.T, user, password string) (device, newDevice []string) {
	t.Helper()
	dir := t.TempDir()
	device = s.bkvEnv(s.vault, dir, user)
	mustRun(t, device, "bkv", "setup", "--mode=password", "--password-file="+write(t, dir, "password", password))
	return device, append(device, "BKV_CONFIG_DIR="+filepath.Join(dir, "new-device"))
}

// opens fails unless the vault's key is under this password, which costs an attempt only if not.
func opens(t *testing.T, env []string, password string) {
	t.Helper()
	mustRun(t, env, "bkv", "verify", "--password-file="+write(t, t.TempDir(), "password", password))
}

// attemptsLeft is what status says of a device that has the key.
func attemptsLeft(t *testing.T, env []string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^attempts left: ([0-9]+) of 10$`).FindStringSubmatch(mustRun(t, env, "bkv", "status"))
	if found == nil {
		t.Fatal("status says nothing of attempts")
	}
	return found[1]
}

// hasNothing fails if a device keeps something.
func hasNothing(t *testing.T, env []string) {
	t.Helper()
	if o := run(t, env, "bkv", "status"); o.code != 1 || !strings.Contains(o.stderr, "not set up on this device") {
		t.Errorf("the device has something: %+v", o)
	}
}

// A change of the key is cut off at each of its requests, before the vault has it and after: the device owns what the
// vault has all the same, and backs nothing up under a key that the vault may not have.
func changeOfKeyCutOff(t *testing.T, s *served) {
	upstream, err := url.Parse(s.vault.url)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		arrives, verify := i%2 == 0, i/2 == 0
		for n := 1; ; n++ {
			device, _ := s.withPassword(t, fmt.Sprintf("cut-%d-%d", n, i), bluePassword)
			dir := t.TempDir()
			there, green, yellow := filepath.Join(dir, "there"), write(t, dir, "green", greenPassword), write(t, dir, "yellow", yellowPassword)
			ctx, kill := context.WithCancel(t.Context())
			var requests atomic.Int32
			forward := httputil.NewSingleHostReverseProxy(upstream)
			between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPost || int(requests.Add(1)) != n {
					forward.ServeHTTP(w, r)
					return
				}
				if arrives {
					forward.ServeHTTP(httptest.NewRecorder(), r)
				} else {
					_, _ = io.Copy(io.Discard, r.Body)
				}
				kill()
				<-r.Context().Done() // bkv is gone
			}))
			err := program(ctx, append(device, "BKV_VAULT_URL="+between.URL), "bkv", "password", "--new-key", "--new-password-file="+green).Run()
			kill()
			between.Close()
			if err == nil {
				if n < 4 { // status, start, stage, activation
					t.Fatalf("the change was over after %d requests", n-1)
				}
				break
			}
			if o := run(t, device, "bkv", "backup", dir, there); n > 1 && (o.code != 1 || !strings.Contains(o.stderr, "a change of the key was interrupted")) {
				t.Errorf("request %d, arrived %t: a backup under a key that the vault may not have: %+v", n, arrives, o)
			}
			if !verify {
				mustRun(t, device, "bkv", "password", "--new-password-file="+yellow)
				opens(t, device, yellowPassword)
			} else if o := run(t, device, "bkv", "verify", "--password-file="+green); o.code != 0 { // the vault has the old one
				opens(t, device, bluePassword)
			}
			mustRun(t, device, "bkv", "backup", dir, there)
			mustRun(t, device, "bkv", "password", "--new-key", "--new-password-file="+green) // as if nothing had been
		}
	}
}

// From a device that has the key, only a new password is asked for. Until it is there twice nothing changes.
func passwordChanged(t *testing.T, s *served) {
	env, _ := s.withPassword(t, "changes-it", bluePassword)
	p := sitDown(t, env, "password")
	p.sees("New password: ")
	p.presses(ctrlD)
	p.sees("bkv: no answer came")
	p.ends(1)

	p = sitDown(t, env, "password")
	p.sees("New password: ")
	p.hidden("password1")
	p.sees("among the first that anybody would try")
	p.sees("New password: ")
	p.hidden(strings.Repeat("long ", 250))
	p.sees("it has 1250 bytes, and at most 1024 are allowed")
	p.sees("New password: ")
	p.hidden("")
	p.sees("it is empty")
	p.sees("New password: ")
	p.hidden(greenPassword)
	p.sees("The same once more: ")
	p.hidden(yellowPassword)
	p.sees("They differ")
	p.sees("New password: ")
	p.hidden(greenPassword)
	p.sees("The same once more: ")
	p.presses(ctrlC)
	p.sees("bkv: stopped; what was there before is unchanged")
	p.ends(130)
	p.neverSaw(greenPassword, yellowPassword)
	if got := attemptsLeft(t, env); got != "10" {
		t.Errorf("%s attempts are left, and none was made", got)
	}
	opens(t, env, bluePassword)

	// An accent as one character or as two is the same password.
	p = sitDown(t, env, "password")
	p.sees("New password: ")
	p.hidden("cafe\u0301 for all of them")
	p.sees("The same once more: ")
	p.hidden("cafe\u0301 for all of them")
	p.sees("The password is changed; the old one recovers nothing any more")
	p.ends(0)
	p = sitDown(t, env, "verify")
	p.sees("Password: ")
	p.hidden(bluePassword)
	p.sees("That password is wrong")
	p.sees("Password: ")
	p.hidden("caf\u00e9 for all of them")
	p.sees("The password is right")
	p.ends(0)
}

// A device without the key asks for the old password first. What is typed wrongly is charged, and nothing else.
func oldPasswordAskedFor(t *testing.T, s *served) {
	env, newDevice := s.withPassword(t, "has-the-old-one", bluePassword)
	for key, status := range map[string]int{ctrlD: 1, ctrlC: 130} {
		p := sitDown(t, newDevice, "password")
		p.sees("does not have the key, so the old password is needed")
		p.sees("10 attempts left of 10")
		p.sees("Password: ")
		p.presses(key)
		p.ends(status)
		hasNothing(t, newDevice)
	}
	p := sitDown(t, newDevice, "password")
	p.sees("10 attempts left of 10")
	p.sees("Password: ")
	p.hidden(strings.Repeat("long ", 250))
	p.sees("at most 1024 are allowed. Nothing was tried")
	p.sees("10 attempts left of 10")
	p.sees("Password: ")
	p.hidden(greenPassword)
	p.sees("That password is wrong")
	p.sees("9 attempts left of 10")
	p.sees("Password: ")
	p.presses(ctrlC)
	p.ends(130)
	hasNothing(t, newDevice)
	if got := attemptsLeft(t, env); got != "9" {
		t.Errorf("%s attempts are left after one", got)
	}

	// When the old one is right the device has the key, and another run needs no old password.
	p = sitDown(t, newDevice, "password")
	p.sees("9 attempts left of 10")
	p.sees("Password: ")
	p.hidden(bluePassword)
	p.sees("tried wrongly 1 time that you did not make just now")
	p.sees("New password: ")
	p.presses(ctrlC)
	p.ends(130)
	if got := attemptsLeft(t, newDevice); got != "10" {
		t.Errorf("%s attempts are left after the right password", got)
	}
	opens(t, env, bluePassword)
	p = sitDown(t, newDevice, "password")
	p.sees("New password: ")
	p.hidden(greenPassword)
	p.sees("The same once more: ")
	p.hidden(greenPassword)
	p.sees("The password is changed")
	p.ends(0)
	opens(t, env, greenPassword)

	// At one go.
	mustRun(t, newDevice, "bkv", "off", "--this-device", "--yes")
	p = sitDown(t, newDevice, "password")
	p.sees("Password: ")
	p.hidden(greenPassword)
	p.sees("New password: ")
	p.hidden(yellowPassword)
	p.sees("The same once more: ")
	p.hidden(yellowPassword)
	p.sees("The password is changed")
	p.ends(0)
	p.neverSaw(greenPassword, yellowPassword)
	opens(t, env, yellowPassword)
}

// Where no password brings anything back, none is asked for.
func noKeyToAskFor(t *testing.T, s *served) {
	env, newDevice := s.withPassword(t, "out-of-luck", bluePassword)
	dir := t.TempDir()
	write(t, dir, "file", "content")
	there := filepath.Join(dir, "there")
	mustRun(t, env, "bkv", "backup", dir+"/file", there)
	refused := func(env []string, why string, args ...string) {
		t.Helper()
		p := sitDown(t, env, args...)
		p.sees(why)
		p.ends(1)
		p.neverSaw("assword: ")
	}
	refused(newDevice, "keeps a key for \"out-of-luck\" already: take it up with 'bkv setup --recover'", "setup", "--mode=password")

	wrong := write(t, dir, "wrong", greenPassword)
	for range 10 {
		if o := run(t, env, "bkv", "verify", "--last-attempt", "--password-file="+wrong); o.code != 1 {
			t.Fatalf("%+v", o)
		}
	}
	const destroyed = "destroyed after too many wrong passwords, and no password recovers it any more; "
	refused(env, destroyed+"this device still has the key: set a new password with 'bkv password'", "verify")
	for _, args := range [][]string{{"restore", there, dir + "/back"}, {"password"}, {"verify"}, {"setup", "--recover", "--mode=password"}} {
		refused(newDevice, destroyed+"with the 64 digits, 'bkv restore --digits' still restores; a device that has the key can", args...)
	}
	// Both are true.
	p := sitDown(t, newDevice, "restore", there, dir+"/back", "--digits")
	p.sees("> ")
	p.types(mustRun(t, env, "bkv", "key"))
	p.sees("Restored: 1 file")
	p.ends(0)
	mustRun(t, newDevice, "bkv", "off", "--this-device", "--yes")
	p = sitDown(t, env, "password")
	p.sees("New password: ")
	p.hidden(yellowPassword)
	p.sees("The same once more: ")
	p.hidden(yellowPassword)
	p.ends(0)
	opens(t, newDevice, yellowPassword)

	mustRun(t, env, "bkv", "off", "--yes")
	refused(newDevice, "the key was turned off, and no password recovers it any more", "restore", there, dir+"/again")
	never := s.bkvEnv(s.vault, t.TempDir(), "nobody-yet")
	refused(never, "the vault keeps no key for the user \"nobody-yet\" of \""+tenant+"\"", "restore", there, dir+"/again")
}

// A key that was turned off without its owner's proof is recovered by its password all the same, and
// brought back by its owner.
func frozenKey(t *testing.T, s *served) {
	env, newDevice := s.withPassword(t, "frozen", bluePassword)
	dir := t.TempDir()
	write(t, dir, "file", "content")
	there := filepath.Join(dir, "there")
	mustRun(t, env, "bkv", "backup", dir+"/file", there)
	mustRun(t, newDevice, "bkv", "off", "--without-proof", "--yes")

	// No new password is asked for that the vault would not take.
	p := sitDown(t, env, "password")
	p.sees("turned off or replaced without it, and the vault destroys it at .*: bring it back with 'bkv password --reinstate'")
	p.ends(1)
	p.neverSaw("assword: ")

	p = sitDown(t, newDevice, "restore", there, dir+"/back")
	p.sees("NOTE: this key was turned off or replaced without its owner's proof")
	p.sees("10 attempts left of 10")
	p.sees("Password: ")
	p.hidden(greenPassword)
	p.sees("That password is wrong")
	p.sees("9 attempts left of 10")
	p.sees("Password: ")
	p.hidden(bluePassword)
	p.sees("Restored: 1 file")
	p.ends(0)
	if n := strings.Count(p.screen(), "NOTE: this key"); n != 1 {
		t.Errorf("told %d times", n)
	}
	if _, err := os.Stat(dir + "/back/file"); err != nil {
		t.Error(err)
	}
	mustRun(t, newDevice, "bkv", "off", "--this-device", "--yes")

	// Somebody puts another key in its place.
	p = sitDown(t, newDevice, "setup", "--mode=password")
	p.sees("NOTE: the vault has a key of yours that was turned off without its owner's proof")
	p.sees("New password: ")
	p.hidden(yellowPassword)
	p.sees("The same once more: ")
	p.hidden(yellowPassword)
	p.ends(0)
	third := append(env, "BKV_CONFIG_DIR="+filepath.Join(t.TempDir(), "device"))
	p = sitDown(t, third, "restore", there, dir+"/not")
	p.sees("NOTE: the key in the vault took the place of another one, whose owner did not agree")
	p.sees("stop here and give --frozen")
	p.sees("Password: ")
	p.presses(ctrlC)
	p.ends(130)
	p = sitDown(t, third, "restore", there, dir+"/again", "--frozen")
	p.sees("Password: ")
	p.hidden(bluePassword)
	p.sees("Restored: 1 file")
	p.ends(0)
	// The device that has the frozen key practises that one's password.
	opens(t, env, bluePassword)
	p = sitDown(t, third, "password", "--reinstate")
	p.sees("Your key is back, under the password that it had")
	p.ends(0)
	if o := run(t, env, "bkv", "verify", "--frozen", "--password-file=/dev/null"); o.code != 1 || !strings.Contains(o.stderr, "no key is frozen at the vault") {
		t.Errorf("%+v", o)
	}
	opens(t, env, bluePassword)
	if got := attemptsLeft(t, env); got != "10" {
		t.Errorf("%s attempts are left", got)
	}
}

// The 64 digits are taken as they were written down, and are this device's only if they are the backup's.
func TestDigitsTypedAtRestore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := offline(dir)
	shown := mustRun(t, env, "bkv", "setup", "--mode=digits", "--yes")
	lines := strings.Split(strings.TrimSpace(shown), "\n")
	write(t, dir, "file", "content")
	there := filepath.Join(dir, "there")
	mustRun(t, env, "bkv", "backup", dir+"/file", there)
	env = append(env, "BKV_CONFIG_DIR="+dir+"/new-device")

	p := sitDown(t, env, "restore", there, dir+"/back")
	p.sees("knows neither the backup's key nor its vault: give --digits to type the 64 digits")
	p.ends(1)

	// Too short, and then no more: as if nothing had been typed.
	p = sitDown(t, env, "restore", there, dir+"/back", "--digits")
	p.sees("Type the 64 digits, in as many lines as you like:\\s+> ")
	p.types(lines[0])
	p.sees("> ")
	p.types(ctrlD)
	p.sees("no answer came")
	p.ends(1)
	hasNothing(t, env)

	// One digit is wrong, one is none, there is one too many; then the lines as bkv prints them.
	typo := []byte(shown)
	if typo[0]++; typo[0] == '0'+10 || typo[0] == 'f'+1 {
		typo[0] = '0'
	}
	p = sitDown(t, env, "restore", there, dir+"/back", "--digits")
	p.sees("> ")
	p.types(strings.ReplaceAll(string(typo), "\n", " "))
	p.sees("These are 64 digits, but not this backup's: compare them with what you wrote down")
	p.sees("> ")
	p.types(lines[0] + " 00o0")
	p.sees("is not a hexadecimal digit: .* That line does not count: type it again")
	for _, line := range lines[:3] {
		p.sees("> ")
		p.types("    " + line)
	}
	p.sees("> ")
	p.types(lines[3] + "0")
	p.sees("a backup key has 64 digits; found 65. That line does not count: type it again")
	p.sees("> ")
	p.types("    " + lines[3])
	p.sees("Done. The backup can be restored on this device, and with the 64 digits")
	p.sees("Restored: 1 file")
	p.ends(0)
	if got := mustRun(t, env, "bkv", "key"); got != shown {
		t.Error("the device keeps other digits")
	}
	if status := mustRun(t, env, "bkv", "status"); !strings.Contains(status, " 1 file, 7 B, in "+there+"\n") {
		t.Errorf("status does not know of the backup: %s", status)
	}

	// In upper case and without spaces, on a device that has another key.
	other := append(env, "BKV_CONFIG_DIR="+dir+"/other-device")
	mustRun(t, other, "bkv", "setup", "--mode=digits", "--yes")
	p = sitDown(t, other, "restore", there, dir+"/upper", "--digits")
	p.sees("> ")
	p.types(strings.ToUpper(strings.Join(strings.Fields(shown), "")))
	p.sees("Restored: 1 file")
	p.ends(0)
	if mustRun(t, other, "bkv", "key") == shown || strings.Contains(mustRun(t, other, "bkv", "status"), there) {
		t.Error("the device takes another key's backup for its own")
	}
}
