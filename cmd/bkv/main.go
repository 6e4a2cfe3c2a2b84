// Command bkv is the tool of the person whose backup it is: it sets up an end-to-end encrypted
// backup under a password or 64 digits, backs up, and brings everything back.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
)

// exitInterrupted is a shell's exit status after Ctrl-C.
const exitInterrupted = 130

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	interrupted := ctx.Err() != nil
	stop()
	if interrupted && errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "bkv: stopped; what was there before is unchanged")
		os.Exit(exitInterrupted)
	}
	fmt.Fprintln(os.Stderr, "bkv:", err)
	if next := advice(err); next != "" {
		fmt.Fprintln(os.Stderr, next)
	}
	os.Exit(1)
}

// advice is what to do about an error that is the system's.
func advice(err error) string {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "Make room there, or choose another place, and run it again."
	case errors.Is(err, syscall.EROFS):
		return "Nothing can be written there: choose another place, or mount the disk for writing."
	case errors.Is(err, fs.ErrPermission):
		return "You may not do that there: choose another place, or change the permissions."
	}
	return ""
}

const description = "bkv keeps an end-to-end encrypted backup. Nobody can read it but whoever has the password or the 64-digit key. " +
	"Start with 'bkv setup', then 'bkv backup FOLDER DESTINATION'; on a new device 'bkv restore DESTINATION FOLDER'."

// command is the whole command line.
type command struct {
	ConfigDir string `env:"BKV_CONFIG_DIR" placeholder:"FOLDER" help:"Where bkv keeps its settings on this device. Default: bkv in your configuration folder."`
	Quiet     bool   `short:"q" help:"Say nothing but what was asked for, warnings and errors, as without a terminal."`

	Setup    setupCommand    `cmd:"" help:"Turn the backup on, with a password or a 64-digit key; on a new device, with --recover, take it up again. Passwords that everybody would try are refused, and the digits count only when you have typed two groups back."`
	Backup   backupCommand   `cmd:"" help:"Back up files and folders: write an archive, read it back, and then delete older ones."`
	Restore  restoreCommand  `cmd:"" help:"Bring a backup back, also on a new device. It is restored beside and renamed at the end: what you see is whole."`
	Status   statusCommand   `cmd:"" help:"Show how the key is kept, the attempts that are left, and the last backup at each place that this device knows."`
	Password passwordCommand `cmd:"" help:"Change the password, or set one in place of the 64 digits. A device that has the key needs no old password."`
	Key      keyCommand      `cmd:"" help:"Show the 64 digits, or what other programs need: age, restic, rclone."`
	Verify   verifyCommand   `cmd:"" help:"Practise the password: recover the key from the vault as a new device would. It is a real attempt: a wrong password costs one."`
	Off      offCommand      `cmd:"" help:"Turn the backup off: destroy the vault's copy of the key, and this device's."`
}

// environment is what a command may use.
type environment struct {
	ctx    context.Context
	stdout io.Writer
	term   *terminal
	device *device
	quiet  bool
}

// printf writes what was asked for.
func (e *environment) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(e.stdout, format, args...)
	return err
}

// say tells what happens, at a terminal.
func (e *environment) say(format string, args ...any) {
	if !e.quiet {
		e.term.printf(format+"\n", args...)
	}
}

// warn tells what the user should know in any case.
func (e *environment) warn(format string, args ...any) { e.term.printf(format+"\n", args...) }

// run is main without the process.
func run(ctx context.Context, args []string, stdin, stdout, stderr *os.File) error {
	var c command
	if len(args) == 0 {
		args = []string{"--help"}
	}
	chosen, err := commandline.Parse(&c, "bkv", description, args, stdout, stderr)
	if errors.Is(err, commandline.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	d, err := openDevice(c.ConfigDir)
	if err != nil {
		return err
	}
	t := &terminal{in: stdin, out: stderr}
	return chosen.Run(&environment{ctx: ctx, stdout: stdout, term: t, device: d, quiet: c.Quiet || !t.shows()})
}
