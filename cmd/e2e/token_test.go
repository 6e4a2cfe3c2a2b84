package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// configured is the environment of programs that use a test's own token.
func configured(t testing.TB, dir string, cfg pkcs11util.Config) []string {
	return []string{
		"BKV_TOKEN_MODULE=" + cfg.Module, "BKV_TOKEN_LABEL=" + cfg.Label, "BKV_VAULT_ID=" + vaultID,
		"BKV_TOKEN_PIN_FILE=" + write(t, dir, "pin", string(tokentest.PIN)+"\n"),
		"BKV_TOKEN_SO_PIN_FILE=" + write(t, dir, "so-pin", string(tokentest.SOPIN)+"\n"),
	}
}

// A token that differs from SoftHSM in all that a profile knows of takes its place by
// configuration alone: check, propose, and go on with the proposal.
func TestAnotherVendorsToken(t *testing.T) {
	t.Parallel()
	shim := tokentest.EmptyShimmed(t)
	shim.Set(tokentest.IVAppended, tokentest.SensitiveRefused, tokentest.DeriveValueLenRefused,
		tokentest.PeerPointDER, tokentest.PointRaw, tokentest.DataLimit(1024))
	d := &deployment{database: storetest.New(t), dir: t.TempDir()}
	tokens := configured(t, d.dir, shim.Config())
	file := filepath.Join(d.dir, "profile.json")

	table := mustRun(t, tokens, "vaultctl", "token", "check", "--propose="+file)
	if !strings.Contains(table, "usable with the proposed profile") {
		t.Fatalf("the check:\n%s", table)
	}
	proposed, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if o := run(t, tokens, "vaultctl", "token", "check", "--propose="+file); o.code != 1 || !strings.Contains(o.stderr, "exists") {
		t.Errorf("over a file that is there: %d %s", o.code, o.stderr)
	}
	if o := run(t, tokens, "vaultctl", "token", "init"); o.code != 1 {
		t.Errorf("keys were made without the profile: %s", o.stdout)
	}
	withProfile := append(tokens, "BKV_TOKEN_PROFILE="+file)
	if table := mustRun(t, withProfile, "vaultctl", "token", "check"); !strings.Contains(table, ": usable; ") {
		t.Errorf("the check under the profile:\n%s", table)
	}
	d.prepare(t, withProfile)

	o := run(t, d.vaultd, "vaultd", "--token-profile=", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")
	if o.code != 1 || !strings.Contains(o.stderr, `token check, line "`) {
		t.Errorf("vaultd without the profile: %d %s", o.code, o.stderr)
	}
	v := d.start(t)
	phone := d.device(t, "alice", at(v))
	enrolled, err := phone.Enrol(t.Context(), "a password")
	if err != nil {
		t.Fatal(err)
	}
	if recovered, err := phone.Recover(t.Context(), "a password"); err != nil || recovered.Key != enrolled.Key {
		t.Fatalf("recovering: %v", err)
	}
	if n := d.database.Exec(t, "SELECT FROM generations WHERE strategy = $1", pkcs11util.ECDHDeriveWrap); n != 1 {
		t.Errorf("%d records say how the token multiplies", n)
	}

	// One wrong value is one sentence, and so are several.
	wrong := write(t, d.dir, "wrong.json", strings.NewReplacer("appended", "added", "1024", "1").Replace(string(proposed)))
	o = run(t, tokens, "vaultctl", "token", "check", "--token-profile="+wrong)
	if o.code != 1 || o.stdout != "" || strings.Count(o.stderr, "\n") != 1 ||
		!strings.Contains(o.stderr, "iv: want") || !strings.Contains(o.stderr, "max_data_bytes: want") {
		t.Errorf("a profile that is none: %+v", o)
	}
}

// A token that lets keys out is refused, in a table and in JSON.
func TestTokenThatIsNotUsable(t *testing.T) {
	env := configured(t, t.TempDir(), tokentest.NSS(t, false))
	proposal := filepath.Join(t.TempDir(), "profile.json")
	o := run(t, env, "vaultctl", "token", "check", "--propose="+proposal)
	if o.code != 1 || !strings.Contains(o.stdout, "could be had: master") || !strings.Contains(o.stdout, "not usable: failed ") ||
		!strings.Contains(o.stderr, "wrapping keys out") {
		t.Errorf("exit status %d\n%s\n%s", o.code, o.stdout, o.stderr)
	}
	if _, err := os.Stat(proposal); err == nil {
		t.Error("proposed a profile for it")
	}
	o = run(t, env, "vaultctl", "token", "check", "--json")
	var report struct {
		Usable  bool
		Verdict string
		Lines   []struct{ What, Result, Why, Do string }
		Rates   []struct{ Operation string }
	}
	if err := json.Unmarshal([]byte(o.stdout), &report); err != nil {
		t.Fatal(err)
	}
	if o.code != 1 || report.Usable || !strings.HasPrefix(report.Verdict, "not usable: ") || len(report.Lines) < 20 || len(report.Rates) < 3 {
		t.Errorf("exit status %d, %+v", o.code, report)
	}
}

// A token that derives nothing for us is refused, with the way out; who declares that lower assurance will do gets a
// profile, and is told at each step what it costs. Everything else is as with other tokens.
func TestTokenThatDoesNotDerive(t *testing.T) {
	t.Parallel()
	shim := tokentest.EmptyShimmed(t)
	shim.Set(tokentest.VendorKDF)
	d := &deployment{database: storetest.New(t), dir: t.TempDir()}
	tokens := configured(t, d.dir, shim.Config())
	file := filepath.Join(d.dir, "profile.json")
	const cost = "guess passwords offline, without the token and its counter"

	o := run(t, tokens, "vaultctl", "token", "check", "--propose="+file)
	if o.code != 1 || !strings.Contains(o.stdout, "declare by --accept-lower-assurance") || !strings.Contains(o.stderr, "not usable: failed ECDH") {
		t.Fatalf("undeclared: exit status %d\n%s%s", o.code, o.stdout, o.stderr)
	}
	if _, err := os.Stat(file); err == nil {
		t.Fatal("proposed undeclared")
	}
	if table := mustRun(t, tokens, "vaultctl", "token", "check", "--accept-lower-assurance", "--propose="+file); !strings.Contains(table, cost) {
		t.Errorf("the verdict does not say what is lost:\n%s", table)
	}
	if o := run(t, tokens, "vaultctl", "token", "init"); o.code != 1 {
		t.Errorf("keys were made without the profile: %s", o.stdout)
	}
	tokens = append(tokens, "BKV_TOKEN_PROFILE="+file)
	if said := mustRun(t, tokens, "vaultctl", "token", "init"); !strings.Contains(said, "WARNING: lower assurance") {
		t.Errorf("init says: %s", said)
	}
	d.prepare(t, tokens)
	v := d.start(t)
	if log := v.log.String(); !strings.Contains(log, cost) {
		t.Errorf("vaultd does not say what is lost:\n%s", log)
	}
	admin := []string{"BKV_ADMIN_URL=" + v.admin}
	if status := mustRun(t, admin, "vaultctl", "key", "status"); !strings.Contains(status, "WARNING: lower assurance") || !strings.Contains(status, cost) {
		t.Errorf("the status does not say what is lost:\n%s", status)
	}

	ctx := t.Context()
	first, err := d.phone(at(v), "ann").enrol(ctx, right)
	if err != nil {
		t.Fatal(err)
	}
	if n := query[int64](t, d.database, `SELECT count(*) FROM generations WHERE strategy = $1`, pkcs11util.ECDHInMemory); n != 1 {
		t.Errorf("%d records say how the token multiplies", n)
	}
	if _, err := d.phone(at(v), "ann").recover(ctx, wrong); !isRefused(err, "wrong-password") {
		t.Errorf("a wrong password: %v", err)
	}
	// The SDK reaches it over the relay channel, whose key is one of those.
	phone := d.device(t, "cat", at(v))
	cat, err := phone.Enrol(ctx, "a password")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := phone.Recover(ctx, "a password"); err != nil || got.Key != cat.Key {
		t.Errorf("over the relay channel: %v", err)
	}
	// All keys rotate; the first record recovers under the keys that it was made with.
	for _, purpose := range []string{"oprf", "server", "relay", "state", "audit"} {
		mustRun(t, admin, "vaultctl", "key", "rotate", purpose)
	}
	for _, purpose := range []string{"mac", "master"} {
		mustRun(t, admin, "vaultctl", "key", "rotate", purpose, "--poll=20ms")
	}
	second, err := d.phone(at(v), "bob").enrol(ctx, right)
	if err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		for user, key := range map[string][32]byte{"ann": first, "bob": second} {
			if got, err := d.phone(at(v), user).recover(ctx, right); err != nil || got != key {
				t.Errorf("%s: %v", user, err)
			}
		}
	}
	check()
	if n := query[int64](t, d.database, `SELECT count(DISTINCT (oprf_key, server_key)) FROM generations`); n != 2 {
		t.Errorf("the records are under %d pairs of keys", n)
	}
	o = run(t, admin, "vaultctl", "key", "destroy", "oprf", "1")
	if o.code != 1 || !strings.Contains(o.stderr, "2 records still need key oprf/1") {
		t.Errorf("destroying a key in use: %d %s", o.code, o.stderr)
	}
	// A token without room for a key says so, and serves on.
	shim.Fail("C_GenerateKey", pkcs11.CKR_DEVICE_MEMORY, tokentest.Always)
	o = run(t, admin, "vaultctl", "key", "rotate", "master")
	if o.code != 1 || !strings.Contains(o.stderr, "the token is full: make room in it") || strings.Count(o.stderr, "\n") != 1 {
		t.Errorf("rotating with a full token: %d %s", o.code, o.stderr)
	}
	check()
	shim.Fail("C_GenerateKey", 0, 0)
	if said := mustRun(t, admin, "vaultctl", "key", "rotate", "master"); said != "master/3 is in use\n" {
		t.Errorf("when there is room: %s", said)
	}
	// The token goes and comes back; the process ends and starts again.
	shim.Vanish(2)
	if _, err := d.phone(at(v), "ann").recover(ctx, right); !isRefused(err, "token-unavailable") {
		t.Errorf("without the token: %v", err)
	}
	shim.Return()
	eventually(t, "service again", func() bool { _, err := d.phone(at(v), "ann").recover(ctx, right); return err == nil })
	v.stop(t)
	v = d.start(t)
	check()
	if shim.Calls("C_DeriveKey") == 0 {
		t.Error("the check did not try to derive") // else it would prove nothing that it is refused
	}
	// Under the profile of tokens that derive, the keys are of the wrong kind.
	o = run(t, d.vaultd, "vaultd", "--token-profile=", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")
	if o.code != 1 || !strings.Contains(o.stderr, `wrong class for a token profile with ecdh "derive"`) {
		t.Errorf("vaultd without the profile: %d %s", o.code, o.stderr)
	}
}
