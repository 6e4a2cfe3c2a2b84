package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/provision"
	"github.com/backup-key-vault/bkv/transcript"
)

type tokenCommand struct {
	Init     tokenInitCommand  `cmd:"" help:"Make the token, if it is not there, and its keys. Run it while vaultd does not run. It can be repeated: it keeps the keys that are there and makes those that are missing."`
	Check    tokenCheckCommand `cmd:"" help:"Find out whether the token can do the vault's work, on keys of its own that it destroys again. Run it before anything depends on the token, and not beside vaultd. Exit status 0: usable; 1: not."`
	PIN      tokenPINCommand   `cmd:"" name:"pin" help:"Change the token's user PIN. Run it while vaultd does not run. After an error it can be repeated: the token has either PIN, and both files are kept."`
	Ceremony ceremonyCommand   `cmd:"" help:"Put one set of keys into the tokens of several sites, so that what is enrolled at one recovers at all."`
}

type tokenInitCommand struct {
	Token     settings.Token `embed:"" prefix:"token-"`
	SOPINFile string         `name:"token-so-pin-file" env:"BKV_TOKEN_SO_PIN_FILE" placeholder:"FILE" help:"File that holds the security officer's PIN, with which the token is initialised."`
}

func (c *tokenInitCommand) Run(e *environment) error {
	problems := c.Token.Problems()
	if c.SOPINFile == "" {
		problems = append(problems, errors.New("--token-so-pin-file: name the file that holds the security officer's PIN"))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	token, tokenErr := c.Token.Config()
	soPIN, soErr := pkcs11util.ReadPIN(c.SOPINFile)
	if err := errors.Join(tokenErr, soErr); err != nil {
		return err
	}
	report, err := provision.Run(provision.Config{Module: token.Module, Label: token.Label, SOPIN: soPIN, PIN: token.PIN, Profile: token.Profile})
	for _, print := range []struct {
		what string
		keys []pkcs11util.KeyName
	}{{"kept", report.Kept}, {"made", report.Made}} {
		for _, k := range print.keys {
			if err := e.printf("%s %v\n", print.what, k); err != nil {
				return err
			}
		}
	}
	if err != nil {
		return fmt.Errorf("%w; what is listed as made is in place, and the command can be run again", err)
	}
	if weakness := token.Profile.Weakness(); weakness != "" {
		if err := e.printf("WARNING: %s\n", weakness); err != nil {
			return err
		}
	}
	return e.printf("token %q is ready; all its keys are proved, sensitive and not extractable\n", c.Token.Label)
}

type identityCommand struct {
	Token   settings.Token `embed:"" prefix:"token-"`
	VaultID string         `name:"vault-id" required:"" env:"BKV_VAULT_ID" help:"The vault's id."`
}

func (c *identityCommand) Run(e *environment) error {
	problems := c.Token.Problems()
	if len(c.VaultID) == 0 || len(c.VaultID) > 255 {
		problems = append(problems, fmt.Errorf("--vault-id: want 1 to 255 bytes, got %d", len(c.VaultID)))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	token, err := c.Token.Config()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
	defer cancel()
	token.Logger = e.log
	keys, err := pkcs11util.Open(ctx, token)
	if err != nil {
		return err
	}
	key, err := keys.PublicKey(pkcs11util.Identity, 1)
	if err := errors.Join(err, keys.Close()); err != nil {
		return err
	}
	return e.printf("%s\n", transcript.FingerprintOf(c.VaultID, key[:]))
}

type tokenPINCommand struct {
	Token    settings.Token `embed:"" prefix:"token-"`
	New      string         `name:"new-pin-file" required:"" placeholder:"FILE" help:"File that holds the new PIN."`
	Generate bool           `help:"If there is no such file, make it, with a random PIN of 32 characters."`
	Replace  bool           `help:"At the end, move the new file to the place of --token-pin-file."`
}

func (c *tokenPINCommand) Run(e *environment) error {
	if err := errors.Join(c.Token.Problems()...); err != nil {
		return err
	}
	token, err := c.Token.Config()
	if err != nil {
		return err
	}
	if c.Generate {
		if err := generatePIN(c.New); err != nil {
			return err
		}
	}
	to, err := pkcs11util.ReadPIN(c.New)
	if err != nil {
		return err
	}
	changed, err := pkcs11util.ChangePIN(token, to)
	if err != nil && changed {
		return fmt.Errorf("%w; keep both files: the token has the old PIN or the new one", err)
	}
	if err != nil {
		return err
	}
	did := "has a new PIN"
	if !changed {
		did = "has the new PIN already"
	}
	if !c.Replace {
		return e.printf("token %q %s; before vaultd starts, move %s to the place of %s\n", c.Token.Label, did, c.New, c.Token.PINFile)
	}
	if err := replace(c.New, c.Token.PINFile); err != nil {
		return fmt.Errorf("token %q %s, which lies in %s: move it to the place of %s, or vaultd cannot log in: %w", c.Token.Label, did, c.New, c.Token.PINFile, err)
	}
	return e.printf("token %q %s, and so has %s\n", c.Token.Label, did, c.Token.PINFile)
}

// generatePIN makes a file with a random PIN, unless there is one: an earlier run may have
// given the token the PIN that it holds.
func generatePIN(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("making the new PIN file: %w", err)
	}
	var random [24]byte
	_, _ = rand.Read(random[:]) // crypto/rand never fails: it ends the process first
	_, err = f.WriteString(base64.RawURLEncoding.EncodeToString(random[:]) + "\n")
	// It has to be on the disk before the token gets it.
	if err := errors.Join(err, f.Sync(), f.Close(), syncDirectory(file)); err != nil {
		return errors.Join(fmt.Errorf("making the new PIN file: %w", err), os.Remove(file))
	}
	return nil
}

// replace moves a file over another, durably.
func replace(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDirectory(to)
}

// syncDirectory makes the name of a file durable.
func syncDirectory(file string) error {
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
