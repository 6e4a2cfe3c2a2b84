package ceremony_test

import (
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// says reports whether err is one sentence that holds text.
func says(err error, text string) bool {
	return err != nil && strings.Contains(err.Error(), text) && !strings.Contains(err.Error(), "\n")
}

func sharesJSON(t testing.TB, shares []ceremony.Share) []byte {
	t.Helper()
	return append(must[[]byte](t)(json.MarshalIndent(shares, "", "  ")), '\n')
}

func rawSignature(t testing.TB, der []byte) []byte {
	t.Helper()
	var sig struct{ R, S *big.Int }
	must[[]byte](t)(asn1.Unmarshal(der, &sig))
	return append(sig.R.FillBytes(make([]byte, 32)), sig.S.FillBytes(make([]byte, 32))...)
}

// destroy destroys all objects of a token with a prefix of their label.
func destroy(t testing.TB, tok *tokentest.Token, prefix string) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, nil); err != nil {
			return err
		}
		handles, _, err := p.FindObjects(session, 1000)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(session); err != nil {
			return err
		}
		for _, h := range handles {
			a, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			if strings.HasPrefix(string(a[0].Value), prefix) {
				if err := p.DestroyObject(session, h); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// A bundle works once, in the token whose request it answers.
func TestBundleForOthersOrUsedBefore(t *testing.T) {
	a, b, c := tokentest.Empty(t), tokentest.Empty(t), tokentest.Empty(t)
	request := join(t, b)
	bundle := makeSet(t, a, config(request))
	if _, err := tryAccept(t, c, bundle); !says(err, "the bundle is not for the token") {
		t.Errorf("another token: got %v", err)
	}
	if got := contents(t, c); len(got) != 0 {
		t.Errorf("the other token holds %v", got)
	}
	_, err := as(t, b, func(admin *pkcs11util.Admin) (ceremony.Accepted, error) {
		return ceremony.Accept(admin, bundle, request.Fingerprint())
	})
	if !says(err, "another fingerprint than was said") {
		t.Errorf("unconfirmed: got %v", err)
	}
	accept(t, a, bundle)
	accept(t, b, bundle)
	// Again: nothing to do.
	if got := accept(t, b, bundle); len(got.Kept) != 8 || len(got.Stored) != 0 {
		t.Errorf("accepted again: %+v", got)
	}
	// Replayed into the token when its keys are gone, as after a rotation that destroyed them.
	destroy(t, b, "bkv/master/1")
	if _, err := tryAccept(t, b, bundle); !says(err, "does not wait for this request") {
		t.Errorf("replayed: got %v", err)
	}
	if slices.ContainsFunc(contents(t, b), func(o object) bool { return o.label == "bkv/master/1" }) {
		t.Error("the replayed key is in the token")
	}
}

// Somebody in the middle puts his own transport key into the request, and the source's operator is careless.
func TestSwappedTransportKey(t *testing.T) {
	a, b := tokentest.Empty(t), tokentest.Empty(t)
	swapped := softwareSite(t, join(t, b)).request
	bundle := makeSet(t, a, config(swapped))
	if _, err := tryAccept(t, b, bundle); !says(err, "it was swapped on the way") {
		t.Fatalf("got %v", err)
	}
	if got := contents(t, b); len(got) != 1 || !strings.HasPrefix(got[0].label, "bkv/transport/") {
		t.Errorf("the token holds %v", got)
	}
}

// Tokens that hold keys take no first set, whether they are source or destination.
func TestTokensWithKeys(t *testing.T) {
	a, b := tokentest.Empty(t), tokentest.Empty(t)
	request := join(t, b)
	b.MakeKey(t, pkcs11util.KeyName{Purpose: pkcs11util.Audit, Generation: 7})
	before := contents(t, b)
	bundle := makeSet(t, a, config(request))
	if _, err := tryAccept(t, b, bundle); !says(err, "the token holds bkv/audit/7, which is not of this ceremony") {
		t.Errorf("got %v", err)
	}
	b.MakeKey(t, pkcs11util.KeyName{Purpose: pkcs11util.Master, Generation: 1})
	if _, err := tryAccept(t, b, bundle); !says(err, "other keys than this ceremony's as bkv/master/1") {
		t.Errorf("got %v", err)
	}
	destroy(t, b, "bkv/master/1")
	if got := contents(t, b); !slices.Equal(got, before) {
		t.Errorf("the token holds %v", got)
	}
	if _, err := tryMake(t, b, config(join(t, a))); !says(err, "the token holds keys already (bkv/audit/7)") {
		t.Errorf("got %v", err)
	}
	// Without the key that is in the way, the same bundle is good: the source stored nothing yet, and takes it too.
	destroy(t, b, "bkv/audit/7")
	accept(t, b, bundle)
}

func TestRequestsThatDoNotGoTogether(t *testing.T) {
	a, b, c := tokentest.Empty(t), tokentest.Empty(t), tokentest.Empty(t)
	fromA, fromB, fromC := join(t, a), join(t, b), join(t, c)
	before := contents(t, a)
	if !slices.ContainsFunc(before, func(o object) bool { return strings.HasPrefix(o.label, "bkv/transport/") }) {
		t.Fatal("no transport key")
	}
	short := fromC
	short.Nonce = short.Nonce[:8]
	copied := fromC
	copied.TransportKey = fromB.TransportKey
	unknown := fromC
	unknown.OAEPHash = "md5"
	modern := fromC
	modern.OAEPHash = ceremony.SHA256 // which SoftHSM cannot wrap with
	unnamed := config(fromB)
	unnamed.Who = ""
	escape := config(fromB)
	escape.Who = "Ann\x1b[2J"
	extra := config(fromB)
	extra.Confirmed = append(extra.Confirmed, fromC.Fingerprint())
	for name, c := range map[string]struct {
		cfg  ceremony.MakeConfig
		says string
	}{
		"none":            {config(), "a ceremony is for two tokens or more"},
		"one twice":       {config(fromB, fromB), "each takes part once"},
		"a site twice":    {config(fromB, join(t, b)), "each takes part once"},
		"the source":      {config(fromA), "the source, "},
		"a copied key":    {config(fromB, copied), "one is a copy of the other"},
		"a short nonce":   {config(short), "its nonce has 8 bytes"},
		"a hash":          {config(unknown), `its OAEP hash is "md5"`},
		"another hash":    {config(fromB, modern), fmt.Sprintf("wrapping for %v: C_WrapKey with RSA-OAEP and SHA-256", fromC.Token)},
		"nobody":          {unnamed, "it is not said who holds the ceremony"},
		"escape sequence": {escape, "more than printable characters"},
		"one word more":   {extra, "as many confirmed fingerprints as requests"},
	} {
		if _, err := tryMake(t, a, c.cfg); !says(err, c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		}
	}
	if got := contents(t, a); len(got) > len(before) {
		t.Errorf("the source holds %v", got)
	}
}

// Further generations are signed by the identity key that the tokens share, and by no other.
func TestFurtherGenerations(t *testing.T) {
	a, b := tokentest.Empty(t), tokentest.Empty(t)
	first := makeSet(t, a, config(join(t, b)))
	for _, tok := range []*tokentest.Token{a, b} {
		accept(t, tok, first)
	}
	cfg := config(join(t, b))
	cfg.Names = []pkcs11util.KeyName{{Purpose: pkcs11util.Identity, Generation: 2}, {Purpose: pkcs11util.Master, Generation: 2}, {Purpose: pkcs11util.OPRF, Generation: 3}}
	second := makeSet(t, a, cfg)
	if second.Record.Identity.Generation != 1 {
		t.Errorf("signed by generation %d", second.Record.Identity.Generation)
	}
	for _, tok := range []*tokentest.Token{a, b} {
		if got := accept(t, tok, second); len(got.Stored) != 3 {
			t.Errorf("%+v", got)
		}
		tok.Keyset = tok.OpenKeyset(t, tok.Config())
	}
	for purpose, generation := range map[string]uint32{pkcs11util.Identity: 2, pkcs11util.Master: 2, pkcs11util.OPRF: 3, pkcs11util.State: 1} {
		if got := b.Newest(purpose); got != generation {
			t.Errorf("%s is at %d, want %d", purpose, got, generation)
		}
	}
	if must[[33]byte](t)(a.PublicKey(pkcs11util.OPRF, 3)) != must[[33]byte](t)(b.PublicKey(pkcs11util.OPRF, 3)) {
		t.Error("the sites have different keys")
	}

	// Another vault's source makes a further generation for b.
	x, y := tokentest.Empty(t), tokentest.Empty(t)
	accept(t, x, makeSet(t, x, config(softwareRequest(t).request)))
	before := contents(t, b)
	cfg = config(join(t, b), join(t, y))
	cfg.Names = []pkcs11util.KeyName{{Purpose: pkcs11util.State, Generation: 2}}
	foreign := makeSet(t, x, cfg)
	if _, err := tryAccept(t, b, foreign); !says(err, "signed by another bkv/identity/1 than the token's") {
		t.Errorf("got %v", err)
	}
	if _, err := tryAccept(t, y, foreign); !says(err, "the token does not hold bkv/identity/1") {
		t.Errorf("got %v", err)
	}
	destroy(t, b, "bkv/transport/")
	if got := contents(t, b); !slices.Equal(got, before) {
		t.Errorf("the token holds %v, want %v", got, before)
	}

	for name, names := range map[string][]pkcs11util.KeyName{
		"is no name for a key":               {{Purpose: "transport", Generation: 4}},
		"bkv/state/0 is no name":             {{Purpose: pkcs11util.State}},
		"the token holds bkv/oprf/3 already": {{Purpose: pkcs11util.OPRF, Generation: 2}},
		"bkv/mac/2 is named twice":           {{Purpose: pkcs11util.MAC, Generation: 2}, {Purpose: pkcs11util.MAC, Generation: 2}},
	} {
		cfg := config(softwareRequest(t).request)
		cfg.Names = names
		if _, err := tryMake(t, a, cfg); !says(err, name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

// A dry run does all that can be done without a trace.
func TestDryRun(t *testing.T) {
	a, b := tokentest.Empty(t), tokentest.Empty(t)
	request := join(t, b)
	cfg := config(request)
	cfg.DryRun = true
	before := contents(t, b)
	bundle := makeSet(t, a, cfg)
	if got := contents(t, a); len(got) != 0 {
		t.Errorf("the source holds %v", got)
	}
	for _, tok := range []*tokentest.Token{a, b} {
		if _, err := tryAccept(t, tok, bundle); !says(err, "it is no bundle of a ceremony") {
			t.Errorf("a token accepts a dry run: %v", err)
		}
	}
	if len(bundle.Record.Keys) != 8 || len(bundle.Shares) != 0 {
		t.Errorf("%d keys, %d shares", len(bundle.Record.Keys), len(bundle.Shares))
	}
	if got := contents(t, b); !slices.Equal(got, before) {
		t.Errorf("the destination holds %v", got)
	}
}

func TestCompare(t *testing.T) {
	a, b := tokentest.Empty(t), tokentest.Empty(t)
	bundle := makeSet(t, a, config(join(t, b)))
	record := must[ceremony.Record](t)(ceremony.ParseRecord(bundle.Record.Encode()))
	accept(t, a, bundle)
	compare := func(tok *tokentest.Token) (same, missing []pkcs11util.KeyName, err error) {
		_, err = as(t, tok, func(admin *pkcs11util.Admin) (bool, error) {
			same, missing, err = ceremony.Compare(admin, record)
			return true, err
		})
		return same, missing, err
	}
	destroy(t, a, "bkv/state/1")
	if same, missing, err := compare(a); err != nil || len(same) != 7 || len(missing) != 1 || missing[0].String() != "bkv/state/1" {
		t.Errorf("%v, %v, %v", same, missing, err)
	}
	a.MakeKey(t, pkcs11util.KeyName{Purpose: pkcs11util.State, Generation: 1})
	if _, _, err := compare(a); !says(err, "other keys than this ceremony's as bkv/state/1") {
		t.Errorf("got %v", err)
	}
	if same, missing, err := compare(b); err != nil || len(same) != 0 || len(missing) != 8 {
		t.Errorf("%v, %v, %v", same, missing, err)
	}
}

// No byte of a file can be changed, added or taken away.
func TestEveryByteCounts(t *testing.T) {
	s, r := newSource(t), softwareRequest(t).request
	other := softwareRequest(t).request
	other.Token.Serial, other.Nonce = "s1", append([]byte{1}, other.Nonce[1:]...)
	b := s.bundle(t, []ceremony.Request{r, other}, nil)
	for name, c := range map[string]struct {
		file  []byte
		parse func([]byte) error
	}{
		// A request is not signed: what can be changed and still reads as one has another fingerprint.
		"request": {r.Encode(), func(b []byte) error {
			got, err := ceremony.ParseRequest(b)
			if err == nil && got.Fingerprint() != r.Fingerprint() {
				err = errors.New("another fingerprint")
			}
			return err
		}},
		"record": {b.Record.Encode(), func(b []byte) error { _, err := ceremony.ParseRecord(b); return err }},
		"bundle": {b.Encode(), func(b []byte) error { _, err := ceremony.ParseBundle(b); return err }},
	} {
		if err := c.parse(c.file); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i := range c.file {
			changed := slices.Clone(c.file)
			changed[i] ^= 1 << (i % 7)
			if err := c.parse(changed); err == nil {
				t.Fatalf("%s: byte %d may be changed to %q", name, i, changed[i])
			}
		}
		for _, changed := range [][]byte{c.file[:len(c.file)-1], append(slices.Clone(c.file), ' '), append([]byte{' '}, c.file...), nil, []byte("null\n")} {
			if c.parse(changed) == nil {
				t.Errorf("%s: another length is accepted", name)
			}
		}
	}
}

func TestFingerprints(t *testing.T) {
	f := softwareRequest(t).request.Fingerprint()
	for _, text := range []string{f.String(), strings.ToUpper(f.String()), strings.ReplaceAll(f.String(), "-", " \t"), strings.ReplaceAll(f.String(), "-", "") + "\r"} {
		if got, err := ceremony.ParseFingerprint(text); err != nil || got != f {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", f.String()[1:], f.String() + "a", strings.Replace(f.String(), f.String()[:1], "1", 1), strings.Repeat("é", 32)} {
		if got, err := ceremony.ParseFingerprint(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}
