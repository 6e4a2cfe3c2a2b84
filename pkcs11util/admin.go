package pkcs11util

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// ErrHalfMade: an initialisation of the token was cut short so early that the security
// officer cannot log in, or the security officer's PIN is another one. The token has no user PIN,
// so that no key of ours can be in it: delete it, and begin again.
var ErrHalfMade = errors.New("the token has no user PIN and refuses the security officer's: delete it " +
	"(SoftHSM: softhsm2-util --delete-token --token LABEL) and begin again")

// InitToken makes a token with this label and PINs in a free slot of a module. A token of this
// label that has a user PIN stays as it is, without a PIN being tried, and created is false. One
// that has none is what an earlier run left that was cut short, and gets one. That may not be
// possible: ErrHalfMade. (Of a hundred runs killed at random, one or two left a SoftHSM 2.6.1 token
// like that. C_InitToken reports success on it, and does not mend it.)
func InitToken(modulePath, label string, soPIN, pin PIN) (created bool, err error) {
	if err := (Config{Module: modulePath, Label: label, PIN: pin}).check(); err != nil {
		return false, err
	}
	if soPIN == "" {
		return false, errors.New("the security officer's PIN is missing")
	}
	m, err := module.Load(modulePath)
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

	slot, info, err := m.FindToken(label)
	found := err == nil
	switch {
	case found && info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0:
		return false, nil
	case errors.Is(err, module.ErrNoToken):
		free, err := m.FreeSlot()
		if err != nil {
			return false, err
		}
		if err := m.Ctx.InitToken(free, string(soPIN), label); err != nil {
			return false, Explain(fmt.Errorf("C_InitToken: %w", err))
		}
		// SoftHSM gives the token another slot now.
		if slot, _, err = m.FindToken(label); err != nil {
			return false, fmt.Errorf("after C_InitToken: %w", err)
		}
	case err != nil:
		return false, err
	}

	s, err := openSession(m, slot, pkcs11.CKF_RW_SESSION)
	if err != nil {
		return false, err
	}
	defer s.close() // the last session with the token, so that it logs the security officer out
	if err := s.login(pkcs11.CKU_SO, soPIN); err != nil {
		if found && refusedPIN(err) {
			err = fmt.Errorf("token %q: %w: %w", label, ErrHalfMade, err)
		}
		return false, fmt.Errorf("as security officer: %w", err)
	}
	if err := m.Ctx.InitPIN(s.handle, string(pin)); err != nil {
		return false, Explain(fmt.Errorf("C_InitPIN: %w", err))
	}
	return true, nil
}

// TemporaryLabel is a label, used once, to make a key under that is to become name.
func TemporaryLabel(name KeyName) string {
	var random [8]byte
	_, _ = rand.Read(random[:]) // crypto/rand never fails: it ends the process first
	return fmt.Sprintf("%s%s/%d/%s", temporaryPrefix, name.Purpose, name.Generation, hex.EncodeToString(random[:]))
}

// Admin is an operator's login to a token, which may write. Keys are made elsewhere,
// under a [TemporaryLabel]; Admin proves them and only then gives them their names, so that a crash
// while a key is made leaves nothing that a [Keyset] would take for a key. It is for
// short commands, one at a time and not beside a running service: starts of other processes
// failed while one wrote to a SoftHSM 2.6.1 token.
type Admin struct {
	module      *module.Module
	incarnation uint64
	session     session
	unpin       func()

	profileGiven bool
}

// OpenAdmin logs in. A refused PIN is ErrPINRefused.
func OpenAdmin(cfg Config) (*Admin, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	m, err := module.Load(cfg.Module)
	if err != nil {
		return nil, err
	}
	a := &Admin{module: m}
	if err := a.login(cfg); err != nil {
		m.Unload()
		return nil, err
	}
	return a, nil
}

func (a *Admin) login(cfg Config) error {
	incarnation, release, err := a.module.Current(context.Background())
	if err != nil {
		return err
	}
	defer release()
	a.module.Objects.Lock()
	slot, _, err := a.module.FindToken(cfg.Label)
	a.module.Objects.Unlock()
	if err != nil {
		return err
	}
	s, err := openSession(a.module, slot, pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	if err := s.login(pkcs11.CKU_USER, cfg.PIN); err != nil {
		s.close()
		if refusedPIN(err) {
			err = fmt.Errorf("%w: %w", ErrPINRefused, err)
		}
		return fmt.Errorf("token %q: %w", cfg.Label, err)
	}
	a.incarnation, a.session, a.unpin = incarnation, s.under(cfg.Profile.orDefault()), a.module.Pin()
	a.profileGiven = cfg.Profile != (Profile{})
	return nil
}

// Close logs out, unless the process has other sessions with the token.
func (a *Admin) Close() {
	if release, err := a.module.Enter(context.Background(), a.incarnation); err == nil {
		a.session.close()
		release()
	}
	a.unpin()
	a.module.Unload()
}

func (a *Admin) enter() (release func(), err error) {
	return a.module.Enter(context.Background(), a.incarnation)
}

// Clean destroys what an earlier run left behind: keys under temporary labels, and public
// halves whose private half did not get its name.
func (a *Admin) Clean() (destroyed int, err error) {
	release, err := a.enter()
	if err != nil {
		return 0, err
	}
	defer release()
	a.module.Objects.Lock()
	defer a.module.Objects.Unlock()

	named := map[string]bool{}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		found, err := a.session.objects(class)
		if err != nil {
			return destroyed, err
		}
		for _, o := range found {
			named[o.label] = named[o.label] || class == pkcs11.CKO_PRIVATE_KEY
			_, ours, _ := parseLabel(o.label)
			orphan := ours && class == pkcs11.CKO_PUBLIC_KEY && !named[o.label]
			if !strings.HasPrefix(o.label, temporaryPrefix) && !orphan {
				continue
			}
			if err := a.session.p.DestroyObject(a.session.handle, o.handle); err != nil {
				return destroyed, Explain(fmt.Errorf("C_DestroyObject of %s: %w", o.label, err))
			}
			destroyed++
		}
	}
	return destroyed, nil
}

// Keys checks and proves every named key in the token, as a Keyset does, and returns their
// names and those of the first generations of purposes that have no key yet. A named key that
// fails is an error: it may be in use, so that whether to destroy it is not for a program to decide.
func (a *Admin) Keys() (there, missing []KeyName, err error) {
	release, err := a.enter()
	if err != nil {
		return nil, nil, err
	}
	defer release()
	keys, err := a.session.findKeys(a.module)
	if err != nil {
		return nil, nil, err
	}
	has := map[string]bool{}
	for name, key := range keys {
		if _, err := a.session.prove(key); err != nil {
			return nil, nil, fmt.Errorf("proving %s: %w", name, err)
		}
		there = append(there, name)
		has[name.Purpose] = true
	}
	sortNames(there)
	for _, purpose := range Purposes() {
		if !has[purpose] {
			missing = append(missing, KeyName{purpose, 1})
		}
	}
	return there, missing, nil
}

// Adopt checks and proves the key under a temporary label, and gives it its name. The
// name must be free. The public half is renamed first: a key exists when its private half has the name.
func (a *Admin) Adopt(temporaryLabel string, name KeyName) error {
	if _, ok := kinds[name.Purpose]; !ok || name.Generation == 0 {
		return fmt.Errorf("%s is no name for a key", name)
	}
	release, err := a.enter()
	if err != nil {
		return err
	}
	defer release()

	keys, err := a.session.findKeys(a.module)
	if err != nil {
		return err
	}
	if keys[name] != nil {
		return fmt.Errorf("key %s is there already", name)
	}
	a.module.Objects.Lock()
	defer a.module.Objects.Unlock()
	_, _, err = a.session.adopt(temporaryLabel, name)
	return err
}

// adopt proves the key under a temporary label and names it. The caller holds
// module.Objects and has seen that the name is free; the session may write.
func (s session) adopt(temporaryLabel string, name KeyName) (*key, knownAnswer, error) {
	kind, _ := s.profile.kind(name.Purpose)
	label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, temporaryLabel)
	found, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, kind.class), label)
	if err != nil {
		return nil, knownAnswer{}, err
	}
	publics, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), label)
	if err != nil {
		return nil, knownAnswer{}, err
	}
	if len(found) != 1 {
		return nil, knownAnswer{}, fmt.Errorf("key %s: %d keys are labelled %s", name, len(found), temporaryLabel)
	}
	k, err := s.inspect(name, kind.class, found[0], publics)
	if err != nil {
		return nil, knownAnswer{}, fmt.Errorf("key %s: %w", name, err)
	}
	known, err := s.prove(k)
	if err == nil && kind.keyType == pkcs11.CKK_AES {
		err = s.proveGCM(k)
	}
	if err != nil {
		return nil, knownAnswer{}, fmt.Errorf("proving %s: %w", name, err)
	}
	rename := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, name.String())}
	for _, h := range append(publics, k.handle) {
		if err := s.p.SetAttributeValue(s.handle, h, rename); err != nil {
			return nil, knownAnswer{}, Explain(fmt.Errorf("C_SetAttributeValue: naming %s: %w", name, err))
		}
	}
	return k, known, nil
}
