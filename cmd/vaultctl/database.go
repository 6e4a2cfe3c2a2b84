package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/vault"
)

// ownerDatabase is the database as the role that owns its tables.
type ownerDatabase struct {
	Database settings.Database `embed:"" prefix:"database-"`
}

// operatorName is who the audit log says did it.
type operatorName struct {
	Operator string `env:"BKV_OPERATOR" placeholder:"NAME" help:"Who does this, for the audit log, at most 256 bytes. Default: your login's name and this machine's."`
}

// as has what is done under the context be this operator's.
func (o operatorName) as(ctx context.Context) context.Context {
	if o.Operator != "" {
		return vault.WithOperator(ctx, o.Operator)
	}
	login, host := "unknown", "unknown"
	if u, err := user.Current(); err == nil {
		login = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return vault.WithOperator(ctx, login+"@"+host)
}

func (o *ownerDatabase) url() (string, error) {
	if err := errors.Join(o.Database.Problems()...); err != nil {
		return "", err
	}
	return o.Database.URL()
}

func (o *ownerDatabase) open(e *environment) (*store.Store, error) {
	url, err := o.url()
	if err != nil {
		return nil, err
	}
	if err := migrations.Check(e.ctx, url); err != nil {
		return nil, err
	}
	return store.Open(e.ctx, store.Config{URL: url, MaxConns: 1})
}

type migrateCommand struct {
	ownerDatabase
}

func (c *migrateCommand) Run(e *environment) error {
	url, err := c.url()
	if err != nil {
		return err
	}
	if err := migrations.Up(e.ctx, url, e.log); err != nil {
		return err
	}
	latest, err := migrations.Latest()
	if err != nil {
		return err
	}
	return e.printf("the database is at version %d; let vaultd's login in with: GRANT %s TO <login>\n", latest, migrations.RuntimeRole)
}

type tenantCommand struct {
	Add    tenantAddCommand    `cmd:"" help:"Add a tenant."`
	Policy tenantPolicyCommand `cmd:"" help:"Change a tenant's policy. It holds for what its users enrol from then on; keys that are enrolled keep theirs."`
	List   tenantListCommand   `cmd:"" help:"List tenants, their policies and keys."`
	Direct tenantDirectCommand `cmd:"" name:"direct" help:"Declare whether the tenant's back end is trusted with passwords."`
	Key    struct {
		Add    tenantKeyAddCommand    `cmd:"" help:"Add a public key that verifies the tenant's tokens."`
		Revoke tenantKeyRevokeCommand `cmd:"" help:"Withdraw a key; its tokens are refused within thirty seconds, or five minutes where the database does not answer."`
	} `cmd:"" help:"Add and revoke a tenant's keys."`
}

// tenantPolicy is what a tenant allows its users' accounts.
type tenantPolicy struct {
	MaxAttempts int           `default:"10" placeholder:"N" help:"Attempts without a success before a key is destroyed: 1 to 10."`
	Delays      string        `placeholder:"LIST" help:"Least time before each attempt since the last success, by number, as durations with commas between; 'none' for no delays (tests only). Default: 0,0,0,0,1m,5m,15m,1h,4h,24h."`
	Grace       time.Duration `default:"168h" placeholder:"DURATION" help:"How long a generation that was replaced or turned off without its owner's proof can still be recovered."`
}

func (c *tenantPolicy) read() (vault.Policy, error) {
	policy := vault.DefaultPolicy()
	policy.MaxAttempts, policy.Grace = c.MaxAttempts, c.Grace
	var err error
	if policy.Delays, err = parseDelays(c.Delays, policy); err == nil {
		err = policy.Validate()
	}
	return policy, err
}

type tenantAddCommand struct {
	ownerDatabase
	operatorName
	Tenant string `arg:"" help:"The tenant's id: the issuer of its tokens. 1 to 64 of a-z, 0-9, '.', '_', '-'."`
	tenantPolicy
	Direct bool `name:"direct-enrolment" help:"Also take enrolments and password changes that do not come over the relay channel. The back end of the app can then answer them in the vault's place and learn passwords from it: only for development, or where the back end is trusted with passwords."`
}

func (c *tenantAddCommand) Run(e *environment) error {
	policy, err := c.read()
	if err != nil {
		return err
	}
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.AddTenant(c.as(e.ctx), vault.Tenant{ID: c.Tenant, Policy: policy, DirectEnrolment: c.Direct}); err != nil {
		return err
	}
	return e.printf("tenant %s added; give it a key with: vaultctl tenant key add %[1]s --kid ID --public-key FILE\n", c.Tenant)
}

type tenantPolicyCommand struct {
	ownerDatabase
	operatorName
	Tenant string `arg:"" help:"The tenant's id. What is not given goes back to its default."`
	tenantPolicy
}

func (c *tenantPolicyCommand) Run(e *environment) error {
	policy, err := c.read()
	if err != nil {
		return err
	}
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.SetPolicy(c.as(e.ctx), c.Tenant, policy); err != nil {
		return err
	}
	return e.printf("tenant %s: %d attempts, delays %s, grace %v, for what is enrolled from now on; running vaults follow within thirty seconds\n",
		c.Tenant, policy.MaxAttempts, showDelays(policy.Delays), policy.Grace)
}

type tenantDirectCommand struct {
	ownerDatabase
	operatorName
	Tenant string `arg:"" help:"The tenant's id."`
	Answer string `arg:"" enum:"allow,refuse" help:"allow: enrolments and password changes are also taken past the relay channel, where the app's back end can learn passwords from them. refuse: over the relay channel alone."`
}

func (c *tenantDirectCommand) Run(e *environment) error {
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.SetDirectEnrolment(c.as(e.ctx), c.Tenant, c.Answer == "allow"); err != nil {
		return err
	}
	return e.printf("tenant %s enrols %s; running vaults know it within thirty seconds\n", c.Tenant, showRoute(c.Answer == "allow"))
}

func showRoute(direct bool) string {
	if direct {
		return "relayed or direct"
	}
	return "relayed"
}

// parseDelays reads --delays. Without it the default delays hold, as far as there are attempts.
func parseDelays(list string, p vault.Policy) ([]time.Duration, error) {
	switch list {
	case "":
		return p.Delays[:max(0, min(len(p.Delays), p.MaxAttempts))], nil
	case "none":
		return nil, nil
	}
	var delays []time.Duration
	for i, text := range strings.Split(list, ",") {
		text = strings.TrimSpace(text)
		d, err := time.ParseDuration(text)
		if err != nil {
			return nil, fmt.Errorf("--delays: number %s: want a duration such as 0s, 1m or 24h, got %q", strconv.Itoa(i+1), text)
		}
		delays = append(delays, d)
	}
	return delays, nil
}

type tenantListCommand struct {
	ownerDatabase
}

func (c *tenantListCommand) Run(e *environment) error {
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	tenants, err := s.ListTenants(e.ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TENANT\tATTEMPTS\tDELAYS\tGRACE\tENROLMENT\tKEY\tALGORITHM\tSHA-256\tSTATE")
	for _, t := range tenants {
		head := fmt.Sprintf("%s\t%d\t%s\t%v\t%s", t.ID, t.Policy.MaxAttempts, showDelays(t.Policy.Delays), t.Policy.Grace, showRoute(t.DirectEnrolment))
		if len(t.Keys) == 0 {
			fmt.Fprintf(w, "%s\t-\t-\t-\tno key: its tokens are refused\n", head)
		}
		for _, k := range t.Keys {
			state := "in use"
			if !k.RevokedAt.IsZero() {
				state = "revoked " + k.RevokedAt.UTC().Format(time.RFC3339)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%x\t%s\n", head, k.ID, keyAlgorithm(k.PublicKey), sha256.Sum256(k.PublicKey), state)
			head = "\t\t\t\t"
		}
	}
	return w.Flush()
}

func showDelays(delays []time.Duration) string {
	var b strings.Builder
	for i, d := range delays {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(d.String())
	}
	if b.Len() == 0 {
		return "none"
	}
	return b.String()
}

func keyAlgorithm(der []byte) string {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return "unreadable"
	}
	switch key.(type) {
	case ed25519.PublicKey:
		return "EdDSA"
	case *ecdsa.PublicKey:
		return "ES256"
	case *rsa.PublicKey:
		return "RS256"
	}
	return "unknown"
}

type tenantKeyAddCommand struct {
	ownerDatabase
	operatorName
	Tenant    string `arg:"" help:"The tenant's id."`
	KID       string `name:"kid" required:"" help:"The key's id, as the tokens' header names it."`
	PublicKey string `required:"" placeholder:"FILE" help:"PEM file with the public key: Ed25519 (EdDSA), ECDSA P-256 (ES256) or RSA of 2048 bits or more (RS256)."`
}

func (c *tenantKeyAddCommand) Run(e *environment) error {
	raw, err := os.ReadFile(c.PublicKey)
	if err != nil {
		return err
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PUBLIC KEY" || len(strings.TrimSpace(string(rest))) > 0 {
		return fmt.Errorf("%s: want one PEM block of type PUBLIC KEY and nothing after it", c.PublicKey)
	}
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.AddTenantKey(c.as(e.ctx), c.Tenant, vault.TenantKey{ID: c.KID, PublicKey: block.Bytes}); err != nil {
		return err
	}
	return e.printf("key %s of tenant %s added\n", c.KID, c.Tenant)
}

type tenantKeyRevokeCommand struct {
	ownerDatabase
	operatorName
	Tenant string `arg:"" help:"The tenant's id."`
	KID    string `name:"kid" required:"" help:"The key's id."`
}

func (c *tenantKeyRevokeCommand) Run(e *environment) error {
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.RevokeTenantKey(c.as(e.ctx), c.Tenant, c.KID); err != nil {
		return err
	}
	return e.printf("key %s of tenant %s revoked; running vaults refuse it within thirty seconds\n", c.KID, c.Tenant)
}
