package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
)

const description = "vaultd is the backup key vault: it keeps the keys of end-to-end encrypted backups, each under a password that it never learns. " +
	"Every setting is a flag or an environment variable; secrets are read from files that settings name. " +
	"It stops cleanly on SIGTERM and SIGINT: running requests are finished first."

// config is vaultd's manual: flags, environment, help and the README's table come from it.
type config struct {
	VaultID     string            `name:"vault-id" env:"BKV_VAULT_ID" placeholder:"ID" help:"The vault's id, 1 to 255 bytes: the audience of tokens and OPAQUE's server identity. It can never change: every record depends on it."`
	Context     string            `name:"opaque-context" env:"BKV_OPAQUE_CONTEXT" placeholder:"TEXT" help:"OPAQUE's context (RFC 9807). Leave it empty unless all clients send one; it can never change."`
	Listen      string            `default:"127.0.0.1:8420" env:"BKV_LISTEN" placeholder:"HOST:PORT" help:"Where tenants' back ends reach the API. Without --tls-cert it is plain HTTP: put it behind a proxy that ends TLS, or keep it on loopback."`
	TLS         tlsFiles          `embed:"" prefix:"tls-" envprefix:"BKV_TLS_" set:"listener=--listen"`
	Admin       string            `name:"admin-listen" default:"127.0.0.1:8421" env:"BKV_ADMIN_LISTEN" placeholder:"HOST:PORT" help:"Where operators reach health, metrics and, with vaultctl, status, keys and the audit log. Never public: whoever reaches it can rotate and destroy keys."`
	AdminTLS    tlsFiles          `embed:"" prefix:"admin-tls-" envprefix:"BKV_ADMIN_TLS_" set:"listener=--admin-listen"`
	Token       settings.Token    `embed:"" prefix:"token-"`
	Sessions    int               `name:"token-sessions" default:"4" env:"BKV_TOKEN_SESSIONS" placeholder:"N" help:"Sessions kept open with the token. SoftHSM gains nothing beyond a few; a hardware HSM may want 30."`
	Database    settings.Database `embed:"" prefix:"database-"`
	Conns       int               `name:"database-connections" default:"16" env:"BKV_DATABASE_CONNECTIONS" placeholder:"N" help:"Most connections to the database."`
	Sweep       time.Duration     `name:"sweep-every" default:"10s" env:"BKV_SWEEP_EVERY" placeholder:"DURATION" help:"How often keys that are used up, or past their grace, are looked for and destroyed."`
	Stop        time.Duration     `name:"stop-within" default:"20s" env:"BKV_STOP_WITHIN" placeholder:"DURATION" help:"How long a stop waits for running requests."`
	StateKey    time.Duration     `name:"rotate-state-every" default:"720h" env:"BKV_ROTATE_STATE_EVERY" placeholder:"DURATION" help:"How long one key seals the states that clients carry between two requests; the next one is made by itself, and the old one destroyed when no state under it can be valid any more. At most 720h."`
	RelayKey    time.Duration     `name:"rotate-relay-every" default:"720h" env:"BKV_ROTATE_RELAY_EVERY" placeholder:"DURATION" help:"How long one relay key is used; the next one is made by itself, and the old one destroyed when no signed key list that names it is valid any more. At most 8760h."`
	Rewraps     int               `name:"rewraps-per-second" default:"200" env:"BKV_REWRAPS_PER_SECOND" placeholder:"N" help:"Most records that are moved to a new master or mac key in a second, after a rotation."`
	Checkpoints time.Duration     `name:"checkpoint-every" default:"10s" env:"BKV_CHECKPOINT_EVERY" placeholder:"DURATION" help:"Least time between two signed checkpoints of the audit log. Events are sealed within a second or two; what is not signed yet, whoever can write to the database can still change unseen."`
	LogLevel    string            `default:"info" env:"BKV_LOG_LEVEL" placeholder:"LEVEL" help:"debug, info, warn or error. Logs are JSON lines on standard error; they never hold bodies, tokens, PINs or user ids."`

	Connections           int `name:"max-connections" default:"4096" env:"BKV_MAX_CONNECTIONS" placeholder:"N" help:"Most connections that --listen keeps open; what comes beyond is closed at once."`
	RequestsAtOnce        int `name:"max-requests" default:"512" env:"BKV_MAX_REQUESTS" placeholder:"N" help:"Most requests that the vault works on at once; what comes beyond is answered 503, busy, and charged nothing."`
	ConnectionsPerAddress int `name:"max-connections-per-address" default:"1024" env:"BKV_MAX_CONNECTIONS_PER_ADDRESS" placeholder:"N" help:"Most of these from one IPv4 address or IPv6 /64. A proxy in front is one address."`

	RequestsPerUser     int `default:"120" env:"BKV_REQUESTS_PER_USER" placeholder:"N" help:"Requests that a user may make in a minute, at this instance, on all routes together."`
	RequestsPerTenant   int `default:"1000" env:"BKV_REQUESTS_PER_TENANT" placeholder:"N" help:"Requests that a tenant may make in a second, at this instance; twice as many in a burst."`
	EnrolmentsPerUser   int `default:"10" env:"BKV_ENROLMENTS_PER_USER" placeholder:"N" help:"Enrolment starts that a user may make in an hour, at this instance."`
	EnrolmentsPerTenant int `default:"50" env:"BKV_ENROLMENTS_PER_TENANT" placeholder:"N" help:"Enrolment starts that a tenant may make in a second, at this instance; twice as many in a burst."`
}

// Validate reports everything that is wrong at once. commandline.Parse asks it.
func (c *config) Validate() error {
	var problems []error
	report := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if c.VaultID == "" || len(c.VaultID) > 255 {
		report("--vault-id: want 1 to 255 bytes, got %d", len(c.VaultID))
	}
	if len(c.Context) > 65535 {
		report("--opaque-context: want at most 65535 bytes, got %d", len(c.Context))
	}
	for _, listen := range []struct{ flag, address string }{{"--listen", c.Listen}, {"--admin-listen", c.Admin}} {
		if _, _, err := net.SplitHostPort(listen.address); err != nil {
			report("%s: want host:port, got %q", listen.flag, listen.address)
		}
	}
	problems = append(problems, c.TLS.problems("--tls-")...)
	problems = append(problems, c.AdminTLS.problems("--admin-tls-")...)
	problems = append(problems, c.Token.Problems()...)
	if c.Sessions < 1 || c.Sessions > 1000 {
		report("--token-sessions: want 1 to 1000, got %d", c.Sessions)
	}
	problems = append(problems, c.Database.Problems()...)
	if c.Conns < 1 || c.Conns > 1000 {
		report("--database-connections: want 1 to 1000, got %d", c.Conns)
	}
	if c.Sweep < 100*time.Millisecond || c.Sweep > time.Hour {
		report("--sweep-every: want 100ms to 1h, got %v", c.Sweep)
	}
	if c.Stop < time.Second || c.Stop > 10*time.Minute {
		report("--stop-within: want 1s to 10m, got %v", c.Stop)
	}
	if _, err := c.level(); err != nil {
		report("--log-level: want debug, info, warn or error, got %q", c.LogLevel)
	}
	if c.StateKey < time.Minute || c.StateKey > 720*time.Hour {
		report("--rotate-state-every: want 1m to 720h, got %v", c.StateKey)
	}
	if c.RelayKey < time.Minute || c.RelayKey > 8760*time.Hour {
		report("--rotate-relay-every: want 1m to 8760h, got %v", c.RelayKey)
	}
	if c.Rewraps < 1 || c.Rewraps > 1_000_000 {
		report("--rewraps-per-second: want 1 to 1000000, got %d", c.Rewraps)
	}
	if c.Checkpoints < time.Second || c.Checkpoints > time.Hour {
		report("--checkpoint-every: want 1s to 1h, got %v", c.Checkpoints)
	}
	for _, limit := range []struct {
		flag string
		n    int
	}{
		{"--max-connections", c.Connections}, {"--max-connections-per-address", c.ConnectionsPerAddress}, {"--max-requests", c.RequestsAtOnce},
		{"--requests-per-user", c.RequestsPerUser}, {"--requests-per-tenant", c.RequestsPerTenant},
		{"--enrolments-per-user", c.EnrolmentsPerUser}, {"--enrolments-per-tenant", c.EnrolmentsPerTenant},
	} {
		if limit.n < 1 || limit.n > 1_000_000 {
			report("%s: want 1 to 1000000, got %d", limit.flag, limit.n)
		}
	}
	return errors.Join(problems...)
}

func (c *config) level() (level slog.Level, err error) {
	err = level.UnmarshalText([]byte(c.LogLevel))
	return level, err
}
