package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/backup-key-vault/bkv/api"
)

type keyCommand struct {
	Status  keyStatusCommand  `cmd:"" help:"Show all keys: age, seals, the records that need them, and what is to be done."`
	Rotate  keyRotateCommand  `cmd:"" help:"Use the next generation of a key from now on. vaultd makes it, as nobody else may write to a token that is in use."`
	Destroy keyDestroyCommand `cmd:"" help:"Destroy a generation of a key that nothing needs any more, in the token of the vaultd that is asked. It cannot be undone: dumps and backups of records that it sealed are worthless from then on."`
	Forget  keyForgetCommand  `cmd:"" name:"forget-token" help:"Take a token out of service that was destroyed or wiped, so that rotations do not wait for it. What it held counts as destroyed. A vaultd that still uses it brings it back."`
}

func (a *adminListener) status(ctx context.Context) (*api.KeyStatus, error) {
	var status api.KeyStatus
	return &status, a.ask(ctx, http.MethodGet, &status)
}

type keyStatusCommand struct {
	adminListener
	JSON bool `help:"Print JSON."`
}

func (c *keyStatusCommand) Run(e *environment) error {
	status, err := c.status(e.ctx)
	if err != nil {
		return err
	}
	if c.JSON {
		encoder := json.NewEncoder(e.stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(status)
	}
	return showKeys(e.stdout, status)
}

func showKeys(out io.Writer, s *api.KeyStatus) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "KEY\tSTATE\tAGE\tIN USE FOR\tSEALS\tRECORDS\tTOKENS")
	for _, k := range s.Keys {
		age, used := since(s.Now, k.CreatedAt), "-"
		if k.CurrentSince != nil {
			until := s.Now
			if k.RetiredAt != nil {
				until = *k.RetiredAt
			}
			used = since(until, *k.CurrentSince)
		}
		fmt.Fprintf(w, "%s/%d\t%s\t%s\t%s\t%d\t%d\t%s\n", k.Purpose, k.Generation, k.State, age, used, k.Seals, k.Records, strings.Join(k.Tokens, ","))
	}
	switch {
	case s.RewrapLeft == 0:
		fmt.Fprintln(w, "\nall records are under the keys in use")
	case s.Rewrapping:
		fmt.Fprintf(w, "\n%d records are under older keys and are being moved\n", s.RewrapLeft)
	default:
		fmt.Fprintf(w, "\n%d records are under older keys and wait to be moved\n", s.RewrapLeft)
	}
	if s.OldestUncovered == nil {
		fmt.Fprintln(w, "every destroyed record is gone from all dumps: the master keys that sealed it are destroyed")
	} else {
		fmt.Fprintf(w, "records destroyed since %s can still be opened from older dumps: rotate master and destroy the old key\n",
			s.OldestUncovered.UTC().Format(time.RFC3339))
	}
	for _, warning := range s.Warnings {
		fmt.Fprintf(w, "WARNING: %s\n", warning)
	}
	return w.Flush()
}

// since is a duration as people say it.
func since(now, then time.Time) string {
	d := max(0, now.Sub(then))
	if d >= 48*time.Hour {
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
	return d.Round(time.Second).String()
}

type keyRotateCommand struct {
	adminListener
	operatorName
	Purpose    string        `arg:"" help:"master, state, oprf, server, relay, mac or audit."`
	DestroyOld bool          `help:"Wait until no record needs the older generations, and destroy them. It can be interrupted; the same command without rotating again is vaultctl key destroy."`
	Poll       time.Duration `default:"2s" help:"How often to look, while waiting."`
}

func (c *keyRotateCommand) Run(e *environment) error {
	if c.Poll < 10*time.Millisecond || c.Poll > time.Minute {
		return fmt.Errorf("--poll: want 10ms to 1m, got %v", c.Poll)
	}
	e.ctx = c.as(e.ctx)
	var key api.RotatedKey
	if err := c.ask(e.ctx, http.MethodPost, &key, c.Purpose, "rotate"); err != nil {
		return err
	}
	if err := e.printf("%s/%d is in use\n", key.Purpose, key.Generation); err != nil || !c.DestroyOld {
		return err
	}
	status, err := c.awaitRewrap(e, key)
	if err != nil {
		return err
	}
	for _, k := range status.Keys {
		if k.Purpose == key.Purpose && k.Generation < key.Generation && (k.State == "retired" || k.State == "closing") {
			if err := destroyKey(e, &c.adminListener, k.Purpose, k.Generation); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitRewrap waits until no record needs an older generation than key.
func (c *keyRotateCommand) awaitRewrap(e *environment, key api.RotatedKey) (*api.KeyStatus, error) {
	last := int64(-1)
	for {
		status, err := c.status(e.ctx)
		if err != nil {
			return nil, err
		}
		left := int64(0)
		for _, k := range status.Keys {
			if k.Purpose == key.Purpose && k.Generation < key.Generation && k.State != "destroyed" {
				left += k.Records
			}
		}
		if left == 0 || key.Purpose != "master" && key.Purpose != "mac" {
			return status, nil // what is not moved is for the destruction to refuse
		}
		if left != last {
			if err := e.printf("%d records left to move\n", left); err != nil {
				return nil, err
			}
			last = left
		}
		select {
		case <-e.ctx.Done():
			return nil, fmt.Errorf("stopped waiting; vaultd goes on moving records: run vaultctl key destroy later: %w", context.Cause(e.ctx))
		case <-time.After(c.Poll):
		}
	}
}

type keyDestroyCommand struct {
	adminListener
	operatorName
	Purpose    string `arg:"" help:"The key's purpose."`
	Generation int    `arg:"" help:"The generation to destroy."`
}

func (c *keyDestroyCommand) Run(e *environment) error {
	if c.Generation < 1 || int64(c.Generation) > 1<<32-1 {
		return fmt.Errorf("generation: want a number from 1 on, got %d", c.Generation)
	}
	e.ctx = c.as(e.ctx)
	return destroyKey(e, &c.adminListener, c.Purpose, uint32(c.Generation))
}

func destroyKey(e *environment, vaultd *adminListener, purpose string, generation uint32) error {
	var key api.RotatedKey
	if err := vaultd.ask(e.ctx, http.MethodPost, &key, purpose, fmt.Sprint(generation), "destroy"); err != nil {
		return err
	}
	return e.printf("%s/%d is destroyed in this vaultd's token\n", key.Purpose, key.Generation)
}

type keyForgetCommand struct {
	adminListener
	operatorName
	Serial string `arg:"" help:"The token's serial number, as vaultctl key status shows it."`
}

func (c *keyForgetCommand) Run(e *environment) error {
	var token api.ForgottenToken
	if err := c.ask(c.as(e.ctx), http.MethodPost, &token, "tokens", c.Serial, "forget"); err != nil {
		return err
	}
	return e.printf("token %s is out of service\n", token.Token)
}
