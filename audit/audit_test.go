package audit_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/nistec"

	"github.com/backup-key-vault/bkv/audit"
)

var start = time.Date(2026, 5, 6, 7, 8, 9, 123456000, time.UTC)

// vault signs as a token does.
type vault struct {
	identity *ecdsa.PrivateKey
	keys     []*ecdsa.PrivateKey // audit, by generation − 1
	log      audit.Log
}

func newVault(t testing.TB) *vault {
	t.Helper()
	v := &vault{}
	v.identity = newKey(t)
	v.log = audit.Log{VaultID: "a.vault", IdentityKey: compressed(v.identity)}
	v.keys = []*ecdsa.PrivateKey{newKey(t), newKey(t)}
	return v
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func compressed(k *ecdsa.PrivateKey) [33]byte {
	raw, err := k.PublicKey.Bytes()
	if err != nil {
		panic(err) // of this test's own making
	}
	point, err := nistec.NewP256Point().SetBytes(raw)
	if err != nil {
		panic(err)
	}
	return [33]byte(point.BytesCompressed())
}

func sign(t testing.TB, k *ecdsa.PrivateKey, digest [32]byte) (out [64]byte) {
	t.Helper()
	r, s, err := ecdsa.Sign(rand.Reader, k, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	r.FillBytes(out[:32])
	s.FillBytes(out[32:])
	return out
}

func (v *vault) checkpoint(t testing.TB, e *audit.Sealed, generation uint32) audit.Checkpoint {
	t.Helper()
	c := audit.Checkpoint{Sequence: e.Sequence, Hash: e.Hash, At: e.At.Add(time.Second), KeyGeneration: generation}
	c.Signature = sign(t, v.keys[generation-1], c.Digest(v.log.VaultID))
	return c
}

// source is a log in memory, as a database has it.
type source struct {
	keys        []audit.Key
	events      []audit.Sealed
	checkpoints []audit.Checkpoint
	stray, lost []uint64
}

// make is a log of n events with a checkpoint after every tenth, the later half by the second key.
func (v *vault) make(t testing.TB, n int) *source {
	t.Helper()
	s := &source{}
	for g := range v.keys {
		k := audit.Key{Generation: uint32(g + 1), PublicKey: compressed(v.keys[g])}
		k.Signature = sign(t, v.identity, k.Digest(v.log.VaultID))
		s.keys = append(s.keys, k)
	}
	for i := 1; i <= n; i++ {
		pseudonym := sha256.Sum256([]byte{byte(i % 7)})
		s.events = append(s.events, audit.Sealed{Event: audit.Event{
			ID: uint64(3 * i), At: start.Add(time.Duration(i) * time.Second), Kind: "attempt", Tenant: "app", Pseudonym: pseudonym[:],
			Generation: pseudonym[:16], Attempt: uint32(i), RequestID: fmt.Sprint("request ", i), Login: "vaultd",
		}})
	}
	v.seal(s.events, 1)
	for i := 10; i <= n; i += 10 {
		generation := uint32(1)
		if i > n/2 {
			generation = 2
		}
		s.checkpoints = append(s.checkpoints, v.checkpoint(t, &s.events[i-1], generation))
	}
	return s
}

// seal numbers and hashes events anew, from a number on.
func (v *vault) seal(events []audit.Sealed, from int) {
	previous := audit.Start(v.log.VaultID)
	for i := range events {
		e := &events[i]
		if i+1 >= from {
			e.Sequence = uint64(i + 1)
			e.Hash = audit.Next(previous, e.Sequence, &e.Event)
		}
		previous = e.Hash
	}
}

func (s *source) clone() *source {
	return &source{keys: slices.Clone(s.keys), events: slices.Clone(s.events), checkpoints: slices.Clone(s.checkpoints)}
}

func after[T any](all []T, sequence func(*T) uint64, after uint64, limit int) (page []T) {
	for i := range all {
		if sequence(&all[i]) > after && len(page) < limit {
			page = append(page, all[i])
		}
	}
	return page
}

func (s *source) AuditKeys(context.Context) ([]audit.Key, error) { return s.keys, nil }
func (s *source) SealedEvents(_ context.Context, n uint64, limit int) ([]audit.Sealed, error) {
	return after(s.events, func(e *audit.Sealed) uint64 { return e.Sequence }, n, limit), nil
}
func (s *source) Checkpoints(_ context.Context, n uint64, limit int) ([]audit.Checkpoint, error) {
	return after(s.checkpoints, func(c *audit.Checkpoint) uint64 { return c.Sequence }, n, limit), nil
}
func (s *source) StrayEvents(context.Context, uint64, int) ([]uint64, uint64, error) {
	return s.stray, 0, nil
}
func (s *source) LostEvents(context.Context, int) ([]uint64, error) { return s.lost, nil }

func (v *vault) verify(t testing.TB, s *source, remembered *audit.Checkpoint) *audit.Result {
	t.Helper()
	r, err := audit.VerifySource(t.Context(), s, v.log, v.log.Fingerprint(), remembered, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (v *vault) export(t testing.TB, s *source, from *audit.Checkpoint) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := audit.Export(t.Context(), s, v.log, from, &s.checkpoints[len(s.checkpoints)-1], &out, nil); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func findings(r *audit.Result) string {
	var lines []string
	for _, f := range r.Findings {
		lines = append(lines, f.String())
	}
	return strings.Join(lines, "\n")
}

// The encoding is fixed: logs of years ago must verify. The answers were made by another program, from the
// definition: the label and each field with its length before it, as four bytes, and numbers as eight.
func TestKnownAnswers(t *testing.T) {
	t.Parallel()
	e := audit.Event{
		ID: 7, At: start, Kind: "destroyed", Tenant: "app", Pseudonym: bytes.Repeat([]byte{1}, 32), Generation: bytes.Repeat([]byte{2}, 16),
		Attempt: 3, Reason: "exhausted", RequestID: "r", Purpose: "master", KeyGeneration: 4, Operator: "o", Detail: "d", Login: "l",
	}
	first := audit.Start("a.vault")
	hash := audit.Next(first, 5, &e)
	c := audit.Checkpoint{Sequence: 5, Hash: hash, At: start, KeyGeneration: 6}
	k := audit.Key{Generation: 6, PublicKey: [33]byte{2, 9}}
	for name, got := range map[string][2]string{
		"start":      {hex.EncodeToString(first[:]), "83c3438df7006e53a6e5999f96472da398ed276dbd99f63c52552d985bb36465"},
		"event":      {hex.EncodeToString(hash[:]), "ea91947b6c1f90b55f42a2ac6f2ea27acf884e8c1da369cfba6767cec22d617d"},
		"checkpoint": {fmt.Sprintf("%x", c.Digest("a.vault")), "68911ba3960ace19b8f04c0911e77f716497a01bffa0f67937afa595f34caf7a"},
		"key":        {fmt.Sprintf("%x", k.Digest("a.vault")), "bfcbfb0d37aa251ae278ee8ee607143a446786c3c862fe2a74f7c6dcfde69d2b"},
	} {
		if got[0] != got[1] {
			t.Errorf("%s: %s, want %s", name, got[0], got[1])
		}
	}
}

// Every field is hashed, and none can be taken for another.
func TestEveryFieldIsHashed(t *testing.T) {
	t.Parallel()
	seen := map[audit.Hash]string{}
	for name, e := range map[string]audit.Event{
		"nothing": {}, "id": {ID: 1}, "at": {At: start}, "kind": {Kind: "x"}, "tenant": {Tenant: "x"}, "pseudonym": {Pseudonym: []byte("x")},
		"generation": {Generation: []byte("x")}, "attempt": {Attempt: 1}, "reason": {Reason: "x"}, "request": {RequestID: "x"},
		"purpose": {Purpose: "x"}, "key generation": {KeyGeneration: 1}, "operator": {Operator: "x"}, "detail": {Detail: "x"}, "login": {Login: "x"},
		"two": {Kind: "xy"}, "split": {Kind: "x", Tenant: "y"},
	} {
		for what, h := range map[string]audit.Hash{
			name: audit.Next(audit.Hash{}, 1, &e), name + ", second": audit.Next(audit.Hash{}, 2, &e), name + ", after another": audit.Next(audit.Hash{1}, 1, &e),
		} {
			if other, ok := seen[h]; ok {
				t.Errorf("%s and %s hash alike", what, other)
			}
			seen[h] = what
		}
	}
}

func TestWholeLogVerifies(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	for _, n := range []int{0, 1, 9, 10, 2345} {
		s := v.make(t, n)
		var remembered *audit.Checkpoint
		if len(s.checkpoints) > 0 {
			remembered = &s.checkpoints[len(s.checkpoints)/2]
		}
		r := v.verify(t, s, remembered)
		if len(r.Findings) > 0 || r.Last != uint64(n) || n >= 10 && r.Newest.Sequence != uint64(n/10*10) {
			t.Errorf("%d events: %+v\n%s", n, r, findings(r))
		}
		if unsigned := n%10 > 0; unsigned != !r.UnsignedSince.IsZero() || unsigned && !r.UnsignedSince.Equal(s.events[n/10*10].At) {
			t.Errorf("%d events: not signed since %v", n, r.UnsignedSince)
		}
		if n < 10 {
			continue
		}
		// An export goes as far as the log is signed.
		r = verifyFiles(t, v, remembered, v.export(t, s, nil))
		if len(r.Findings) > 0 || r.Last != uint64(n/10*10) || r.Newest.Sequence != r.Last || !r.UnsignedSince.IsZero() {
			t.Errorf("%d events, exported: %+v\n%s", n, r, findings(r))
		}
	}
}

func verifyFiles(t testing.TB, v *vault, remembered *audit.Checkpoint, files ...[]byte) *audit.Result {
	t.Helper()
	r, err := tryFiles(v, remembered, files...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tryFiles(v *vault, remembered *audit.Checkpoint, files ...[]byte) (*audit.Result, error) {
	var parts []audit.File
	for i, f := range files {
		parts = append(parts, audit.File{Name: fmt.Sprint("part-", i), Reader: bytes.NewReader(f)})
	}
	return audit.VerifyExport(v.log.Fingerprint(), remembered, nil, parts...)
}

// What a hand in the database can do, each with what is found, and where.
func TestTampering(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	whole := v.make(t, 60)
	remembered := whole.checkpoints[4] // at 50
	remove := func(s *source, n int) { s.events = slices.Delete(s.events, n-1, n) }
	forged := audit.Event{ID: 1000, At: start, Kind: "success", Tenant: "app"}
	for _, c := range []struct {
		name   string
		tamper func(*source)
		want   string
	}{
		{"an event is edited", func(s *source) { s.events[16].Kind = "success" },
			"event 17: not what was sealed here: edited, or put in another's place"},
		{"two far apart are edited", func(s *source) { s.events[16].Attempt++; s.events[41].At = start },
			"event 17: not what was sealed here: edited, or put in another's place\nevent 42: not what was sealed here: edited, or put in another's place"},
		{"edited, and its own hash made anew", func(s *source) {
			s.events[16].Kind = "success"
			s.events[16].Hash = audit.Next(s.events[15].Hash, 17, &s.events[16].Event)
		}, "event 18: not what was sealed here: edited, or put in another's place"},
		{"edited, and all hashes made anew", func(s *source) { s.events[16].Kind = "success"; v.seal(s.events, 17) },
			"events 11 to 20: not what the vault signed at 2026-05-06T07:08:30.123456Z: at least one of them was changed, and the hashes made anew"},
		{"edited after the last checkpoint that is kept", func(s *source) {
			s.events[54].Kind = "success"
			v.seal(s.events, 55)
			s.checkpoints = s.checkpoints[:5]
		}, ""}, // nothing can show it: what is not signed is not proved, and Newest says so
		{"a hash is changed", func(s *source) { s.events[16].Hash[0]++ },
			"event 17: the hash stored with it was changed; the event is as it was sealed"},
		{"the hash under a checkpoint is changed", func(s *source) { s.events[19].Hash[0]++ },
			"event 20: the hash stored with it was changed; the event is as it was sealed"},
		{"an event is deleted", func(s *source) { remove(s, 17) }, "event 17: missing: deleted after being sealed"},
		{"three are deleted, with the checkpoint at one of them", func(s *source) { remove(s, 21); remove(s, 20); remove(s, 19) },
			"events 19 to 21: missing: deleted after being sealed"},
		{"an event's row is deleted, not its seal", func(s *source) { s.events[16].Event = audit.Event{} },
			"event 17: its row is gone: deleted after being sealed"},
		{"the first is deleted", func(s *source) { remove(s, 1) }, "event 1: missing: deleted after being sealed"},
		{"deleted, and the rest renumbered", func(s *source) {
			remove(s, 17)
			for i := 16; i < len(s.events); i++ {
				s.events[i].Sequence--
			}
		}, "event 17: not what was sealed here: edited, or put in another's place\n" +
			"events 18 to 59: sealed as 19 to 60, and renumbered: 1 before them were removed\n" +
			"event 60: missing: the log ends before a checkpoint that was signed at 2026-05-06T07:09:10.123456Z"},
		{"two change places", func(s *source) {
			s.events[16].Event, s.events[30].Event = s.events[30].Event, s.events[16].Event
		}, "event 17: out of order: it was sealed as number 31\nevent 31: out of order: it was sealed as number 17"},
		{"two change places, with their hashes", func(s *source) {
			s.events[16], s.events[17] = s.events[17], s.events[16]
			s.events[16].Sequence, s.events[17].Sequence = 17, 18
		}, "event 17: out of order: it was sealed as number 18\nevent 18: out of order: it was sealed as number 17\nevent 19: out of order: what stood before it was moved"},
		{"one is put in, and the rest renumbered", func(s *source) {
			s.events = slices.Insert(s.events, 16, audit.Sealed{Sequence: 17, Event: forged})
			s.events[16].Hash = audit.Next(s.events[15].Hash, 17, &forged)
			for i := 17; i < len(s.events); i++ {
				s.events[i].Sequence++
			}
		}, "events 18 to 61: sealed as 17 to 60, and renumbered: 1 before them were put in"},
		{"one takes another's place", func(s *source) { s.events[16].Event = forged },
			"event 17: not what was sealed here: edited, or put in another's place"},
		{"cut off at the end, with the checkpoints", func(s *source) { s.events, s.checkpoints = s.events[:44], s.checkpoints[:4] },
			"events 45 to 50: missing: the log was cut off at its end; the remembered checkpoint was signed at 2026-05-06T07:09:00.123456Z"},
		{"cut off at the end, without the checkpoints", func(s *source) { s.events = s.events[:44] },
			"events 45 to 60: missing: the log ends before a checkpoint that was signed at 2026-05-06T07:09:10.123456Z"},
		{"everything is gone", func(s *source) { *s = source{keys: s.keys} },
			"events 1 to 50: missing: the log was cut off at its end; the remembered checkpoint was signed at 2026-05-06T07:09:00.123456Z"},
		{"another history after a fork", func(s *source) {
			s.events[44].Kind = "success"
			v.seal(s.events, 45)
			s.checkpoints = s.checkpoints[:4]
		}, "events 41 to 50: another history than the one that was remembered, which was signed at 2026-05-06T07:09:00.123456Z"},
		{"a checkpoint is edited", func(s *source) { s.checkpoints[1].At = start },
			"checkpoint at 20: the signature does not verify"},
		{"a checkpoint is made up", func(s *source) { s.checkpoints[1].Signature = [64]byte{1} }, "checkpoint at 20: the signature does not verify"},
		{"a checkpoint by a key that is not certified", func(s *source) {
			k := newKey(t)
			s.keys[1].PublicKey = compressed(k)
			for i := range s.checkpoints {
				s.checkpoints[i].Signature = sign(t, k, s.checkpoints[i].Digest(v.log.VaultID))
			}
		}, "audit key 2: the identity key has not certified it\ncheckpoint at 10: the signature does not verify\n" +
			"checkpoint at 20: the signature does not verify\ncheckpoint at 30: the signature does not verify\n" +
			"checkpoint at 40: no certificate of the key that signed it (audit/2)\ncheckpoint at 50: no certificate of the key that signed it (audit/2)\n" +
			"checkpoint at 60: no certificate of the key that signed it (audit/2)"},
		{"a key is deleted", func(s *source) { s.keys = s.keys[:1] },
			"checkpoint at 40: no certificate of the key that signed it (audit/2)\ncheckpoint at 50: no certificate of the key that signed it (audit/2)\n" +
				"checkpoint at 60: no certificate of the key that signed it (audit/2)"},
		{"a waiting event is deleted", func(s *source) { s.lost = []uint64{7, 8} }, "rows of events that waited to be sealed are gone: ids [7 8]"},
		{"an event is taken off the queue", func(s *source) { s.stray = []uint64{7, 9} },
			"rows of events were neither sealed nor do they wait for it: 2, ids from 7 to 9"},
	} {
		s := whole.clone()
		c.tamper(s)
		memory := remembered
		if strings.Contains(c.name, "not certified") || strings.Contains(c.name, "key is deleted") {
			memory = whole.checkpoints[0]
		}
		r := v.verify(t, s, &memory)
		if got := findings(r); got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
		if c.want == "" && (r.Newest.Sequence != 50 || r.Last != 60) {
			t.Errorf("%s: proved to %d of %d", c.name, r.Newest.Sequence, r.Last)
		}
	}
}

// However much is wrong, verifying ends soon and keeps little.
func TestEverythingIsWrong(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	s := v.make(t, 5000)
	for i := range s.events {
		s.events[i].Hash[0]++
		s.events[i].Attempt++
	}
	r := v.verify(t, s, nil)
	if len(r.Findings) != 100 || r.More < 5000-100 {
		t.Errorf("%d findings and %d more", len(r.Findings), r.More)
	}
}

func TestOtherVaults(t *testing.T) {
	t.Parallel()
	v, other := newVault(t), newVault(t)
	s := v.make(t, 20)
	if _, err := audit.VerifySource(t.Context(), s, v.log, other.log.Fingerprint(), nil, nil); err == nil || !strings.Contains(err.Error(), "fingerprint") {
		t.Error(err)
	}
	foreign := other.make(t, 20).checkpoints[0]
	if _, err := audit.VerifySource(t.Context(), s, v.log, v.log.Fingerprint(), &foreign, nil); err == nil || !strings.Contains(err.Error(), "remembered checkpoint") {
		t.Error(err)
	}
	if _, err := tryFiles(other, nil, v.export(t, s, nil)); err == nil || !strings.Contains(err.Error(), "fingerprint") {
		t.Error(err)
	}
	bad := v.log
	bad.IdentityKey = [33]byte{5}
	if _, err := audit.NewKeyring(bad); err == nil {
		t.Error("a keyring under no key")
	}
}

// An export in parts is as good as one in one piece.
func TestParts(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	s := v.make(t, 60)
	early := s.clone()
	early.events, early.checkpoints = early.events[:20], early.checkpoints[:2]
	first, rest, tail := v.export(t, early, nil), v.export(t, s, &s.checkpoints[1]), v.export(t, s, &s.checkpoints[4])
	for name, c := range map[string]struct {
		files      [][]byte
		remembered *audit.Checkpoint
		want       string // of the error, or the findings
	}{
		"a part alone":                 {[][]byte{rest}, &s.checkpoints[2], ""},
		"a part, from what is known":   {[][]byte{tail}, &s.checkpoints[4], ""},
		"a part after what is known":   {[][]byte{tail}, &s.checkpoints[3], "begins after event 50"},
		"the tail after the beginning": {[][]byte{v.export(t, early, nil), tail}, nil, "this file begins after event 50, and the one before ends with 20"},
		"twice the same":               {[][]byte{first, first}, nil, "event 1: it stands after event 20"},
	} {
		r, err := tryFiles(v, c.remembered, c.files...)
		got := fmt.Sprint(err)
		if err == nil {
			got = findings(r)
		}
		if !strings.Contains(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%s: %s", name, got)
		}
	}
	// Where one part ends with a checkpoint, the next begins.
	if r := verifyFiles(t, v, &s.checkpoints[0], v.export(t, early, nil), rest); len(r.Findings) > 0 || r.After != 0 || r.Last != 60 {
		t.Errorf("%+v", r)
	}
}

func TestDamagedFiles(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	text := string(v.export(t, v.make(t, 20), nil))
	lines := strings.SplitAfter(text, "\n")
	for name, c := range map[string]struct{ text, want string }{
		"empty":            {"", "cut short"},
		"cut short":        {strings.Join(lines[:10], ""), "part-0, line 11: the file ends before its last line: it was cut short"},
		"cut in a line":    {text[:len(text)/2], "no JSON object"},
		"no export":        {"hello\n", "line 1: it is no JSON object with a type"},
		"a blank line":     {lines[0] + "\n" + strings.Join(lines[1:], ""), "line 2: it is no JSON object"},
		"another format":   {strings.Replace(text, "bkv-audit/1", "bkv-audit/2", 1), `its format is "bkv-audit/2", and this program reads bkv-audit/1`},
		"two heads":        {lines[0] + text, "line 2: want the line of type log first, and once"},
		"no head":          {strings.Join(lines[1:], ""), "line 1: want the line of type log first"},
		"after the end":    {text + lines[5], "it stands after the end"},
		"an unknown type":  {lines[0] + `{"type":"x"}` + "\n", "no such type"},
		"an unknown field": {strings.Replace(text, `"kind":`, `"kin":`, 1), "event: "},
		"a field twice":    {strings.Replace(text, `"kind":"attempt",`, `"kind":"attempt","kind":"attempt",`, 1), "line 4"},
		"upper case":       {strings.Replace(text, `"pseudonym":"4`, `"pseudonym":"4`+"A", 1), "line"},
		"spaces":           {strings.Replace(text, `"kind":`, `"kind": `, 1), "not written as an export is"},
		"a short hash":     {strings.Replace(text, `"hash":"`, `"hash":"","x":"`, 1), "line 4"},
		"not sealed":       {lines[0] + lines[1] + lines[2] + strings.Replace(lines[3], lines[3][strings.Index(lines[3], `"sequence"`):strings.Index(lines[3], `"id"`)], "", 1), "the event is not sealed"},
		"a long line":      {lines[0] + strings.Repeat("x", 1<<17), "longer than any line"},
	} {
		var damage *audit.Damage
		if _, err := tryFiles(v, nil, []byte(c.text)); !errors.As(err, &damage) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is left out is no damage, but found.
	if r := verifyFiles(t, v, nil, []byte(strings.Join(append(slices.Clone(lines[:10]), lines[11:]...), ""))); findings(r) != "event 8: missing: deleted after being sealed" {
		t.Error(findings(r))
	}
	if r := verifyFiles(t, v, nil, []byte(strings.Join(append(slices.Clone(lines[:len(lines)-5]), lines[len(lines)-2]), ""))); !strings.Contains(findings(r), "missing at the end of the export") {
		t.Error(findings(r))
	}
	if _, err := audit.VerifyExport(v.log.Fingerprint(), nil, nil); err == nil {
		t.Error("no file is no verdict")
	}
}

func TestSavedCheckpoint(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	s := v.make(t, 10)
	line, err := audit.EncodeLine(&s.checkpoints[0])
	if err != nil {
		t.Fatal(err)
	}
	if c, err := audit.ReadCheckpoint(bytes.NewReader(line)); err != nil || *c != s.checkpoints[0] {
		t.Errorf("%+v, %v", c, err)
	}
	event, _ := audit.EncodeLine(&s.events[0])
	for _, text := range []string{"", "{}", string(line) + string(line), string(event), string(line[:len(line)/2])} {
		if _, err := audit.ReadCheckpoint(strings.NewReader(text)); err == nil {
			t.Errorf("%q is read", text)
		}
	}
}

// A line that is read is written the same again.
func FuzzDecodeLine(f *testing.F) {
	v := newVault(f)
	for line := range bytes.Lines(v.export(f, v.make(f, 12), nil)) {
		f.Add(line)
	}
	unsealed, _ := audit.EncodeLine(&audit.Event{ID: 1, At: start, Kind: "migrated", Detail: "\u2028<é>\x7f", Operator: "o"})
	f.Add(unsealed)
	f.Add([]byte(`{"type":"event","sequence":1,"hash":null,"id":1,"at":"2026-05-06T07:08:09.000000Z","kind":"x"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		decoded, err := audit.DecodeLine(line)
		if err != nil {
			return
		}
		again, err := audit.EncodeLine(decoded)
		if err != nil || !bytes.Equal(bytes.TrimSuffix(again, []byte("\n")), bytes.TrimSuffix(line, []byte("\n"))) {
			t.Fatalf("%q\nis written as\n%q\n%v", line, again, err)
		}
	})
}

// No file makes it panic, and none that is not the vault's is proved.
func FuzzVerifyExport(f *testing.F) {
	v := newVault(f)
	whole := v.export(f, v.make(f, 12), nil)
	f.Add(whole)
	f.Add(bytes.ReplaceAll(whole, []byte("attempt"), []byte("success")))
	f.Add(whole[:len(whole)/2])
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := tryFiles(v, nil, file)
		if err == nil && len(r.Findings) == 0 && r.Newest != nil && !bytes.Contains(file, []byte(`"type":"checkpoint"`)) {
			t.Fatal("proved without a checkpoint")
		}
	})
}
