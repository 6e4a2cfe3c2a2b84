package main

import (
	"errors"
	"fmt"
	"slices"
)

type verifyCommand struct {
	vaultFlags    `group:"The vault, as setup saved it or an app gives it:"`
	passwordFlags `group:"The password:"`
}

func (c *verifyCommand) Run(e *environment) error {
	if e.device.Mode == modeDigits {
		return e.practiseDigits()
	}
	vault, err := e.connect(c.vaultFlags)
	if err != nil {
		return err
	}
	e.say("This recovers the key from the vault, as a new device would. It is a real attempt:\n" +
		"a wrong password costs one, and the right one gives all of them back.")
	recovered, err := e.recoverKey(vault, c.passwordFlags)
	if err != nil {
		return err
	}
	keys, err := e.device.keys()
	switch {
	case errors.Is(err, errNotSetUp):
		e.say("The password is right.")
		return nil
	case err != nil:
		return err
	case keys[0] != recovered.Key && !(e.device.Unsettled && slices.Contains(keys, recovered.Key)):
		return fmt.Errorf("the password is right, but %w", errOtherKey)
	}
	e.device.Generation = recovered.Generation.String()
	if err := e.settle(recovered.Key, keys); err != nil {
		return err
	}
	e.say("The password is right, and it recovers this device's key.")
	return nil
}

// practiseDigits compares what was written down with the device's key. It costs nothing.
func (e *environment) practiseDigits() error {
	key, err := e.device.key()
	if err != nil {
		return err
	}
	typed, err := e.readDigits("")
	if err != nil {
		return err
	}
	if typed != key {
		return errors.New("these are 64 digits, but not this backup's: show them with 'bkv key', and write them down")
	}
	e.say("The 64 digits are right.")
	return nil
}
