// Package provision makes a token ready for the vault: the operator's path, run
// before the service starts and never beside it.
//
// Keys are generated in the token by crypto11, under temporary labels; package pkcs11util then
// proves each and gives it its name. The two do not overlap: crypto11 initialises the module, which
// must not be in use in this process, and finalises it for everybody when it is closed. It is a
// package of its own so that the service does not link crypto11.
//
// What is trusted: the operator, with both PINs, and the token's generator. A run that was cut
// short is repaired by the next.
package provision

import (
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/eclipse-keypont/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// Config says which token to make ready.
type Config struct {
	Module string         // path of the PKCS#11 module
	Label  string         // of the token, at most 32 bytes
	SOPIN  pkcs11util.PIN // the security officer's, used if the token has to be initialised
	PIN    pkcs11util.PIN // the user's
	// Profile is how the token differs from others. Default: pkcs11util.DefaultProfile.
	Profile pkcs11util.Profile
}

// Report says what was done.
type Report struct {
	TokenCreated bool                 // the token was initialised
	Destroyed    int                  // objects that an earlier run had left behind
	Kept         []pkcs11util.KeyName // keys that were there, proven again
	Made         []pkcs11util.KeyName // keys that were made
}

// Run initialises the token if it is not there, and makes the first generation of
// every purpose that has no key yet. It may be repeated at any time while the service does not run; the
// report is of use even with an error.
func Run(cfg Config) (Report, error) {
	var report Report
	var err error
	if report.TokenCreated, err = pkcs11util.InitToken(cfg.Module, cfg.Label, cfg.SOPIN, cfg.PIN); err != nil {
		return report, fmt.Errorf("initialising the token: %w", err)
	}
	missing, err := survey(cfg, &report)
	if err != nil {
		return report, fmt.Errorf("looking what is in the token: %w", err)
	}
	if len(missing) == 0 {
		return report, nil
	}
	labels, err := generate(cfg, missing)
	if err != nil {
		return report, fmt.Errorf("generating keys: %w", err)
	}
	admin, err := pkcs11util.OpenAdmin(cfg.login())
	if err != nil {
		return report, err
	}
	defer admin.Close()
	for _, name := range missing {
		if err := admin.Adopt(labels[name], name); err != nil {
			return report, err
		}
		report.Made = append(report.Made, name)
	}
	return report, nil
}

func (cfg Config) login() pkcs11util.Config {
	return pkcs11util.Config{Module: cfg.Module, Label: cfg.Label, PIN: cfg.PIN, Profile: cfg.Profile}
}

func survey(cfg Config, report *Report) (missing []pkcs11util.KeyName, err error) {
	admin, err := pkcs11util.OpenAdmin(cfg.login())
	if err != nil {
		return nil, err
	}
	defer admin.Close()
	if report.Destroyed, err = admin.Clean(); err != nil {
		return nil, err
	}
	report.Kept, missing, err = admin.Keys()
	return missing, err
}

// generate makes keys with crypto11 and returns their temporary labels.
func generate(cfg Config, names []pkcs11util.KeyName) (labels map[pkcs11util.KeyName]string, err error) {
	ctx, err := crypto11.Configure(&crypto11.Config{
		Path: cfg.Module, TokenLabel: cfg.Label, Pin: string(cfg.PIN),
		MaxSessions: 2, // the fewest that it takes
	})
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return nil, fmt.Errorf("the module is in use in this process: %w", err)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if closeErr := ctx.Close(); err == nil {
			err = closeErr
		}
	}()
	labels = map[pkcs11util.KeyName]string{}
	for _, name := range names {
		labels[name] = pkcs11util.TemporaryLabel(name)
		if err := generateKey(ctx, cfg.Profile, name, labels[name]); err != nil {
			return nil, fmt.Errorf("%s: %w", name, pkcs11util.Explain(err))
		}
	}
	return labels, nil
}

// generateKey makes one key or pair. crypto11 adds attributes of its own only where the template is
// silent, and the templates speak of all that matter.
func generateKey(ctx *crypto11.Context, profile pkcs11util.Profile, name pkcs11util.KeyName, label string) error {
	secret, private, public, err := profile.Templates(name.Purpose)
	if err != nil {
		return err
	}
	id := make([]byte, 16) // CKA_ID, which crypto11 wants; both halves share it
	_, _ = rand.Read(id)   // crypto/rand never fails: it ends the process first
	if secret != nil {
		set, err := attributes(secret, id, label)
		if err != nil {
			return err
		}
		cipher := crypto11.CipherAES
		if profile.SecretKeyGen(name.Purpose) == pkcs11.CKM_GENERIC_SECRET_KEY_GEN {
			cipher = crypto11.CipherGeneric
		}
		_, err = ctx.GenerateSecretKeyWithAttributes(set, 256, cipher)
		return err
	}
	privateSet, err := attributes(private, id, label)
	if err != nil {
		return err
	}
	publicSet, err := attributes(public, id, label)
	if err != nil {
		return err
	}
	_, err = ctx.GenerateECDSAKeyPairWithAttributes(publicSet, privateSet, elliptic.P256())
	if refused := pkcs11.Error(0); err != nil && !errors.As(err, &refused) {
		// The pair was made, but crypto11 v1.6.8 reads CKA_EC_POINT in DER only, which some tokens
		// give bare. Adopt reads both, and says so if the pair is not there or no good.
		return nil
	}
	return err
}

func attributes(template []*pkcs11.Attribute, id []byte, label string) (crypto11.AttributeSet, error) {
	set, err := crypto11.NewAttributeSetWithIDAndLabel(id, []byte(label))
	if err != nil {
		return nil, err
	}
	set.AddIfNotPresent(template)
	return set, nil
}
