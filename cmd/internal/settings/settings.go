// Package settings reads the settings of vaultd and vaultctl. The struct of a command
// is the manual: its tags give the flags, the environment variables, the help
// text, and the README's table, which a test compares.
//
// Secrets are never settings: the token's PIN and the database URL are read from files
// that settings name, so that no process list shows them.
package settings

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

// Token says which PKCS#11 token to use.
type Token struct {
	Module  string `default:"/usr/lib/softhsm/libsofthsm2.so" env:"BKV_TOKEN_MODULE" placeholder:"FILE" help:"PKCS#11 module, a shared library."`
	Label   string `default:"bkv" env:"BKV_TOKEN_LABEL" placeholder:"LABEL" help:"Label of the token, 1 to 32 bytes."`
	PINFile string `name:"pin-file" env:"BKV_TOKEN_PIN_FILE" placeholder:"FILE" help:"File that holds the token's user PIN; a line break at its end is ignored."`
	Profile string `env:"BKV_TOKEN_PROFILE" placeholder:"FILE" help:"File that says how the token differs from others, as 'vaultctl token check' proposes it. None for SoftHSM and tokens that behave alike."`
}

// maxLabelBytes is what a token has room for (PKCS #11 v2.40 section 3.2, CK_TOKEN_INFO).
const maxLabelBytes = 32

// Problems names what is wrong, flag by flag.
func (t Token) Problems() (problems []error) {
	if t.Module == "" {
		problems = append(problems, errors.New("--token-module: name the PKCS#11 module"))
	}
	if t.Label == "" || len(t.Label) > maxLabelBytes {
		problems = append(problems, fmt.Errorf("--token-label: want 1 to %d bytes, got %d", maxLabelBytes, len(t.Label)))
	}
	if t.PINFile == "" {
		problems = append(problems, errors.New("--token-pin-file: name the file that holds the token's user PIN"))
	}
	if t.Profile != "" {
		if _, err := pkcs11util.ReadProfile(t.Profile); err != nil {
			problems = append(problems, fmt.Errorf("--token-profile: %w", err))
		}
	}
	return problems
}

// Config reads the files that are named.
func (t Token) Config() (pkcs11util.Config, error) {
	cfg := pkcs11util.Config{Module: t.Module, Label: t.Label}
	var pinErr, profileErr error
	cfg.PIN, pinErr = pkcs11util.ReadPIN(t.PINFile)
	if t.Profile != "" {
		cfg.Profile, profileErr = pkcs11util.ReadProfile(t.Profile)
	}
	if profileErr != nil {
		profileErr = fmt.Errorf("token profile: %w", profileErr)
	}
	return cfg, errors.Join(pinErr, profileErr)
}

// Database says which Postgres to use.
type Database struct {
	URLFile string `name:"url-file" env:"BKV_DATABASE_URL_FILE" placeholder:"FILE" help:"File that holds the database's URL (postgres://user:password@host/database, or host=/socket/folder dbname=…)."`
}

// URL reads the database's URL.
func (d Database) URL() (string, error) {
	raw, err := os.ReadFile(d.URLFile)
	if err != nil {
		return "", fmt.Errorf("reading the database's URL: %w", err)
	}
	url := strings.TrimSpace(string(raw))
	if url == "" {
		return "", fmt.Errorf("the file %s, which should hold the database's URL, is empty", d.URLFile)
	}
	return url, nil
}

// Problems names what is wrong, flag by flag.
func (d Database) Problems() (problems []error) {
	if d.URLFile == "" {
		problems = append(problems, errors.New("--database-url-file: name the file that holds the database's URL"))
	}
	return problems
}

// ErrHelp is Parse's answer when it has printed help and there is nothing to do.
var ErrHelp = errors.New("help was asked for")

// exited carries kong's wish to exit out of its parser.
type exited int

// Parse fills command, a pointer to a tagged struct, from arguments and environment.
// A command that has a method Validate() error is asked by it whether the values make
// sense; its complaints and all values that cannot be read come in one error. A
// command line that cannot be understood is reported alone. ErrHelp: help was printed.
func Parse(command any, name, description string, args []string, stdout, stderr io.Writer) (chosen *kong.Context, err error) {
	var unread []error
	parser, err := newParser(command, name, description, &unread, stdout, stderr)
	if err != nil {
		return nil, err
	}
	defer func() {
		if r := recover(); r != nil {
			code, ok := r.(exited)
			if !ok {
				panic(r)
			}
			if err = ErrHelp; code != 0 {
				err = fmt.Errorf("command line: exit status %d", int(code))
			}
		}
	}()
	chosen, err = parser.Parse(args)
	if joined := errors.Join(append(unread, err)...); joined != nil {
		return nil, joined
	}
	return chosen, nil
}

func newParser(command any, name, description string, unread *[]error, stdout, stderr io.Writer) (*kong.Kong, error) {
	return kong.New(command, kong.Name(name), kong.Description(description),
		kong.Writers(stdout, stderr), kong.Exit(func(code int) { panic(exited(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.ValueFormatter(explain),
		kong.TypeMapper(reflect.TypeFor[time.Duration](), collect(unread, "a duration such as 90s, 15m or 24h", time.ParseDuration)),
		kong.TypeMapper(reflect.TypeFor[int](), collect(unread, "a whole number", strconv.Atoi)),
	)
}

// explain is a setting's help with its default and its environment variable.
func explain(v *kong.Value) string {
	text := v.Help
	if v.HasDefault {
		text += " Default: " + v.Default + "."
	}
	if len(v.Tag.Envs) > 0 {
		text += " Environment: " + strings.Join(v.Tag.Envs, ", ") + "."
	}
	return text
}

// collect reads a value and puts what cannot be read aside, so that all of it is
// reported together, where kong would stop at the first. The default then takes its
// place, which nothing else will complain about.
func collect[T any](unread *[]error, want string, parse func(string) (T, error)) kong.Mapper {
	return kong.MapperFunc(func(ctx *kong.DecodeContext, target reflect.Value) error {
		var text string
		if err := ctx.Scan.PopValueInto("value", &text); err != nil {
			return err
		}
		value, err := parse(text)
		if err != nil {
			*unread = append(*unread, fmt.Errorf("--%s: want %s, got %q", ctx.Value.Name, want, text))
			if value, err = parse(ctx.Value.Default); err != nil {
				return fmt.Errorf("--%s has no default: %w", ctx.Value.Name, err)
			}
		}
		target.Set(reflect.ValueOf(value))
		return nil
	})
}

// Table is the settings of a command as a Markdown table.
func Table(command any) (string, error) {
	var unread []error
	parser, err := newParser(command, "command", "", &unread, io.Discard, io.Discard)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("| flag | environment | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, group := range parser.Model.AllFlags(true) {
		for _, f := range group {
			if f.Name == "help" {
				continue
			}
			fallback := "none"
			if f.HasDefault {
				fallback = "`" + f.Default + "`"
			}
			fmt.Fprintf(&b, "| `--%s` | `%s` | %s | %s |\n", f.Name, strings.Join(f.Envs, "`, `"), fallback, f.Help)
		}
	}
	return b.String(), nil
}
