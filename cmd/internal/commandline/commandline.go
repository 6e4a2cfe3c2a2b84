// Package commandline reads the settings of the commands. The struct of a command
// is the manual: its tags give the flags, the environment variables, the help
// text, and the README's table, which a test compares.
package commandline

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

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
	if v.HasDefault && v.Default != "" {
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
	return flagTable(slices.Concat(parser.Model.AllFlags(true)...)), nil
}

func flagTable(flags []*kong.Flag) string {
	var b strings.Builder
	b.WriteString("| flag | environment | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, f := range flags {
		if f.Name == "help" {
			continue
		}
		fallback, environment := "none", ""
		if f.HasDefault {
			fallback = "`" + f.Default + "`"
		}
		if len(f.Envs) > 0 {
			environment = "`" + strings.Join(f.Envs, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `--%s` | %s | %s | %s |\n", f.Name, environment, fallback, f.Help)
	}
	return b.String()
}

// Commands is what a program can do as two Markdown tables: its commands, each with its flags; and
// the flags of a group and of the program, which several commands share.
func Commands(command any) (commands, shared string, err error) {
	var unread []error
	parser, err := newParser(command, "command", "", &unread, io.Discard, io.Discard)
	if err != nil {
		return "", "", err
	}
	var b strings.Builder
	b.WriteString("| command | what | flags |\n| --- | --- | --- |\n")
	common := parser.Model.Flags
	for _, n := range parser.Model.Leaves(true) {
		var own []string
		for _, f := range n.Flags {
			switch {
			case f.Group == nil:
				own = append(own, "`"+f.String()+"`")
			case !slices.ContainsFunc(common, func(c *kong.Flag) bool { return c.Name == f.Name }):
				common = append(common, f)
			}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", strings.TrimSuffix(n.Summary(), " [flags]"), n.Help, strings.Join(own, ", "))
	}
	return b.String(), flagTable(common), nil
}
