package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/transcript"
)

// vaultFlags say where the vault is. What is not given is as setup saved it.
type vaultFlags struct {
	Vault        string `env:"BKV_VAULT_URL" placeholder:"URL" help:"The vault's address. https, unless it is on this host."`
	Fingerprint  string `env:"BKV_VAULT_FINGERPRINT" placeholder:"FINGERPRINT" help:"What the vault is known by, as its operator publishes it. Never take it from the connection."`
	Tenant       string `env:"BKV_TENANT" placeholder:"NAME" help:"The app or service whose user you are."`
	User         string `env:"BKV_USER" placeholder:"NAME" help:"Who you are there."`
	TokenFile    string `env:"BKV_TOKEN_FILE" placeholder:"FILE" help:"File with the token (a JWT) that tells the vault who you are. It is read again when the vault refuses it."`
	TokenCommand string `env:"BKV_TOKEN_COMMAND" placeholder:"COMMAND" help:"Command for the shell that prints the token. It is run again when the vault refuses it."`
}

// over are the settings with what was given on the command line in their place.
func (f vaultFlags) over(s vaultSettings) vaultSettings {
	s.URL = cmp.Or(f.Vault, s.URL)
	s.Fingerprint = cmp.Or(f.Fingerprint, s.Fingerprint)
	s.Tenant = cmp.Or(f.Tenant, s.Tenant)
	s.User = cmp.Or(f.User, s.User)
	if f.TokenFile != "" || f.TokenCommand != "" {
		s.TokenFile, s.TokenCommand = f.TokenFile, f.TokenCommand
	}
	return s
}

// connect makes a client of the saved settings and the flags, and keeps the settings in the device,
// to be saved when something came of them. It sends nothing.
func (e *environment) connect(f vaultFlags) (*client.Client, error) {
	s := f.over(e.device.Vault)
	var missing []string
	for _, must := range []struct{ flag, value string }{
		{"--vault", s.URL}, {"--fingerprint", s.Fingerprint}, {"--tenant", s.Tenant}, {"--user", s.User},
		{"--token-file or --token-command", s.TokenFile + s.TokenCommand},
	} {
		if must.value == "" {
			missing = append(missing, must.flag)
		}
	}
	switch {
	case len(missing) > 0:
		return nil, fmt.Errorf("to reach the vault, give %s", strings.Join(missing, ", "))
	case s.TokenFile != "" && s.TokenCommand != "":
		return nil, errors.New("give --token-file or --token-command, not both")
	}
	pin, err := transcript.ParseFingerprint(s.Fingerprint)
	if err != nil {
		return nil, fmt.Errorf("--fingerprint: %w", err)
	}
	transport, err := httpclient.New(httpclient.Config{BaseURL: s.URL})
	if err != nil {
		return nil, fmt.Errorf("--vault: %w", err)
	}
	e.device.Vault = s
	return client.New(client.Config{
		Transport: transport, Fingerprint: pin, Tenant: s.Tenant, User: s.User,
		Token: s.token, LastSerial: e.device.Serial,
	})
}

// maxTokenBytes bounds a token; vaults take some kilobytes.
const maxTokenBytes = 16 << 10

// token gets a token, anew each time.
func (s vaultSettings) token(ctx context.Context) (string, error) {
	var raw []byte
	var err error
	if s.TokenFile != "" {
		if raw, err = os.ReadFile(s.TokenFile); err != nil {
			return "", fmt.Errorf("--token-file: %w", err)
		}
	} else {
		command := exec.CommandContext(ctx, "/bin/sh", "-c", s.TokenCommand)
		var complaint bytes.Buffer
		command.Stderr = &complaint
		if raw, err = command.Output(); err != nil {
			return "", fmt.Errorf("--token-command: %w: %s", err, bytes.TrimSpace(complaint.Bytes()))
		}
	}
	token := strings.TrimSpace(string(raw))
	if token == "" || len(token) > maxTokenBytes || strings.ContainsAny(token, " \t\r\n") {
		return "", errors.New("what should be a token is none: want one line, as the app's back end gives it out")
	}
	return token, nil
}

// passwordFlags are for whoever has no terminal.
type passwordFlags struct {
	PasswordFile string `env:"BKV_PASSWORD_FILE" placeholder:"FILE" help:"File with the password, for use without a terminal; a line break at its end is ignored. /dev/fd/3 reads it from file descriptor 3."`
	LastAttempt  bool   `help:"Without a terminal: try the password even if it is the last attempt, after which a wrong one destroys the key."`
	Frozen       bool   `help:"Try the password on the key that somebody replaced without it. The vault keeps that one for some days."`
}

// readPassword reads a password from a file.
func readPassword(file string) (string, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the password: %w", err)
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(raw), "\n"), "\r")
	if password == "" {
		return "", fmt.Errorf("reading the password: %s is empty", file)
	}
	return password, nil
}

// recoverKey gets the key from the vault by the password. At a terminal it asks until it is
// right, and says before each attempt how many are left.
func (e *environment) recoverKey(c *client.Client, f passwordFlags) (client.Recovered, error) {
	mine := 0
	for first := true; ; first = false {
		g, last, err := e.beforeAttempt(c, f, first)
		if err != nil {
			return client.Recovered{}, err
		}
		password, err := e.oldPassword(f, last)
		if err != nil {
			return client.Recovered{}, err
		}
		recovered, err := e.finish(c.RecoverGeneration(e.ctx, password, g.ID))
		var wrong *client.WrongPasswordError
		switch {
		case errors.As(err, &wrong) && f.PasswordFile == "" && wrong.AttemptsLeft > 0:
			mine++
			e.warn("That password is wrong.")
			continue
		case errors.Is(err, client.ErrInvalidPassword) && f.PasswordFile == "":
			e.warn("%v. Nothing was tried.", err)
			continue
		case errors.Is(err, client.ErrKeyDestroyed):
			return client.Recovered{}, e.lost("that was one wrong password too many: the key is destroyed, and no password recovers it any more")
		case err != nil:
			return client.Recovered{}, err
		}
		e.device.Serial = c.Serial()
		if others := int(recovered.FailuresSince) - mine; others > 0 {
			e.warn("NOTE: since the password was last right, it was tried wrongly %s that you did not make just now.\n"+
				"If it was not you, somebody is guessing: change the password with 'bkv password'.", count(others, "time", "times"))
		}
		return recovered, nil
	}
}

// beforeAttempt finds what the password is to be tried on, and says how many attempts are left and when the
// next one is possible, before a password is asked for. Last says that a wrong one destroys the key.
func (e *environment) beforeAttempt(c *client.Client, f passwordFlags, first bool) (g *api.Generation, last bool, err error) {
	s, err := c.Status(e.ctx)
	if errors.Is(err, client.ErrNotEnrolled) {
		return nil, false, e.lost(fmt.Sprintf("the vault keeps no key for the user %q of %q, if that is who you are", e.device.Vault.User, e.device.Vault.Tenant))
	}
	if err != nil {
		return nil, false, err
	}
	if g, err = e.target(s, f.Frozen, first); err != nil {
		return nil, false, err
	}
	if s.NextAttemptAt != nil {
		if wait := time.Until(*s.NextAttemptAt); wait > 0 {
			return nil, false, fmt.Errorf("%s left, and the next one is possible in %v, from %s: nothing was tried",
				count(s.AttemptsLeft, "attempt", "attempts"), wait.Round(time.Second), shownTime(*s.NextAttemptAt))
		}
	}
	if s.AttemptsLeft == 0 {
		return nil, false, errors.New("the last attempt was made just now, and is not decided yet: nothing was tried; 'bkv status' tells how it ends")
	}
	last = s.AttemptsLeft == 1
	if f.PasswordFile != "" {
		if last && !f.LastAttempt {
			return nil, false, errors.New("this is the last attempt, and a wrong password destroys the key for good: to try all the same, give --last-attempt")
		}
		return g, last, nil
	}
	e.warn("%s left of %d. A wrong password costs one.", count(s.AttemptsLeft, "attempt", "attempts"), s.MaxAttempts)
	if last {
		e.warn("THIS IS THE LAST ATTEMPT. If the password is wrong, the key is destroyed, and\n" +
			"nobody can ever read the backup again, unless you have the 64 digits.")
		if err := e.term.confirm(e.ctx, "Are you sure that you know the password?", "last attempt"); err != nil {
			return nil, false, err
		}
	}
	return g, last, nil
}

// target is the generation that a password is to be tried on: the active one, or a frozen one if that
// is wanted, is this device's, or there is no other.
func (e *environment) target(s *api.Status, wantFrozen, tell bool) (*api.Generation, error) {
	active, frozen := generation(s, "active"), generation(s, "frozen")
	ours := frozen != nil && frozen.ID.String() == e.device.Generation
	switch {
	case wantFrozen && frozen == nil:
		return nil, errors.New("no key is frozen at the vault: leave --frozen out")
	case frozen != nil && (wantFrozen || ours || active == nil):
		if tell {
			e.warn("NOTE: this key was turned off or replaced without its owner's proof. Its password still\n"+
				"recovers it, until the vault destroys it at %s. To keep it, run\n"+
				"'bkv password --reinstate' once this device has it.", shownEnd(frozen))
		}
		return frozen, nil
	case active != nil:
		if frozen != nil && tell {
			e.warn("NOTE: the key in the vault took the place of another one, whose owner did not agree.\n"+
				"The vault keeps that one until %s: if your password is for it,\n"+
				"stop here and give --frozen.", shownEnd(frozen))
		}
		return active, nil
	}
	if g := generation(s, "destroyed"); g != nil && (g.Reason == "exhausted" || g.Reason == "failures") {
		return nil, e.lost("the key was destroyed after too many wrong passwords, and no password recovers it any more")
	}
	return nil, e.lost("the key was turned off, and no password recovers it any more")
}

// generation returns the generation in a state, or nil.
func generation(s *api.Status, state string) *api.Generation {
	for i := range s.Generations {
		if s.Generations[i].State == state {
			return &s.Generations[i]
		}
	}
	return nil
}

// shownEnd is when a frozen generation is destroyed.
func shownEnd(g *api.Generation) string {
	if g.ExpiresAt == nil {
		return "its end"
	}
	return shownTime(*g.ExpiresAt)
}

// lost says what is left to do where the vault has no key for any password.
func (e *environment) lost(why string) error {
	if e.device.KeyStore != "" {
		return errors.New(why + "; this device still has the key: set a new password with 'bkv password'")
	}
	return errors.New(why + "; with the 64 digits, 'bkv restore --digits' still restores; a device that has the key can give it a new password with 'bkv password'; " +
		"if there are neither, nobody can read the backup any more: begin anew with 'bkv setup'")
}

// errUnsettled: a backup under the wrong one of two keys would open by no password.
var errUnsettled = errors.New("a change of the key was interrupted, and the vault may have the old key or the new one: settle it first, with 'bkv password' or, if you know the password, 'bkv verify'")

// errOtherKey: the vault's key is not this device's.
var errOtherKey = errors.New("the vault keeps another key than this device: it was set up anew elsewhere, and what this device backs up cannot be restored with that password; " +
	"to go on with the other key, run 'bkv off --this-device' and 'bkv setup --recover'; to go on with this one, first run 'bkv off' on the device that has the other")

// oldPassword asks for a password that exists: twice before the last attempt.
func (e *environment) oldPassword(f passwordFlags, twice bool) (string, error) {
	if f.PasswordFile != "" {
		return readPassword(f.PasswordFile)
	}
	for {
		password, err := e.term.ask(e.ctx, "Password: ", true)
		if errors.Is(err, errNobody) {
			err = fmt.Errorf("%w for the password: give --password-file", err)
		}
		if err != nil || !twice {
			return password, err
		}
		again, err := e.term.ask(e.ctx, "The same once more: ", true)
		if err != nil {
			return "", err
		}
		if again == password {
			return password, nil
		}
		e.warn("They differ. Nothing was tried.")
	}
}

// How long an attempt that has begun is held on to when the vault does not answer: its own limit
// is five minutes.
const (
	holdOn     = 4 * time.Minute
	holdOnStep = 5 * time.Second
)

// finish goes on with a recovery whose end is not known. That costs no further attempt, where
// starting anew would.
func (e *environment) finish(recovered client.Recovered, err error) (client.Recovered, error) {
	var pending *client.PendingRecovery
	for until := time.Now().Add(holdOn); errors.As(err, &pending) && time.Now().Before(until); {
		e.warn("The vault does not answer; trying again, at no further attempt (Ctrl-C to stop)…")
		if err := e.sleep(holdOnStep); err != nil {
			return client.Recovered{}, err
		}
		recovered, err = pending.Resume(e.ctx)
	}
	return recovered, err
}

// finishEnrolment is finish for an enrolment or a change.
func (e *environment) finishEnrolment(enrolled client.Enrolled, err error) (client.Enrolled, error) {
	var pending *client.PendingEnrolment
	for until := time.Now().Add(holdOn); errors.As(err, &pending) && time.Now().Before(until); {
		e.warn("The vault does not answer; trying again (Ctrl-C to stop)…")
		if err := e.sleep(holdOnStep); err != nil {
			return client.Enrolled{}, err
		}
		enrolled, err = pending.Resume(e.ctx)
	}
	return enrolled, err
}

func (e *environment) sleep(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// shownTime is a time in the user's zone.
func shownTime(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 -07:00") }
