package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

type devCommand struct {
	Key   devKeyCommand   `cmd:"" help:"Make an Ed25519 key pair for a tenant: FILE (private) and FILE.pub."`
	Token devTokenCommand `cmd:"" help:"Mint a token as a tenant's back end would, and print it."`
}

type devKeyCommand struct {
	File string `arg:"" help:"Where the private key goes; it must not exist. The public key goes beside it, with .pub added."`
}

func (c *devKeyCommand) Run(e *environment) error {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	if err := writePEM(c.File, "PRIVATE KEY", 0o600, private, x509.MarshalPKCS8PrivateKey); err != nil {
		return err
	}
	if err := writePEM(c.File+".pub", "PUBLIC KEY", 0o644, public, x509.MarshalPKIXPublicKey); err != nil {
		return errors.Join(err, os.Remove(c.File)) // half a pair is of no use
	}
	return e.printf("%s and %[1]s.pub written\n", c.File)
}

// writePEM never overwrites a file.
func writePEM(file, kind string, mode os.FileMode, key any, marshal func(any) ([]byte, error)) error {
	der, err := marshal(key)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	return errors.Join(pem.Encode(f, &pem.Block{Type: kind, Bytes: der}), f.Close())
}

// maxTokenLife is what the vault accepts.
const maxTokenLife = 10 * time.Minute

type devTokenCommand struct {
	VaultID string        `name:"vault-id" required:"" env:"BKV_VAULT_ID" help:"The vault's id: the token's audience."`
	Tenant  string        `required:"" help:"The tenant's id: the token's issuer."`
	User    string        `required:"" help:"The user: the token's subject."`
	KID     string        `name:"kid" required:"" help:"The key's id, as it was added to the tenant."`
	Key     string        `required:"" placeholder:"FILE" help:"PEM file with the private Ed25519 key (see vaultctl dev key)."`
	Life    time.Duration `default:"5m" placeholder:"DURATION" help:"How long the token holds: at most 10m."`
}

func (c *devTokenCommand) Run(e *environment) error {
	var problems []error
	for _, must := range []struct{ flag, value string }{
		{"--vault-id", c.VaultID}, {"--tenant", c.Tenant}, {"--user", c.User}, {"--kid", c.KID},
	} {
		if must.value == "" {
			problems = append(problems, fmt.Errorf("%s: must not be empty", must.flag))
		}
	}
	if c.Life <= 0 || c.Life > maxTokenLife {
		problems = append(problems, fmt.Errorf("--life: want more than 0 and at most %v, got %v", maxTokenLife, c.Life))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	raw, err := os.ReadFile(c.Key)
	if err != nil {
		return err
	}
	key, err := jwt.ParseEdPrivateKeyFromPEM(raw)
	if err != nil {
		return fmt.Errorf("%s: want a PEM file with a private Ed25519 key: %w", c.Key, err)
	}
	now := time.Now()
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: c.Tenant, Subject: c.User, Audience: jwt.ClaimStrings{c.VaultID},
		IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(c.Life)),
	})
	token.Header["kid"] = c.KID
	signed, err := token.SignedString(key)
	if err != nil {
		return fmt.Errorf("signing the token: %w", err)
	}
	return e.printf("%s\n", signed)
}
