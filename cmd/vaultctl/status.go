package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/backup-key-vault/bkv/api"
)

type statusCommand struct {
	adminListener
	JSON bool `name:"json" help:"Print JSON."`
}

// Exit statuses of vaultctl status, besides 0 and 1, which main gives to every error.
const (
	exitDegraded = 2
	exitDown     = 3
)

// Run shows what vaultd says of itself.
func (c *statusCommand) Run(e *environment) error {
	var s api.ServiceStatus
	if err := c.request(e.ctx, http.MethodGet, &s, "status"); err != nil {
		return err
	}
	var err error
	if c.JSON {
		encoder := json.NewEncoder(e.stdout)
		encoder.SetIndent("", "  ")
		err = encoder.Encode(s)
	} else {
		err = showStatus(e.stdout, &s)
	}
	switch {
	case err != nil:
		return err
	case s.State == api.StateOK:
		return nil
	case s.State == api.StateDegraded:
		return &exitStatus{errors.New("the vault serves, and an operator should look at it"), exitDegraded}
	default:
		return &exitStatus{fmt.Errorf("the vault does not serve: it is %s", s.State), exitDown}
	}
}

type readyCommand struct {
	adminListener
}

// readyTimeout is longer than vaultd's own bound for the checks of one question.
const readyTimeout = 5 * time.Second

// Run asks vaultd whether it can serve.
func (c *readyCommand) Run(e *environment) error {
	ctx, cancel := context.WithTimeout(e.ctx, readyTimeout)
	defer cancel()
	response, body, err := c.exchange(ctx, http.MethodGet, "readyz")
	if err != nil {
		return err
	}
	var answer struct {
		Ready   bool     `json:"ready"`
		Failing []string `json:"failing"`
	}
	err = json.Unmarshal(body, &answer)
	switch status := response.StatusCode; {
	case err == nil && status == http.StatusServiceUnavailable && len(answer.Failing) > 0:
		return fmt.Errorf("vaultd does not serve: %s; vaultctl status says more", strings.Join(answer.Failing, ", "))
	case err != nil, status != http.StatusOK, !answer.Ready:
		return unexpected(response)
	}
	_, err = fmt.Fprintln(e.stdout, "vaultd serves")
	return err
}

func showStatus(out io.Writer, s *api.ServiceStatus) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	row("vault", "%s, %s", s.VaultID, s.State)
	row("fingerprint", "%s", s.Fingerprint)
	row("vaultd", "%s %s, %s, up %s", s.Version, s.Revision, s.Go, since(s.Now, s.StartedAt))

	t := &s.Token
	profile := t.Profile
	if profile == "" {
		profile = "the default"
	}
	if t.Available {
		row("token", "%s, label %s, serial %s", t.Model, t.Label, t.Serial)
	} else {
		row("token", "DOWN: %s, label %s, serial %s", t.Model, t.Label, t.Serial)
	}
	row("", "profile %s, %s; %d sessions, lost %d times, recovered %d times", profile, t.Strategy, t.Sessions, t.Lost, t.Recoveries)

	d := &s.Database
	switch {
	case d.Error != "":
		row("database", "DOWN")
	case d.Standby:
		row("database", "STANDBY: Postgres %s, migration %d", d.Server, d.Schema)
	default:
		row("database", "Postgres %s, migration %d", d.Server, d.Schema)
	}
	row("", "%d of at most %d connections, %d in use", d.Connections, d.Most, d.InUse)
	if d.Error == "" {
		behind, waits := "", "commits do not wait for them"
		if d.Synchronous {
			waits = "commits wait for them"
		}
		switch {
		case d.Replicas == 0:
		case d.LagSeconds != nil:
			behind = fmt.Sprintf(", at most %s behind", time.Duration(*d.LagSeconds*float64(time.Second)).Round(time.Millisecond))
		default:
			behind = ", how far behind only a login with pg_read_all_stats may see"
		}
		row("replicas", "%d connected%s; %s", d.Replicas, behind, waits)
	}
	if a := &s.Audit; a.Fault != "" {
		row("audit log", "FAULT: %s", a.Fault)
	} else {
		row("audit log", "%d events sealed, %d signed, %d wait, the oldest for %s", a.Sealed, a.Signed, a.Waiting,
			time.Duration(a.LagSeconds*float64(time.Second)).Round(time.Millisecond))
	}
	for _, c := range s.Certificates {
		clients := "no client certificates"
		if c.Clients {
			clients = "client certificates demanded"
		}
		row("TLS, "+c.Listener, "%s, until %s, %s", c.Subject, c.NotAfter.Format(time.RFC3339), clients)
	}
	for i, k := range s.Keys {
		name := ""
		if i == 0 {
			name = "keys"
		}
		seals, older := "", ""
		if k.Seals > 0 {
			seals = fmt.Sprintf(", %d seals", k.Seals)
		}
		if k.Older > 0 {
			older = fmt.Sprintf(", and %d older", k.Older)
		}
		row(name, "%s/%d in use for %s%s%s", k.Purpose, k.Generation, since(s.Now, k.Since), seals, older)
	}
	if s.RewrapLeft > 0 {
		row("rewrap", "%d records are under older keys", s.RewrapLeft)
	} else {
		row("rewrap", "done")
	}
	if s.Uncovered != nil {
		row("destructions", "since %s can be undone from older dumps", s.Uncovered.UTC().Format(time.RFC3339))
	} else {
		row("destructions", "none can be undone from older dumps")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, p := range s.Problems {
		if _, err := fmt.Fprintf(out, "PROBLEM: %s\n", p); err != nil {
			return err
		}
	}
	for _, n := range s.NotCovered {
		if _, err := fmt.Fprintf(out, "NOT COVERED: %s\n", n); err != nil {
			return err
		}
	}
	return nil
}
