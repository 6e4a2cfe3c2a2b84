package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/provision"
	"github.com/backup-key-vault/bkv/transcript"
)

type tokenCommand struct {
	Init     tokenInitCommand  `cmd:"" help:"Make the token, if it is not there, and its keys. Run it while vaultd does not run. It can be repeated: it keeps the keys that are there and makes those that are missing."`
	Check    tokenCheckCommand `cmd:"" help:"Find out whether the token can do the vault's work, on keys of its own that it destroys again. Run it before anything depends on the token, and not beside vaultd. Exit status 0: usable; 1: not."`
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
