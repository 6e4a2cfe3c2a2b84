package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/store/storetest"
)

// auditor runs vaultctl audit against a database, as vaultd's login.
type auditor struct {
	env []string
	dir string
}

func newAuditor(t testing.TB, d *deployment) *auditor {
	t.Helper()
	return auditorOf(t, d, d.database)
}

func auditorOf(t testing.TB, d *deployment, db *storetest.Database) *auditor {
	t.Helper()
	dir := t.TempDir()
	return &auditor{[]string{
		"BKV_DATABASE_URL_FILE=" + write(t, dir, "url", withPassword(db.RuntimeURL)), "BKV_FINGERPRINT=" + d.pin.String(),
	}, dir}
}

func (a *auditor) run(t testing.TB, args ...string) outcome {
	t.Helper()
	return run(t, a.env, "vaultctl", append([]string{"audit"}, args...)...)
}

// read is a file's content.
func read(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (a *auditor) file(name string) string { return filepath.Join(a.dir, name) }

// says fails unless the command ends so.
func (a *auditor) says(t testing.TB, code int, stdout, stderr string, args ...string) outcome {
	t.Helper()
	o := a.run(t, args...)
	if o.code != code || !regexp.MustCompile(stdout).MatchString(o.stdout) || !regexp.MustCompile(stderr).MatchString(o.stderr) || stderr == "" && o.stderr != "" {
		t.Errorf("audit %v: status %d, want %d\n%s\nwant: %s\n%s\nwant: %s", args, o.code, code, o.stdout, stdout, o.stderr, stderr)
	}
	return o
}

// settled waits until all events are sealed and signed.
func settled(t testing.TB, db *storetest.Database) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if query[bool](t, db, `SELECT NOT EXISTS (SELECT FROM unsealed_events) AND coalesce((SELECT max(sequence) FROM event_seals) = (SELECT max(sequence) FROM audit_checkpoints), false)`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the log is not sealed and signed")
		}
	}
}

func TestAuditLog(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	d := deploy(t, storetest.New(t))
	a := newAuditor(t, d)
	a.says(t, 1, `^$`, `^vaultctl: the database has no audit log: it begins when vaultd runs`, "verify")
	a.says(t, 1, `^$`, `no audit log`, "export")
	v := d.start(t, "BKV_CHECKPOINT_EVERY=1s")

	ann := d.device(t, "ann", at(v))
	if _, err := ann.Enrol(ctx, "right"); err != nil {
		t.Fatal(err)
	}
	if _, err := ann.Recover(ctx, "wrong"); err == nil {
		t.Fatal("recovered")
	}
	owner := ownerEnv(t, d.dir, d.database)
	mustRun(t, owner, "vaultctl", "tenant", "policy", tenant, "--max-attempts=9", "--delays=none", "--operator=olga")
	admin := []string{"BKV_ADMIN_URL=" + v.admin, "BKV_OPERATOR=oscar"}
	mustRun(t, admin, "vaultctl", "key", "rotate", "audit")
	mustRun(t, admin, "vaultctl", "key", "destroy", "audit", "1")
	settled(t, d.database)

	eventually(t, "the admin listener says so", func() bool {
		var status api.AuditStatus
		r := get(t, v.admin+"/audit/")
		if err := json.Unmarshal(r.body, &status); err != nil || r.status != 200 || status.Fault != "" {
			t.Fatalf("%v, %v", r, err)
		}
		sealed := query[int64](t, d.database, `SELECT max(sequence) FROM event_seals`)
		return status.Sealing && status.Sealed == uint64(sealed) && status.Signed == status.Sealed && status.SignedAt != nil &&
			status.At != nil && status.Waiting == 0 && status.LagSeconds == 0
	})

	// Verified in the database and, without it, in an export; what the checkpoint file remembers is still there.
	o := a.says(t, 0, `^proved: events 1 to \d+, signed at .* by audit/2\n$`, ``, "verify", "--save="+a.file("checkpoint"))
	a.says(t, 0, `^proved: `, ``, "verify", "--since="+a.file("checkpoint"))
	a.says(t, 0, `^$`, ``, "export", "--out="+a.file("log.jsonl"), "--save="+a.file("exported"))
	offline := &auditor{[]string{"BKV_FINGERPRINT=" + d.pin.String()}, a.dir}
	if got := offline.says(t, 0, `^proved: `, ``, "verify", "--file="+a.file("log.jsonl"), "--since="+a.file("checkpoint")); got.stdout != o.stdout {
		t.Errorf("in the database %sin the export %s", o.stdout, got.stdout)
	}
	if got := a.says(t, 0, ``, ``, "export").stdout; got != read(t, a.file("log.jsonl")) {
		t.Error("the export on standard output is another")
	}
	var report struct {
		Last, Signed uint64
		Findings     []any
		Overdue      bool
	}
	if err := json.Unmarshal([]byte(a.says(t, 0, ``, ``, "verify", "--json").stdout), &report); err != nil || report.Last != report.Signed || report.Findings == nil || report.Overdue {
		t.Errorf("%+v, %v", report, err)
	}

	// What it says, and what it does not.
	text := a.says(t, 0, ``, ``, "tail", "-n", "1000").stdout
	for _, want := range []string{
		` migrated +detail="schema version \d+" login=bkv_owner\n`, ` tenant-added +tenant=app detail="max_attempts=10 .*" operator=\S+@\S+ login=bkv_owner\n`,
		` tenant-key-added +tenant=app detail="kid=app-1 sha256=[0-9a-f]{64}" `, ` tenant-policy +tenant=app detail="max_attempts=9 delays=\[\] grace=168h0m0s" operator=olga `,
		` key-current +key=audit/2 operator="oscar \(unproven\) at 127.0.0.1" login=bkv_service\n`, ` key-closing +key=audit/1 `, ` key-erased +key=audit/1 detail=\S+ operator="oscar`, ` key-destroyed +key=audit/1 `,
		` staged +tenant=app account=[0-9a-f]{16} generation=[0-9a-f]{8} request=\S+ login=bkv_service\n`, ` activated `, ` attempt +tenant=app account=\S+ generation=\S+ attempt=1 `, ` failure .* attempt=1 `,
	} {
		if n := len(regexp.MustCompile(want).FindAllString(text, -1)); n == 0 || n > 1 && !strings.Contains(want, "current") && !strings.Contains(want, "migrated") {
			t.Errorf("%d lines are as %q in\n%s", n, want, text)
		}
	}
	if strings.Contains(text, "ann") {
		t.Error("the log names a user")
	}
	user := &auditor{owner, a.dir}
	if got := user.says(t, 0, ``, ``, "tail", "--tenant=app", "--user=ann").stdout; strings.Count(got, "\n") != 4 {
		t.Errorf("of ann:\n%s", got)
	}
	user.says(t, 1, `^$`, `tenant app has no such user`, "tail", "--tenant=app", "--user=nobody")
	if got := a.says(t, 0, ``, ``, "tail", "--kind=attempt,failure").stdout; strings.Count(got, "\n") != 2 {
		t.Errorf("attempts and failures:\n%s", got)
	}
	if got := a.says(t, 0, ``, ``, "tail", "-n", "1", "--json").stdout; !strings.HasPrefix(got, `{"type":"event","sequence":`) || strings.Count(got, "\n") != 1 {
		t.Errorf("as JSON: %s", got)
	}
	a.says(t, 1, `^$`, `(?s)--lines: want 0 to 10000.*--poll: want 10ms to 1h.*--user: name the tenant`, "tail", "--lines=-1", "--poll=0s", "--user=x")
	a.says(t, 1, `^$`, `--pseudonym: want hexadecimal`, "tail", "--pseudonym=ANN")

	// An archive in parts.
	if _, err := ann.Recover(ctx, "right"); err != nil {
		t.Fatal(err)
	}
	settled(t, d.database)
	a.says(t, 0, `^$`, ``, "export", "--since="+a.file("exported"), "--out="+a.file("more.jsonl"))
	a.says(t, 0, `^proved: events 1 to `, ``, "verify", "--file="+a.file("log.jsonl"), "--file="+a.file("more.jsonl"))
	a.says(t, 0, `^proved: events \d\d+ to `, ``, "verify", "--file="+a.file("more.jsonl"))
	a.says(t, 0, `^proved`, ``, "verify", "--file="+a.file("more.jsonl"), "--since="+a.file("exported"))

	// What cannot be answered is no verdict.
	v.stop(t)
	other := storetest.Empty(t)
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"another vault":        {[]string{"verify", "--fingerprint=" + strings.Repeat("a", 40)}, `--fingerprint: .*checksum`},
		"no such file":         {[]string{"verify", "--file=/nowhere/log"}, `/nowhere/log: no such file`},
		"no export":            {[]string{"verify", "--file=" + a.file("checkpoint")}, `checkpoint, line 1: want the line of type log first`},
		"half an export":       {[]string{"verify", "--file=" + write(t, a.dir, "half", read(t, a.file("log.jsonl"))[:2000])}, `half, line \d+: `},
		"no checkpoint":        {[]string{"verify", "--since=" + a.file("log.jsonl")}, `--since: .*log.jsonl holds no checkpoint`},
		"no checkpoint file":   {[]string{"verify", "--since=/nowhere/c"}, `--since: .*no such file`},
		"the export is there":  {[]string{"export", "--out=" + a.file("log.jsonl")}, `--out: .*file exists`},
		"nowhere to save":      {[]string{"verify", "--save=/nowhere/c"}, `--save: .*no such file`},
		"no schema":            {[]string{"verify", "--database-url-file=" + write(t, a.dir, "empty", other.OwnerURL)}, `run vaultctl migrate`},
		"no database":          {[]string{"tail", "--database-url-file=" + write(t, a.dir, "none", "postgres://u@/d?host=/nowhere")}, `/nowhere`},
		"a foreign checkpoint": {[]string{"verify", "--since=" + write(t, a.dir, "foreign", strings.Replace(read(t, a.file("checkpoint")), `"sequence":`, `"sequence":1`, 1))}, `the remembered checkpoint: the signature does not verify`},
	} {
		o := a.run(t, c.args...)
		if o.code != 1 || !regexp.MustCompile(c.want).MatchString(o.stderr) || name != "nowhere to save" && o.stdout != "" {
			t.Errorf("%s: status %d, %s%s", name, o.code, o.stdout, o.stderr)
		}
	}

	// Tampering is found, located, and told by the exit status.
	super, err := pgx.Connect(ctx, d.database.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(context.Background())
	do := func(sql string) {
		t.Helper()
		if _, err := super.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	do(`SET session_replication_role = replica`)
	do(`UPDATE events SET kind = 'success' WHERE kind = 'failure'`)
	failure := query[int64](t, d.database, `SELECT min(sequence) FROM event_seals JOIN events ON id = event_id WHERE kind = 'success'`)
	finding := regexp.MustCompile(`^event (\d+): not what was sealed here: edited, or put in another's place\nNOT PROVED: looked at events 1 to \d+\n$`)
	o = a.says(t, 2, finding.String(), `^vaultctl: the audit log was tampered with: 1 findings\n$`, "verify", "--save="+a.file("unwritten"))
	if m := finding.FindStringSubmatch(o.stdout); m == nil || m[1] != fmt.Sprint(failure) {
		t.Errorf("it was event %d:\n%s", failure, o.stdout)
	}
	if _, err := os.Stat(a.file("unwritten")); err == nil {
		t.Error("a checkpoint of a log that is not proved was saved")
	}
	// A vaultd that starts now serves on: what was changed lies before the newest checkpoint. Where it lies after it, or the
	// checkpoint itself is another, it seals no more and says so.
	do(`UPDATE audit_checkpoints SET signature = sha256('x') || sha256('y') WHERE sequence = (SELECT max(sequence) FROM audit_checkpoints)`)
	faulty := d.start(t)
	eventually(t, "the fault shows", func() bool {
		var status api.AuditStatus
		if err := json.Unmarshal(get(t, faulty.admin+"/audit/").body, &status); err != nil {
			t.Fatal(err)
		}
		return strings.HasPrefix(status.Fault, "checkpoint at ") && strings.Contains(faulty.log.String(), "the audit log is not as the vault wrote it: checkpoint at ")
	})
	if ready, failing := readiness(t, faulty); !ready {
		t.Errorf("not ready: %v", failing)
	}
	if _, err := d.device(t, "ann", at(faulty)).Recover(ctx, "right"); err != nil {
		t.Errorf("recovering beside a log that was tampered with: %v", err)
	}
	faulty.stop(t)
	if n := query[int64](t, d.database, `SELECT count(*) FROM unsealed_events`); n == 0 {
		t.Error("events were sealed over a log that does not prove")
	}
	a.says(t, 2, `(?m)^checkpoint at \d+: the signature does not verify$`, `tampered with: 2 findings`, "verify")
	do(`DELETE FROM audit_checkpoints WHERE sequence = (SELECT max(sequence) FROM audit_checkpoints)`)
	do(`UPDATE events SET kind = 'failure' WHERE id = (SELECT event_id FROM event_seals WHERE sequence = ` + fmt.Sprint(failure) + `)`)
	a.says(t, 0, `^proved`, ``, "verify")
	do(`DELETE FROM audit_checkpoints WHERE sequence > 2`)
	do(`UPDATE events SET at = at - interval '1 day'`)
	do(`DELETE FROM event_seals WHERE sequence > 1`)
	do(`DELETE FROM audit_checkpoints`)
	a.says(t, 2, `(?s)was cut off at its end; the remembered checkpoint was signed at.*rows of events were neither sealed nor do they wait for it`, `tampered with`, "verify", "--since="+a.file("checkpoint"))
	// The export that was made before shows what was there.
	offline.says(t, 0, `^proved`, ``, "verify", "--file="+a.file("log.jsonl"), "--since="+a.file("checkpoint"))
}

// Events that nobody signs are no proof, and for scripts a status of their own.
func TestUnsignedEvents(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	a := newAuditor(t, d)
	v := d.start(t, "BKV_CHECKPOINT_EVERY=1h")
	settled(t, d.database)
	mustRun(t, ownerEnv(t, d.dir, d.database), "vaultctl", "tenant", "add", "another")
	for deadline := time.Now().Add(patience); !query[bool](t, d.database, `SELECT NOT EXISTS (SELECT FROM unsealed_events)`); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not sealed")
		}
	}
	a.says(t, 0, `^proved: events 1 to \d+, signed .*\nevents \d+ to \d+ are sealed and not signed, the oldest of `, ``, "verify")
	// The owner can give an event another time; here it stands for one that nobody signed for hours.
	ctx := t.Context()
	owner, err := pgx.Connect(ctx, d.database.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(context.Background())
	if _, err := owner.Exec(ctx, `INSERT INTO events (kind, detail, at) VALUES ('migrated', 'by hand', now() - interval '3 hours')`); err != nil {
		t.Fatal(err)
	}
	unsigned := query[int64](t, d.database, `SELECT max(sequence) FROM audit_checkpoints`)
	for deadline := time.Now().Add(patience); !query[bool](t, d.database, `SELECT NOT EXISTS (SELECT FROM unsealed_events)`); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not sealed")
		}
	}
	a.says(t, 3, `^proved: events 1 to `+fmt.Sprint(unsigned)+`, signed `, `^vaultctl: events after `+fmt.Sprint(unsigned)+` are not signed, the oldest of `, "verify")
	// A clean stop signs what is left.
	v.stop(t)
	a.says(t, 0, `^proved: events 1 to `+fmt.Sprint(unsigned+2)+`, signed .*\n$`, ``, "verify")
	super, err := pgx.Connect(t.Context(), d.database.SuperuserURL())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close(context.Background())
	if _, err := super.Exec(t.Context(), `DELETE FROM audit_checkpoints`); err != nil {
		t.Fatal(err)
	}
	a.says(t, 3, `^nothing is signed yet, so nothing is proved\n`, `events after 0 are not signed`, "verify")
	a.says(t, 1, `^$`, `nothing is signed yet, so there is nothing to export`, "export")
}

// tail -f prints each event once, sealed or not, and stops cleanly.
func TestAuditTailFollows(t *testing.T) {
	t.Parallel()
	d := deploy(t, storetest.New(t))
	a := newAuditor(t, d)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := program(ctx, a.env, "vaultctl", "audit", "tail", "-f", "-n", "0", "--poll=20ms", "--kind=tenant-added,staged")
	var out lines
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	owner := ownerEnv(t, d.dir, d.database)
	await := func(want int) {
		t.Helper()
		for out.count() < want && ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
		}
		if got := out.count(); got != want {
			t.Fatalf("%d lines, want %d:\n%s", got, want, out.String())
		}
	}
	time.Sleep(500 * time.Millisecond) // what happens before it looks for the first time is not to be followed
	mustRun(t, owner, "vaultctl", "tenant", "add", "first")
	await(1)
	v := d.start(t)
	settled(t, d.database)
	mustRun(t, owner, "vaultctl", "tenant", "add", "second")
	await(2)
	ann := d.device(t, "ann", at(v))
	if _, err := ann.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	await(3)
	settled(t, d.database)
	time.Sleep(100 * time.Millisecond)
	await(3)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("interrupted: %v\n%s", err, out.String())
	}
	if text := out.String(); !regexp.MustCompile(`^ +- .* tenant-added .*tenant=first .*\n.* tenant=second .*\n.* staged .*\n$`).MatchString(text) {
		t.Errorf("%s", text)
	}
}

// lines is what a program writes, as it comes.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) count() int { return strings.Count(l.String(), "\n") }

// The disk is full under the audit table: nothing that would be an event happens, everybody is told so, nothing is charged,
// what needs no event is served, and all goes on when there is room again.
func TestFullAuditTable(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	db := storetest.NewCluster(t).Database(t)
	d := deploy(t, db)
	v := d.start(t)
	fill, free := db.SmallDisk(t)
	ann, bob := d.phone(at(v), "ann"), d.device(t, "bob", at(v))
	key, err := ann.enrol(ctx, "right")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bob.Enrol(ctx, "bob's"); err != nil {
		t.Fatal(err)
	}
	charged, err := newGuess("right")
	if err == nil {
		err = ann.start(ctx, charged)
	}
	if err != nil {
		t.Fatal(err)
	}
	other, err := newGuess("wrong")
	if err != nil {
		t.Fatal(err)
	}

	fill()
	before := query[int64](t, db, `SELECT count(*) FROM events WHERE tenant = 'app'`)
	for what, err := range map[string]error{
		"another guess": ann.start(ctx, other),
		"the finish":    second(ann.end(ctx, charged)),
		"a new key":     second(d.phone(at(v), "carl").enrol(ctx, "carl's")),
	} {
		var r *refused
		if !errors.As(err, &r) || r.status != 503 || r.problem() != "store-unavailable" || r.header.Get("Retry-After") == "" {
			t.Errorf("%s, on a full disk: %v", what, err)
		}
	}
	if o := run(t, ownerEnv(t, d.dir, db), "vaultctl", "tenant", "add", "another"); o.code != 1 || !strings.Contains(o.stderr, "SQLSTATE 53100") || !strings.Contains(o.stderr, "No space left on device") {
		t.Errorf("adding a tenant on a full disk: %d, %s", o.code, o.stderr)
	}
	if n := query[int64](t, db, `SELECT count(*) FROM tenants WHERE id = 'another'`); n != 0 {
		t.Error("the tenant was added without its event")
	}
	if n, events := d.started(t, "ann"), query[int64](t, db, `SELECT count(*) FROM events WHERE tenant = 'app'`); n != 1 || events != before {
		t.Errorf("%d attempts are counted after one guess, and %d events more", n, events-before)
	}
	// What needs no event is served: reading, and the answer to the guess that was charged.
	if err := ann.start(ctx, charged); err != nil {
		t.Errorf("the charged guess, sent again: %v", err)
	}
	if s, err := bob.Status(ctx); err != nil || s.AttemptsLeft != 10 {
		t.Errorf("the status: %+v, %v", s, err)
	}
	if ready, failing := readiness(t, v); !ready {
		t.Errorf("not ready: %v", failing)
	}
	if log := v.log.String(); !strings.Contains(log, "53100") || !strings.Contains(log, "No space left on device") {
		t.Error("the log does not say that the disk is full")
	}

	free()
	if got, err := ann.end(ctx, charged); err != nil || got != key {
		t.Errorf("finishing the charged guess: %v", err)
	}
	if _, err := bob.Recover(ctx, "bob's"); err != nil {
		t.Error(err)
	}
	settled(t, db)
	newAuditor(t, d).says(t, 0, `^proved`, ``, "verify")
	v.stop(t)
}
