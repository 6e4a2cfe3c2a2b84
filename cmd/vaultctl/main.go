// Command vaultctl is the operator's tool: it makes the token's keys, migrates the
// database, and keeps the list of tenants.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "vaultctl:", err)
		stop()
		code := 1
		var status *exitStatus
		if errors.As(err, &status) {
			code = status.code
		}
		os.Exit(code)
	}
}

const description = "vaultctl prepares and looks after a backup key vault: its token, its database, its tenants. " +
	"Secrets are read from files, never from arguments. Each command can be run again without harm."

// command is the whole command line.
type command struct {
	Token    tokenCommand    `cmd:"" help:"Make the token and its keys."`
	Identity identityCommand `cmd:"" help:"Print the fingerprint that clients pin."`
	Migrate  migrateCommand  `cmd:"" help:"Bring the database to this version's schema, as the role that owns it."`
	Tenant   tenantCommand   `cmd:"" help:"Add and list tenants (apps) and the keys that verify their tokens."`
	Key      keyCommand      `cmd:"" help:"Look at the token's keys, rotate and destroy them, through a running vaultd."`
	Audit    auditCommand    `cmd:"" help:"Follow, prove and export the audit log."`
	Status   statusCommand   `cmd:"" help:"Show how a running vaultd is: token, database, keys, certificates, and what is not covered. Exit status 0: all is well; 1: it cannot be told; 2: it serves, and an operator should look; 3: it cannot serve."`
	Ready    readyCommand    `cmd:"" help:"Ask a running vaultd whether it can serve, for health checks. Exit status 0: it can; 1: it cannot, or does not answer."`
	Dev      devCommand      `cmd:"" help:"For development: make a tenant's key pair and mint tokens with it."`
}

// environment is what a command may use.
type environment struct {
	ctx    context.Context
	stdin  io.Reader
	stdout io.Writer
	log    *slog.Logger
}

func (e *environment) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(e.stdout, format, args...)
	return err
}

// run is main without the process.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	var c command
	if len(args) == 0 {
		args = []string{"--help"}
	}
	chosen, err := commandline.Parse(&c, "vaultctl", description, args, stdout, stderr)
	if errors.Is(err, commandline.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	return chosen.Run(&environment{ctx, stdin, stdout, slog.New(slog.NewTextHandler(stderr, nil))})
}
