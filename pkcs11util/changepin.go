package pkcs11util

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// ErrSamePIN: the new PIN is the old one.
var ErrSamePIN = errors.New("the new PIN is the old one")

// ChangePIN gives the user of a token another PIN in place of cfg.PIN, and proves it by a login. It
// is for a short command while the service does not run, and may be repeated after any error: if the token
// refuses the old PIN and takes the new one, an earlier call did the work, and changed is false.
//
// Errors: ErrSamePIN; ErrPINRefused if the token takes neither, or refuses the old one and another
// refusal could lock it; the token's own if it does not like the new PIN. The old PIN then holds still.
func ChangePIN(cfg Config, to PIN) (changed bool, err error) {
	if err := cfg.check(); err != nil {
		return false, err
	}
	if to == "" {
		return false, errors.New("the new PIN is missing")
	}
	if to == cfg.PIN {
		return false, ErrSamePIN
	}
	m, err := module.Load(cfg.Module)
	if err != nil {
		return false, err
	}
	defer m.Unload()
	_, release, err := m.Current(context.Background())
	if err != nil {
		return false, err
	}
	defer release()
	m.Objects.Lock()
	defer m.Objects.Unlock()
	slot, _, err := m.FindToken(cfg.Label)
	if err != nil {
		return false, err
	}

	err = withLogin(m, slot, cfg.PIN, func(s session) error {
		if err := s.p.SetPIN(s.handle, string(cfg.PIN), string(to)); err != nil {
			return fmt.Errorf("C_SetPIN: the token keeps the old PIN: %w", err)
		}
		changed = true
		return nil
	})
	switch {
	case changed: // whether or not the session ended well
	case errors.Is(err, ErrPINRefused):
		// Only now the other one: each refusal counts against a token that locks.
		info, infoErr := m.Ctx.GetTokenInfo(slot)
		if infoErr != nil || info.Flags&(pkcs11.CKF_USER_PIN_FINAL_TRY|pkcs11.CKF_USER_PIN_LOCKED) != 0 {
			return false, fmt.Errorf("token %q: %w; the new one was not tried, as the token would lock or is locked", cfg.Label, err)
		}
	default:
		return false, fmt.Errorf("token %q: %w", cfg.Label, err)
	}
	if err := withLogin(m, slot, to, func(session) error { return nil }); err != nil {
		if changed {
			return true, fmt.Errorf("token %q: C_SetPIN succeeded, and yet: %w", cfg.Label, err)
		}
		return false, fmt.Errorf("token %q, of the old PIN and of the new: %w", cfg.Label, err)
	}
	return changed, nil
}

// withLogin calls f in a session of the user's, and ends it, which logs out.
func withLogin(m *module.Module, slot uint, pin PIN, f func(session) error) error {
	s, err := openSession(m, slot, pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.login(pkcs11.CKU_USER, pin); err != nil {
		if refusedPIN(err) {
			return fmt.Errorf("%w: %w", ErrPINRefused, err)
		}
		return err
	}
	return f(s)
}
