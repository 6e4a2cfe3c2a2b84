package e2e_test

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// nonsense is a value for every setting of vaultd that has wrong values, and what is
// said of it.
var nonsense = []struct{ env, value, complaint string }{
	// What cannot be read comes first, in the order of the settings.
	{"BKV_TOKEN_SESSIONS", "four", `--token-sessions: want a whole number, got "four"`},
	{"BKV_STOP_WITHIN", "soon", `--stop-within: want a duration such as 90s, 15m or 24h, got "soon"`},
	{"BKV_ENROLMENTS_PER_USER", "1e3", `--enrolments-per-user: want a whole number, got "1e3"`},
	{"BKV_VAULT_ID", strings.Repeat("x", 256), `--vault-id: want 1 to 255 bytes, got 256`},
	{"BKV_OPAQUE_CONTEXT", strings.Repeat("x", 65536), `--opaque-context: want at most 65535 bytes, got 65536`},
	{"BKV_LISTEN", "nowhere", `--listen: want host:port, got "nowhere"`},
	{"BKV_ADMIN_LISTEN", "8421", `--admin-listen: want host:port, got "8421"`},
	{"BKV_TLS_CERT", "/nowhere/cert", `--tls-cert: open /nowhere/cert: no such file or directory`},
	{"BKV_TLS_KEY", "/nowhere/key", `--tls-key: open /nowhere/key: no such file or directory`},
	{"BKV_TLS_CLIENT_CA", "/nowhere/ca", `--tls-client-ca: open /nowhere/ca: no such file or directory`},
	{"BKV_ADMIN_TLS_CERT", "/nowhere/cert", `--admin-tls-cert: open /nowhere/cert: no such file or directory`},
	{"BKV_ADMIN_TLS_KEY", "/nowhere/key", `--admin-tls-key: open /nowhere/key: no such file or directory`},
	{"BKV_ADMIN_TLS_CLIENT_CA", "/nowhere/ca", `--admin-tls-client-ca: open /nowhere/ca: no such file or directory`},
	{"BKV_TOKEN_MODULE", "", `--token-module: name the PKCS#11 module`},
	{"BKV_TOKEN_LABEL", strings.Repeat("x", 33), `--token-label: want 1 to 32 bytes, got 33`},
	{"BKV_TOKEN_PIN_FILE", "", `--token-pin-file: name the file that holds the token's user PIN`},
	{"BKV_TOKEN_PROFILE", "/nowhere/profile.json", `--token-profile: open /nowhere/profile.json: no such file or directory`},
	{"BKV_DATABASE_URL_FILE", "", `--database-url-file: name the file that holds the database's URL`},
	{"BKV_DATABASE_CONNECTIONS", "0", `--database-connections: want 1 to 1000, got 0`},
	{"BKV_SWEEP_EVERY", "1ms", `--sweep-every: want 100ms to 1h, got 1ms`},
	{"BKV_LOG_LEVEL", "loud", `--log-level: want debug, info, warn or error, got "loud"`},
	{"BKV_ROTATE_STATE_EVERY", "721h", `--rotate-state-every: want 1m to 720h, got 721h0m0s`},
	{"BKV_ROTATE_RELAY_EVERY", "30s", `--rotate-relay-every: want 1m to 8760h, got 30s`},
	{"BKV_REWRAPS_PER_SECOND", "0", `--rewraps-per-second: want 1 to 1000000, got 0`},
	{"BKV_CHECKPOINT_EVERY", "1ms", `--checkpoint-every: want 1s to 1h, got 1ms`},
	{"BKV_MAX_CONNECTIONS", "0", `--max-connections: want 1 to 1000000, got 0`},
	{"BKV_MAX_CONNECTIONS_PER_ADDRESS", "0", `--max-connections-per-address: want 1 to 1000000, got 0`},
	{"BKV_MAX_REQUESTS", "0", `--max-requests: want 1 to 1000000, got 0`},
	{"BKV_REQUESTS_PER_USER", "0", `--requests-per-user: want 1 to 1000000, got 0`},
	{"BKV_REQUESTS_PER_TENANT", "-5", `--requests-per-tenant: want 1 to 1000000, got -5`},
	{"BKV_ENROLMENTS_PER_TENANT", "-1", `--enrolments-per-tenant: want 1 to 1000000, got -1`},
}

func TestInvalidSettingsAreReportedTogether(t *testing.T) {
	t.Parallel()
	var env []string
	want := "vaultd: settings (see --help):\n"
	for _, n := range nonsense {
		env = append(env, n.env+"="+n.value)
		want += n.complaint + "\n"
	}
	if got := run(t, env, "vaultd"); got != (outcome{1, "", want}) {
		t.Errorf("exit status %d\n%s\nwant\n%s", got.code, got.stderr, want)
	}
	// A flag's value is read like a variable's.
	got := run(t, nil, "vaultd", "--token-sessions=four", "--sweep-every=1ms", "--vault-id=v", "--token-pin-file=p", "--database-url-file=u")
	want = "vaultd: settings (see --help):\n--token-sessions: want a whole number, got \"four\"\n--sweep-every: want 100ms to 1h, got 1ms\n"
	if got != (outcome{1, "", want}) {
		t.Errorf("exit status %d\n%s\nwant\n%s", got.code, got.stderr, want)
	}
	// A command line that is not understood is the one complaint.
	for _, arg := range []string{"--nope", "serve", "--log-level"} {
		if got := run(t, nil, "vaultd", arg); got.code != 1 || strings.Count(got.stderr, "\n") != 2 || got.stdout != "" {
			t.Errorf("vaultd %s: %+v", arg, got)
		}
	}
}

// The help names every variable that is read, and none that is not: each one that it
// names makes a difference above.
func TestHelpNamesWhatIsRead(t *testing.T) {
	t.Parallel()
	help := run(t, nil, "vaultd", "--help")
	if help.code != 0 || help.stderr != "" {
		t.Fatalf("vaultd --help: %+v", help)
	}
	var read []string
	for _, n := range nonsense {
		read = append(read, n.env)
		if flag, _, _ := strings.Cut(n.complaint, ":"); !strings.Contains(help.stdout, flag+"=") {
			t.Errorf("the help does not name %s", flag)
		}
	}
	named := regexp.MustCompile(`BKV_[A-Z_]+`).FindAllString(help.stdout, -1)
	slices.Sort(read)
	slices.Sort(named)
	if !slices.Equal(named, read) {
		t.Errorf("the help names %v\nread are %v", named, read)
	}
	if named := strings.Count(help.stdout, "\n      --"); named != len(read) {
		t.Errorf("the help lists %d flags, %d are known to be read", named, len(read))
	}
}

// What vaultd cannot serve with, it refuses at start: exit status 1, one sentence, no
// secret in it.
func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	urlFile := func(t testing.TB, url string) string {
		return "BKV_DATABASE_URL_FILE=" + write(t, t.TempDir(), "url", withPassword(url))
	}
	file := func(t testing.TB, variable, content string) string {
		return variable + "=" + write(t, t.TempDir(), "file", content)
	}
	schema := func(t testing.TB, sql string) string {
		db := storetest.New(t)
		db.Exec(t, sql)
		return urlFile(t, db.RuntimeURL)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, refusal := range map[string]struct {
		env  func(t testing.TB) string
		want string
	}{
		"no URL file":    {func(testing.TB) string { return "BKV_DATABASE_URL_FILE=/nowhere/url" }, `/nowhere/url: no such file`},
		"empty URL file": {func(t testing.TB) string { return file(t, "BKV_DATABASE_URL_FILE", "\n") }, `is empty`},
		"malformed URL": {func(t testing.TB) string {
			return file(t, "BKV_DATABASE_URL_FILE", "postgres://u:"+dbPassword+"@h:port/db")
		}, `database URL: .*port`},
		"no Postgres": {func(t testing.TB) string { return urlFile(t, "postgres://vaultd@/vault?host=/nowhere") }, `connecting to the database: .*/nowhere`},
		"no such database": {func(t testing.TB) string {
			return urlFile(t, strings.Replace(d.database.RuntimeURL, "/test_", "/none_", 1))
		}, `database "none_.*" does not exist`},
		"no schema": {func(t testing.TB) string { return urlFile(t, storetest.Empty(t).RuntimeURL) }, `run vaultctl migrate`},
		"older schema": {func(t testing.TB) string {
			return schema(t, `DELETE FROM schema_version WHERE version_id = (SELECT max(version_id) FROM schema_version)`)
		}, `the database is older than this program.*run vaultctl migrate`},
		"newer schema": {func(t testing.TB) string {
			return schema(t, `INSERT INTO schema_version (version_id, is_applied) VALUES (999, true)`)
		}, `the database is newer than this program.*999`},
		"rights not granted": {func(t testing.TB) string { return schema(t, `REVOKE SELECT ON schema_version FROM bkv_runtime`) }, `GRANT bkv_runtime TO "bkv_service"`},
		"a right withdrawn":  {func(t testing.TB) string { return schema(t, `REVOKE INSERT (kind) ON events FROM bkv_runtime`) }, `may not INSERT kind on table events; have the owner run: GRANT`},
		"a right too many":   {func(t testing.TB) string { return schema(t, `GRANT DELETE ON events TO bkv_runtime`) }, `"bkv_service" may DELETE on table events; have the owner take that away`},
		"the tables' owner":  {func(t testing.TB) string { return urlFile(t, d.database.OwnerURL) }, `may do more than the service needs: role "bkv_owner" owns the vault's tables; log in as another role`},
		"a superuser":        {func(t testing.TB) string { return urlFile(t, d.database.SuperuserURL()) }, `role "postgres" is a superuser; log in as another role, made with: CREATE ROLE vaultd LOGIN IN ROLE bkv_runtime`},

		"no module":      {func(testing.TB) string { return "BKV_TOKEN_MODULE=/nowhere/module.so" }, `/nowhere/module.so`},
		"not a module":   {func(testing.TB) string { return "BKV_TOKEN_MODULE=/etc/passwd" }, `/etc/passwd`},
		"no such token":  {func(testing.TB) string { return "BKV_TOKEN_LABEL=another" }, `"another"`},
		"wrong PIN":      {func(t testing.TB) string { return file(t, "BKV_TOKEN_PIN_FILE", "wrong-"+pin) }, `refused the PIN`},
		"no PIN file":    {func(testing.TB) string { return "BKV_TOKEN_PIN_FILE=/nowhere/pin" }, `/nowhere/pin: no such file`},
		"empty PIN file": {func(t testing.TB) string { return file(t, "BKV_TOKEN_PIN_FILE", "\n") }, `is empty`},

		"port taken":          {func(testing.TB) string { return "BKV_LISTEN=" + taken.Addr().String() }, `--listen: .*address already in use`},
		"admin port taken":    {func(testing.TB) string { return "BKV_ADMIN_LISTEN=" + taken.Addr().String() }, `--admin-listen: .*address already in use`},
		"no such port number": {func(testing.TB) string { return "BKV_LISTEN=127.0.0.1:123456" }, `--listen: .*invalid port`},
	} {
		t.Run(name, func(t *testing.T) { refuses(t, append(slices.Clip(d.vaultd), refusal.env(t)), refusal.want) })
	}
	d.start(t) // and with all as it should be, it starts
}

// refuses starts vaultd, which must refuse.
func refuses(t *testing.T, env []string, want string) {
	t.Helper()
	got := run(t, append([]string{"BKV_LISTEN=127.0.0.1:0", "BKV_ADMIN_LISTEN=127.0.0.1:0"}, env...), "vaultd")
	var said []string // besides the log
	for line := range strings.Lines(got.stderr) {
		if !strings.HasPrefix(line, "{") {
			said = append(said, strings.TrimSpace(line))
		}
	}
	if got.code != 1 || got.stdout != "" || len(said) != 1 || !strings.HasPrefix(said[0], "vaultd: ") || !regexp.MustCompile(want).MatchString(said[0]) {
		t.Errorf("exit status %d, standard output %q\n%s\nwant %s", got.code, got.stdout, got.stderr, want)
	}
	searchSecrets(t, got.stderr)
}

// searchSecrets fails if a deployment's secrets are in a text.
func searchSecrets(t testing.TB, text string) {
	t.Helper()
	for _, secret := range []string{pin, soPIN, dbPassword} {
		if strings.Contains(text, secret) {
			t.Errorf("%s is in\n%s", secret, text)
		}
	}
}

// Keys that a killed or foreign hand left half-made are no keys.
func TestRefusesHalfMadeKeys(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t testing.TB, tok *tokentest.Token)
		want   string
	}{
		"a key is missing": {func(t testing.TB, tok *tokentest.Token) {
			destroy(t, tok, "bkv/mac/1", pkcs11.CKO_SECRET_KEY)
		}, `bkv/mac/1`},
		"a key still has its temporary label": {func(t testing.TB, tok *tokentest.Token) {
			destroy(t, tok, "bkv/state/1", pkcs11.CKO_SECRET_KEY)
			generate(t, tok, pkcs11util.TemporaryLabel(pkcs11util.KeyName{Purpose: pkcs11util.State, Generation: 1}))
		}, `bkv/state/1`},
		"there are two of a key": {func(t testing.TB, tok *tokentest.Token) {
			generate(t, tok, "bkv/master/1")
		}, `bkv/master/1`},
		"a key can be extracted": {func(t testing.TB, tok *tokentest.Token) {
			destroy(t, tok, "bkv/state/1", pkcs11.CKO_SECRET_KEY)
			generate(t, tok, "bkv/state/1", pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true))
		}, `bkv/state/1`},
		"a public half is missing": {func(t testing.TB, tok *tokentest.Token) {
			destroy(t, tok, "bkv/server/1", pkcs11.CKO_PUBLIC_KEY)
		}, `bkv/server/1`},
	} {
		t.Run(name, func(t *testing.T) {
			tok, db := tokentest.New(t), storetest.New(t)
			dir := t.TempDir()
			env := []string{
				tok.Directory.Env(), "BKV_TOKEN_MODULE=" + tok.Directory.Module, "BKV_TOKEN_LABEL=" + tok.Label,
				"BKV_TOKEN_PIN_FILE=" + write(t, dir, "pin", string(tokentest.PIN)), "BKV_VAULT_ID=" + vaultID,
				"BKV_DATABASE_URL_FILE=" + write(t, dir, "url", db.RuntimeURL),
			}
			startVaultd(t, env).stop(t)
			c.damage(t, tok)
			refuses(t, env, c.want)
		})
	}
}

// A database belongs to its keys: another token, with other keys of the same names, is refused.
func TestRefusesAnotherToken(t *testing.T) {
	t.Parallel()
	db := storetest.New(t)
	deploy(t, db).start(t).stop(t)
	dir := t.TempDir()
	env := append(tokenEnv(t, dir, tokentest.NewDirectory(t)), "BKV_DATABASE_URL_FILE="+write(t, dir, "url", db.RuntimeURL))
	mustRun(t, env, "vaultctl", "token", "init")
	refuses(t, env, "holds another key master/1 than the database knows by this name")
}

// destroy destroys the one object of a class and label.
func destroy(t testing.TB, tok *tokentest.Token, label string, class uint) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(s, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		}); err != nil {
			return err
		}
		found, _, err := p.FindObjects(s, 2)
		if err == nil {
			err = p.FindObjectsFinal(s)
		}
		if err != nil || len(found) != 1 {
			return fmt.Errorf("%d objects: %w", len(found), err)
		}
		return p.DestroyObject(s, found[0])
	})
}

// generate makes an AES key in a token, as a key of ours but for the attributes given.
func generate(t testing.TB, tok *tokentest.Token, label string, other ...*pkcs11.Attribute) {
	t.Helper()
	template, _, _, err := pkcs11util.DefaultProfile().Templates(pkcs11util.Master)
	if err != nil {
		t.Fatal(err)
	}
	template = slices.DeleteFunc(template, func(a *pkcs11.Attribute) bool {
		return slices.ContainsFunc(other, func(o *pkcs11.Attribute) bool { return o.Type == a.Type })
	})
	template = append(append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)), other...)
	tok.Raw(t, func(p *pkcs11.Ctx, s pkcs11.SessionHandle) error {
		_, err := p.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, template)
		return err
	})
}

// At start vaultd says who it is and what it does not protect against; the admin
// listener says that it lives and is ready, and the public one says nothing of that.
func TestStart(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	v := d.start(t)
	if v.fingerprint != d.pin.String() {
		t.Errorf("vaultd says its fingerprint is %s, vaultctl %s", v.fingerprint, d.pin)
	}
	var warnings []string
	for _, r := range v.log.records(t) {
		if r["level"] == "WARN" {
			warnings = append(warnings, r["msg"].(string))
		}
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], "SoftHSM") || !strings.Contains(warnings[1], "witness") {
		t.Errorf("warnings at start: %q", warnings)
	}
	for _, c := range []struct {
		url    string
		status int
		body   string
	}{
		{v.admin + "/healthz", 200, `{"alive":true}`},
		{v.admin + "/readyz", 200, `{"ready":true,"failing":[]}`},
		{v.admin + "/v1/vault", 404, ""},
		{v.url + "/healthz", 404, ""},
		{v.url + "/readyz", 404, ""},
		{v.url + "/v1/vault", 200, ""},
		{v.url + "/openapi.json", 200, ""},
	} {
		r := get(t, c.url)
		if r.status != c.status || c.body != "" && string(r.body) != c.body {
			t.Errorf("GET %s: %v", c.url, r)
		}
	}
	v.stop(t)
}

// get sends a GET to a listener of vaultd.
func get(t testing.TB, url string) reply {
	t.Helper()
	response, err := crowd.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response.StatusCode, response.Header, body}
}
