package ceremony_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/ceremony"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
	"github.com/backup-key-vault/bkv/vault"
	"github.com/backup-key-vault/bkv/vault/vaulttest"
)

const vaultID = "two.sites"

// as runs f as the operator of a token.
func as[T any](t testing.TB, tok *tokentest.Token, f func(*pkcs11util.Admin) (T, error)) (T, error) {
	t.Helper()
	admin, err := pkcs11util.OpenAdmin(tok.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	return f(admin)
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func join(t testing.TB, tok *tokentest.Token) ceremony.Request {
	t.Helper()
	return must[ceremony.Request](t)(as(t, tok, func(a *pkcs11util.Admin) (ceremony.Request, error) {
		return ceremony.Join(a, ceremony.JoinConfig{OAEPHash: ceremony.SHA1, Tool: "test"})
	}))
}

func config(requests ...ceremony.Request) ceremony.MakeConfig {
	cfg := ceremony.MakeConfig{
		Requests: requests, OAEPHash: ceremony.SHA1, Who: "Ann Operator", VaultID: vaultID, Tool: "test",
		Time: time.Date(2026, 11, 23, 12, 0, 0, 5, time.FixedZone("CET", 3600)),
	}
	for _, r := range requests {
		cfg.Confirmed = append(cfg.Confirmed, r.Fingerprint())
	}
	return cfg
}

func tryMake(t testing.TB, tok *tokentest.Token, cfg ceremony.MakeConfig) (ceremony.Bundle, error) {
	t.Helper()
	return as(t, tok, func(a *pkcs11util.Admin) (ceremony.Bundle, error) { return ceremony.Make(a, cfg) })
}

func makeSet(t testing.TB, tok *tokentest.Token, cfg ceremony.MakeConfig) ceremony.Bundle {
	t.Helper()
	return must[ceremony.Bundle](t)(tryMake(t, tok, cfg))
}

func tryAccept(t testing.TB, tok *tokentest.Token, b ceremony.Bundle) (ceremony.Accepted, error) {
	t.Helper()
	return as(t, tok, func(a *pkcs11util.Admin) (ceremony.Accepted, error) {
		return ceremony.Accept(a, b, b.Record.Fingerprint())
	})
}

func accept(t testing.TB, tok *tokentest.Token, b ceremony.Bundle) ceremony.Accepted {
	t.Helper()
	return must[ceremony.Accepted](t)(tryAccept(t, tok, b))
}

// object is an object of a token as it is found, with what can be done to it.
type object struct {
	label                  string
	class                  uint
	sensitive, extractable bool
}

// contents lists all objects of a token.
func contents(t testing.TB, tok *tokentest.Token) (all []object) {
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
			a, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil), pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil),
			})
			if err != nil {
				return err
			}
			o := object{label: string(a[0].Value), class: uint(a[1].Value[0])}
			if o.class != pkcs11.CKO_PUBLIC_KEY {
				a, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{
					pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
				})
				if err != nil {
					return err
				}
				o.sensitive, o.extractable = a[0].Value[0] == 1, a[1].Value[0] == 1
			}
			all = append(all, o)
		}
		return nil
	})
	slices.SortFunc(all, func(a, b object) int {
		if c := strings.Compare(a.label, b.label); c != 0 {
			return c
		}
		return int(a.class) - int(b.class)
	})
	return all
}

// wholeSet is what a token holds after a ceremony: thirteen objects, and nothing else.
func wholeSet() (all []object) {
	for _, purpose := range pkcs11util.Purposes() {
		label := "bkv/" + purpose + "/1"
		switch purpose {
		case pkcs11util.Master, pkcs11util.State, pkcs11util.MAC:
			all = append(all, object{label, pkcs11.CKO_SECRET_KEY, true, false})
		default:
			all = append(all,
				object{label, pkcs11.CKO_PUBLIC_KEY, false, false}, object{label, pkcs11.CKO_PRIVATE_KEY, true, false})
		}
	}
	slices.SortFunc(all, func(a, b object) int {
		if c := strings.Compare(a.label, b.label); c != 0 {
			return c
		}
		return int(a.class) - int(b.class)
	})
	return all
}

// What is enrolled through one token recovers through the others, and no token holds anything that can be taken out.
func TestOneSetInThreeTokens(t *testing.T) {
	tokens := []*tokentest.Token{tokentest.Empty(t), tokentest.Empty(t), tokentest.Empty(t)}
	b := makeSet(t, tokens[0], config(join(t, tokens[1]), join(t, tokens[2])))
	b = must[ceremony.Bundle](t)(ceremony.ParseBundle(b.Encode()))
	store := vaulttest.NewMemoryStore(time.Now)
	var vaults []*vault.Vault
	for i, tok := range tokens {
		if got := accept(t, tok, b); len(got.Stored) != 8 || len(got.Kept) != 0 {
			t.Fatalf("token %d: %+v", i, got)
		}
		if got, want := contents(t, tok), wholeSet(); !slices.Equal(got, want) {
			t.Fatalf("token %d holds %v, want %v", i, got, want)
		}
		tok.Keyset = tok.OpenKeyset(t, tok.Config())
		v, err := vault.New(vault.Config{ID: vaultID, Store: store, Token: tok.Keyset})
		if err != nil {
			t.Fatal(err)
		}
		vaults = append(vaults, v)
	}
	for _, purpose := range []string{pkcs11util.OPRF, pkcs11util.Server, pkcs11util.Relay, pkcs11util.Identity, pkcs11util.Audit} {
		first := must[[33]byte](t)(tokens[0].PublicKey(purpose, 1))
		for _, tok := range tokens[1:] {
			if must[[33]byte](t)(tok.PublicKey(purpose, 1)) != first {
				t.Errorf("%s differs", purpose)
			}
		}
	}
	for i := range vaults {
		d := device(vaults[i], "user")
		d.Caller.Account.User += string(rune('a' + i))
		e := d.MustEnrol(t, "right", nil)
		for j := range vaults {
			d.Vault = vaults[j]
			if key, err := d.Recover(t.Context(), "right"); err != nil || key != e.Key {
				t.Fatalf("enrolled through %d, recovering through %d: %v", i, j, err)
			}
		}
	}
	// A start through one site is finished through another: the state is sealed under a shared key too.
	sealed := must[[]byte](t)(tokens[1].Seal(context.Background(), pkcs11util.State, [16]byte{7}, []byte("state"), []byte("a")))
	if opened, ok, err := tokens[2].Open(context.Background(), pkcs11util.State, [16]byte{7}, sealed, []byte("a")); err != nil || !ok || string(opened) != "state" {
		t.Fatalf("%q %v %v", opened, ok, err)
	}
}

func device(v *vault.Vault, user string) *vaulttest.Device {
	policy := vault.DefaultPolicy()
	policy.Delays = nil
	return &vaulttest.Device{Vault: v, VaultID: vaultID, Caller: vault.Caller{
		Account: vault.AccountID{Tenant: "app", User: user}, Policy: policy, RequestID: "r",
	}}
}

// Tokens of the profile that multiplies in memory take one set as others do, the secrets of its scalars included; tokens
// of another profile do not take it.
func TestOneSetInTokensThatDoNotDerive(t *testing.T) {
	inMemory := pkcs11util.DefaultProfile()
	inMemory.ECDH = pkcs11util.ECDHInMemory
	source, site, other := tokentest.Empty(t), tokentest.Empty(t), tokentest.Empty(t)
	source.Profile, site.Profile = inMemory, inMemory
	b := makeSet(t, source, config(join(t, site), join(t, other)))
	b = must[ceremony.Bundle](t)(ceremony.ParseBundle(b.Encode()))
	var products [][33]byte
	for _, tok := range []*tokentest.Token{source, site} {
		if got := accept(t, tok, b); len(got.Stored) != 8 {
			t.Fatalf("%+v", got)
		}
		pairs := 0
		for _, o := range contents(t, tok) {
			if o.class != pkcs11.CKO_PUBLIC_KEY && (!o.sensitive || o.extractable) {
				t.Errorf("%s can be taken out", o.label)
			}
			if o.class == pkcs11.CKO_PRIVATE_KEY {
				pairs++
			}
		}
		if pairs != 2 {
			t.Errorf("%d keys are pairs; identity and audit are", pairs)
		}
		tok.Keyset = tok.OpenKeyset(t, tok.Config())
		g := must[[33]byte](t)(tok.PublicKey(pkcs11util.Server, 1))
		products = append(products, must[[33]byte](t)(tok.Multiply(t.Context(), pkcs11util.OPRF, 1, g)))
		same, err := as(t, tok, func(a *pkcs11util.Admin) ([]pkcs11util.KeyName, error) {
			same, _, err := ceremony.Compare(a, b.Record)
			return same, err
		})
		if err != nil || len(same) != 8 {
			t.Errorf("the record names %v: %v", same, err)
		}
	}
	if products[0] != products[1] {
		t.Error("the tokens multiply differently")
	}
	if _, err := tryAccept(t, other, b); err == nil || !strings.Contains(err.Error(), "was made for tokens of another profile") {
		t.Errorf("a token of another profile: %v", err)
	}
	for _, o := range contents(t, other) {
		if strings.HasPrefix(o.label, "bkv/") && !strings.HasPrefix(o.label, "bkv/tmp/") && !strings.HasPrefix(o.label, "bkv/transport/") {
			t.Errorf("it holds %s", o.label)
		}
	}
}
