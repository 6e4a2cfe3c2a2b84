package pkcs11util_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// check runs the check on a token.
func check(t *testing.T, cfg pkcs11util.Config) pkcs11util.CheckReport {
	t.Helper()
	admin, err := pkcs11util.OpenAdmin(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	report, err := admin.Check(context.Background(), pkcs11util.CheckConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// with names the lines that came out so.
func with(r pkcs11util.CheckReport, result pkcs11util.CheckResult) (lines []string) {
	for _, l := range r.Lines {
		if l.Result == result {
			lines = append(lines, l.What)
		}
	}
	return lines
}

func line(t *testing.T, r pkcs11util.CheckReport, what string) pkcs11util.CheckLine {
	t.Helper()
	i := slices.IndexFunc(r.Lines, func(l pkcs11util.CheckLine) bool { return l.What == what })
	if i < 0 {
		t.Fatalf("no line %q in %+v", what, r.Lines)
	}
	return r.Lines[i]
}

// labels lists the labels of all objects in a token.
func labels(t *testing.T, tok *tokentest.Token) (all []string) {
	t.Helper()
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error {
		if err := p.FindObjectsInit(session, nil); err != nil {
			return err
		}
		found, _, err := p.FindObjects(session, 1000)
		if err := errors.Join(err, p.FindObjectsFinal(session)); err != nil {
			return err
		}
		for _, h := range found {
			label, err := p.GetAttributeValue(session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			all = append(all, string(label[0].Value))
		}
		return nil
	})
	slices.Sort(all)
	return all
}

func TestCheckPassesSoftHSM(t *testing.T) {
	tok := tokentest.New(t)
	before := labels(t, tok)
	tok.Raw(t, func(p *pkcs11.Ctx, session pkcs11.SessionHandle) error { // of a check that was killed
		_, err := p.GenerateKey(session, mechanisms(pkcs11.CKM_AES_KEY_GEN), []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "bkv/tmp/check/master/0011223344556677"),
		})
		return err
	})
	report := check(t, tok.Config())
	if !report.Usable || len(report.Failed()) > 0 {
		t.Errorf("%s: %+v", report.Verdict, report.Lines)
	}
	if got, want := with(report, pkcs11util.CheckWarn), []string{"token", "missing IV"}; !slices.Equal(got, want) {
		t.Errorf("warns of %q, want %q", got, want)
	}
	if !strings.Contains(line(t, report, "leftovers").Why, "destroyed 1 ") {
		t.Errorf("leftovers: %+v", line(t, report, "leftovers"))
	}
	if !strings.Contains(line(t, report, "wrapping keys out").Why, "mechanisms that wrap an extractable key") {
		t.Errorf("wrapping had nothing to compare with: %+v", line(t, report, "wrapping keys out"))
	}
	if report.Profile != pkcs11util.DefaultProfile() {
		t.Errorf("proposes %+v", report.Profile)
	}
	if len(report.Rates) != 5 {
		t.Errorf("rates: %+v", report.Rates)
	}
	for _, r := range report.Rates {
		if r.PerSecond <= 0 {
			t.Errorf("rate: %+v", r)
		}
	}
	if after := labels(t, tok); !slices.Equal(after, before) {
		t.Errorf("the token holds %q, and held %q", after, before)
	}
	if err := tok.Check(context.Background()); err != nil {
		t.Errorf("the keys in use: %v", err)
	}
}

func mechanisms(m uint) []*pkcs11.Mechanism { return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)} }

// A check that is interrupted leaves nothing behind.
func TestCheckInterrupted(t *testing.T) {
	t.Parallel()
	tok := tokentest.EmptyShimmed(t)
	for stop := range 12 {
		admin, err := pkcs11util.OpenAdmin(tok.Config())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		steps := 0
		_, err = admin.Check(ctx, pkcs11util.CheckConfig{Progress: func(string) {
			if steps++; steps > stop {
				cancel()
			}
		}})
		admin.Close()
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("after %d steps: %v", stop, err)
		}
		if left := labels(t, tok.Token); len(left) > 0 {
			t.Errorf("after %d steps: left %q", stop, left)
		}
	}
}
