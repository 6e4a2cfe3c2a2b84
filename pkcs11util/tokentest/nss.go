package tokentest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
)

//go:embed shim/nss.c
var nssSource []byte

// nssPaths is where packages put NSS's software token.
var nssPaths = []string{
	"/usr/lib/*/libsoftokn3.so", // Debian, Ubuntu
	"/usr/lib64/libsoftokn3.so",
}

// NSS makes a token of NSS's, without keys, and returns what opens it. It computes well and does not
// keep keys in. NSS 3.87 gets the first of the two calls wrong in which AES-GCM is asked for
// its size; mended answers it in NSS's place.
//
// A process has one NSS: not for tests that run in parallel, and one token at a time.
func NSS(t testing.TB, mended bool) pkcs11util.Config {
	t.Helper()
	var module string
	for _, pattern := range nssPaths {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			module = found[0]
		}
	}
	certutil, err := exec.LookPath("certutil")
	if module == "" || err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("NSS is not installed: packages libnss3 and libnss3-tools")
		}
		t.Skip("NSS is not installed; ./scripts/test installs it")
	}
	dir := t.TempDir()
	pinFile := filepath.Join(dir, "pin")
	if err := os.WriteFile(pinFile, []byte(string(PIN)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if said, err := exec.Command(certutil, "-N", "-d", "sql:"+dir, "-f", pinFile).CombinedOutput(); err != nil {
		t.Fatalf("certutil: %v: %s", err, said)
	}
	macros := []string{
		fmt.Sprintf("MODULE=%q", module),
		fmt.Sprintf("PARAMETERS=%q", "configdir='sql:"+dir+"' certPrefix='' keyPrefix='' secmod='secmod.db' flags="),
	}
	if mended {
		macros = append(macros, "SIZES")
	}
	forwarder, err := compile("nss.c", nssSource, macros...)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "nss.so")
	if err := os.WriteFile(path, forwarder, 0o700); err != nil {
		t.Fatal(err)
	}
	return pkcs11util.Config{Module: path, Label: "NSS Certificate DB", PIN: PIN}
}
