package e2e_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// TestScripts runs testdata/script. Each script has in its directory
//
//	pin, so-pin             PINs, named by the environment
//	owner.url, runtime.url  a migrated database, as its owner and as vaultd; the owner's is named by the environment
//	empty.url, empty-runtime.url  a database without a schema, as its owner and as vaultd
//	nowhere.url             a database that is not there
//	p256.pub, p384.pub, rsa2048.pub, rsa1024.pub  public keys
//
// an empty token directory, and this command besides testscript's own:
//
//	[!] vaultctl ARGUMENTS
//
// It fails unless vaultctl succeeds; with !, unless vaultctl ends with status 1, nothing
// on standard output, and one sentence on standard error, or one for each setting that is wrong.
// Either way it fails if a secret or a crash shows in what vaultctl wrote.
//
// After it,
//
//	fingerprint NAME
//
// puts the ceremony's fingerprint that vaultctl wrote last into the environment.
func TestScripts(t *testing.T) {
	lookAtSources()
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", WorkdirRoot: t.TempDir(), // which goes away even where only some scripts run
		UpdateScripts: *update, RequireUniqueNames: true, Setup: setupScript,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"vaultctl": vaultctl, "fingerprint": fingerprint},
	})
}

func setupScript(e *testscript.Env) error {
	t := e.T().(testing.TB)
	for _, env := range append(tokenEnv(t, e.WorkDir, tokentest.NewDirectory(t)), bareEnv...) {
		name, value, _ := strings.Cut(env, "=")
		e.Setenv(name, value)
	}
	migrated, empty := storetest.New(t), storetest.Empty(t)
	for name, url := range map[string]string{
		"owner.url": migrated.OwnerURL, "runtime.url": migrated.RuntimeURL,
		"empty.url": empty.OwnerURL, "empty-runtime.url": empty.RuntimeURL,
		"nowhere.url": "postgres://owner@/vault?host=/nowhere",
	} {
		write(t, e.WorkDir, name, withPassword(url)+"\n")
	}
	e.Setenv("BKV_DATABASE_URL_FILE", filepath.Join(e.WorkDir, "owner.url"))
	for name, make := range map[string]func() (any, error){
		"p256.pub":    func() (any, error) { k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader); return k.Public(), err },
		"p384.pub":    func() (any, error) { k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader); return k.Public(), err },
		"rsa2048.pub": func() (any, error) { k, err := rsa.GenerateKey(rand.Reader, 2048); return k.Public(), err },
		"rsa1024.pub": func() (any, error) { k, err := rsa.GenerateKey(rand.Reader, 1024); return k.Public(), err },
	} {
		key, err := make()
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return err
		}
		write(t, e.WorkDir, name, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	return nil
}

func vaultctl(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(filepath.Join(bin, "vaultctl"), args...)
	stdout, stderr := ts.ReadFile("stdout"), ts.ReadFile("stderr")
	for _, sign := range []string{pin, soPIN, dbPassword, "PRIVATE KEY", "DATA RACE", "goroutine ", "panic"} {
		if strings.Contains(stdout+stderr, sign) {
			ts.Fatalf("vaultctl wrote %q", sign)
		}
	}
	if !neg {
		ts.Check(err)
		return
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("vaultctl ended with %v, want exit status 1", err)
	}
	if stdout != "" {
		ts.Fatalf("vaultctl failed and wrote to standard output")
	}
	n := 0
	for line := range strings.Lines(stderr) {
		if n++; n == 1 && !strings.HasPrefix(line, "vaultctl: ") || n > 1 && !strings.HasPrefix(line, "--") {
			ts.Fatalf("line %d is no sentence about what is wrong", n)
		}
	}
}

func fingerprint(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: fingerprint NAME")
	}
	lines := strings.Fields(ts.ReadFile("stdout"))
	if _, err := ceremony.ParseFingerprint(lines[len(lines)-1]); err != nil {
		ts.Fatalf("vaultctl ended with %q: %v", lines[len(lines)-1], err)
	}
	ts.Setenv(args[0], lines[len(lines)-1])
}
