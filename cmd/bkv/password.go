package main

import (
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
)

type passwordCommand struct {
	vaultFlags      `group:"The vault, as setup saved it or an app gives it:"`
	passwordFlags   `group:"The password:"`
	NewPasswordFile string `placeholder:"FILE" help:"File with the new password, for use without a terminal."`
	NewKey          bool   `help:"Take a new key too: for when somebody may have read the old one. What is backed up already stays readable to him; back up again at once."`
	Reinstate       bool   `help:"Bring back this device's key, which somebody replaced or turned off without it. The password stays as it was."`
	KeyStore        string `enum:"auto,keyring,file" default:"auto" help:"On a device without the key: where to keep it then, as in setup."`
}

func (c *passwordCommand) Run(e *environment) error {
	vault, err := e.connect(c.vaultFlags)
	if err != nil {
		return err
	}
	keys, err := e.device.keys()
	if c.Reinstate {
		if err != nil {
			return err
		}
		if err := vault.Reinstate(e.ctx, keys[0]); err != nil {
			return err
		}
		e.say("Your key is back, under the password that it had.")
		return nil
	}
	var password string
	if c.NewPasswordFile != "" { // before an attempt is made with the old one
		var err error
		if password, err = e.newPassword(c.NewPasswordFile); err != nil {
			return err
		}
	}
	if errors.Is(err, errNotSetUp) {
		e.say("This device does not have the key, so the old password is needed.")
		recovered, recoverErr := e.recoverKey(vault, c.passwordFlags)
		if recoverErr != nil {
			return recoverErr
		}
		if err := e.remember(c.KeyStore, modePassword, recovered.Generation.String(), recovered.Key); err != nil {
			return err
		}
		keys, err = e.device.keys()
	}
	if err != nil {
		return err
	}
	if err := e.notFrozen(vault); err != nil {
		return err
	}
	if password == "" {
		if password, err = e.newPassword(""); err != nil {
			return err
		}
	}
	enrolled, err := e.finishEnrolment(c.change(e, vault, keys[0], password))
	if errors.Is(err, client.ErrForbidden) {
		return fmt.Errorf("%w: %w", err, errOtherKey)
	}
	if err != nil {
		return err
	}
	if enrolled.Key != keys[0] {
		// The old ones still open what they encrypted.
		keys = append([]backup.Key{enrolled.Key}, keys...)
		if err := e.storeKeys(c.KeyStore, keys...); err != nil {
			return fmt.Errorf("the vault has a new key under the new password, but this device could not keep it: %w; take it up with 'bkv setup --recover'", err)
		}
	}
	e.device.Mode, e.device.Generation, e.device.Serial = modePassword, enrolled.Generation.String(), vault.Serial()
	if err := e.device.save(); err != nil {
		return err
	}
	e.say("The password is changed; the old one recovers nothing any more.")
	if c.NewKey {
		e.warn("There is a new key. Run 'bkv backup' now: the new password does not open what was backed up before.")
	}
	return nil
}

// notFrozen makes sure, before a new password is thought up, that the vault would take one for this
// device's key.
func (e *environment) notFrozen(vault *client.Client) error {
	s, err := vault.Status(e.ctx)
	if errors.Is(err, client.ErrNotEnrolled) {
		return nil
	}
	if err != nil {
		return err
	}
	g := generation(s, "frozen")
	if g == nil || generation(s, "active") != nil && g.ID.String() != e.device.Generation {
		return nil
	}
	return fmt.Errorf("this device's key was turned off or replaced without it, and the vault destroys it at %s: bring it back with 'bkv password --reinstate', and then change the password", shownEnd(g))
}

// change puts a key under the new password: proven by the old one where the vault has that, else anew.
func (c *passwordCommand) change(e *environment, vault *client.Client, key backup.Key, password string) (client.Enrolled, error) {
	var enrolled client.Enrolled
	var err error
	if c.NewKey {
		var fresh backup.Key
		if fresh, err = backup.NewKey(rand.Reader); err != nil {
			return client.Enrolled{}, err
		}
		enrolled, err = vault.ChangePasswordAndKey(e.ctx, key, password, fresh)
	} else {
		enrolled, err = vault.ChangePassword(e.ctx, key, password)
	}
	if errors.Is(err, client.ErrNotEnrolled) || errors.Is(err, client.ErrKeyDestroyed) {
		if c.NewKey {
			return vault.Enrol(e.ctx, password)
		}
		return vault.EnrolKey(e.ctx, password, key)
	}
	return enrolled, err
}
