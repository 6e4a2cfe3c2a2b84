// Package settings is the settings that vaultd and vaultctl have in common. Package
// commandline reads them.
//
// Secrets are never settings: the token's PIN and the database URL are read from files
// that settings name, so that no process list shows them.
package settings

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// Token says which PKCS#11 token to use.
type Token struct {
	Module  string `default:"/usr/lib/softhsm/libsofthsm2.so" env:"BKV_TOKEN_MODULE" placeholder:"FILE" help:"PKCS#11 module, a shared library."`
	Label   string `default:"bkv" env:"BKV_TOKEN_LABEL" placeholder:"LABEL" help:"Label of the token, 1 to 32 bytes."`
	PINFile string `name:"pin-file" env:"BKV_TOKEN_PIN_FILE" placeholder:"FILE" help:"File that holds the token's user PIN; a line break at its end is ignored."`
	Profile string `env:"BKV_TOKEN_PROFILE" placeholder:"FILE" help:"File that says how the token differs from others, as 'vaultctl token check' proposes it. None for SoftHSM and tokens that behave alike."`
}

// maxLabelBytes is what a token has room for (PKCS #11 v2.40 section 3.2, CK_TOKEN_INFO).
const maxLabelBytes = 32

// Problems names what is wrong, flag by flag.
func (t Token) Problems() (problems []error) {
	if t.Module == "" {
		problems = append(problems, errors.New("--token-module: name the PKCS#11 module"))
	}
	if t.Label == "" || len(t.Label) > maxLabelBytes {
		problems = append(problems, fmt.Errorf("--token-label: want 1 to %d bytes, got %d", maxLabelBytes, len(t.Label)))
	}
	if t.PINFile == "" {
		problems = append(problems, errors.New("--token-pin-file: name the file that holds the token's user PIN"))
	}
	if t.Profile != "" {
		if _, err := pkcs11util.ReadProfile(t.Profile); err != nil {
			problems = append(problems, fmt.Errorf("--token-profile: %w", err))
		}
	}
	return problems
}

// Config reads the files that are named.
func (t Token) Config() (pkcs11util.Config, error) {
	cfg := pkcs11util.Config{Module: t.Module, Label: t.Label}
	var pinErr, profileErr error
	cfg.PIN, pinErr = pkcs11util.ReadPIN(t.PINFile)
	if t.Profile != "" {
		cfg.Profile, profileErr = pkcs11util.ReadProfile(t.Profile)
	}
	if profileErr != nil {
		profileErr = fmt.Errorf("token profile: %w", profileErr)
	}
	return cfg, errors.Join(pinErr, profileErr)
}

// Database says which Postgres to use.
type Database struct {
	URLFile string `name:"url-file" env:"BKV_DATABASE_URL_FILE" placeholder:"FILE" help:"File that holds the database's URL (postgres://user:password@host/database, or host=/socket/folder dbname=…)."`
}

// URL reads the database's URL.
func (d Database) URL() (string, error) {
	raw, err := os.ReadFile(d.URLFile)
	if err != nil {
		return "", fmt.Errorf("reading the database's URL: %w", err)
	}
	url := strings.TrimSpace(string(raw))
	if url == "" {
		return "", fmt.Errorf("the file %s, which should hold the database's URL, is empty", d.URLFile)
	}
	return url, nil
}

// Problems names what is wrong, flag by flag.
func (d Database) Problems() (problems []error) {
	if d.URLFile == "" {
		problems = append(problems, errors.New("--database-url-file: name the file that holds the database's URL"))
	}
	return problems
}
