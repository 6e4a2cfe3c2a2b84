package client_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backup-key-vault/bkv/api"
	"github.com/backup-key-vault/bkv/backup"
	"github.com/backup-key-vault/bkv/client"
	"github.com/backup-key-vault/bkv/opaque"
	"github.com/backup-key-vault/bkv/transcript"
	"github.com/backup-key-vault/bkv/vault"
)

// edit changes a JSON answer as the type that it is.
func edit[T any](r *client.Response, change func(*T)) {
	var v T
	if json.Unmarshal(r.Body, &v) == nil {
		change(&v)
		r.Body, _ = json.Marshal(v)
	}
}

// Whoever cannot show the pinned identity gets nothing: no token, no user, no password.
func TestNotThePinnedVault(t *testing.T) {
	s, other := newService(t), newService(t)
	var foreignVault api.Vault
	answer, err := inProcess{other.handler}.RoundTrip(t.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(answer.Body, &foreignVault); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(*api.Vault)
		want   error
	}{
		"another vault":          {func(v *api.Vault) { *v = foreignVault }, client.ErrWrongVault},
		"another id":             {func(v *api.Vault) { v.ID = "vault.exampl" }, client.ErrWrongVault},
		"another identity key":   {func(v *api.Vault) { v.IdentityKey = foreignVault.IdentityKey }, client.ErrWrongVault},
		"another vault's list":   {func(v *api.Vault) { v.Keys = foreignVault.Keys }, client.ErrWrongVault},
		"no identity key":        {func(v *api.Vault) { v.IdentityKey = nil }, client.ErrWrongVault},
		"another server key":     {func(v *api.Vault) { v.Keys.Keys[0].PublicKey = foreignVault.Keys.Keys[0].PublicKey }, client.ErrWrongVault},
		"one more key":           {func(v *api.Vault) { v.Keys.Keys = append(v.Keys.Keys, foreignVault.Keys.Keys[0]) }, client.ErrWrongVault},
		"no keys":                {func(v *api.Vault) { v.Keys.Keys = nil }, client.ErrWrongVault},
		"another purpose":        {func(v *api.Vault) { v.Keys.Keys[0].Purpose = "relay" }, client.ErrWrongVault},
		"another key generation": {func(v *api.Vault) { v.Keys.Keys[0].Generation++ }, client.ErrWrongVault},
		"a higher serial":        {func(v *api.Vault) { v.Keys.Serial++ }, client.ErrWrongVault},
		"a longer validity":      {func(v *api.Vault) { v.Keys.Expires = v.Keys.Expires.Add(time.Second) }, client.ErrWrongVault},
		"an earlier validity":    {func(v *api.Vault) { v.Keys.NotBefore = v.Keys.NotBefore.Add(-time.Second) }, client.ErrWrongVault},
		"a flipped bit":          {func(v *api.Vault) { v.Keys.Signature[63] ^= 1 }, client.ErrWrongVault},
		"a short signature":      {func(v *api.Vault) { v.Keys.Signature = v.Keys.Signature[:63] }, client.ErrWrongVault},
		"a zero signature":       {func(v *api.Vault) { clear(v.Keys.Signature) }, client.ErrWrongVault},
		"no signature":           {func(v *api.Vault) { v.Keys.Signature = nil }, client.ErrWrongVault},
		"another suite":          {func(v *api.Vault) { v.Suite = "OPAQUE-3DH/ristretto255" }, client.ErrWrongVault},
	} {
		d, w := s.device("alice")
		w.set(func(w *wire) {
			w.tamper = func(step string, r *client.Response) {
				if step == "GET /v1/vault" {
					edit(r, test.change)
				}
			}
		})
		key := backup.Key{1}
		ctx := t.Context()
		for op, run := range map[string]func() error{
			"enrol":     func() error { _, err := d.Enrol(ctx, "password"); return err },
			"recover":   func() error { _, err := d.Recover(ctx, "password"); return err },
			"change":    func() error { _, err := d.ChangePassword(ctx, key, "password"); return err },
			"status":    func() error { _, err := d.Status(ctx); return err },
			"turn off":  func() error { return d.TurnOff(ctx, key) },
			"reinstate": func() error { return d.Reinstate(ctx, key) },
		} {
			if err := run(); !errors.Is(err, test.want) {
				t.Errorf("%s, %s: %v", name, op, err)
			}
			for _, sent := range w.take() {
				if sent.step != "GET /v1/vault" || sent.request.Header["authorization"] != "" || len(sent.request.Body) != 0 {
					t.Errorf("%s, %s: sent %s", name, op, sent.step)
				}
			}
		}
	}
}

func TestDeviceClock(t *testing.T) {
	s := newService(t)
	for name, test := range map[string]struct {
		off  time.Duration
		good bool
	}{
		"right":             {0, true},
		"an hour slow":      {-time.Hour, true},
		"a day slow":        {-24 * time.Hour, false},
		"a day fast":        {24 * time.Hour, true}, // lists hold for a week
		"a month fast":      {30 * 24 * time.Hour, false},
		"never set at all":  {-50 * 365 * 24 * time.Hour, false},
		"an hour and a bit": {-2*time.Hour - time.Minute, false},
	} {
		w := &wire{next: inProcess{s.handler}}
		config := s.config("alice", w)
		config.Now = func() time.Time { return time.Now().Add(test.off) }
		_, err := newClient(t, config).Status(t.Context())
		if good := errors.Is(err, client.ErrNotEnrolled); good != test.good || !good && !errors.Is(err, client.ErrStaleKeys) {
			t.Errorf("%s: %v", name, err)
		}
		if !test.good && (!strings.Contains(err.Error(), "clock") || len(w.take()) != 1) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOldSerialIsRefused(t *testing.T) {
	s := newService(t)
	d, _ := s.device("alice")
	if d.Serial() != 0 {
		t.Error("a serial before anything was seen")
	}
	if _, err := d.Status(t.Context()); !errors.Is(err, client.ErrNotEnrolled) {
		t.Fatal(err)
	}
	seen := d.Serial()
	if seen == 0 {
		t.Fatal("no serial was kept")
	}
	config := s.config("alice", inProcess{s.handler})
	config.LastSerial = seen
	if _, err := newClient(t, config).Status(t.Context()); !errors.Is(err, client.ErrNotEnrolled) {
		t.Errorf("the same serial: %v", err)
	}
	config.LastSerial = seen + 1
	if _, err := newClient(t, config).Status(t.Context()); !errors.Is(err, client.ErrStaleKeys) {
		t.Errorf("an older serial: %v", err)
	}
}

// The identity is asked for once while its list holds, and again when it has expired.
func TestIdentityIsKept(t *testing.T) {
	s := newService(t)
	w := &wire{next: inProcess{s.handler}}
	config := s.config("alice", w)
	now := time.Now()
	config.Now = func() time.Time { return now }
	d := newClient(t, config)
	fetched := func() int {
		_, err := d.Status(t.Context())
		if err != nil && !errors.Is(err, client.ErrNotEnrolled) && !errors.Is(err, client.ErrStaleKeys) {
			t.Fatal(err)
		}
		n := 0
		for _, s := range w.take() {
			if s.step == "GET /v1/vault" {
				n++
			}
		}
		return n
	}
	if n := fetched(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	if n := fetched(); n != 0 {
		t.Errorf("fetched again while it holds: %d", n)
	}
	now = now.Add(7*24*time.Hour + time.Minute)
	if n := fetched(); n != 1 {
		t.Errorf("fetched %d times after it expired", n)
	}
}

// A vault that answers an enrolment with a server key that it does not vouch for gets no record.
func TestUnlistedServerKey(t *testing.T) {
	s, other := newService(t), newService(t)
	d, w := s.device("alice")
	key, err := other.token.PublicKey("server", 1)
	if err != nil {
		t.Fatal(err)
	}
	w.set(func(w *wire) {
		w.tamper = func(step string, r *client.Response) {
			if step == "POST backup-key/enrolment" {
				edit(r, func(a *api.StartEnrolmentResponse) { copy(a.RegistrationResponse[33:], key[:]) })
			}
		}
	})
	if _, err := d.Enrol(t.Context(), "password"); !errors.Is(err, client.ErrWrongVault) {
		t.Errorf("got: %v", err)
	}
	// The list is asked for once more, for it might have been older than the key.
	want := []string{"GET /v1/vault", "GET backup-key", "POST backup-key/enrolment", "GET /v1/vault"}
	if got := steps(w.take()); !slices.Equal(got, want) {
		t.Errorf("sent %q", got)
	}
}

// A login with a server key that the vault has taken off its list does not get a right proof.
func TestServerKeyTakenOffTheList(t *testing.T) {
	s, other := newService(t), newService(t)
	d, _ := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	key, err := other.token.PublicKey("server", 1)
	if err != nil {
		t.Fatal(err)
	}
	fresh, w := s.device("alice")
	w.set(func(w *wire) {
		w.tamper = func(step string, r *client.Response) {
			if step != "GET /v1/vault" {
				return
			}
			edit(r, func(v *api.Vault) {
				v.Keys.Keys = []api.Key{{Purpose: "server", Generation: 2, PublicKey: key[:]}}
				list := transcript.KeyList{
					Vault: v.ID, Serial: v.Keys.Serial, NotBefore: v.Keys.NotBefore.Unix(), Expires: v.Keys.Expires.Unix(),
					Keys: []transcript.ListedKey{{Purpose: "server", Generation: 2, Key: key[:]}},
				}
				signature, err := s.token.Sign(t.Context(), "identity", 1, list.Digest())
				if err != nil {
					t.Error(err)
				}
				v.Keys.Signature = signature[:]
			})
		}
	})
	if _, err := fresh.Recover(t.Context(), "right"); !errors.Is(err, client.ErrWrongVault) {
		t.Errorf("got: %v", err)
	}
	want := append(slices.Clone(recoverSteps[:3]), "GET /v1/vault", recoverSteps[3])
	if got := steps(w.take()); !slices.Equal(got, want) {
		t.Errorf("sent %q", got)
	}
	if failed, ok := s.store.Count(vault.EventFailure), s.store.Count(vault.EventSuccess); failed != 1 || ok != 0 {
		t.Errorf("%d failures and %d successes", failed, ok)
	}
}

// Every answer to a start that cannot be opened is finished with random bytes. Seen from the
// relay, all of these look alike, and like a success.
func TestFinishIsAlwaysSent(t *testing.T) {
	type start = api.StartRecoveryResponse
	s := newService(t)
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for name, test := range map[string]struct {
		change func(*start)
		want   error
	}{
		"weak stretching":       {func(a *start) { a.KSF.MemoryKiB = 8 }, opaque.ErrArgon2idBounds},
		"one pass less":         {func(a *start) { a.KSF.Time-- }, opaque.ErrArgon2idBounds},
		"huge stretching":       {func(a *start) { a.KSF.MemoryKiB = 1 << 31 }, opaque.ErrArgon2idBounds},
		"endless stretching":    {func(a *start) { a.KSF.Time = 1 << 31 }, opaque.ErrArgon2idBounds},
		"threads that wrap":     {func(a *start) { a.KSF.Threads = 256 + 4 }, opaque.ErrArgon2idBounds},
		"no stretching":         {func(a *start) { a.KSF = api.KSF{} }, opaque.ErrArgon2idBounds},
		"another KSF":           {func(a *start) { a.KSF.Algorithm = "scrypt" }, opaque.ErrArgon2idBounds},
		"a short KE2":           {func(a *start) { a.KE2 = a.KE2[:258] }, client.ErrBadResponse},
		"no KE2":                {func(a *start) { a.KE2 = nil }, client.ErrBadResponse},
		"a point off the curve": {func(a *start) { copy(a.KE2[1:33], bytes.Repeat([]byte{0xff}, 32)) }, client.ErrBadResponse},
		"another generation":    {func(a *start) { a.Generation[0] ^= 1 }, client.ErrBadResponse},
		"another attempt":       {func(a *start) { a.Attempt++ }, client.ErrBadResponse},
		"a false server MAC":    {func(a *start) { a.KE2[258] ^= 1 }, client.ErrWrongVault},
		"other nonces":          {func(a *start) { a.KE2[33] ^= 1 }, &client.WrongPasswordError{}}, // looks like one
	} {
		w.take()
		w.set(func(w *wire) {
			w.tamper = func(step string, r *client.Response) {
				if step == "POST backup-key/recovery" {
					edit(r, test.change)
				}
			}
		})
		_, err := d.Recover(t.Context(), "right")
		var wrong, wantWrong *client.WrongPasswordError
		if isWrong := errors.As(err, &wrong); errors.As(test.want, &wantWrong) != isWrong || !isWrong && !errors.Is(err, test.want) {
			t.Errorf("%s: got: %v", name, err)
		}
		if got := steps(w.take()); !slices.Equal(got, recoverSteps[1:]) {
			t.Errorf("%s: sent %q", name, got)
		}
		if failed++; s.store.Count(vault.EventFailure) != failed {
			t.Errorf("%s: the vault learned of %d failures, want %d", name, s.store.Count(vault.EventFailure), failed)
		}
		if failed%8 == 0 { // before the attempts run out
			w.set(func(w *wire) { w.tamper = nil })
			mustRecover(t, d, "right")
		}
	}
}

// A success and a failure are the same sequence of requests of the same sizes.
func TestRelaySeesNoDifference(t *testing.T) {
	s := newService(t)
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	var seen [2][]string
	for i, password := range []string{"right", "wrong"} {
		w.take()
		_, _ = d.Recover(t.Context(), password)
		for _, r := range w.take() {
			seen[i] = append(seen[i], fmt.Sprintf("%s %d", r.step, len(r.request.Body)))
		}
	}
	if !slices.Equal(seen[0], seen[1]) || len(seen[0]) != 3 {
		t.Errorf("right: %q, wrong: %q", seen[0], seen[1])
	}
	// Random bytes are not the same bytes twice.
	bodies := map[string]bool{}
	for range 2 {
		w.take()
		_, _ = d.Recover(t.Context(), "wrong")
		all := w.take()
		var finish api.FinishRecoveryRequest
		if err := json.Unmarshal(all[len(all)-1].request.Body, &finish); err != nil {
			t.Fatal(err)
		}
		bodies[string(finish.KE3)] = true
		if len(finish.KE3) != opaque.KE3Size || bytes.Equal(finish.KE3, make([]byte, opaque.KE3Size)) {
			t.Errorf("KE3 is %x", finish.KE3)
		}
	}
	if len(bodies) != 2 {
		t.Error("the same random KE3 twice")
	}
}

// What could not be stretched costs no attempt where the status says so already.
func TestRefusedStretchingCostsNoAttempt(t *testing.T) {
	s := newService(t)
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	w.set(func(w *wire) {
		w.tamper = func(step string, r *client.Response) {
			if step == "GET backup-key" {
				edit(r, func(a *api.Status) { a.Generations[0].KSF.MemoryKiB = 1 << 30 })
			}
		}
	})
	if _, err := d.Recover(t.Context(), "right"); !errors.Is(err, opaque.ErrArgon2idBounds) {
		t.Errorf("got: %v", err)
	}
	if n := s.store.Count(vault.EventAttempt); n != 0 {
		t.Errorf("%d attempts were charged", n)
	}
}

// Answers to a finish, and to the steps of an enrolment, that no honest vault gives.
func TestFalseAnswers(t *testing.T) {
	enrolAnd := func(run func(*client.Client) error) func(*testing.T, *client.Client, *wire, func()) error {
		return func(t *testing.T, d *client.Client, w *wire, tamper func()) error {
			if _, err := d.Enrol(t.Context(), "right"); err != nil {
				t.Fatal(err)
			}
			tamper()
			return run(d)
		}
	}
	enrol := func(t *testing.T, d *client.Client, _ *wire, tamper func()) error {
		tamper()
		_, err := d.Enrol(t.Context(), "right")
		return err
	}
	recover := func(password string) func(*client.Client) error {
		return func(d *client.Client) error { _, err := d.Recover(t.Context(), password); return err }
	}
	const finish = "POST backup-key/recovery/finish"
	for name, test := range map[string]struct {
		run    func(*testing.T, *client.Client, *wire, func()) error
		step   string
		change func(*client.Response)
		want   error
	}{
		"a changed delivery": {enrolAnd(recover("right")), finish, func(r *client.Response) {
			edit(r, func(a *api.FinishRecoveryResponse) { a.SealedKey[20] ^= 1 })
		}, client.ErrBadResponse},
		"no delivery": {enrolAnd(recover("right")), finish, func(r *client.Response) {
			edit(r, func(a *api.FinishRecoveryResponse) { a.SealedKey = nil })
		}, client.ErrBadResponse},
		"another generation's": {enrolAnd(recover("right")), finish, func(r *client.Response) {
			edit(r, func(a *api.FinishRecoveryResponse) { a.Generation[3] ^= 1 })
		}, client.ErrBadResponse},
		"the right password refused": {enrolAnd(recover("right")), finish, func(r *client.Response) {
			*r = problem(403, api.WrongPassword, "")
			r.Body = []byte(`{"type":"urn:bkv:problem:wrong-password","attempts_left":9}`)
		}, client.ErrBadResponse},
		"a random proof accepted": {enrolAnd(recover("wrong")), finish, func(r *client.Response) {
			*r = client.Response{Status: 200, Body: []byte(`{"failures_total":0}`)}
		}, client.ErrBadResponse},
		"a state that is too long": {enrol, "POST backup-key/enrolment", func(r *client.Response) {
			edit(r, func(a *api.StartEnrolmentResponse) { a.State = make([]byte, 5000) })
		}, client.ErrBadResponse},
		"no state": {enrol, "POST backup-key/enrolment", func(r *client.Response) {
			edit(r, func(a *api.StartEnrolmentResponse) { a.State = nil })
		}, client.ErrBadResponse},
		"an enrolment without generation": {enrol, "POST backup-key/enrolment", func(r *client.Response) {
			edit(r, func(a *api.StartEnrolmentResponse) { a.Generation = api.GenerationID{} })
		}, client.ErrBadResponse},
		"a short registration response": {enrol, "POST backup-key/enrolment", func(r *client.Response) {
			edit(r, func(a *api.StartEnrolmentResponse) { a.RegistrationResponse = a.RegistrationResponse[:65] })
		}, client.ErrBadResponse},
		"an enrolment that follows another": {enrol, "POST backup-key/enrolment", func(r *client.Response) {
			edit(r, func(a *api.StartEnrolmentResponse) { a.Follows[0] = 1 })
		}, client.ErrConflict},
		"another record staged": {enrol, "PUT backup-key", func(r *client.Response) {
			edit(r, func(a *api.StageResponse) { a.Digest[0] ^= 1 })
		}, client.ErrBadResponse},
		"another generation activated": {enrol, "POST backup-key/activation", func(r *client.Response) {
			edit(r, func(a *api.Status) { a.Generations[0].ID[0] ^= 1 })
		}, client.ErrBadResponse},
		"a status without attempt number": {enrolAnd(recover("right")), "GET backup-key", func(r *client.Response) {
			edit(r, func(a *api.Status) { a.Generations[0].NextAttempt = 0 })
		}, client.ErrBadResponse},
		"a status with a short digest": {enrolAnd(func(d *client.Client) error { return d.TurnOff(t.Context(), backup.Key{}) }), "GET backup-key", func(r *client.Response) {
			edit(r, func(a *api.Status) { a.Generations[0].Digest = a.Generations[0].Digest[:31] })
		}, client.ErrBadResponse},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			d, w := s.device("alice")
			err := test.run(t, d, w, func() {
				w.set(func(w *wire) {
					w.tamper = func(step string, r *client.Response) {
						if step == test.step {
							test.change(r)
						}
					}
				})
			})
			var wrong *client.WrongPasswordError
			if !errors.Is(err, test.want) || errors.As(err, &wrong) {
				t.Errorf("got: %v", err)
			}
		})
	}
}

func TestConfigIsChecked(t *testing.T) {
	s := newService(t)
	for name, spoil := range map[string]func(*client.Config){
		"no transport":   func(c *client.Config) { c.Transport = nil },
		"no fingerprint": func(c *client.Config) { clear(c.Fingerprint[:]) },
		"no tenant":      func(c *client.Config) { c.Tenant = "" },
		"no user":        func(c *client.Config) { c.User = "" },
		"a broken user":  func(c *client.Config) { c.User = "\xff" },
		"no token":       func(c *client.Config) { c.Token = nil },
		"weak KSF":       func(c *client.Config) { c.KSF = opaque.Argon2id{Time: 1, MemoryKiB: 8, Threads: 1} },
		"huge KSF":       func(c *client.Config) { c.KSF = opaque.Argon2id{Time: 3, MemoryKiB: 1 << 30, Threads: 1} },
	} {
		config := s.config("alice", inProcess{s.handler})
		spoil(&config)
		if _, err := client.New(config); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestPasswords(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                   "plain",
		" spaces stay ":           " spaces stay ",
		"Case Stays":              "Case Stays",
		"no\u00a0break":           "no break",
		"ideographic\u3000space":  "ideographic space",
		"e\u0301":                 "\u00e9",
		"\u00e9":                  "\u00e9",
		"\u212b":                  "\u00c5",       // Angstrom sign
		"\uff41":                  "\uff41",       // full width stays
		"\ufb01":                  "\ufb01",       // ligature stays
		"\u1100\u1161":            "\uac00",       // Hangul
		"a\u0323\u0307":           "\u1ea1\u0307", // ạ with a dot above
		"a\u0307\u0323":           "\u1ea1\u0307",
		"tab\t and \x00 stay":     "tab\t and \x00 stay",
		"\u2003":                  " ",
		strings.Repeat("x", 1024): strings.Repeat("x", 1024),
	} {
		if err := client.CheckPassword(in); err != nil {
			t.Errorf("%q: %v", in, err)
		}
		if got, err := client.Normalise(in); err != nil || string(got) != want {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
	for name, in := range map[string]string{
		"empty":               "",
		"too long":            strings.Repeat("x", 1025),
		"too long afterwards": strings.Repeat("\U0001D160", 300), // four bytes become twelve
		"invalid UTF-8":       "a\xff",
		"a surrogate":         "\xed\xa0\x80",
	} {
		if err := client.CheckPassword(in); !errors.Is(err, client.ErrInvalidPassword) {
			t.Errorf("%q: %v", in, err)
		}
		if _, err := client.Normalise(in); !errors.Is(err, client.ErrInvalidPassword) || strings.Contains(err.Error(), in) && in != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := newService(t)
	d, w := s.device("alice")
	if _, err := d.Recover(t.Context(), ""); !errors.Is(err, client.ErrInvalidPassword) {
		t.Error(err)
	}
	if _, err := d.ChangePasswordWithOld(t.Context(), "old", "\xff"); !errors.Is(err, client.ErrInvalidPassword) {
		t.Error(err)
	}
	if got := w.take(); len(got) != 0 {
		t.Errorf("sent %q", steps(got))
	}
}

func FuzzNormalise(f *testing.F) {
	for _, s := range []string{"", "a\u0301", "\u00a0", "\xff", "\u1100\u1161", strings.Repeat("\U0001D160", 90)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		once, err := client.Normalise(s)
		if err != nil {
			return
		}
		if twice, err := client.Normalise(string(once)); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("%q becomes %q becomes %q, %v", s, once, twice, err)
		}
	})
}

// FuzzAnswers has a vault that shows its true identity and then answers anything at all.
func FuzzAnswers(f *testing.F) {
	s := newService(f)
	d, w := s.device("alice")
	if _, err := d.Enrol(f.Context(), "right"); err != nil {
		f.Fatal(err)
	}
	for _, password := range []string{"right", "wrong"} {
		_, _ = d.Recover(f.Context(), password)
	}
	for _, sent := range w.take() {
		f.Add(sent.answer.Status, sent.answer.Body, sent.answer.Header["retry-after"])
	}
	for _, kind := range []string{api.TooEarly, api.KeyDestroyed, api.Conflict, api.Forbidden, "x"} {
		p := problem(400, kind, "")
		f.Add(p.Status, p.Body, "1")
	}
	f.Add(200, []byte(`null`), "")
	f.Add(200, []byte(`{"tenant":"chat","generations":[{"id":"00000000000000000000000000000001","state":"active","digest":"AA","next_attempt":1,"ksf":{}}]}`), "")
	f.Add(403, []byte(`{"type":"urn:bkv:problem:wrong-password","attempts_left":-1}`), "")
	identity, err := inProcess{s.handler}.RoundTrip(f.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, status int, body []byte, retryAfter string) {
		var p api.Problem
		if status >= 502 && status <= 504 || json.Unmarshal(body, &p) == nil && p.Type == api.RateLimited {
			return // they are waited for
		}
		transport := &answering{
			vault:   constant{identity},
			answers: []client.Response{{Status: max(status, 1), Body: body, Header: map[string]string{"retry-after": retryAfter}}},
		}
		d := newClient(t, s.config("alice", transport))
		ctx := t.Context()
		if enrolled, err := d.Enrol(ctx, "right"); err == nil {
			t.Errorf("enrolled with nobody: %v", enrolled)
		}
		if _, err := d.Recover(ctx, "right"); err == nil {
			t.Error("recovered from nobody")
		}
		_, _ = d.ReplaceWithoutProof(ctx, "right", backup.Key{1})
		_ = d.TurnOff(ctx, backup.Key{})
		_ = d.TurnOffWithoutProof(ctx)
		_ = d.Reinstate(ctx, backup.Key{})
		if _, err := d.Status(ctx); err != nil && err.Error() == "" {
			t.Error("an error without a text")
		}
	})
}

// FuzzIdentity has anything at all say that it is the vault.
func FuzzIdentity(f *testing.F) {
	s := newService(f)
	identity, err := inProcess{s.handler}.RoundTrip(f.Context(), &client.Request{Method: "GET", Path: "/v1/vault"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(identity.Body)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		sent := 0
		d := newClient(t, s.config("alice", roundTripper(func(r *client.Request) *client.Response {
			if r.Path == "/v1/vault" {
				return &client.Response{Status: 200, Body: body}
			}
			sent++
			return &client.Response{Status: 418}
		})))
		_, err := d.Status(t.Context())
		if err == nil {
			t.Fatal("no error")
		}
		if sent > 0 { // it was believed, so it must say what the vault said
			var got, want api.Vault
			if json.Unmarshal(body, &got) != nil || json.Unmarshal(identity.Body, &want) != nil {
				t.Fatal("believed what is no JSON")
			}
			if got.ID != want.ID || !bytes.Equal(got.IdentityKey, want.IdentityKey) || fmt.Sprint(got.Keys) != fmt.Sprint(want.Keys) {
				t.Errorf("believed %s", body)
			}
		}
	})
}

// Nothing that a caller might print shows a key, a password or a token.
func TestNothingPrintsSecrets(t *testing.T) {
	s := newService(t)
	w := &wire{next: inProcess{s.handler}}
	config := s.config("alice", w)
	d := newClient(t, config)
	key := backup.Key(bytes.Repeat([]byte{0xa7}, backup.KeySize))
	const password = "correct horse battery staple"
	enrolled, err := d.EnrolKey(t.Context(), password, key)
	if err != nil {
		t.Fatal(err)
	}
	recovered := mustRecover(t, d, password)
	w.set(func(w *wire) {
		w.tamper = func(step string, r *client.Response) {
			if step == "POST backup-key/recovery/finish" || step == "POST backup-key/activation" {
				*r = client.Response{Status: 500}
			}
		}
	})
	_, pendingRecovery := d.Recover(t.Context(), password)
	_, pendingEnrolment := d.ChangePassword(t.Context(), key, password)
	var pr *client.PendingRecovery
	var pe *client.PendingEnrolment
	if !errors.As(pendingRecovery, &pr) || !errors.As(pendingEnrolment, &pe) {
		t.Fatalf("%v; %v", pendingRecovery, pendingEnrolment)
	}
	var out strings.Builder
	for _, v := range []any{d, enrolled, &enrolled, recovered, pr, *pr, pe, *pe} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	for _, secret := range []string{password, "636f7272656374", "a7a7a7", "167 167", "0xa7", "A7A7", "eyJ"} {
		if i := strings.Index(out.String(), secret); i >= 0 {
			t.Errorf("%q is printed: …%s…", secret, out.String()[max(0, i-80):min(out.Len(), i+80)])
		}
	}
}

// In the browser net/http would double the size of the program.
func TestNoNetHTTP(t *testing.T) {
	list := exec.Command("go", "list", "-deps", ".")
	list.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm", "CGO_ENABLED=0")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "golang.org/x/crypto/argon2") {
		t.Fatalf("this is no list of dependencies: %q", deps)
	}
	for _, bad := range []string{"net/http", "net", "crypto/tls", "os/exec"} {
		if slices.Contains(deps, bad) {
			t.Errorf("depends on %s", bad)
		}
	}
}

// The SDK sends the bodies that the vault's own strict reader takes, and asks for JSON.
func TestRequestHeaders(t *testing.T) {
	s := newService(t)
	d, w := s.device("alice")
	if _, err := d.Enrol(t.Context(), "right"); err != nil {
		t.Fatal(err)
	}
	for _, r := range w.take() {
		h := r.request.Header
		if h["accept"] != "application/json" || (h["content-type"] == "application/json") != (len(r.request.Body) > 0) {
			t.Errorf("%s: %v", r.step, h)
		}
		if (h["authorization"] == "") != (r.step == "GET /v1/vault") {
			t.Errorf("%s: token sent: %v", r.step, h["authorization"] != "")
		}
	}
}
