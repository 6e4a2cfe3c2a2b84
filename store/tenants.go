package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/vault"
)

// What the operator's calls refuse.
var (
	ErrTenantExists  = errors.New("the tenant exists already")
	ErrUnknownTenant = errors.New("no such tenant")
	ErrKeyExists     = errors.New("the tenant has had a key of this kid already")
	ErrUnknownKey    = errors.New("the tenant has no key of this kid")
)

// Shapes of names. The database checks them too.
var (
	tenantID = regexp.MustCompile(`\A[a-z0-9][a-z0-9._-]{0,63}\z`)
	keyID    = regexp.MustCompile(`\A[!-~]{1,128}\z`)
)

// TenantRecord is a tenant as operators see it.
type TenantRecord struct {
	ID     string
	Policy vault.Policy
	// DirectEnrolment says that enrolments are taken past the relay channel too.
	DirectEnrolment bool
	CreatedAt       time.Time
	Keys            []TenantKeyRecord // by age
}

// TenantKeyRecord is a tenant's key, revoked ones included.
type TenantKeyRecord struct {
	vault.TenantKey
	CreatedAt time.Time
	RevokedAt time.Time // zero: in use
}

const listTenants = `
SELECT t.id, t.max_attempts, t.delays, t.grace, t.direct_enrolment, t.created_at,
	k.kid, k.public_key, k.created_at, k.revoked_at
FROM tenants AS t LEFT JOIN tenant_keys AS k ON k.tenant = t.id
ORDER BY t.id, k.created_at, k.kid`

// ListTenants returns all tenants by id, with all their keys.
func (s *Store) ListTenants(ctx context.Context) ([]TenantRecord, error) {
	var tenants []TenantRecord
	err := s.with(ctx, "listing tenants", func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, listTenants)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var (
				t                  TenantRecord
				kid                *string
				publicKey          []byte
				created, revokedAt *time.Time
			)
			if err := rows.Scan(&t.ID, &t.Policy.MaxAttempts, &t.Policy.Delays, &t.Policy.Grace, &t.DirectEnrolment, &t.CreatedAt,
				&kid, &publicKey, &created, &revokedAt); err != nil {
				return err
			}
			if len(tenants) == 0 || tenants[len(tenants)-1].ID != t.ID {
				if len(t.Policy.Delays) == 0 {
					t.Policy.Delays = nil
				}
				t.CreatedAt = t.CreatedAt.UTC()
				tenants = append(tenants, t)
			}
			if kid == nil { // a tenant without keys
				continue
			}
			key := TenantKeyRecord{TenantKey: vault.TenantKey{ID: *kid, PublicKey: publicKey}, CreatedAt: created.UTC()}
			if revokedAt != nil {
				key.RevokedAt = revokedAt.UTC()
			}
			last := &tenants[len(tenants)-1]
			last.Keys = append(last.Keys, key)
		}
		return rows.Err()
	})
	if err != nil {
		return nil, err
	}
	return tenants, nil
}

// Tenants returns all tenants by id, each with the keys that are in use.
func (s *Store) Tenants(ctx context.Context) ([]vault.Tenant, error) {
	records, err := s.ListTenants(ctx)
	if err != nil {
		return nil, err
	}
	tenants := make([]vault.Tenant, len(records))
	for i, r := range records {
		tenants[i] = vault.Tenant{ID: r.ID, Policy: r.Policy, DirectEnrolment: r.DirectEnrolment}
		for _, k := range r.Keys {
			if k.RevokedAt.IsZero() {
				tenants[i].Keys = append(tenants[i].Keys, k.TenantKey)
			}
		}
	}
	return tenants, nil
}

const addTenant = `
WITH tenant AS (
	INSERT INTO tenants (id, max_attempts, delays, grace, direct_enrolment) VALUES ($1, $2, $3, $4, $10)
	ON CONFLICT ON CONSTRAINT tenants_pk DO NOTHING
	RETURNING id
), keys AS (
	INSERT INTO tenant_keys (tenant, kid, public_key)
	SELECT tenant.id, k.kid, k.public_key FROM tenant, unnest($5::text[], $6::bytea[]) AS k (kid, public_key)
), recorded AS (
	INSERT INTO events (kind, tenant, operator, detail)
	SELECT e.kind, tenant.id, $7, e.detail FROM tenant, unnest($8::text[], $9::text[]) AS e (kind, detail)
)
SELECT count(*) FROM tenant`

// AddTenant adds a tenant with its first keys, or nothing of it: ErrTenantExists. Like
// all calls below it needs the owner's role, and is refused to the service's. Each is an event, by
// vault.OperatorOf the context.
func (s *Store) AddTenant(ctx context.Context, t vault.Tenant) error {
	if !tenantID.MatchString(t.ID) {
		return errors.New("tenant id: want 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")
	}
	if err := checkPolicy(t.Policy); err != nil {
		return err
	}
	kids, keys := make([]string, len(t.Keys)), make([][]byte, len(t.Keys))
	kinds, details := []string{"tenant-added"}, []string{policyDetail(t.Policy) + " " + directDetail(t.DirectEnrolment)}
	for i, k := range t.Keys {
		if err := checkKey(k); err != nil {
			return err
		}
		if slices.Contains(kids[:i], k.ID) {
			return fmt.Errorf("kid %q: %w", k.ID, ErrKeyExists)
		}
		kids[i], keys[i] = k.ID, k.PublicKey
		kinds, details = append(kinds, "tenant-key-added"), append(details, keyDetail(k))
	}
	var added int
	err := s.with(ctx, "adding a tenant", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, addTenant, t.ID, t.Policy.MaxAttempts, delaysOf(t.Policy), t.Policy.Grace, kids, keys,
			operator(ctx), kinds, details, t.DirectEnrolment).Scan(&added)
	})
	if err == nil && added == 0 {
		return ErrTenantExists
	}
	return err
}

const setPolicy = `
WITH tenant AS (
	UPDATE tenants SET max_attempts = $2, delays = $3, grace = $4 WHERE id = $1 RETURNING id
)
INSERT INTO events (kind, tenant, operator, detail) SELECT 'tenant-policy', id, $5, $6 FROM tenant`

// SetPolicy changes what the tenant's users get when they enrol the next time; keys
// that are enrolled keep the policy that they have. An unknown tenant is ErrUnknownTenant.
func (s *Store) SetPolicy(ctx context.Context, tenant string, p vault.Policy) error {
	if err := checkPolicy(p); err != nil {
		return err
	}
	var set int64
	err := s.with(ctx, "setting a tenant's policy", func(ctx context.Context, conn *pgx.Conn) error {
		tag, err := conn.Exec(ctx, setPolicy, tenant, p.MaxAttempts, delaysOf(p), p.Grace, operator(ctx), policyDetail(p))
		set = tag.RowsAffected()
		return err
	})
	if err == nil && set == 0 {
		return ErrUnknownTenant
	}
	return err
}

const setDirectEnrolment = `
WITH tenant AS (
	UPDATE tenants SET direct_enrolment = $2 WHERE id = $1 RETURNING id
)
INSERT INTO events (kind, tenant, operator, detail) SELECT 'tenant-policy', id, $3, $4 FROM tenant`

// SetDirectEnrolment declares whether the tenant's back end is trusted with passwords, so that enrolments are taken
// past the relay channel too. An unknown tenant is ErrUnknownTenant.
func (s *Store) SetDirectEnrolment(ctx context.Context, tenant string, direct bool) error {
	var set int64
	err := s.with(ctx, "setting a tenant's way of enrolment", func(ctx context.Context, conn *pgx.Conn) error {
		tag, err := conn.Exec(ctx, setDirectEnrolment, tenant, direct, operator(ctx), directDetail(direct))
		set = tag.RowsAffected()
		return err
	})
	if err == nil && set == 0 {
		return ErrUnknownTenant
	}
	return err
}

const addTenantKey = `
WITH added AS (
	INSERT INTO tenant_keys (tenant, kid, public_key) VALUES ($1, $2, $3) RETURNING tenant
)
INSERT INTO events (kind, tenant, operator, detail) SELECT 'tenant-key-added', tenant, $4, $5 FROM added`

// AddTenantKey adds a key. A kid is never used again, by a revoked key neither: ErrKeyExists.
// An unknown tenant is ErrUnknownTenant.
func (s *Store) AddTenantKey(ctx context.Context, tenant string, key vault.TenantKey) error {
	if err := checkKey(key); err != nil {
		return err
	}
	err := s.with(ctx, "adding a tenant's key", func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, addTenantKey, tenant, key.ID, key.PublicKey, operator(ctx), keyDetail(key))
		return err
	})
	switch {
	case violates(err, "tenant_keys_pk", uniqueViolation):
		return ErrKeyExists
	case violates(err, "tenant_keys_tenant_fk", foreignKeyViolation):
		return ErrUnknownTenant
	}
	return err
}

const revokeTenantKey = `
WITH tenant AS (
	SELECT id FROM tenants WHERE id = $1
), key AS (
	SELECT kid FROM tenant_keys WHERE tenant = $1 AND kid = $2
), revoked AS (
	UPDATE tenant_keys SET revoked_at = statement_timestamp() WHERE tenant = $1 AND kid = $2 AND revoked_at IS NULL
	RETURNING tenant, kid
), recorded AS (
	INSERT INTO events (kind, tenant, operator, detail) SELECT 'tenant-key-revoked', tenant, $3, 'kid=' || kid FROM revoked
)
SELECT (SELECT count(*) FROM tenant), (SELECT count(*) FROM key)`

// RevokeTenantKey ends the use of a key. One that is revoked already stays as it is. An
// unknown tenant is ErrUnknownTenant, an unknown kid ErrUnknownKey.
func (s *Store) RevokeTenantKey(ctx context.Context, tenant, kid string) error {
	var tenants, keys int
	err := s.with(ctx, "revoking a tenant's key", func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, revokeTenantKey, tenant, kid, operator(ctx)).Scan(&tenants, &keys)
	})
	switch {
	case err != nil:
		return err
	case tenants == 0:
		return ErrUnknownTenant
	case keys == 0:
		return ErrUnknownKey
	}
	return nil
}

// operator is who asks, for events.
func operator(ctx context.Context) *string { return textOrNull(vault.OperatorOf(ctx)) }

// policyDetail and keyDetail are what events say of a policy and a key.
func policyDetail(p vault.Policy) string {
	return fmt.Sprintf("max_attempts=%d delays=%v grace=%v", p.MaxAttempts, p.Delays, p.Grace)
}

func directDetail(direct bool) string { return fmt.Sprintf("direct_enrolment=%t", direct) }

func keyDetail(k vault.TenantKey) string {
	return fmt.Sprintf("kid=%s sha256=%x", k.ID, sha256.Sum256(k.PublicKey))
}

func checkPolicy(p vault.Policy) error {
	if err := p.Validate(); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	for _, d := range append([]time.Duration{p.Grace}, p.Delays...) {
		if d%time.Second != 0 {
			return fmt.Errorf("policy: want whole seconds, got %v", d)
		}
	}
	return nil
}

// checkKey refuses a key that no token of a tenant may be signed with.
func checkKey(k vault.TenantKey) error {
	if !keyID.MatchString(k.ID) {
		return errors.New("kid: want 1 to 128 printable ASCII characters without spaces")
	}
	public, err := x509.ParsePKIXPublicKey(k.PublicKey)
	if err != nil {
		return fmt.Errorf("kid %q: the public key is not DER in PKIX form: %w", k.ID, err)
	}
	switch public := public.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if public.Curve == elliptic.P256() {
			return nil
		}
	case *rsa.PublicKey:
		if bits := public.N.BitLen(); bits >= 2048 && bits <= 16384 {
			return nil
		}
	}
	return fmt.Errorf("kid %q: want an Ed25519, ECDSA P-256 or RSA public key, RSA of 2048 to 16384 bits", k.ID)
}

// delaysOf are never null.
func delaysOf(p vault.Policy) []time.Duration {
	if p.Delays == nil {
		return []time.Duration{}
	}
	return p.Delays
}
