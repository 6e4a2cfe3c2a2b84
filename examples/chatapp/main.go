package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

type settings struct {
	Listen          string `default:"127.0.0.1:8430" env:"CHATAPP_LISTEN" help:"Where the page is served. Put TLS before it, or open it as http://localhost."`
	DatabaseURLFile string `name:"database-url-file" required:"" env:"CHATAPP_DATABASE_URL_FILE" placeholder:"FILE" help:"File that holds the database's URL. Its tables are made at start."`
	SDK             string `name:"sdk" required:"" env:"CHATAPP_SDK" placeholder:"DIR" help:"What scripts/build-sdk wrote."`
	VaultURL        string `name:"vault-url" required:"" env:"CHATAPP_VAULT_URL" help:"The vault's address."`
	VaultID         string `name:"vault-id" required:"" env:"CHATAPP_VAULT_ID" help:"The vault's id."`
	Fingerprint     string `required:"" env:"CHATAPP_FINGERPRINT" help:"The vault's fingerprint, as vaultctl identity prints it; the page pins it."`
	Tenant          string `required:"" env:"CHATAPP_TENANT" help:"This app's name at the vault."`
	KID             string `name:"kid" required:"" env:"CHATAPP_KID" help:"The id of the key that signs tokens."`
	Key             string `required:"" env:"CHATAPP_KEY" placeholder:"FILE" help:"That key: PEM, Ed25519 (see vaultctl dev key)."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var s settings
	kong.Parse(&s, kong.Name("chatapp"), kong.Description("A chat app with end-to-end encrypted backup: its back end and its page."))
	if err := run(ctx, s, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "chatapp:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings, stderr io.Writer) error {
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	url, err := os.ReadFile(s.DatabaseURLFile)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(s.Key)
	if err != nil {
		return err
	}
	key, err := jwt.ParseEdPrivateKeyFromPEM(pem)
	if err != nil {
		return fmt.Errorf("%s: want a PEM file with a private Ed25519 key: %w", s.Key, err)
	}
	if _, err := os.Stat(s.SDK + "/bkv.wasm"); err != nil {
		return fmt.Errorf("no SDK: run scripts/build-sdk %s: %w", s.SDK, err)
	}
	pool, err := pgxpool.New(ctx, strings.TrimSpace(string(url)))
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	defer pool.Close()
	if _, err := pool.Exec(ctx, schema); err != nil {
		return fmt.Errorf("making the tables: %w", err)
	}
	handler := newServer(config{
		db: pool, log: log, sdk: os.DirFS(s.SDK), fingerprint: s.Fingerprint,
		tokens: tokens{vault: s.VaultID, tenant: s.Tenant, kid: s.KID, key: key}, vaultURL: strings.TrimRight(s.VaultURL, "/"),
	})

	listener, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 60 * time.Second,
		WriteTimeout: 60 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	log.Info("serving", "listen", listener.Addr().String())
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := errors.Join(server.Shutdown(stopping), ignoreClosed(<-failed)); err != nil {
		return fmt.Errorf("stopping: %w", err)
	}
	log.Info("stopped")
	return nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
