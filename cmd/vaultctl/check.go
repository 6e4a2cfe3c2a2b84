package main

import (
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/pkcs11util"
)

type tokenCheckCommand struct {
	Token   settings.Token `embed:"" prefix:"token-"`
	Propose string         `placeholder:"FILE" help:"Write the profile that fits to FILE, for --token-profile. It must not exist."`
	Lower   bool           `name:"accept-lower-assurance" help:"If the token gives the products of no key away, propose a profile by which vaultd multiplies in its own memory. Whoever controls vaultd once can then carry those keys away and guess passwords offline, without the counter. Never proposed where anything better works."`
	JSON    bool           `name:"json" help:"Print the report as JSON."`
}

func (c *tokenCheckCommand) Run(e *environment) error {
	problems := c.Token.Problems()
	if _, err := os.Stat(c.Propose); c.Propose != "" && err == nil {
		problems = append(problems, fmt.Errorf("--propose: %s exists already", c.Propose))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	cfg, err := c.Token.Config()
	if err != nil {
		return err
	}
	admin, err := pkcs11util.OpenAdmin(cfg)
	if err != nil {
		return err
	}
	defer admin.Close()
	report, err := admin.Check(e.ctx, pkcs11util.CheckConfig{
		LowerAssurance: c.Lower, Progress: func(what string) { e.log.Info("checking", "what", what) },
	})
	if err != nil {
		return err
	}
	if c.JSON {
		err = json.MarshalWrite(e.stdout, report, jsontext.Multiline(true), jsontext.WithIndent("  "))
		err = errors.Join(err, e.printf("\n"))
	} else {
		err = c.table(e, report)
	}
	if err != nil {
		return err
	}
	if !report.Usable {
		return fmt.Errorf("token %q is %s", c.Token.Label, report.Verdict)
	}
	if c.Propose == "" {
		return nil
	}
	return writeProfile(c.Propose, report.Profile)
}

func (c *tokenCheckCommand) table(e *environment, r pkcs11util.CheckReport) error {
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tRESULT\tWHY")
	for _, l := range r.Lines {
		fmt.Fprintf(w, "%s\t%s\t%s\n", l.What, l.Result, l.Why)
		if l.Do != "" {
			fmt.Fprintf(w, "\t\t→ %s\n", l.Do)
		}
	}
	fmt.Fprintln(w)
	for _, rate := range r.Rates {
		fmt.Fprintf(w, "%s\t%.0f/s\tin one session\n", rate.Operation, rate.PerSecond)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return e.printf("\ntoken %q: %s\n", c.Token.Label, r.Verdict)
}

// writeProfile never overwrites a file.
func writeProfile(file string, p pkcs11util.Profile) error {
	b, err := p.File()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}
