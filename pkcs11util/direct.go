package pkcs11util

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// Do runs f with the operator's session, in which the user is logged in, with nobody else in this process at the token's
// objects. It is for what a ceremony does once and a service never: wrapping and
// unwrapping keys. f leaves the session open and logged in, and calls no method of a.
// Keys that f puts into the token go under a [TemporaryLabel], for Adopt to prove and name.
func (a *Admin) Do(f func(p *pkcs11.Ctx, session pkcs11.SessionHandle, token pkcs11.TokenInfo) error) error {
	release, err := a.enter()
	if err != nil {
		return err
	}
	defer release()
	a.module.Objects.Lock()
	defer a.module.Objects.Unlock()
	session, err := a.session.p.GetSessionInfo(a.session.handle)
	if err != nil {
		return fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	token, err := a.session.p.GetTokenInfo(session.SlotID)
	if err != nil {
		return fmt.Errorf("C_GetTokenInfo: %w", err)
	}
	return f(a.session.p, a.session.handle, token)
}
