package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

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
		if err := e.prove(keys, func(key backup.Key) error { return vault.Reinstate(e.ctx, key) }); err != nil {
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
	enrolled, err := c.change(e, vault, keys, password)
	if errors.Is(err, client.ErrForbidden) {
		return fmt.Errorf("%w: %w", err, errOtherKey)
	}
	if err != nil {
		return err
	}
	e.device.Mode, e.device.Generation, e.device.Serial = modePassword, enrolled.Generation.String(), vault.Serial()
	if err := e.settle(enrolled.Key, keys); err != nil {
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

// change puts a key under the new password, a new one with --new-key: proven by that of the device's keys which
// the vault has.
func (c *passwordCommand) change(e *environment, vault *client.Client, all []backup.Key, password string) (enrolled client.Enrolled, err error) {
	keys := all
	if !c.NewKey {
		err = e.prove(keys, func(key backup.Key) error {
			enrolled, err = e.finishEnrolment(vault.ChangePassword(e.ctx, key, password))
			if isGone(err) {
				enrolled, err = e.finishEnrolment(vault.EnrolKey(e.ctx, password, key))
			}
			return err
		})
		return enrolled, err
	}
	fresh, err := backup.NewKey(rand.Reader)
	if err != nil {
		return enrolled, err
	}
	before := e.device.Unsettled
	if !before {
		keys = keys[:1] // the others are of earlier changes
	}
	// This device has it before the vault may: whoever is stopped in between still owns what the vault has.
	if err := e.storeKeys("", append(slices.Clone(all), fresh)...); err != nil {
		return enrolled, err
	}
	e.device.Unsettled = true
	if err := e.device.save(); err != nil {
		return enrolled, err
	}
	err = e.prove(keys, func(key backup.Key) error {
		enrolled, err = e.finishEnrolment(vault.ChangePasswordAndKey(e.ctx, key, password, fresh))
		if isGone(err) {
			enrolled, err = e.finishEnrolment(vault.EnrolKey(e.ctx, password, fresh))
		}
		return err
	})
	var pending *client.PendingEnrolment
	if err != nil && !errors.As(err, &pending) && e.ctx.Err() == nil { // the vault has not taken it
		e.device.Unsettled = before
		err = errors.Join(err, e.storeKeys("", all...), e.device.save())
	}
	return enrolled, err
}

// isGone: the vault keeps no key any more.
func isGone(err error) bool {
	return errors.Is(err, client.ErrNotEnrolled) || errors.Is(err, client.ErrKeyDestroyed)
}

// prove has this device's key prove something or, if a change of the key is unsettled, whichever the vault has.
func (e *environment) prove(keys []backup.Key, do func(backup.Key) error) error {
	err := do(keys[0])
	for _, key := range keys[1:] {
		if !e.device.Unsettled || !errors.Is(err, client.ErrForbidden) {
			break
		}
		err = do(key)
	}
	return err
}

// settle notes which of this device's keys the vault has. The others still open what they encrypted.
func (e *environment) settle(key backup.Key, keys []backup.Key) error {
	if key != keys[0] || e.device.Unsettled {
		others := slices.DeleteFunc(slices.Clone(keys), func(k backup.Key) bool { return k == key })
		if err := e.storeKeys("", append([]backup.Key{key}, others...)...); err != nil {
			return fmt.Errorf("the vault has a key that this device could not keep as its own: %w; take it up with 'bkv setup --recover'", err)
		}
	}
	e.device.Unsettled = false
	return e.device.save()
}
