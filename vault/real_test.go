package vault_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/opaque/opaquetest"
	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/store/storetest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

// The tests of this file run on a real SoftHSM token and a real Postgres.

// countingToken counts the distinct points that the token multiplied by the OPRF key.
type countingToken struct {
	vault.Token
	mu        sync.Mutex
	evaluated map[[33]byte]bool
}

func (c *countingToken) Multiply(ctx context.Context, purpose string, generation uint32, point [33]byte) ([33]byte, error) {
	if purpose == pkcs11util.OPRF {
		c.mu.Lock()
		c.evaluated[point] = true
		c.mu.Unlock()
	}
	return c.Token.Multiply(ctx, purpose, generation, point)
}

func (c *countingToken) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.evaluated)
}

// real is a deployment: one database, one token, any number of instances.
type real struct {
	db    *storetest.Database
	token *countingToken
}

func newReal(t testing.TB) *real {
	t.Helper()
	return realOn(t, storetest.New(t))
}

func realOn(t testing.TB, db *storetest.Database) *real {
	t.Helper()
	if err := db.OwnerStore(t).AddTenant(t.Context(), vault.Tenant{ID: "app", Policy: vault.DefaultPolicy()}); err != nil {
		t.Fatal(err)
	}
	return &real{db: db, token: &countingToken{Token: tokentest.New(t).Keyset, evaluated: map[[33]byte]bool{}}}
}

// instance is a vault with connections of its own.
func (r *real) instance(t testing.TB) *vault.Vault {
	t.Helper()
	return r.instanceOn(t, r.db.Store(t))
}

func (r *real) instanceOn(t testing.TB, s vault.Store) *vault.Vault {
	t.Helper()
	v, err := vault.New(vault.Config{ID: vaultID, Store: s, Token: r.token})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func deviceOf(v *vault.Vault, user string) *vaulttest.Device {
	policy := vault.DefaultPolicy()
	policy.Delays = nil
	return &vaulttest.Device{Vault: v, VaultID: vaultID, Caller: vault.Caller{
		Account: vault.AccountID{Tenant: "app", User: user}, Policy: policy, RequestID: "r",
	}}
}

func TestRealEnrolRecoverDestroy(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	d := deviceOf(r.instance(t), "ann/ünï ☺")
	e := d.MustEnrol(t, "right", nil)
	if key, err := d.Recover(t.Context(), "right"); err != nil || key != e.Key {
		t.Fatalf("recovering: %v", err)
	}
	for left := 9; left >= 1; left-- {
		var wrong *vault.WrongPassword
		if _, err := d.Recover(t.Context(), "wrong"); !errors.As(err, &wrong) || wrong.AttemptsLeft != left {
			t.Fatalf("got %v, want %d attempts left", err, left)
		}
	}
	for _, password := range []string{"wrong", "right"} {
		if _, err := d.Recover(t.Context(), password); !errors.Is(err, vault.ErrKeyDestroyed) {
			t.Fatalf("got %v, want the key destroyed", err)
		}
	}
	if n := r.db.Exec(t, "UPDATE generations SET sealed = sealed WHERE sealed IS NOT NULL"); n != 0 {
		t.Fatal("the database still holds a sealed record")
	}
}

// One attempt is left, many devices race for it over several instances: one evaluation.
func TestRaceForTheLastAttempt(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	instances := []*vault.Vault{r.instance(t), r.instance(t), r.instance(t)}
	first := deviceOf(instances[0], "ann")
	e := first.MustEnrol(t, "right", nil)
	for range 9 {
		_, _ = first.Recover(t.Context(), "wrong")
	}
	before := r.token.count()
	var answered, early, other atomic.Int32
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			d := deviceOf(instances[i%len(instances)], "ann")
			g, err := d.NewGuess("wrong", e.Generation)
			if err != nil {
				t.Error(err)
				return
			}
			var tooEarly *vault.TooEarly
			switch err := d.Send(t.Context(), g); {
			case err == nil:
				answered.Add(1)
			case errors.As(err, &tooEarly):
				early.Add(1)
			default:
				other.Add(1)
				t.Errorf("racing: %v", err)
			}
		})
	}
	wg.Wait()
	if evaluated := r.token.count() - before; evaluated != 1 || answered.Load() != 1 || early.Load() != 23 {
		t.Fatalf("%d evaluations, %d answered, %d refused", evaluated, answered.Load(), early.Load())
	}
}

// The same guess, sent by many at once: all are answered, one attempt is charged.
func TestSameGuessRaces(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	instances := []*vault.Vault{r.instance(t), r.instance(t)}
	d := deviceOf(instances[0], "ann")
	e := d.MustEnrol(t, "right", nil)
	g, err := d.NewGuess("right", e.Generation)
	if err != nil {
		t.Fatal(err)
	}
	g.Start.Attempt = 1
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			started, err := instances[i%2].StartRecovery(t.Context(), d.Caller, g.Start)
			if err != nil || started.Attempt != 1 || started.AttemptsLeft != 9 {
				t.Errorf("%+v, %v", started, err)
			}
		})
	}
	wg.Wait()
}

// Faults at every write of every operation, in pairs: failed and not written, failed
// and written all the same. The device sends the same bytes again, as the SDK does.
func TestFaultsAtEveryWrite(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	healthy := r.db.Store(t)
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			faults := &faultyStore{Store: healthy}
			d := deviceOf(r.instanceOn(t, faults), "user-"+when)
			charged := 0
			// again runs a step until it succeeds: once with the fault, then without.
			again := func(what string, step func() error) {
				t.Helper()
				faults.armed = when
				err := step()
				if !errors.Is(err, vault.ErrStoreUnavailable) {
					t.Fatalf("%s with a fault: %v", what, err)
				}
				if err := step(); err != nil {
					t.Fatalf("%s again: %v", what, err)
				}
			}
			enrol := func(password string, previous *vaulttest.Enrolment) *vaulttest.Enrolment {
				e, err := d.Prepare(t.Context(), password)
				if err != nil {
					t.Fatal(err)
				}
				again("stage", func() error { return d.Stage(t.Context(), e) })
				again("activate", func() error {
					_, err := d.Vault.Activate(t.Context(), d.Caller, d.Activation(e, previous))
					return err
				})
				return e
			}
			recover := func(password string, want *vaulttest.Enrolment) {
				g, err := d.NewGuess(password, want.Generation)
				if err != nil {
					t.Fatal(err)
				}
				before := r.token.count()
				again("start", func() error { return d.Send(t.Context(), g) })
				charged++
				if n := r.token.count() - before; n != 1 {
					t.Fatalf("%d distinct evaluations for one guess", n)
				}
				again("finish", func() error {
					key, err := d.Finish(t.Context(), g)
					if err == nil && key != want.Key {
						return errors.New("another key")
					}
					return err
				})
			}
			first := enrol("first", nil)
			recover("first", first)
			second := enrol("second", first)
			recover("second", second)
			// Ten wrong ones, each with a fault at start and at finish.
			for n := range 10 {
				g, err := d.NewGuess("wrong", second.Generation)
				if err != nil {
					t.Fatal(err)
				}
				again("wrong start", func() error { return d.Send(t.Context(), g) })
				faults.armed = when
				if _, err := d.Finish(t.Context(), g); !errors.Is(err, vault.ErrStoreUnavailable) {
					t.Fatal(err)
				}
				_, err = d.Finish(t.Context(), g)
				var wrong *vault.WrongPassword
				if n < 9 && (!errors.As(err, &wrong) || wrong.AttemptsLeft != 9-n) || n == 9 && !errors.Is(err, vault.ErrKeyDestroyed) {
					t.Fatalf("wrong attempt %d: %v", n+1, err)
				}
			}
			if _, err := d.Recover(t.Context(), "second"); !errors.Is(err, vault.ErrKeyDestroyed) {
				t.Fatalf("a destroyed key came back: %v", err)
			}
		})
	}
}

// A hand in the database: every edit is refused and reported, and reveals nothing.
func TestEditedRowsAreRefused(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	var log lockedBuffer
	v, err := vault.New(vault.Config{ID: vaultID, Store: r.db.Store(t), Token: r.token, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ann, bob := deviceOf(v, "ann"), deviceOf(v, "bob")
	mine := ann.MustEnrol(t, "right", nil)
	if _, err := ann.Recover(t.Context(), "wrong"); err == nil {
		t.Fatal("a wrong password was right")
	}
	bob.MustEnrol(t, "bob's", nil)
	const annRow = `tenant = 'app' AND user_id = 'ann'::bytea`
	for name, sql := range map[string]string{
		"attempts refunded":      `UPDATE generations SET started = last_success, attempts = '[]' WHERE ` + annRow,
		"a success made up":      `UPDATE generations SET last_success = started, successes = 1, attempts = '[]' WHERE ` + annRow,
		"an attempt left out":    `UPDATE generations SET attempts = '[]' WHERE ` + annRow,
		"a claim changed":        `UPDATE generations SET attempts = replace(attempts::text, substr(attempts->0->>'claim', 1, 8), '00000000')::jsonb WHERE ` + annRow,
		"a later expiry":         `UPDATE generations SET attempts = replace(attempts::text, '"failed"', '"open"')::jsonb WHERE ` + annRow,
		"attempts unreadable":    `UPDATE generations SET attempts = '[{}]' WHERE ` + annRow,
		"delays loosened":        `UPDATE accounts SET delays = '{1 hour}' WHERE ` + annRow,
		"a longer grace":         `UPDATE accounts SET grace = grace + interval '1 hour' WHERE ` + annRow,
		"fewer attempts":         `UPDATE accounts SET max_attempts = 5 WHERE ` + annRow,
		"the head moved":         `UPDATE accounts SET head = NULL WHERE ` + annRow,
		"the MAC replaced":       `UPDATE accounts SET mac = decode(repeat('ab', 32), 'hex') WHERE ` + annRow,
		"another mac key":        `UPDATE accounts SET mac_key = 2 WHERE ` + annRow,
		"another pseudonym":      `UPDATE accounts SET pseudonym = decode(repeat('cd', 32), 'hex') WHERE ` + annRow,
		"another owner":          `UPDATE generations SET owner_key = (SELECT owner_key FROM generations WHERE user_id = 'bob'::bytea) WHERE ` + annRow,
		"bob's record":           `UPDATE generations SET sealed = (SELECT sealed FROM generations WHERE user_id = 'bob'::bytea) WHERE ` + annRow,
		"a bit of the record":    `UPDATE generations SET sealed = set_byte(sealed, 60, (get_byte(sealed, 60) + 1) % 256) WHERE ` + annRow,
		"bob's id":               `UPDATE generations SET generation_id = (SELECT generation_id FROM generations WHERE user_id = 'bob'::bytea) WHERE ` + annRow,
		"weaker stretching":      `UPDATE generations SET ksf_time = ksf_time + 1 WHERE ` + annRow,
		"another digest":         `UPDATE generations SET digest = decode(repeat('01', 32), 'hex') WHERE ` + annRow,
		"frozen":                 `UPDATE generations SET state = 'frozen', expires_at = now() + interval '1 day' WHERE ` + annRow,
		"another server key":     `UPDATE generations SET server_key = 2 WHERE ` + annRow,
		"an earlier creation":    `UPDATE generations SET created_at = created_at - interval '1 day' WHERE ` + annRow,
		"bob's account and rows": `UPDATE accounts SET mac = (SELECT mac FROM accounts WHERE user_id = 'bob'::bytea) WHERE ` + annRow,
	} {
		t.Run(name, func(t *testing.T) {
			r.db.Exec(t, `CREATE TABLE kept_accounts AS SELECT * FROM accounts`)
			r.db.Exec(t, `CREATE TABLE kept_generations AS SELECT * FROM generations`)
			if n := r.db.Exec(t, sql); n != 1 {
				t.Fatalf("the edit touched %d rows", n)
			}
			before := r.token.count()
			log.take()
			for what, do := range map[string]func() error{
				"status":  func() error { return errOf(ann.Vault.Status(t.Context(), ann.Caller)) },
				"start":   func() error { return errOf(ann.Recover(t.Context(), "right")) },
				"enrol":   func() error { return errOf(ann.Prepare(t.Context(), "new")) },
				"turnoff": func() error { return errOf(ann.Vault.TurnOff(t.Context(), ann.Caller, mine.Generation, nil)) },
			} {
				err := do()
				// A MAC key that the token does not have is the token's answer, not the row's.
				if !errors.Is(err, vault.ErrAccountFault) && (name != "another mac key" || !errors.Is(err, vault.ErrTokenUnavailable)) {
					t.Errorf("%s: got %v, want an account fault", what, err)
				}
			}
			if n := r.token.count(); n != before {
				t.Errorf("%d evaluations on an edited row", n-before)
			}
			if reported := log.take(); name != "another mac key" && strings.Count(reported, `msg="account fault"`) != 4 || strings.Contains(reported, "ann") {
				t.Errorf("reported: %s", reported)
			}
			if _, err := bob.Vault.Status(t.Context(), bob.Caller); err != nil {
				t.Errorf("the others are served: %v", err)
			}
			r.db.Exec(t, `DELETE FROM generations`)
			r.db.Exec(t, `DELETE FROM accounts`)
			r.db.Exec(t, `INSERT INTO accounts SELECT * FROM kept_accounts`)
			r.db.Exec(t, `INSERT INTO generations SELECT * FROM kept_generations`)
			r.db.Exec(t, `DROP TABLE kept_accounts`)
			r.db.Exec(t, `DROP TABLE kept_generations`)
		})
	}
	if key, err := ann.Recover(t.Context(), "right"); err != nil || key != mine.Key {
		t.Fatalf("with the row as it was: %v", err)
	}
}

// lockedBuffer is a log that a test reads while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// take returns what was written since the last call.
func (b *lockedBuffer) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.buf.Reset()
	return b.buf.String()
}

// What is where. The database, without the token, must hold nothing from which a password
// could be tested: not the record, its masking key or envelope, not t_u, not the wrapped
// key. This lists every column that holds account data; a new one has to be put here.
func TestADumpGivesNothingToGuessWith(t *testing.T) {
	t.Parallel()
	r := newReal(t)
	d := deviceOf(r.instance(t), "ann")
	e := d.MustEnrol(t, "correct horse battery staple", nil)
	g, err := d.NewGuess("correct horse battery staple", e.Generation)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Send(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Finish(t.Context(), g); err != nil {
		t.Fatal(err)
	}

	conn, err := pgx.Connect(t.Context(), r.db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), `SELECT table_name || '.' || column_name FROM information_schema.columns
		WHERE table_schema = 'public' AND table_name IN ('accounts', 'generations', 'events') ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	columns, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]string{ // column → why it tells nothing about the password
		"accounts": "tenant user_id pseudonym max_attempts delays grace head next_number mac_key mac due_at created_at updated_at",
		"generations": "tenant user_id number generation_id follows state reason created_at expires_at digest owner_key " +
			"ksf_time ksf_memory_kib ksf_threads sealed oprf_key server_key strategy started last_success successes attempts destroyed_at",
		"events": "id at kind tenant pseudonym generation_id attempt reason request_id purpose key_generation operator detail login",
	}
	for _, c := range columns {
		table, column, _ := strings.Cut(c, ".")
		if !slices.Contains(strings.Fields(known[table]), column) {
			t.Errorf("column %s is new: say why it tells nothing about the password", c)
		}
	}

	var dump strings.Builder
	for _, table := range []string{"accounts", "generations", "events", "tenants", "tenant_keys"} {
		rows, err := conn.Query(t.Context(), `SELECT row_to_json(x)::text FROM `+table+` AS x`)
		if err != nil {
			t.Fatal(err)
		}
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		dump.WriteString(strings.Join(lines, "\n"))
	}
	text := dump.String()
	occurs := func(b []byte) bool {
		return strings.Contains(text, hex.EncodeToString(b)) || strings.Contains(text, string(b)) ||
			strings.Contains(text, base64.StdEncoding.EncodeToString(b)) || strings.Contains(text, base64.RawURLEncoding.EncodeToString(b))
	}
	record := e.Staging.Record
	for name, secret := range map[string][]byte{
		"the password":          []byte("correct horse"),
		"the backup key":        e.Key[:],
		"client public key":     record[1:33],
		"masking key":           record[33:65],
		"envelope nonce":        record[65:97],
		"envelope tag":          record[97:129],
		"wrapped key":           e.Staging.WrappedKey[12:44],
		"the attempt's KE1":     g.KE1[1:33],
		"the vault's masked":    g.Started.KE2[65:97],
		"the state it gave out": g.Started.State[48:80],
	} {
		if occurs(secret) {
			t.Errorf("the database holds %s", name)
		}
	}
	// The search finds what is there.
	for name, public := range map[string][]byte{"owner key": e.Staging.OwnerKey[:], "generation id": e.Generation[:], "digest": e.Digest[:]} {
		if !occurs(public) {
			t.Errorf("the search does not find the %s, which is stored in clear", name)
		}
	}
	// The digest is in clear and covers the record: it must not let a guess be tested. It
	// cannot, because the record's masking key comes from the OPRF output, which needs k0.
}

// RFC 9807 C.1.5, C.1.6 and C.2.3, with their private keys imported into a token.
func TestVectorsThroughTheToken(t *testing.T) {
	t.Parallel()
	real, fake := opaquetest.Vectors(t)
	ran := 0
	for i, vector := range []opaquetest.Vector{real[0], real[1], fake} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			oprfKey, serverKey := vector.OPRFKey(t), vector.ServerPrivateKey(t)
			keys := tokentest.Import(t, map[string][32]byte{pkcs11util.OPRF: oprfKey, pkcs11util.Server: serverKey}).Keyset
			ke2, finish, err := opaque.GenerateKE2(t.Context(), vector.Session(), vector.ServerRandomness(), vector.Record(t), vector.KE1(t),
				tokenKey{keys, pkcs11util.Server}, tokenKey{keys, pkcs11util.OPRF})
			if err != nil {
				t.Fatal(err)
			}
			if string(ke2[:]) != string(vector.Outputs.KE2) {
				t.Errorf("KE2 is\n%x, want\n%x", ke2, vector.Outputs.KE2)
			}
			if len(vector.Outputs.SessionKey) > 0 && string(finish.SessionKey[:]) != string(vector.Outputs.SessionKey) {
				t.Error("the session key differs")
			}
			if len(vector.Outputs.RegistrationRequest) > 0 {
				request, err := opaque.ParseRegistrationRequest(vector.Outputs.RegistrationRequest)
				if err != nil {
					t.Fatal(err)
				}
				public, err := keys.PublicKey(pkcs11util.Server, 1)
				if err != nil {
					t.Fatal(err)
				}
				response, err := opaque.CreateRegistrationResponse(t.Context(), request, opaque.PublicKey(public), tokenKey{keys, pkcs11util.OPRF})
				if err != nil || string(response[:]) != string(vector.Outputs.RegistrationResponse) {
					t.Errorf("registration response: %x, %v", response, err)
				}
			}
		})
		ran++
	}
	if ran != 3 {
		t.Fatalf("%d vectors ran, want 3", ran)
	}
}

// tokenKey is a key in the token without a record's share: the RFC's own setting.
type tokenKey struct {
	keys    *pkcs11util.Keyset
	purpose string
}

func (k tokenKey) PublicKey() opaque.PublicKey {
	public, err := k.keys.PublicKey(k.purpose, 1)
	if err != nil {
		panic(err)
	}
	return opaque.PublicKey(public)
}

func (k tokenKey) Multiply(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	return k.keys.Multiply(ctx, k.purpose, 1, p)
}

func (k tokenKey) Evaluate(ctx context.Context, p opaque.Element) (opaque.Element, error) {
	return k.Multiply(ctx, p)
}

// Postgres away in the middle: an attempt that was charged stays charged, and open to the same bytes.
func TestPostgresAway(t *testing.T) {
	t.Parallel()
	cluster := storetest.NewCluster(t)
	r := realOn(t, cluster.Database(t))
	d := deviceOf(r.instance(t), "ann")
	e := d.MustEnrol(t, "right", nil)
	g, err := d.NewGuess("right", e.Generation)
	if err != nil {
		t.Fatal(err)
	}
	g.Start.Attempt = 1
	if err := d.Send(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	cluster.Stop(t)
	for _, err := range []error{d.Send(t.Context(), g), errOf(d.Finish(t.Context(), g)), errOf(d.Vault.Status(t.Context(), d.Caller))} {
		if !errors.Is(err, vault.ErrStoreUnavailable) {
			t.Errorf("with Postgres away: %v", err)
		}
	}
	cluster.Start(t)
	deadline := time.Now().Add(30 * time.Second)
	for err = d.Send(t.Context(), g); err != nil && time.Now().Before(deadline); err = d.Send(t.Context(), g) {
		if !errors.Is(err, vault.ErrStoreUnavailable) {
			t.Fatalf("with Postgres back: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil || g.Started.Attempt != 1 || g.Started.AttemptsLeft != 9 {
		t.Fatalf("the same bytes: %+v, %v", g.Started, err)
	}
	if key, err := d.Finish(t.Context(), g); err != nil || key != e.Key {
		t.Fatal(err)
	}
}
