// Command composeclient is what scripts/compose-test sees of a vault: it plays an app's users
// against a running one, and later finds out whether anything was lost. It also serves Go modules
// to a build that reaches no proxy.
package main

import (
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"reflect"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/golang-jwt/jwt/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/client/httpclient"
	"github.com/backup-key-vault/bkv/transcript"
)

type flags struct {
	Enrol   enrolCommand   `cmd:"" help:"Enrol users, make wrong attempts, and write down what must last."`
	Check   checkCommand   `cmd:"" help:"Compare every user with what was written down, and recover the key of one."`
	Recover recoverCommand `cmd:"" help:"Recover the keys of all users, and compare failures too."`
	Modules modulesCommand `cmd:"" help:"Serve a Go module cache as a module proxy, until stopped."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var f flags
	chosen := kong.Parse(&f, kong.Description("Plays users against a running vault, and finds out whether anything was lost."),
		kong.BindTo(ctx, (*context.Context)(nil)))
	if err := chosen.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "composeclient:", err)
		stop()
		os.Exit(1)
	}
}

// vault is where the users' app finds the vault.
type vault struct {
	URL         string `required:"" help:"The vault's address."`
	Fingerprint string `required:"" help:"The vault's fingerprint."`
	VaultID     string `name:"vault-id" required:"" env:"BKV_VAULT_ID" help:"The vault's id."`
	Tenant      string `required:"" help:"The tenant whose users are played."`
	KID         string `name:"kid" required:"" help:"The id of the tenant's key."`
	Key         string `required:"" placeholder:"FILE" help:"The tenant's private key (PEM, Ed25519)."`
	State       string `required:"" placeholder:"FILE" help:"Where it is written down what must last."`
}

// user is what must last of a user.
type user struct {
	Name     string
	Key      string // the backup key, as hexadecimal digits
	Failures uint64 // wrong attempts since the last success
	Status   *api.Status
}

func (u *user) password() string { return "the password of " + u.Name }

func (v *vault) client(name string) (*client.Client, error) {
	fingerprint, err := transcript.ParseFingerprint(v.Fingerprint)
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(v.Key)
	if err != nil {
		return nil, err
	}
	key, err := jwt.ParseEdPrivateKeyFromPEM(raw)
	if err != nil {
		return nil, err
	}
	transport, err := httpclient.New(httpclient.Config{BaseURL: v.URL})
	if err != nil {
		return nil, err
	}
	return client.New(client.Config{
		Transport: transport, Fingerprint: fingerprint, Tenant: v.Tenant, User: name,
		Token: func(context.Context) (string, error) { return v.token(key, name) },
	})
}

// token is what the app's back end would sign.
func (v *vault) token(key crypto.PrivateKey, name string) (string, error) {
	now := time.Now()
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.RegisteredClaims{
		Issuer: v.Tenant, Subject: name, Audience: jwt.ClaimStrings{v.VaultID},
		IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(5 * time.Minute)),
	})
	token.Header["kid"] = v.KID
	return token.SignedString(key)
}

func (v *vault) read() (users []*user, err error) {
	raw, err := os.ReadFile(v.State)
	if err != nil {
		return nil, err
	}
	return users, json.Unmarshal(raw, &users)
}

func (v *vault) write(users []*user) error {
	raw, err := json.MarshalIndent(users, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(v.State, raw, 0o600)
}

// miss makes a wrong attempt.
func miss(ctx context.Context, c *client.Client) error {
	_, err := c.Recover(ctx, "a typing error")
	if wrong := (*client.WrongPasswordError)(nil); !errors.As(err, &wrong) && !errors.Is(err, client.ErrKeyDestroyed) {
		return fmt.Errorf("a wrong password was answered with: %w", err)
	}
	return nil
}

type enrolCommand struct {
	vault
	Users int    `default:"3" help:"How many; the first makes no wrong attempt, the second one, and so on."`
	Name  string `default:"user" help:"What their names begin with."`
}

func (c *enrolCommand) Run(ctx context.Context) error {
	var users []*user
	for i := range c.Users {
		u := &user{Name: fmt.Sprintf("%s-%d", c.Name, i), Failures: uint64(i)}
		phone, err := c.client(u.Name)
		if err != nil {
			return err
		}
		enrolled, err := phone.Enrol(ctx, u.password())
		if err != nil {
			return fmt.Errorf("enrolling %s: %w", u.Name, err)
		}
		u.Key = hex.EncodeToString(enrolled.Key[:])
		for range i {
			if err := miss(ctx, phone); err != nil {
				return err
			}
		}
		if u.Status, err = phone.Status(ctx); err != nil {
			return err
		}
		users = append(users, u)
	}
	return c.write(users)
}

type checkCommand struct {
	vault
	Miss bool `help:"Then make a wrong attempt for every user, which is not written down."`
}

func (c *checkCommand) Run(ctx context.Context) error {
	users, err := c.read()
	if err != nil {
		return err
	}
	for i, u := range users {
		phone, err := c.client(u.Name)
		if err != nil {
			return err
		}
		status, err := phone.Status(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", u.Name, err)
		}
		if !reflect.DeepEqual(status, u.Status) {
			was, _ := json.Marshal(u.Status)
			is, _ := json.Marshal(status)
			return fmt.Errorf("%s: the status was %s and is %s", u.Name, was, is)
		}
		if c.Miss {
			if err := miss(ctx, phone); err != nil {
				return err
			}
			continue
		}
		if i > 0 {
			continue
		}
		if err := u.recover(ctx, phone); err != nil {
			return err
		}
		if u.Status, err = phone.Status(ctx); err != nil {
			return err
		}
	}
	return c.write(users)
}

// recover must bring back the same key, and tell of the failures that there were.
func (u *user) recover(ctx context.Context, phone *client.Client) error {
	recovered, err := phone.Recover(ctx, u.password())
	if err != nil {
		return fmt.Errorf("recovering the key of %s: %w", u.Name, err)
	}
	if hex.EncodeToString(recovered.Key[:]) != u.Key {
		return fmt.Errorf("the recovered key of %s is another one", u.Name)
	}
	if uint64(recovered.FailuresSince) != u.Failures {
		return fmt.Errorf("%s had %d failures, and is told of %d", u.Name, u.Failures, recovered.FailuresSince)
	}
	return nil
}

type recoverCommand struct{ vault }

func (c *recoverCommand) Run(ctx context.Context) error {
	users, err := c.read()
	if err != nil {
		return err
	}
	for _, u := range users {
		phone, err := c.client(u.Name)
		if err != nil {
			return err
		}
		if err := u.recover(ctx, phone); err != nil {
			return err
		}
	}
	return nil
}

type modulesCommand struct {
	Host  string `required:"" help:"The address to listen on; the port is any, and printed."`
	Cache string `required:"" placeholder:"DIR" help:"GOMODCACHE, whose downloads are laid out as a proxy's (Go Modules Reference, GOPROXY protocol)."`
}

func (c *modulesCommand) Run(ctx context.Context) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(c.Host, "0"))
	if err != nil {
		return err
	}
	fmt.Printf("http://%s\n", listener.Addr())
	server := &http.Server{Handler: http.FileServer(http.Dir(c.Cache + "/cache/download")), ReadHeaderTimeout: time.Minute}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
