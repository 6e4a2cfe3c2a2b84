package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/backup-key-vault/bkv/cmd/internal/settings"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
	"github.com/backup-key-vault/bkv/transcript"
)

type ceremonyCommand struct {
	Join   ceremonyJoinCommand   `cmd:"" help:"At each other site: make a transport key in its token, and a request that goes to the source. Initialises the token if it is not there."`
	Make   ceremonyMakeCommand   `cmd:"" help:"At the source: make the keys, wrapped for all tokens, a record of it, and store the source's own copy. All sites must take part: nobody can add one to the same keys later."`
	Accept ceremonyAcceptCommand `cmd:"" help:"At each other site: store the keys from the bundle. Also at the source, where make was interrupted after it wrote the bundle."`
	Verify ceremonyVerifyCommand `cmd:"" help:"Verify a record's signature and show it, and compare it with the keys in a token."`
}

// ceremonyToken is a token that takes part. Run beside a running service it may disturb it.
type ceremonyToken struct {
	Token     settings.Token `embed:"" prefix:"token-"`
	SOPINFile string         `name:"token-so-pin-file" env:"BKV_TOKEN_SO_PIN_FILE" placeholder:"FILE" help:"File that holds the security officer's PIN. Needed only if the token is not there and has to be initialised."`
}

// open logs in. create says whether a token that is not there is made, if the security officer's PIN is given.
func (c *ceremonyToken) open(create bool, problems ...error) (*pkcs11util.Admin, error) {
	if err := errors.Join(append(c.Token.Problems(), problems...)...); err != nil {
		return nil, err
	}
	cfg, err := c.Token.Config()
	if err != nil {
		return nil, err
	}
	if create && c.SOPINFile != "" {
		soPIN, err := pkcs11util.ReadPIN(c.SOPINFile)
		if err != nil {
			return nil, err
		}
		if _, err := pkcs11util.InitToken(c.Token.Module, c.Token.Label, soPIN, cfg.PIN); err != nil {
			return nil, fmt.Errorf("initialising the token: %w", err)
		}
	}
	return pkcs11util.OpenAdmin(cfg)
}

// oaepSetting is the hash that this site's token unwraps with.
type oaepSetting struct {
	OAEPHash string `name:"oaep-hash" enum:"sha256,sha1" default:"sha256" placeholder:"HASH" help:"Hash of RSA-OAEP that the token unwraps with: sha256, or sha1 for tokens that know no other (SoftHSM 2.6.1). OAEP does not rest on collision resistance, and is safe with either."`
}

func (s oaepSetting) hash() ceremony.OAEPHash { return ceremony.OAEPHash(s.OAEPHash) }

type ceremonyJoinCommand struct {
	ceremonyToken
	oaepSetting
	Out string `required:"" placeholder:"FILE" help:"Where the request goes. If it is there, it is checked and kept."`
}

func (c *ceremonyJoinCommand) Run(e *environment) error {
	admin, err := c.open(true)
	if err != nil {
		return err
	}
	defer admin.Close()
	there, _, err := admin.Keys()
	if err != nil {
		return err
	}
	request, err := readFile(c.Out, ceremony.ParseRequest)
	switch {
	case err == nil:
		if err := ceremony.Pending(admin, request); err != nil {
			return fmt.Errorf("%s is there already, and cannot be used: %w", c.Out, err)
		}
	case errors.Is(err, os.ErrNotExist):
		if request, err = ceremony.Join(admin, ceremony.JoinConfig{OAEPHash: c.hash(), Tool: tool()}); err != nil {
			return err
		}
		if err := writeNew(c.Out, request.Encode()); err != nil {
			return err
		}
	default:
		return err
	}
	if len(there) > 0 {
		if err := e.printf("the token holds %d keys already: it can take further generations from the source of those, but no first set\n", len(there)); err != nil {
			return err
		}
	}
	return e.printf("token %v waits for the bundle that answers %s; tell the source's operator, by voice:\n%v\n", request.Token, c.Out, request.Fingerprint())
}

type ceremonyMakeCommand struct {
	ceremonyToken
	oaepSetting
	Requests   []string `name:"request" required:"" sep:"none" placeholder:"FILE" help:"Request of another site; once for each."`
	Confirm    []string `sep:"none" placeholder:"FINGERPRINT" help:"A request's fingerprint, as who made it says it; once for each. What is not given is asked for on the terminal."`
	Out        string   `required:"" placeholder:"FILE" help:"Where the bundle goes; it must not exist."`
	Record     string   `placeholder:"FILE" help:"Where the record goes; it must not exist. Default: the bundle's name with .record added."`
	Who        string   `required:"" placeholder:"NAME" help:"Who holds the ceremony, for the record."`
	VaultID    string   `name:"vault-id" env:"BKV_VAULT_ID" help:"The vault that the keys are for, for the record and the fingerprint that clients pin."`
	Purposes   []string `name:"purpose" sep:"none" placeholder:"PURPOSE" help:"Make further generations, of this purpose; may be repeated. Default: the first generation of every purpose, into tokens without keys."`
	Generation int      `default:"0" placeholder:"N" help:"With --purpose: the generation to make, higher than those in the tokens."`
	DryRun     bool     `help:"Do all of it with keys that the token forgets, and write no file."`
}

func (c *ceremonyMakeCommand) Run(e *environment) error {
	var problems []error
	if (len(c.Purposes) > 0) != (c.Generation != 0) || c.Generation < 0 || c.Generation > math.MaxUint32 {
		problems = append(problems, errors.New("--generation: want a number from 1 on with --purpose, and none without"))
	}
	if c.Who == "" {
		problems = append(problems, errors.New("--who: must not be empty"))
	}
	var confirmed []ceremony.Fingerprint
	for _, text := range c.Confirm {
		f, err := ceremony.ParseFingerprint(text)
		if err != nil {
			problems = append(problems, fmt.Errorf("--confirm: %w", err))
		}
		confirmed = append(confirmed, f)
	}
	if err := errors.Join(append(c.Token.Problems(), problems...)...); err != nil {
		return err
	}
	if c.Record == "" {
		c.Record = c.Out + ".record"
	}
	if err := c.free(); err != nil {
		return err
	}
	cfg := ceremony.MakeConfig{
		OAEPHash: c.hash(), Who: c.Who, VaultID: c.VaultID, Tool: tool(), Time: time.Now(), DryRun: c.DryRun,
	}
	for _, purpose := range c.Purposes {
		cfg.Names = append(cfg.Names, pkcs11util.KeyName{Purpose: purpose, Generation: uint32(c.Generation)})
	}
	for _, file := range c.Requests {
		r, err := readFile(file, ceremony.ParseRequest)
		if err != nil {
			return err
		}
		cfg.Requests = append(cfg.Requests, r)
		if len(confirmed) < len(c.Requests) && !slices.Contains(confirmed, r.Fingerprint()) {
			said, err := e.ask(fmt.Sprintf("the request of %v", r.Token))
			if err != nil {
				return err
			}
			confirmed = append(confirmed, said)
		}
	}
	cfg.Confirmed = confirmed

	admin, err := c.open(!c.DryRun)
	if err != nil {
		return err
	}
	defer admin.Close()
	bundle, err := ceremony.Make(admin, cfg)
	if err != nil {
		return err
	}
	if c.DryRun {
		return e.printf("dry run: %d keys were made, wrapped for %d tokens and forgotten; nothing was changed\n", len(bundle.Record.Keys), len(bundle.Record.Requests))
	}
	if err := writeNew(c.Record, bundle.Record.Encode()); err != nil {
		return err
	}
	if err := writeNew(c.Out, bundle.Encode()); err != nil {
		return err
	}
	accepted, err := ceremony.Accept(admin, bundle, bundle.Record.Fingerprint())
	if err != nil {
		return fmt.Errorf("the bundle is written, but not all of its keys are in this token; run: vaultctl token ceremony accept --bundle %s --confirm %v: %w", c.Out, bundle.Record.Fingerprint(), err)
	}
	if err := e.accepted(accepted); err != nil {
		return err
	}
	return e.printf("%s goes to the other sites and %s to the archive; tell their operators, by voice:\n%v\n", c.Out, c.Record, bundle.Record.Fingerprint())
}

// free refuses files that are there. The record is written before the bundle, and the bundle before the
// source stores a key. A bundle that is there is not simply stored: somebody may have replaced it.
func (c *ceremonyMakeCommand) free() error {
	if c.DryRun {
		return nil
	}
	if _, err := os.Lstat(c.Out); err == nil {
		return fmt.Errorf("%s is there already: to go on with its keys, run: vaultctl token ceremony accept --bundle %[1]s, which asks for the fingerprint that verify shows of %s; to make others, move both away", c.Out, c.Record)
	}
	if _, err := os.Lstat(c.Record); err == nil {
		return fmt.Errorf("%s is there already, without its bundle: if an earlier run ended in between, it stored no key; move it away", c.Record)
	}
	return nil
}

type ceremonyAcceptCommand struct {
	Token   settings.Token `embed:"" prefix:"token-"`
	Bundle  string         `required:"" placeholder:"FILE" help:"The bundle from the source."`
	Confirm string         `placeholder:"FINGERPRINT" help:"The bundle's fingerprint, as the source's operator says it. If it is not given, it is asked for on the terminal."`
	Record  string         `placeholder:"FILE" help:"Where to put a copy of the record. Default: nowhere."`
}

func (c *ceremonyAcceptCommand) Run(e *environment) error {
	var said ceremony.Fingerprint
	var problems []error
	if c.Confirm != "" {
		var err error
		if said, err = ceremony.ParseFingerprint(c.Confirm); err != nil {
			problems = append(problems, fmt.Errorf("--confirm: %w", err))
		}
	}
	if err := errors.Join(append(c.Token.Problems(), problems...)...); err != nil {
		return err
	}
	bundle, err := readFile(c.Bundle, ceremony.ParseBundle)
	if err != nil {
		return err
	}
	if c.Confirm == "" {
		if said, err = e.ask("the bundle"); err != nil {
			return err
		}
	}
	admin, err := (&ceremonyToken{Token: c.Token}).open(false)
	if err != nil {
		return err
	}
	defer admin.Close()
	accepted, err := ceremony.Accept(admin, bundle, said)
	if err != nil {
		return err
	}
	if c.Record != "" {
		if err := writeNew(c.Record, bundle.Record.Encode()); err != nil {
			return fmt.Errorf("the keys are in the token, but not the record in its file: %w", err)
		}
	}
	if err := e.accepted(accepted); err != nil {
		return err
	}
	return e.printf("token %q holds the keys of the ceremony; the bundle is of no further use to it\n", c.Token.Label)
}

type ceremonyVerifyCommand struct {
	Token       settings.Token `embed:"" prefix:"token-"`
	Record      string         `required:"" placeholder:"FILE" help:"The record."`
	Fingerprint string         `placeholder:"FINGERPRINT" help:"What the record must have, as it was told in the ceremony. Without it the record shows only that it was not changed since its identity key signed it: compare that key."`
	Compare     bool           `help:"Compare with the keys in the token, too."`
}

func (c *ceremonyVerifyCommand) Run(e *environment) error {
	record, err := readFile(c.Record, ceremony.ParseRecord)
	if err != nil {
		return err
	}
	if c.Fingerprint != "" {
		want, err := ceremony.ParseFingerprint(c.Fingerprint)
		if err != nil {
			return fmt.Errorf("--fingerprint: %w", err)
		}
		if want != record.Fingerprint() {
			return fmt.Errorf("the record's fingerprint is %v: it is not the record that was asked for", record.Fingerprint())
		}
	}
	var same, missing []pkcs11util.KeyName
	if c.Compare {
		admin, err := (&ceremonyToken{Token: c.Token}).open(false)
		if err != nil {
			return err
		}
		defer admin.Close()
		if same, missing, err = ceremony.Compare(admin, record); err != nil {
			return err
		}
		if len(same) == 0 {
			return fmt.Errorf("the token %q holds none of the record's keys", c.Token.Label)
		}
	}

	var b strings.Builder
	fmt.Fprintf(&b, "record %v, signed by %v, whose public key is %x\n", record.Fingerprint(), record.Identity.Name(), record.Identity.PublicKey)
	if record.VaultID != "" {
		fmt.Fprintf(&b, "clients of vault %s pin %v\n", record.VaultID, transcript.FingerprintOf(record.VaultID, record.Identity.PublicKey))
	}
	fmt.Fprintf(&b, "held %s by %s with %s\n", record.Time, record.Who, record.Tool)
	for i, r := range record.Requests {
		role := "for"
		if i == 0 {
			role = "in"
		}
		fmt.Fprintf(&b, "%s token %v, request %v\n", role, r.Token, r.Fingerprint())
	}
	for _, k := range record.Keys {
		state := ""
		switch {
		case slices.Contains(same, k.Name()):
			state = " in the token"
		case slices.Contains(missing, k.Name()):
			state = " not in the token"
		}
		fmt.Fprintf(&b, "key %v %x%s\n", k.Name(), k.Fingerprint, state)
	}
	return e.printf("%s", b.String())
}

func (e *environment) accepted(a ceremony.Accepted) error {
	for _, print := range []struct {
		what string
		keys []pkcs11util.KeyName
	}{{"kept", a.Kept}, {"stored", a.Stored}} {
		for _, k := range print.keys {
			if err := e.printf("%s %v\n", print.what, k); err != nil {
				return err
			}
		}
	}
	return nil
}

// ask has the operator type a fingerprint as he hears it. It is not shown to him, so that he cannot but ask for it.
func (e *environment) ask(of string) (ceremony.Fingerprint, error) {
	in, ok := e.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return ceremony.Fingerprint{}, fmt.Errorf("%s is not confirmed: ask who made it for its fingerprint, and give it with --confirm", of)
	}
	if err := e.printf("fingerprint of %s, as who made it says it: ", of); err != nil {
		return ceremony.Fingerprint{}, err
	}
	var line []byte
	for next := make([]byte, 1); len(line) < 256; line = append(line, next[0]) { // byte by byte: the next question's answer stays in the terminal
		if _, err := in.Read(next); errors.Is(err, io.EOF) || err == nil && next[0] == '\n' {
			break
		} else if err != nil {
			return ceremony.Fingerprint{}, err
		}
	}
	return ceremony.ParseFingerprint(string(line))
}

// tool names this program in files.
func tool() string {
	version := "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version
	}
	return "vaultctl " + version
}

// readFile reads and parses a file of a ceremony.
func readFile[T any](file string, parse func([]byte) (T, error)) (v T, err error) {
	f, err := os.Open(file)
	if err != nil {
		return v, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, ceremony.MaxFileBytes+1))
	if err != nil {
		return v, err
	}
	if v, err = parse(b); err != nil {
		return v, fmt.Errorf("%s: %w", file, err)
	}
	return v, nil
}

// writeNew makes a file that is there whole, on disk, or not at all. It never overwrites one.
func writeNew(file string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), ".vaultctl-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), file); err != nil { // fails if there is one, where a rename would replace it
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
