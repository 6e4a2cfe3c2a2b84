// Package tokentest gives tests a real PKCS#11 token: SoftHSM, in a directory of the
// test process's own, one token for each call of [New].
//
// Tests may run in parallel. The ways to make a token fail say whom they hit.
// Where SoftHSM is not installed a local run skips, and CI (CI=true in the environment) fails.
package tokentest

import (
	"context"
	"crypto/ecdh"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/internal/module"
)

// modulePaths is where packages put SoftHSM.
var modulePaths = []string{
	"/usr/lib/softhsm/libsofthsm2.so", // Debian, Ubuntu
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// PINs of all test tokens.
const (
	PIN   pkcs11util.PIN = "2468-user"
	SOPIN pkcs11util.PIN = "1357-officer"
)

// Module returns SoftHSM's path, or skips or fails the test.
func Module(t testing.TB) string {
	t.Helper()
	for _, path := range modulePaths {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("SoftHSM is not installed: package softhsm2")
	}
	t.Skip("SoftHSM is not installed; ./scripts/test installs it")
	return ""
}

// A Directory holds SoftHSM tokens.
type Directory struct {
	Path   string // of the directory
	Conf   string // of its softhsm2.conf
	Module string
}

// Env is what a process needs in its environment to use the directory.
func (d Directory) Env() string { return "SOFTHSM2_CONF=" + d.Conf }

// NewDirectory makes an empty directory for other processes, removed at the test's
// end. This process does not use it.
func NewDirectory(t testing.TB) Directory {
	t.Helper()
	d := Directory{Module: Module(t)}
	if err := d.create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d.Path); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *Directory) create() (err error) {
	if d.Path, err = os.MkdirTemp("", "bkvtok"); err != nil {
		return err
	}
	d.Conf = filepath.Join(d.Path, "softhsm2.conf")
	for _, dir := range []string{d.tokens(), d.away()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	conf := "directories.tokendir = " + d.tokens() + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	return os.WriteFile(d.Conf, []byte(conf), 0o600)
}

func (d *Directory) tokens() string { return filepath.Join(d.Path, "tokens") }
func (d *Directory) away() string   { return filepath.Join(d.Path, "away") }

// Vanish moves all tokens away, as if the token had been unplugged; Return brings them
// back. It works for tokens that other processes use, too.
func (d *Directory) Vanish(t testing.TB) { moveAll(t, d.tokens(), d.away()) }

// Return undoes Vanish.
func (d *Directory) Return(t testing.TB) { moveAll(t, d.away(), d.tokens()) }

func moveAll(t testing.TB, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) == 0 {
		t.Fatalf("no tokens in %s", from)
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// The process's own directory. SoftHSM reads SOFTHSM2_CONF in C_Initialize, for the
// whole process, so that there is one, made for the first token and removed with the last.
var (
	shared     Directory
	sharedMu   sync.Mutex
	sharedRefs int
	lastLabel  atomic.Uint32
)

func useShared(t testing.TB) Directory {
	t.Helper()
	path := Module(t)
	sharedMu.Lock()
	defer sharedMu.Unlock()
	if sharedRefs == 0 {
		shared = Directory{Module: path}
		if err := shared.create(); err != nil {
			t.Fatal(err)
		}
		if err := os.Setenv("SOFTHSM2_CONF", shared.Conf); err != nil {
			t.Fatal(err)
		}
	}
	sharedRefs++
	t.Cleanup(func() {
		sharedMu.Lock()
		defer sharedMu.Unlock()
		if sharedRefs--; sharedRefs > 0 {
			return
		}
		// The next token would be looked for in the directory that is removed now.
		if _, err := pkcs11.New(path).GetInfo(); err != pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) {
			t.Error("a Keyset or Admin on a test token was left open by this or an earlier test")
		}
		if err := os.RemoveAll(shared.Path); err != nil {
			t.Error(err)
		}
	})
	return shared
}

// Token is a token of one test's own, with one key for every purpose.
type Token struct {
	*pkcs11util.Keyset // open; closed at the test's end
	Label              string
	Directory          Directory
	Profile            pkcs11util.Profile // under which keys are made and the token is opened; zero: the default

	module *module.Module
}

// New makes a token, with keys generated in it, and opens it.
func New(t testing.TB) *Token {
	t.Helper()
	tok := Empty(t)
	tok.fill(t, nil)
	return tok
}

// Import is New, but that the keys of some purposes (OPRF, Server, Relay, Identity, Audit) are
// given: private scalars, big endian. It is for test vectors; keys that were outside a token are no
// use otherwise.
func Import(t testing.TB, scalars map[string][32]byte) *Token {
	t.Helper()
	tok := Empty(t)
	tok.fill(t, scalars)
	return tok
}

// Fill makes a key for each purpose in a token that was made Empty, and opens it.
func (tok *Token) Fill(t testing.TB) {
	t.Helper()
	tok.fill(t, nil)
}

// fill makes or imports a key for each purpose, and opens the token.
func (tok *Token) fill(t testing.TB, scalars map[string][32]byte) {
	t.Helper()
	for _, purpose := range pkcs11util.Purposes() {
		name := pkcs11util.KeyName{Purpose: purpose, Generation: 1}
		if scalar, ok := scalars[purpose]; ok {
			tok.ImportKey(t, name, scalar)
		} else {
			tok.MakeKey(t, name)
		}
	}
	tok.Keyset = tok.OpenKeyset(t, tok.Config())
}

// Empty makes a token without keys, not opened (its Keyset is nil).
func Empty(t testing.TB) *Token {
	t.Helper()
	return emptyIn(t, useShared(t))
}

func emptyIn(t testing.TB, dir Directory) *Token {
	t.Helper()
	m, err := module.Load(dir.Module)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Unload)
	tok := &Token{Label: fmt.Sprintf("test-%d", lastLabel.Add(1)), Directory: dir, module: m}
	if _, err := pkcs11util.InitToken(dir.Module, tok.Label, SOPIN, PIN); err != nil {
		t.Fatal(err)
	}
	return tok
}

// Config opens the token.
func (tok *Token) Config() pkcs11util.Config {
	return pkcs11util.Config{Module: tok.Directory.Module, Label: tok.Label, PIN: PIN, Profile: tok.Profile}
}

// OpenKeyset opens the token a further time, until the test's end.
func (tok *Token) OpenKeyset(t testing.TB, cfg pkcs11util.Config) *pkcs11util.Keyset {
	t.Helper()
	keys, err := pkcs11util.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := keys.Close(); err != nil {
			t.Error(err)
		}
	})
	return keys
}

// MakeKey generates a key in the token, proves and names it. A Keyset finds it when it is opened next.
func (tok *Token) MakeKey(t testing.TB, name pkcs11util.KeyName) {
	t.Helper()
	label := pkcs11util.TemporaryLabel(name)
	secret, private, public, err := tok.Profile.Templates(name.Purpose)
	if err != nil {
		t.Fatal(err)
	}
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if secret != nil {
			_, err := p.GenerateKey(session, mechanism(tok.Profile.SecretKeyGen(name.Purpose)), labelled(secret, label))
			return err
		}
		_, _, err := p.GenerateKeyPair(session, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN), labelled(public, label), labelled(private, label))
		return err
	})
	tok.Adopt(t, label, name)
}

// ImportKey puts a given private key into the token, proves and names it.
func (tok *Token) ImportKey(t testing.TB, name pkcs11util.KeyName, scalar [32]byte) {
	t.Helper()
	key, err := ecdh.P256().NewPrivateKey(scalar[:])
	if err != nil {
		t.Fatalf("scalar for %s: %v", name, err)
	}
	point, err := asn1.Marshal(key.PublicKey().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	_, private, public, err := pkcs11util.DefaultProfile().Templates(name.Purpose)
	if err != nil {
		t.Fatal(err)
	}
	if private == nil {
		t.Fatalf("%s is no key pair", name)
	}
	var params *pkcs11.Attribute
	for _, a := range public {
		if a.Type == pkcs11.CKA_EC_PARAMS {
			params = a
		}
	}
	label := pkcs11util.TemporaryLabel(name)
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if _, err := p.CreateObject(session, append(labelled(public, label),
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, point),
		)); err != nil {
			return err
		}
		_, err := p.CreateObject(session, append(labelled(private, label),
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
			params,
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, scalar[:]),
		))
		return err
	})
	tok.Adopt(t, label, name)
}

func labelled(template []*pkcs11.Attribute, label string) []*pkcs11.Attribute {
	return append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}, template...)
}

func mechanism(m uint) []*pkcs11.Mechanism { return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)} }

// Adopt proves and names a key that is under a temporary label.
func (tok *Token) Adopt(t testing.TB, label string, name pkcs11util.KeyName) {
	t.Helper()
	admin, err := pkcs11util.OpenAdmin(tok.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if err := admin.Adopt(label, name); err != nil {
		t.Fatal(err)
	}
}

// Raw runs f with a read-write session in which the user is logged in, and nobody else at the
// token's objects. An error fails the test. f must not use the Keyset.
func (tok *Token) Raw(t testing.TB, f func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error) {
	t.Helper()
	tok.inside(t, func(p *pkcs11.Ctx, slot uint) error {
		session, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		defer func() { _ = p.CloseSession(session) }() // f may have ended it
		if err := p.Login(session, pkcs11.CKU_USER, string(PIN)); err != nil && err != pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
			return err
		}
		return f(p, session)
	})
}

func (tok *Token) inside(t testing.TB, f func(p *pkcs11.Ctx, slot uint) error) {
	t.Helper()
	_, release, err := tok.module.Current(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	tok.module.Objects.Lock()
	defer tok.module.Objects.Unlock()
	tok.inSlot(t, f)
}

// alone is inside, but that no call is in the module meanwhile: closing a session
// that SoftHSM is using in another thread could crash the process.
func (tok *Token) alone(t testing.TB, f func(p *pkcs11.Ctx, slot uint) error) {
	t.Helper()
	release, err := tok.module.Quiesce(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	tok.inSlot(t, f)
}

func (tok *Token) inSlot(t testing.TB, f func(p *pkcs11.Ctx, slot uint) error) {
	t.Helper()
	slot, _, err := tok.module.FindToken(tok.Label)
	if err != nil {
		t.Fatal(err)
	}
	if err := f(tok.module.Ctx, slot); err != nil {
		t.Fatal(err)
	}
}

// DestroyKey destroys a key and its public half.
func (tok *Token) DestroyKey(t testing.TB, name pkcs11util.KeyName) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, labelled(nil, name.String())); err != nil {
			return err
		}
		found, _, err := p.FindObjects(session, 10)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(session); err != nil {
			return err
		}
		if len(found) == 0 {
			t.Fatalf("there is no %s", name)
		}
		for _, h := range found {
			if err := p.DestroyObject(session, h); err != nil {
				return err
			}
		}
		return nil
	})
}

// CloseAllSessions ends this token's sessions behind the Keyset's back, which also logs it out.
func (tok *Token) CloseAllSessions(t testing.TB) {
	t.Helper()
	tok.alone(t, func(p *pkcs11.Ctx, slot uint) error { return p.CloseAllSessions(slot) })
}

// Logout logs this token's user out behind the Keyset's back.
func (tok *Token) Logout(t testing.TB) {
	t.Helper()
	tok.alone(t, func(p *pkcs11.Ctx, slot uint) error {
		session, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			return err
		}
		defer func() { _ = p.CloseSession(session) }() // logged out or not
		return p.Logout(session)
	})
}

// Finalize finalises the module behind everybody's back. It hits every token in the process: not for
// tests that run in parallel.
func (tok *Token) Finalize(t testing.TB) {
	t.Helper()
	tok.alone(t, func(p *pkcs11.Ctx, _ uint) error { return p.Finalize() })
}

// Reinitialise finalises and initialises the module as the recovery of another token would. It
// hits every token in the process: not for tests that run in parallel.
func (tok *Token) Reinitialise(t testing.TB) {
	t.Helper()
	incarnation, err := tok.module.Incarnation(context.Background())
	if err == nil {
		err = tok.module.Reinitialise(context.Background(), incarnation)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Vanish makes this token go away, until Return: its files are moved. The recovery of its Keyset
// finalises the module now and then meanwhile, which hits every token in the process: not for tests
// that run in parallel.
func (tok *Token) Vanish(t testing.TB) {
	t.Helper()
	tok.alone(t, func(p *pkcs11.Ctx, slot uint) error {
		return os.Rename(tok.files(t, p, slot))
	})
}

// Return undoes Vanish.
func (tok *Token) Return(t testing.TB) {
	t.Helper()
	from := filepath.Join(tok.Directory.away(), tok.Label)
	entries, err := os.ReadDir(from)
	if err != nil || len(entries) == 0 {
		t.Fatalf("the token did not vanish: %v", err)
	}
	name := entries[0].Name()
	if err := os.Rename(filepath.Join(from, name), filepath.Join(tok.Directory.tokens(), name)); err != nil {
		t.Fatal(err)
	}
}

// files finds the token's directory, which SoftHSM names by a UUID that ends in the serial number.
func (tok *Token) files(t testing.TB, p *pkcs11.Ctx, slot uint) (here, away string) {
	t.Helper()
	info, err := p.GetTokenInfo(slot)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hex.DecodeString(info.SerialNumber); err != nil {
		t.Fatalf("serial number %q is not hexadecimal", info.SerialNumber)
	}
	entries, err := os.ReadDir(tok.Directory.tokens())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(strings.ReplaceAll(e.Name(), "-", ""), info.SerialNumber) {
			dir := filepath.Join(tok.Directory.away(), tok.Label)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(tok.Directory.tokens(), e.Name()), filepath.Join(dir, e.Name())
		}
	}
	t.Fatalf("no token with the serial number %s in %s", info.SerialNumber, tok.Directory.tokens())
	return "", ""
}
