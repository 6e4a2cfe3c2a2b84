package main

import (
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/backup-key-vault/bkv/client"
)

type statusCommand struct {
	vaultFlags `group:"The vault, as setup saved it or an app gives it:"`
}

func (c *statusCommand) Run(e *environment) error {
	d := e.device
	if d.KeyStore == "" {
		return errNotSetUp
	}
	stores := map[string]string{inKeyring: "in the system's keyring", inFile: "in a file, unprotected but for its mode"}
	var vaultErr error
	switch d.Mode {
	case modePassword:
		vaultErr = c.password(e) // what the device knows by itself is shown all the same
	case modeDigits:
		if err := e.printf("mode: 64 digits, which you keep; no vault has the key\n"); err != nil {
			return err
		}
	}
	if err := e.printf("key on this device: %s\n", stores[d.KeyStore]); err != nil {
		return err
	}
	if d.Unsettled {
		if err := e.printf("NOTE: %v\n", errUnsettled); err != nil {
			return err
		}
	}
	if len(d.Backups) == 0 {
		if err := e.printf("last backup: none that this device knows of\n"); err != nil {
			return err
		}
	}
	for _, where := range slices.Sorted(maps.Keys(d.Backups)) {
		b := d.Backups[where]
		if err := e.printf("last backup: %s (%v ago), %s, %s, in %s\n", shownTime(b.Created), time.Since(b.Created).Round(time.Minute), count(int(b.Files), "file", "files"), size(b.Bytes), where); err != nil {
			return err
		}
	}
	return vaultErr
}

func (c *statusCommand) password(e *environment) error {
	vault, err := e.connect(c.vaultFlags)
	if err != nil {
		return err
	}
	s, err := vault.Status(e.ctx)
	if errors.Is(err, client.ErrNotEnrolled) {
		return e.printf("mode: password, but the vault keeps no key for you any more: set a password with 'bkv password'\n")
	}
	if err != nil {
		return err
	}
	if err := e.printf("mode: password, at %s as %s/%s\n", e.device.Vault.URL, e.device.Vault.Tenant, e.device.Vault.User); err != nil {
		return err
	}
	for _, g := range s.Generations {
		what := g.State
		switch {
		case g.State == "destroyed":
			what += " (" + g.Reason + "): the password recovers nothing any more; set one anew with 'bkv password'"
		case g.State == "frozen" && g.ExpiresAt != nil:
			what += ": it was turned off or replaced without the key, and is destroyed at " + shownTime(*g.ExpiresAt) + "; if that was not you, bring it back with 'bkv password --reinstate'"
		case g.ID.String() == e.device.Generation:
			what += ", with this device's key"
		case g.State == "active":
			what += ", and was not made by this device: it was set up anew or changed elsewhere"
		}
		if err := e.printf("generation %s: %s\n", g.ID, what); err != nil {
			return err
		}
		if g.FailuresSince > 0 {
			if err := e.printf("  wrong passwords since it was last right: %d\n", g.FailuresSince); err != nil {
				return err
			}
		}
	}
	next := "at once"
	if s.NextAttemptAt != nil && time.Until(*s.NextAttemptAt) > 0 {
		next = "from " + shownTime(*s.NextAttemptAt)
	}
	if s.AttemptsLeft == 0 {
		next = "never"
	}
	return e.printf("attempts left: %d of %d\nnext attempt: %s\n", s.AttemptsLeft, s.MaxAttempts, next)
}
