package e2e_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/transcript"
)

// Names and secrets of a deployment. The secrets are such that a search for them finds nothing else.
const (
	vaultID    = "e2e.vault"
	tenant     = "app"
	kid        = "app-1"
	pin        = "pin-Quetzal-58"
	soPIN      = "so-pin-Axolotl-77"
	dbPassword = "db-password-Okapi-93" // not asked for by the tests' Postgres, but part of the URL
)

// deployment is what vaultd needs: a token with keys, a migrated database, a tenant.
type deployment struct {
	database  *storetest.Database
	directory tokentest.Directory
	dir       string // its files
	vaultd    []string
	signer    ed25519.PrivateKey // the tenant's back end signs with it
	pin       transcript.Fingerprint
}

// ownerEnv is the environment of vaultctl's commands on a database.
func ownerEnv(t testing.TB, dir string, db *storetest.Database) []string {
	return []string{"BKV_DATABASE_URL_FILE=" + write(t, dir, "owner.url", withPassword(db.OwnerURL))}
}

// withPassword puts dbPassword into a database's URL.
func withPassword(url string) string { return strings.Replace(url, "@", ":"+dbPassword+"@", 1) }

// tokenEnv is the environment of programs that use the token.
func tokenEnv(t testing.TB, dir string, tokens tokentest.Directory) []string {
	return []string{
		tokens.Env(), "BKV_TOKEN_MODULE=" + tokens.Module,
		"BKV_TOKEN_PIN_FILE=" + write(t, dir, "pin", pin+"\n"),
		"BKV_TOKEN_SO_PIN_FILE=" + write(t, dir, "so-pin", soPIN+"\n"),
		"BKV_VAULT_ID=" + vaultID,
	}
}

// deploy does what an operator does, with vaultctl. The tenant has no delays.
func deploy(t testing.TB, db *storetest.Database) *deployment {
	t.Helper()
	d := &deployment{database: db, directory: tokentest.NewDirectory(t), dir: t.TempDir()}
	d.prepare(t, tokenEnv(t, d.dir, d.directory))
	return d
}

// deployOn is deploy with a token that has its keys.
func deployOn(t testing.TB, db *storetest.Database, directory tokentest.Directory) *deployment {
	t.Helper()
	d := &deployment{database: db, directory: directory, dir: t.TempDir()}
	d.register(t, tokenEnv(t, d.dir, d.directory))
	return d
}

// prepare is deploy on the token that the environment names.
func (d *deployment) prepare(t testing.TB, tokens []string) {
	t.Helper()
	mustRun(t, tokens, "vaultctl", "token", "init")
	d.register(t, tokens)
}

// register does the rest: the database and the tenant.
func (d *deployment) register(t testing.TB, tokens []string) {
	t.Helper()
	db, owner := d.database, ownerEnv(t, d.dir, d.database)
	mustRun(t, owner, "vaultctl", "migrate")
	mustRun(t, nil, "vaultctl", "dev", "key", d.dir+"/tenant.key")
	mustRun(t, owner, "vaultctl", "tenant", "add", tenant, "--delays=none", "--direct-enrolment")
	mustRun(t, owner, "vaultctl", "tenant", "key", "add", tenant, "--kid="+kid, "--public-key="+d.dir+"/tenant.key.pub")
	d.vaultd = append(slices.Clone(tokens),
		"BKV_DATABASE_URL_FILE="+write(t, d.dir, "vaultd.url", withPassword(db.RuntimeURL)),
		"BKV_ENROLMENTS_PER_TENANT=100000", "BKV_REQUESTS_PER_USER=1000000", "BKV_REQUESTS_PER_TENANT=1000000")

	var err error
	if d.pin, err = transcript.ParseFingerprint(strings.TrimSpace(mustRun(t, tokens, "vaultctl", "identity"))); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(d.dir + "/tenant.key")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		t.Fatal("vaultctl dev key wrote no PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	d.signer = key.(ed25519.PrivateKey)
}

// start starts a vaultd of the deployment.
func (d *deployment) start(t testing.TB, more ...string) *vaultd {
	t.Helper()
	return startVaultd(t, d.vaultd, more...)
}

// mint signs a token as the tenant's back end does.
func (d *deployment) mint(user string) (string, error) {
	now := time.Now()
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{vaultID},
		IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)), ID: rand.Text(),
	})
	token.Header["kid"] = kid
	return token.SignedString(d.signer)
}

// device is a phone with the SDK, over the relay channel.
func (d *deployment) device(t testing.TB, user string, transport client.Transport) *client.Client {
	t.Helper()
	return newClient(t, d.config(user, transport))
}

// direct is device without the relay channel.
func (d *deployment) direct(t testing.TB, user string, transport client.Transport) *client.Client {
	t.Helper()
	c := d.config(user, transport)
	c.Direct = true
	return newClient(t, c)
}

func (d *deployment) config(user string, transport client.Transport) client.Config {
	return client.Config{
		Transport: transport, Fingerprint: d.pin, Tenant: tenant, User: user,
		Token: func(context.Context) (string, error) { return d.mint(user) },
	}
}

func newClient(t testing.TB, config client.Config) *client.Client {
	t.Helper()
	c, err := client.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// address is where vaultd is. It moves when vaultd is started again.
type address struct{ url atomic.Pointer[string] }

func (a *address) move(url string) { a.url.Store(&url) }

func (a *address) String() string { return *a.url.Load() }

// RoundTrip makes an address a transport of the SDK.
func (a *address) RoundTrip(ctx context.Context, r *client.Request) (*client.Response, error) {
	t, err := httpclient.New(httpclient.Config{BaseURL: a.String()})
	if err != nil {
		return nil, err
	}
	defer t.CloseIdleConnections()
	return t.RoundTrip(ctx, r)
}

// at is the address of a vaultd.
func at(v *vaultd) *address {
	a := &address{}
	a.move(v.url)
	return a
}

// query reads from the database, past the service.
func query[T any](t testing.TB, db *storetest.Database, sql string, args ...any) T {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	conn, err := pgx.Connect(ctx, db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// started is how many attempts the database has counted, over all of a user's generations.
func (d *deployment) started(t testing.TB, user string) int64 {
	t.Helper()
	return query[int64](t, d.database, `SELECT coalesce(sum(started), 0)::bigint FROM generations WHERE tenant = $1 AND user_id = $2`, tenant, []byte(user))
}
