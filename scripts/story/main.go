// Command story is what scripts/demo tells: it plays a user's two devices and a
// stranger against a running vault, on the Go SDK, and after each step prints what the
// vault's database holds. scripts/demo makes the vault and calls it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/transcript"
)

type flags struct {
	URL         string `required:"" help:"The vault's address."`
	Fingerprint string `required:"" help:"The vault's fingerprint, as vaultctl identity prints it."`
	VaultID     string `name:"vault-id" required:"" env:"BKV_VAULT_ID" help:"The vault's id."`
	Tenant      string `required:"" help:"The tenant whose back end is played. It should have no delays."`
	Trusted     string `required:"" help:"A second tenant with the same key, declared direct-enrolment."`
	KID         string `name:"kid" required:"" help:"The id of the tenant's key."`
	Key         string `required:"" placeholder:"FILE" help:"The tenant's private key (PEM, Ed25519)."`
	Database    string `required:"" placeholder:"FILE" help:"File with the database's URL, to show what is stored."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var f flags
	kong.Parse(&f, kong.Description("Tells the vault's story against a running vault."))
	if err := run(ctx, f); err != nil {
		fmt.Fprintln(os.Stderr, "story:", err)
		stop()
		os.Exit(1)
	}
}

// user is whose backup it is. The password is one that a person might choose.
const (
	user        = "alice"
	password    = "blue teapot on a tuesday"
	newPassword = "green teapot on a friday"
)

type story struct {
	flags
	fingerprint transcript.Fingerprint
	mint        func(tenant string) func(context.Context) (string, error)
	db          *pgx.Conn
	secrets     map[string][]byte // what must be nowhere in the database
}

func run(ctx context.Context, f flags) error {
	s := &story{flags: f, secrets: map[string][]byte{
		"the password": []byte(password), "the new password": []byte(newPassword),
	}}
	var err error
	if s.fingerprint, err = transcript.ParseFingerprint(f.Fingerprint); err != nil {
		return err
	}
	if s.mint, err = minter(f); err != nil {
		return err
	}
	url, err := os.ReadFile(f.Database)
	if err != nil {
		return err
	}
	if s.db, err = pgx.Connect(ctx, strings.TrimSpace(string(url))); err != nil {
		return err
	}
	defer s.db.Close(context.WithoutCancel(ctx))
	return s.tell(ctx)
}

// minter signs tokens as the app's back end does.
func minter(f flags) (func(tenant string) func(context.Context) (string, error), error) {
	raw, err := os.ReadFile(f.Key)
	if err != nil {
		return nil, err
	}
	key, err := jwt.ParseEdPrivateKeyFromPEM(raw)
	if err != nil {
		return nil, err
	}
	return func(tenant string) func(context.Context) (string, error) {
		return func(context.Context) (string, error) {
			now := time.Now()
			token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
				Issuer: tenant, Subject: user, Audience: jwt.ClaimStrings{f.VaultID},
				IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)),
			})
			token.Header["kid"] = f.KID
			return token.SignedString(key)
		}
	}, nil
}

// device is a phone: it has the app, the vault's fingerprint, and nothing else.
func (s *story) device() (*client.Client, error) {
	transport, err := s.transport()
	if err != nil {
		return nil, err
	}
	return s.deviceOver(transport, s.Tenant, false)
}

func (s *story) transport() (client.Transport, error) {
	return httpclient.New(httpclient.Config{BaseURL: s.URL})
}

// deviceOver is a device of a tenant's whose requests go this way, over the relay channel or directly.
func (s *story) deviceOver(transport client.Transport, tenant string, direct bool) (*client.Client, error) {
	return client.New(client.Config{
		Transport: transport, Direct: direct, Fingerprint: s.fingerprint, Tenant: tenant, User: user, Token: s.mint(tenant),
	})
}

func say(format string, args ...any)   { fmt.Printf("   "+format+"\n", args...) }
func title(format string, args ...any) { fmt.Printf("\n── "+format+"\n", args...) }

func (s *story) tell(ctx context.Context) error {
	title("Alice turns on end-to-end encrypted backup")
	old, err := s.device()
	if err != nil {
		return err
	}
	say("Her phone makes a random 32-byte backup key and puts it into the vault under")
	say("a password. It knows the vault by its fingerprint:")
	say("  %v", s.fingerprint)
	enrolled, err := old.Enrol(ctx, password)
	if err != nil {
		return fmt.Errorf("enrolling: %w", err)
	}
	s.secrets["the backup key"] = enrolled.Key[:]
	say("The key, as she could also write it down (64 digits; only her phone shows it):")
	for _, line := range strings.Split(enrolled.Key.Digits(), "\n") {
		say("  %s", line)
	}
	if err := s.stored(ctx); err != nil {
		return err
	}

	title("The phone is lost; a new phone has the password and nothing else")
	phone, err := s.device()
	if err != nil {
		return err
	}
	say("First with a typing error:")
	if _, err := phone.Recover(ctx, "blue teapot on a thursday"); !isWrong(err) {
		return fmt.Errorf("a wrong password was answered with: %w", err)
	} else {
		say("  %v", err)
	}
	say("Then rightly:")
	recovered, err := phone.Recover(ctx, password)
	if err != nil {
		return fmt.Errorf("recovering: %w", err)
	}
	if recovered.Key != enrolled.Key {
		return errors.New("the recovered key is another one")
	}
	say("  recovered; it is the same key, and %d failed attempt since the last success is reported", recovered.FailuresSince)
	if err := s.stored(ctx); err != nil {
		return err
	}

	title("She changes her password; the key stays, the old record is destroyed at once")
	if _, err := phone.ChangePassword(ctx, recovered.Key, newPassword); err != nil {
		return fmt.Errorf("changing the password: %w", err)
	}
	if _, err := phone.Recover(ctx, password); !isWrong(err) {
		return fmt.Errorf("the old password was answered with: %w", err)
	} else {
		say("  the old password: %v", err)
	}
	again, err := phone.Recover(ctx, newPassword)
	if err != nil || again.Key != enrolled.Key {
		return errors.Join(errors.New("recovering with the new password"), err)
	}
	say("  the new password: recovered")
	if err := s.stored(ctx); err != nil {
		return err
	}

	title("A stranger guesses, ten times (this tenant has no delays between attempts; by")
	fmt.Println("   default the fifth waits a minute, the tenth a day)")
	if err := s.guess(ctx); err != nil {
		return err
	}
	say("And now Alice, with the right password:")
	_, err = phone.Recover(ctx, newPassword)
	if !errors.Is(err, client.ErrKeyDestroyed) {
		return fmt.Errorf("after ten wrong guesses: %w", err)
	}
	say("  %v", err)
	if err := s.stored(ctx); err != nil {
		return err
	}
	title("Had she written down the 64 digits, they would still open her backup:")
	key, err := backup.ParseDigits(enrolled.Key.Digits())
	if err != nil || key != enrolled.Key {
		return errors.Join(errors.New("reading the 64 digits"), err)
	}
	say("read back, they are the same key. Without them it is gone for good.")
	if err := s.betray(ctx); err != nil {
		return err
	}
	return s.search(ctx)
}

func isWrong(err error) bool {
	var wrong *client.WrongPasswordError
	return errors.As(err, &wrong)
}

// guess makes ten wrong attempts. Stretching a guess takes a third of a second of a
// stranger's time too, besides the vault's count.
func (s *story) guess(ctx context.Context) error {
	stranger, err := s.device()
	if err != nil {
		return err
	}
	for n := 1; n <= 10; n++ {
		_, err := stranger.Recover(ctx, fmt.Sprintf("guess number %d", n))
		if n < 10 && !isWrong(err) || n == 10 && !errors.Is(err, client.ErrKeyDestroyed) {
			return fmt.Errorf("guess %d was answered with: %w", n, err)
		}
		if errors.Is(err, client.ErrKeyDestroyed) {
			err = client.ErrKeyDestroyed // without the request's number
		}
		say("  guess %2d: %v", n, err)
	}
	return nil
}

const showRows = `
SELECT g.number, g.state, coalesce(g.reason, ''), g.started, g.last_success, g.successes,
	jsonb_array_length(g.attempts), coalesce(encode(g.sealed, 'hex'), ''), encode(a.mac, 'hex')
FROM accounts AS a JOIN generations AS g USING (tenant, user_id)
WHERE a.tenant = $1 AND a.user_id = $2 ORDER BY g.number`

// stored prints the user's rows as the database holds them.
func (s *story) stored(ctx context.Context) error {
	rows, err := s.db.Query(ctx, showRows, s.Tenant, []byte(user))
	if err != nil {
		return err
	}
	say("What the vault stores (bytes that mean nothing without the token):")
	var number, started, lastSuccess, successes int64
	var attempts int
	var state, reason, sealed, mac string
	_, err = pgx.ForEachRow(rows, []any{&number, &state, &reason, &started, &lastSuccess, &successes, &attempts, &sealed, &mac}, func() error {
		say("  generation %d: %s", number, strings.TrimSpace(state+" "+reason))
		say("    attempts made %d, last success %d, successes %d, attempts kept %d", started, lastSuccess, successes, attempts)
		if sealed == "" {
			say("    sealed record: none, erased")
		} else {
			say("    sealed record: %s… (%d bytes)", sealed[:64], len(sealed)/2)
		}
		return nil
	})
	if err != nil {
		return err
	}
	say("  the row's MAC, made in the token: %s…", mac[:32])
	return nil
}

// search looks for the secrets in all that the database holds.
func (s *story) search(ctx context.Context) error {
	title("Is any secret in the database?")
	names := []string{"the password", "the new password", "the backup key"}
	for _, table := range []string{"accounts", "generations", "events", "tenants", "tenant_keys", "relay_seeds"} {
		for _, name := range names {
			var n int
			err := s.db.QueryRow(ctx, `SELECT count(*) FROM `+table+` AS x
				WHERE strpos(x::text, encode($1, 'hex')) > 0 OR strpos(x::text, encode($1, 'base64')) > 0
				OR strpos(x::text, encode($1, 'escape')) > 0`, s.secrets[name]).Scan(&n)
			if err != nil {
				return err
			}
			if n > 0 {
				return fmt.Errorf("%s is in table %s", name, table)
			}
		}
	}
	say("searched every row of every table for both passwords and the key, in clear, hex and base64: none")
	return nil
}
