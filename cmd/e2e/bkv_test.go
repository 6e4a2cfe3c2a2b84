package e2e_test

import (
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
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

// served is a deployment with a vaultd that serves.
type served struct {
	*deployment
	vault *vaultd
}

// TestBkv is bkv with a vault, whose tenant has no delays. Each test is users of its own.
func TestBkv(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	s := &served{d, d.start(t)}
	for name, test := range map[string]func(*testing.T, *served){
		"scripts":                bkvScripts,
		"password at a terminal": passwordAtATerminal,
		"password changed":       passwordChanged,
		"change of key cut off":  changeOfKeyCutOff,
		"old password asked for": oldPasswordAskedFor,
		"no key to ask for":      noKeyToAskFor,
		"frozen key":             frozenKey,
		"backup at a terminal":   backupAtATerminal,
		"token asked for again":  tokenAskedForAgain,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

// bkvScripts runs testdata/bkv. Each script is a user, called as the script, with the
// environment of a device, and this command besides testscript's own:
//
//	[!] bkv ARGUMENTS
//
// It fails unless bkv succeeds; with !, unless bkv ends with status 1 and says why.
// Either way it fails if a crash shows in what bkv wrote.
func bkvScripts(t *testing.T, s *served) {
	runBkvScripts(t, "testdata/bkv", func(e *testscript.Env) []string {
		return s.bkvEnv(s.vault, e.WorkDir, strings.TrimPrefix(filepath.Base(e.WorkDir), "script-"))
	})
}

func runBkvScripts(t *testing.T, dir string, environment func(*testscript.Env) []string) {
	lookAtSources()
	testscript.Run(t, testscript.Params{
		Dir: dir, WorkdirRoot: t.TempDir(), UpdateScripts: *update, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			for _, env := range append(slices.Clone(bareEnv), environment(e)...) {
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
