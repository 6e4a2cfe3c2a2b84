package e2e_test

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/backup-key-vault/bkv/store/storetest"
)

// bkvEnv is the environment of a user's bkv, with files below dir. There is no keyring: no test
// touches that of whoever runs it.
func (d *deployment) bkvEnv(v *vaultd, dir, user string) []string {
	return []string{
		"BKV_VAULT_URL=" + v.url, "BKV_VAULT_FINGERPRINT=" + d.pin.String(), "BKV_TENANT=" + tenant, "BKV_USER=" + user,
		"BKV_TOKEN_COMMAND=" + filepath.Join(bin, "vaultctl") + " dev token --vault-id=" + vaultID + " --tenant=" + tenant +
			" --user=" + user + " --kid=" + kid + " --key=" + d.dir + "/tenant.key",
		"BKV_CONFIG_DIR=" + filepath.Join(dir, "device"), "HOME=" + dir,
		"DBUS_SESSION_BUS_ADDRESS=", "XDG_RUNTIME_DIR=", "TZ=UTC",
	}
}

// TestBkvScripts runs testdata/bkv. Each script is a user of its own, called as the script, of one
// vault without delays, with the environment of a device, and this command besides testscript's:
//
//	[!] bkv ARGUMENTS
//
// It fails unless bkv succeeds; with !, unless bkv ends with status 1 and says why.
// Either way it fails if a crash shows in what bkv wrote.
func TestBkvScripts(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/bkv", WorkdirRoot: t.TempDir(), UpdateScripts: *update, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			name := strings.TrimPrefix(filepath.Base(e.WorkDir), "script-")
			for _, env := range append(d.bkvEnv(v, e.WorkDir, name), bareEnv...) {
				name, value, _ := strings.Cut(env, "=")
				e.Setenv(name, value)
			}
			e.Setenv("PATH", bin+":"+e.Getenv("PATH"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"bkv": bkv},
	})
}

func bkv(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(filepath.Join(bin, "bkv"), args...)
	stderr := ts.ReadFile("stderr")
	for _, sign := range []string{"DATA RACE", "goroutine ", "panic", "%!"} {
		if strings.Contains(stderr, sign) {
			ts.Fatalf("bkv wrote %q", sign)
		}
	}
	if !neg {
		ts.Check(err)
		return
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("bkv ended with %v, want exit status 1", err)
	}
	if !strings.Contains(stderr, "bkv: ") {
		ts.Fatalf("bkv did not say why")
	}
}
