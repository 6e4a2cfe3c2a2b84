package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"unicode"

	"github.com/trustelem/zxcvbn"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
)

type setupCommand struct {
	vaultFlags    `group:"The vault, as setup saved it or an app gives it:"`
	passwordFlags `group:"The password:"`
	Mode          string `placeholder:"MODE" enum:",password,digits" default:"" help:"How the key is kept: password (the vault guards it) or digits (you keep 64 digits, and no vault is needed). Asked for at a terminal."`
	Recover       bool   `help:"Take up a backup that was set up on another device: by its password, or by the 64 digits with --mode=digits."`
	DigitsFile    string `placeholder:"FILE" help:"With --recover --mode=digits and without a terminal: file with the 64 digits."`
	KeyStore      string `enum:"auto,keyring,file" default:"auto" help:"Where this device keeps the key: keyring (the system's), file (mode 0600), or auto for the keyring if there is one."`
	Yes           bool   `help:"Ask nothing: you have read the warnings and, in 64-digit mode, keep what is printed."`
}

func (c *setupCommand) Run(e *environment) error {
	if e.device.KeyStore != "" {
		return errors.New("the backup is set up on this device already: see 'bkv status'; 'bkv password' changes the password, 'bkv off' turns it off")
	}
	mode, err := c.mode(e)
	if err != nil {
		return err
	}
	switch {
	case c.Recover && mode == modeDigits:
		key, err := e.readDigits(c.DigitsFile)
		if err != nil {
			return err
		}
		return e.remember(c.KeyStore, mode, "", key)
	case c.Recover:
		vault, err := e.connect(c.vaultFlags)
		if err != nil {
			return err
		}
		recovered, err := e.recoverKey(vault, c.passwordFlags)
		if err != nil {
			return err
		}
		return e.remember(c.KeyStore, mode, recovered.Generation.String(), recovered.Key)
	case mode == modeDigits:
		key, err := backup.NewKey(rand.Reader)
		if err != nil {
			return err
		}
		if err := e.showDigits(key, c.Yes); err != nil {
			return err
		}
		return e.remember(c.KeyStore, mode, "", key)
	}
	vault, err := e.connect(c.vaultFlags)
	if err != nil {
		return err
	}
	// Whoever has a key there already should not think up a password first.
	s, err := vault.Status(e.ctx)
	switch {
	case errors.Is(err, client.ErrNotEnrolled):
	case err != nil:
		return err
	case generation(s, "active") != nil:
		return e.enrolledAlready()
	default:
		if g := generation(s, "frozen"); g != nil {
			e.warn("NOTE: the vault has a key of yours that was turned off without its owner's proof, until\n"+
				"%s. 'bkv setup --recover' takes that one up, by its password;\n"+
				"what you set up now is another one, which does not open its backups.", shownEnd(g))
		}
	}
	e.warn("The password will be the only way to your backup if you lose this device.\n" +
		"Nobody can reset it or look it up: not the app, not the vault. After ten wrong\n" +
		"passwords the key is destroyed, and the backup with it.")
	password, err := e.newPassword(c.PasswordFile)
	if err != nil {
		return err
	}
	enrolled, err := e.finishEnrolment(vault.Enrol(e.ctx, password))
	if errors.Is(err, client.ErrAlreadyEnrolled) {
		return e.enrolledAlready()
	}
	if err != nil {
		return err
	}
	e.device.Serial = vault.Serial()
	return e.remember(c.KeyStore, mode, enrolled.Generation.String(), enrolled.Key)
}

func (e *environment) enrolledAlready() error {
	return fmt.Errorf("the vault keeps a key for %q already: take it up with 'bkv setup --recover'; a device that has it can destroy it with 'bkv off'", e.device.Vault.User)
}

// mode is how the key is to be kept.
func (c *setupCommand) mode(e *environment) (string, error) {
	if c.Mode != "" {
		return c.Mode, nil
	}
	const choice = "How do you want to keep the key of your backup?\n\n" +
		"  1  Under a password. A vault guards the key: it lets anybody try ten passwords\n" +
		"     at most, and learns neither the password nor the key.\n" +
		"  2  As 64 digits that you write down. Without them nobody, not even you, can\n" +
		"     ever restore the backup.\n\n"
	for {
		answer, err := e.term.ask(e.ctx, choice+"1 or 2: ", false)
		if errors.Is(err, errNobody) {
			return "", fmt.Errorf("%w: give --mode=password or --mode=digits", err)
		}
		if err != nil {
			return "", err
		}
		switch strings.TrimSpace(answer) {
		case "1":
			return modePassword, nil
		case "2":
			return modeDigits, nil
		}
	}
}

// remember makes this device one that has the key.
func (e *environment) remember(where, mode, generation string, key backup.Key) error {
	if err := e.storeKeys(where, key); err != nil {
		return err
	}
	e.device.Mode, e.device.Generation = mode, generation
	if err := e.device.save(); err != nil {
		return err
	}
	if mode == modePassword {
		e.say("Done. Your backup key is in the vault under your password, and on this device.\n" +
			"Practise the password now and then: 'bkv verify'.")
	} else {
		e.say("Done. The backup can be restored on this device, and with the 64 digits.")
	}
	return nil
}

// showDigits shows the 64 digits and goes on only when two groups, which it picks, were typed back.
func (e *environment) showDigits(key backup.Key, yes bool) error {
	const warning = "Write these 64 digits down and keep them where neither fire nor thief finds them:"
	if yes {
		return e.printf("%s\n", key.Digits())
	}
	if !e.term.interactive() {
		return fmt.Errorf("%w: with --yes the 64 digits are printed, and it is up to you to keep them", errNobody)
	}
	groups := strings.Fields(key.Digits())
	for {
		err := e.term.show("\n%s\n\n    %s\n\n"+
			"Without them NOBODY can restore your backup, not even you: there is no other copy,\n"+
			"and nobody can look them up. If you lose this device and the digits, the backup is lost.\n\n",
			warning, strings.ReplaceAll(key.Digits(), "\n", "\n    "))
		if err != nil {
			return err
		}
		first, second, err := twoOf(len(groups))
		if err != nil {
			return err
		}
		right := true
		for _, i := range []int{first, second} {
			got, err := e.term.ask(e.ctx, fmt.Sprintf("To show that you have them, type group %d of 16: ", i+1), false)
			if err != nil {
				return err
			}
			right = right && strings.EqualFold(strings.TrimSpace(got), groups[i])
		}
		if right {
			return e.term.show("That is right. Once more: without these digits nobody can restore the backup.\n")
		}
		if err := e.term.show("That is not what stands there. Once more:\n"); err != nil {
			return err
		}
	}
}

// twoOf draws two different numbers below n, in ascending order.
func twoOf(n int) (int, int, error) {
	a, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		return 0, 0, err
	}
	b, err := rand.Int(rand.Reader, big.NewInt(int64(n-1)))
	if err != nil {
		return 0, 0, err
	}
	i, j := int(a.Int64()), int(b.Int64())
	if j >= i {
		return i, j + 1, nil
	}
	return j, i, nil
}

// readDigits asks for 64 digits until they are some.
func (e *environment) readDigits(file string) (backup.Key, error) {
	if file != "" {
		raw, err := readPassword(file)
		if err != nil {
			return backup.Key{}, err
		}
		return backup.ParseDigits(raw)
	}
	question := "Type the 64 digits, in as many lines as you like:\n> "
	var typed strings.Builder
	for {
		line, err := e.term.ask(e.ctx, question, false)
		question = "> "
		if errors.Is(err, errNobody) {
			err = fmt.Errorf("%w for the 64 digits: give --digits-file", err)
		}
		if err != nil {
			return backup.Key{}, err
		}
		before := typed.String()
		typed.WriteString(line + "\n")
		key, err := backup.ParseDigits(typed.String())
		if err == nil {
			return key, nil
		}
		var wrong *backup.DigitsError
		if errors.As(err, &wrong) && wrong.Position == 0 && wrong.Found < 2*backup.KeySize {
			continue
		}
		e.warn("%v. That line does not count: type it again.", err)
		typed.Reset()
		typed.WriteString(before)
	}
}

// leastGuesses is what a password must withstand. A vault allows ten guesses, by default over
// more than a day, and ten again for each success of its owner; whoever
// guesses begins with the commonest ones. zxcvbn calls less than this very guessable.
const leastGuesses = 1e6

// ratedRunes bounds what is rated: zxcvbn's time grows with the square, and no longer password
// is weak for its end.
const ratedRunes = 64

// newPassword asks for a new password twice, and refuses what many would guess.
func (e *environment) newPassword(file string) (string, error) {
	if file != "" {
		password, err := readPassword(file)
		if err != nil {
			return "", err
		}
		return password, e.rate(password)
	}
	for {
		password, err := e.term.ask(e.ctx, "New password: ", true)
		if errors.Is(err, errNobody) {
			err = fmt.Errorf("%w for the new password: give --password-file", err)
		}
		if err != nil {
			return "", err
		}
		if err := e.rate(password); err != nil {
			e.warn("%v", err)
			continue
		}
		again, err := e.term.ask(e.ctx, "The same once more: ", true)
		if err != nil {
			return "", err
		}
		if again == password {
			return password, nil
		}
		e.warn("They differ. Once more:")
	}
}

// rate estimates a password's strength.
func (e *environment) rate(password string) error {
	if err := client.CheckPassword(password); err != nil {
		return err
	}
	if strings.ContainsFunc(password, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }) {
		return errors.New("the password has a line break or another character that cannot be typed at every terminal: take one without")
	}
	runes := []rune(password)
	known := []string{"backup", "bkv", "vault", e.device.Vault.User, e.device.Vault.Tenant}
	result := zxcvbn.PasswordStrength(string(runes[:min(len(runes), ratedRunes)]), known)
	if result.Guesses < leastGuesses {
		return errors.New("that password is among the first that anybody would try: take a longer one, such as four or five words that do not belong together")
	}
	if result.Score < 3 {
		e.warn("That password is not strong. Some more words would make it so.")
	}
	return nil
}
