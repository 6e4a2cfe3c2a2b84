package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/backup-key-vault/bkv/audit"
	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/migrations"
	"github.com/backup-key-vault/bkv/store"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

type auditCommand struct {
	Tail   auditTailCommand   `cmd:"" help:"Print the newest events, sealed or not, and follow them."`
	Verify auditVerifyCommand `cmd:"" help:"Prove that no sealed event was removed, changed, moved or added, and say where one was. Exit status: 0 proved; 1 no verdict (the error says why); 2 tampered with; 3 proved, but for events that should have been signed and are not."`
	Export auditExportCommand `cmd:"" help:"Write the log, as far as it is signed, as JSON lines that verify --file proves without the database."`
}

// auditDatabase is the database as any role that may read the log: the owner, vaultd's login, or an auditor's.
type auditDatabase struct {
	Database settings.Database `embed:"" prefix:"database-"`
}

func (d *auditDatabase) open(e *environment) (*store.Store, error) {
	if err := errors.Join(d.Database.Problems()...); err != nil {
		return nil, err
	}
	url, err := d.Database.URL()
	if err != nil {
		return nil, err
	}
	if err := migrations.Check(e.ctx, url); err != nil {
		return nil, err
	}
	return store.Open(e.ctx, store.Config{URL: url, MaxConns: 1, Timeout: 30 * time.Second})
}

// log reads whose log it is and how far it goes.
func (d *auditDatabase) log(e *environment, s *store.Store) (vault.AuditState, error) {
	state, err := s.ReadAuditState(e.ctx)
	if err == nil && state.Log == nil {
		err = errors.New("the database has no audit log: it begins when vaultd runs for the first time; if it ran, somebody removed the log")
	}
	return state, err
}

// exitStatus is an error after which vaultctl ends with a status of its own.
type exitStatus struct {
	error
	code int
}

// Exit statuses of audit verify.
const (
	exitTampered = 2
	exitUnsigned = 3
)

// signedWithin is how old an event in the database may be that is not signed: vaultd signs at least once an hour.
const signedWithin = 2 * time.Hour

// progressEvery is how often long work says how far it is.
const progressEvery = 5 * time.Second

// progress logs how far long work is.
func progress(e *environment, doing string, of uint64) func(uint64) {
	last := time.Now()
	return func(sequence uint64) {
		if time.Since(last) >= progressEvery {
			last = time.Now()
			e.log.Info(doing, "event", sequence, "of", of)
		}
	}
}

type auditVerifyCommand struct {
	auditDatabase
	Fingerprint string   `required:"" env:"BKV_FINGERPRINT" placeholder:"TEXT" help:"The vault's fingerprint, as 'vaultctl identity' prints it: what the proof rests on."`
	File        []string `placeholder:"FILE" help:"Prove this export instead of the database; several that follow each other, in their order. No database is needed."`
	Since       string   `placeholder:"FILE" help:"A checkpoint that was saved earlier: the log must still contain it. Only this shows that the end was not cut off, or the database put back from a dump."`
	Save        string   `placeholder:"FILE" help:"Write the newest checkpoint to this file if nothing is wrong. It may be the same as --since. Keep it where nobody who can write to the database reaches it."`
	JSON        bool     `help:"Print JSON."`
}

func (c *auditVerifyCommand) Run(e *environment) error {
	fingerprint, err := transcript.ParseFingerprint(c.Fingerprint)
	if err != nil {
		return fmt.Errorf("--fingerprint: %w", err)
	}
	since, err := readCheckpoint(c.Since)
	if err != nil {
		return err
	}
	var report auditReport
	if len(c.File) > 0 {
		report, err = c.verifyFiles(e, fingerprint, since)
	} else {
		report, err = c.verifyDatabase(e, fingerprint, since)
	}
	if err != nil {
		return err
	}
	if err := report.print(e.stdout, c.JSON); err != nil {
		return err
	}
	if len(report.Findings) > 0 {
		return &exitStatus{fmt.Errorf("the audit log was tampered with: %d findings", len(report.Findings)+report.More), exitTampered}
	}
	if c.Save != "" && report.newest != nil {
		if err := saveCheckpoint(c.Save, report.newest); err != nil {
			return err
		}
	}
	if report.Overdue {
		return &exitStatus{fmt.Errorf("events after %d are not signed, the oldest of %s: is a vaultd running that can sign, or were checkpoints removed?",
			report.Signed, report.UnsignedSince.UTC().Format(time.RFC3339)), exitUnsigned}
	}
	return nil
}

// auditReport is what audit verify says.
type auditReport struct {
	After         uint64          `json:"after"`
	Last          uint64          `json:"last"`
	Signed        uint64          `json:"signed"`
	SignedAt      *time.Time      `json:"signed_at"`
	UnsignedSince *time.Time      `json:"unsigned_since"`
	Overdue       bool            `json:"overdue"`
	Waiting       *int            `json:"waiting,omitempty"`
	Findings      []audit.Finding `json:"findings"`
	More          int             `json:"more_findings"`

	newest *audit.Checkpoint
}

func newAuditReport(r *audit.Result) auditReport {
	report := auditReport{After: r.After, Last: r.Last, Findings: append([]audit.Finding{}, r.Findings...), More: r.More, newest: r.Newest}
	if r.Newest != nil {
		report.Signed, report.SignedAt = r.Newest.Sequence, &r.Newest.At
	}
	if !r.UnsignedSince.IsZero() {
		report.UnsignedSince = &r.UnsignedSince
	}
	return report
}

func (r *auditReport) print(out io.Writer, asJSON bool) error {
	if asJSON {
		encoder := json.NewEncoder(out)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		return encoder.Encode(r)
	}
	var b bytes.Buffer
	for _, f := range r.Findings {
		fmt.Fprintln(&b, f)
	}
	if r.More > 0 {
		fmt.Fprintf(&b, "and %d more\n", r.More)
	}
	switch {
	case len(r.Findings) > 0:
		fmt.Fprintf(&b, "NOT PROVED: looked at events %d to %d\n", r.After+1, r.Last)
	case r.newest == nil:
		fmt.Fprintln(&b, "nothing is signed yet, so nothing is proved")
	default:
		fmt.Fprintf(&b, "proved: events %d to %d, signed at %s by audit/%d\n", r.After+1, r.Signed, r.SignedAt.Format(time.RFC3339), r.newest.KeyGeneration)
	}
	if r.Last > r.Signed && r.UnsignedSince != nil {
		fmt.Fprintf(&b, "events %d to %d are sealed and not signed, the oldest of %s\n", r.Signed+1, r.Last, r.UnsignedSince.Format(time.RFC3339))
	}
	if r.Waiting != nil && *r.Waiting > 0 {
		fmt.Fprintf(&b, "%d events wait to be sealed\n", *r.Waiting)
	}
	_, err := out.Write(b.Bytes())
	return err
}

func (c *auditVerifyCommand) verifyDatabase(e *environment, fingerprint transcript.Fingerprint, since *audit.Checkpoint) (auditReport, error) {
	s, err := c.open(e)
	if err != nil {
		return auditReport{}, err
	}
	defer s.Close()
	state, err := c.log(e, s)
	if err != nil {
		return auditReport{}, err
	}
	result, err := audit.VerifySource(e.ctx, s, *state.Log, fingerprint, since, progress(e, "verifying", state.Sequence))
	if err != nil {
		return auditReport{}, err
	}
	report := newAuditReport(result)
	report.Waiting = &state.Waiting
	report.Overdue = report.UnsignedSince != nil && state.Now.Sub(*report.UnsignedSince) > signedWithin
	return report, nil
}

func (c *auditVerifyCommand) verifyFiles(e *environment, fingerprint transcript.Fingerprint, since *audit.Checkpoint) (auditReport, error) {
	var files []audit.File
	for _, name := range c.File {
		f, err := os.Open(name)
		if err != nil {
			return auditReport{}, err
		}
		defer f.Close()
		files = append(files, audit.File{Name: name, Reader: contextReader{e, f}})
	}
	tell := progress(e, "verifying", 0)
	result, err := audit.VerifyExport(fingerprint, since, tell, files...)
	if err != nil {
		return auditReport{}, err
	}
	report := newAuditReport(result)
	report.Overdue = report.UnsignedSince != nil // an export goes as far as it is signed
	return report, nil
}

// contextReader reads until the command is interrupted.
type contextReader struct {
	e *environment
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.e.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// readCheckpoint reads a saved checkpoint; nil: none is named.
func readCheckpoint(name string) (*audit.Checkpoint, error) {
	if name == "" {
		return nil, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("--since: %w", err)
	}
	defer f.Close()
	c, err := audit.ReadCheckpoint(f)
	if err != nil {
		return nil, fmt.Errorf("--since: %s holds no checkpoint as --save writes it: %w", name, err)
	}
	return c, nil
}

// saveCheckpoint replaces the file, or leaves it as it was.
func saveCheckpoint(name string, c *audit.Checkpoint) error {
	line, err := audit.EncodeLine(c)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".checkpoint-*")
	if err != nil {
		return fmt.Errorf("--save: %w", err)
	}
	_, err = f.Write(line)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("--save: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

type auditExportCommand struct {
	auditDatabase
	Out   string `placeholder:"FILE" help:"Where the export goes; the file must not exist. Default: standard output."`
	Since string `placeholder:"FILE" help:"A checkpoint that was saved earlier: export what follows it. An archive can so be kept in parts, which verify --file takes together."`
	Save  string `placeholder:"FILE" help:"Write the checkpoint with which the export ends to this file, for the next --since. It may be the same."`
}

func (c *auditExportCommand) Run(e *environment) error {
	since, err := readCheckpoint(c.Since)
	if err != nil {
		return err
	}
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	state, err := c.log(e, s)
	if err != nil {
		return err
	}
	switch {
	case state.Newest == nil:
		return errors.New("nothing is signed yet, so there is nothing to export; vaultd signs within seconds of the first event")
	case since != nil && state.Newest.Sequence < since.Sequence:
		return fmt.Errorf("the log is signed up to event %d, and the checkpoint of --since is at %d: was its end cut off? Run vaultctl audit verify", state.Newest.Sequence, since.Sequence)
	}
	out, done := io.Writer(e.stdout), func(error) error { return nil }
	if c.Out != "" {
		f, err := os.OpenFile(c.Out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return fmt.Errorf("--out: %w", err)
		}
		out = f
		done = func(err error) error {
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				return errors.Join(err, os.Remove(c.Out)) // half an export is of no use
			}
			return nil
		}
	}
	if err := done(audit.Export(e.ctx, s, *state.Log, since, state.Newest, out, progress(e, "exporting", state.Newest.Sequence))); err != nil {
		return err
	}
	if c.Save != "" {
		return saveCheckpoint(c.Save, state.Newest)
	}
	return nil
}

type auditTailCommand struct {
	auditDatabase
	Lines     int           `short:"n" default:"20" placeholder:"N" help:"How many of the newest events to begin with: 0 to 10000."`
	Follow    bool          `short:"f" help:"Go on with events as they happen, until interrupted."`
	Kind      []string      `placeholder:"KIND" help:"Only events of these kinds, for example destroyed,frozen."`
	Tenant    string        `placeholder:"ID" help:"Only events of this tenant."`
	User      string        `placeholder:"ID" help:"Only events of this user, with --tenant. Needs a login that may read accounts."`
	Pseudonym string        `placeholder:"HEX" help:"Only events of the account with this pseudonym, or whose pseudonym begins so."`
	JSON      bool          `help:"Print JSON lines, as in an export; events that are not sealed have no sequence."`
	Poll      time.Duration `default:"1s" placeholder:"DURATION" help:"How often to look for new events, with --follow."`
}

func (c *auditTailCommand) Run(e *environment) error {
	var problems []error
	if c.Lines < 0 || c.Lines > 10_000 {
		problems = append(problems, fmt.Errorf("--lines: want 0 to 10000, got %d", c.Lines))
	}
	if c.Poll < 10*time.Millisecond || c.Poll > time.Hour {
		problems = append(problems, fmt.Errorf("--poll: want 10ms to 1h, got %v", c.Poll))
	}
	if c.User != "" && c.Tenant == "" {
		problems = append(problems, errors.New("--user: name the tenant too, with --tenant"))
	}
	if c.User != "" && c.Pseudonym != "" {
		problems = append(problems, errors.New("--user: it stands for a pseudonym; give one of --user and --pseudonym"))
	}
	if strings.Trim(c.Pseudonym, "0123456789abcdef") != "" {
		problems = append(problems, errors.New("--pseudonym: want hexadecimal digits in lower case, as tail prints them"))
	}
	if err := errors.Join(problems...); err != nil {
		return err
	}
	s, err := c.open(e)
	if err != nil {
		return err
	}
	defer s.Close()
	if c.User != "" {
		pseudonym, err := s.Pseudonym(e.ctx, vault.AccountID{Tenant: c.Tenant, User: c.User})
		if err != nil {
			return err
		}
		if pseudonym == nil {
			return fmt.Errorf("tenant %s has no such user", c.Tenant)
		}
		c.Pseudonym = hex.EncodeToString(pseudonym)
	}
	t := &tail{auditTailCommand: c, e: e, store: s, shown: map[uint64]bool{}}
	err = t.run()
	if c.Follow && e.ctx.Err() != nil {
		return nil // it was to go on until interrupted
	}
	return err
}

// tailPage is how many events are read at once, and tailWaiting how many of those that wait to be sealed are looked at.
const (
	tailPage    = 1000
	tailWaiting = 10 * tailPage
)

// tail prints each event once: when it is first seen, sealed or not.
type tail struct {
	*auditTailCommand
	e     *environment
	store *store.Store

	sequence uint64          // sealed events up to here were dealt with
	shown    map[uint64]bool // ids of those that were dealt with before they were sealed
}

func (t *tail) run() error {
	state, err := t.store.ReadAuditState(t.e.ctx)
	if err != nil {
		return err
	}
	t.sequence = state.Sequence
	var newest []audit.Sealed
	// From the end on backwards, until there are enough.
	for end := state.Sequence; end > 0 && len(newest) < t.Lines; {
		begin := end - min(end, tailPage)
		page, err := t.store.SealedEvents(t.e.ctx, begin, tailPage)
		if err != nil {
			return err
		}
		page = slices.DeleteFunc(page, func(e audit.Sealed) bool { return e.Sequence > end || !t.matches(&e.Event) })
		newest, end = slices.Concat(page, newest), begin
	}
	waiting, err := t.waiting()
	if err != nil {
		return err
	}
	newest = append(newest, waiting...)
	for _, e := range newest[max(0, len(newest)-t.Lines):] {
		if err := t.print(&e); err != nil {
			return err
		}
	}
	for t.Follow {
		select {
		case <-t.e.ctx.Done():
			return t.e.ctx.Err()
		case <-time.After(t.Poll):
		}
		if err := t.more(); err != nil {
			return err
		}
	}
	return nil
}

// waiting returns the events that wait to be sealed and were not seen before, if they match.
func (t *tail) waiting() (fresh []audit.Sealed, err error) {
	for after, seen := uint64(0), 0; seen < tailWaiting; seen += tailPage {
		page, err := t.store.Unsealed(t.e.ctx, after, tailPage)
		if err != nil {
			return nil, err
		}
		for _, e := range page {
			if after = e.ID; !t.shown[e.ID] {
				t.shown[e.ID] = true
				if t.matches(&e) {
					fresh = append(fresh, audit.Sealed{Event: e})
				}
			}
		}
		if len(page) < tailPage {
			break
		}
	}
	return fresh, nil
}

// more prints what is new. What is sealed between the two readings is found in the next round.
func (t *tail) more() error {
	for {
		page, err := t.store.SealedEvents(t.e.ctx, t.sequence, tailPage)
		if err != nil {
			return err
		}
		for i := range page {
			e := &page[i]
			t.sequence = e.Sequence
			if t.shown[e.ID] {
				delete(t.shown, e.ID)
			} else if t.matches(&e.Event) {
				if err := t.print(e); err != nil {
					return err
				}
			}
		}
		if len(page) < tailPage {
			break
		}
	}
	fresh, err := t.waiting()
	for i := range fresh {
		err = errors.Join(err, t.print(&fresh[i]))
	}
	return err
}

func (t *tail) matches(e *audit.Event) bool {
	return (len(t.Kind) == 0 || slices.Contains(t.Kind, e.Kind)) && (t.Tenant == "" || e.Tenant == t.Tenant) &&
		strings.HasPrefix(hex.EncodeToString(e.Pseudonym), t.Pseudonym)
}

func (t *tail) print(e *audit.Sealed) error {
	if t.JSON {
		var line any = e
		if e.Sequence == 0 {
			line = &e.Event
		}
		text, err := audit.EncodeLine(line)
		if err == nil {
			_, err = t.e.stdout.Write(text)
		}
		return err
	}
	_, err := io.WriteString(t.e.stdout, describe(e))
	return err
}

// describe is an event as a line for people.
func describe(e *audit.Sealed) string {
	sequence := "-"
	switch {
	case e.ID == 0:
		return fmt.Sprintf("%7d  GONE: its row was deleted; see vaultctl audit verify\n", e.Sequence)
	case e.Sequence > 0:
		sequence = fmt.Sprint(e.Sequence)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%7s  %s  %-18s", sequence, e.At.Format("2006-01-02T15:04:05.000Z"), e.Kind)
	add := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, " %s=%s", name, plain(value))
		}
	}
	add("tenant", e.Tenant)
	add("account", hex.EncodeToString(e.Pseudonym[:min(8, len(e.Pseudonym))]))
	add("generation", hex.EncodeToString(e.Generation[:min(4, len(e.Generation))]))
	if e.Attempt != 0 {
		add("attempt", fmt.Sprint(e.Attempt))
	}
	add("reason", e.Reason)
	if e.Purpose != "" {
		add("key", fmt.Sprintf("%s/%d", e.Purpose, e.KeyGeneration))
	}
	add("detail", e.Detail)
	add("operator", e.Operator)
	add("request", e.RequestID)
	add("login", e.Login)
	b.WriteByte('\n')
	return b.String()
}

// plain quotes what could be taken for something else, or upset a terminal.
func plain(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r == ' ' || r == '"' || !unicode.IsPrint(r) }) {
		return fmt.Sprintf("%q", s)
	}
	return s
}
