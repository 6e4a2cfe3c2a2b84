package pkcs11util

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// Profile is the token's, as Config said.
func (a *Admin) Profile() Profile { return a.session.profile }

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

// Prove checks and proves the key under a temporary label, for the name that it is to get, and leaves it
// there, so that none of several keys gets its name before all are proved.
func (a *Admin) Prove(temporaryLabel string, name KeyName) error {
	release, err := a.enter()
	if err != nil {
		return err
	}
	defer release()
	a.module.Objects.Lock()
	defer a.module.Objects.Unlock()
	label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, temporaryLabel)
	kind, _ := a.session.profile.kind(name.Purpose)
	found, err := a.session.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, kind.class), label)
	if err != nil {
		return err
	}
	publics, err := a.session.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), label)
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("key %s: %d keys are labelled %s", name, len(found), temporaryLabel)
	}
	k, err := a.session.inspect(name, kind.class, found[0], publics)
	if err != nil {
		return fmt.Errorf("key %s: %w", name, err)
	}
	if _, err := a.session.prove(k); err != nil {
		return fmt.Errorf("proving %s: %w", name, err)
	}
	return nil
}
