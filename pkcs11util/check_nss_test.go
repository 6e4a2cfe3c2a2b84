package pkcs11util_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// NSS's software token computes well, and lets keys out that are not extractable.
func TestCheckRefusesNSS(t *testing.T) {
	for _, c := range []struct {
		name   string
		mended bool
		failed []string
	}{
		{"as it is", false, []string{"AES-GCM", "wrapping keys out", "extractable copies", "profile"}},
		{"with AES-GCM that gives its size", true, []string{"wrapping keys out", "extractable copies"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			report := check(t, tokentest.NSS(t, c.mended))
			if line(t, report, "AES-GCM").Result == pkcs11util.CheckOK {
				c.failed = []string{"wrapping keys out", "extractable copies"} // an NSS in which it is mended
			} else if c.mended || !strings.Contains(line(t, report, "AES-GCM").Why, "CKR_BUFFER_TOO_SMALL") {
				t.Errorf("%+v", line(t, report, "AES-GCM"))
			}
			if got := report.Failed(); report.Usable || !slices.Equal(got, c.failed) {
				for _, l := range report.Lines {
					t.Logf("%+v", l)
				}
				t.Errorf("%s; failed %q, want %q", report.Verdict, got, c.failed)
			}
			for _, what := range []string{
				"key for master", "key for oprf", "key for mac", "key for identity", "look-up by label",
				"ECDH", "whole points", "invalid point", "HMAC-SHA-256", "ECDSA", "reading CKA_VALUE", "lifting protection", "destroying",
			} {
				if l := line(t, report, what); l.Result != pkcs11util.CheckOK {
					t.Errorf("%+v", l)
				}
			}
			if l := line(t, report, "other uses of keys"); l.Result != pkcs11util.CheckWarn || !strings.Contains(l.Why, "signing key derives") {
				t.Errorf("%+v", l)
			}
			if l := line(t, report, "wrapping keys out"); !strings.Contains(l.Why, "master (CKM_AES_") || !strings.Contains(l.Why, "identity (CKM_AES_") {
				t.Errorf("%+v", l)
			}
		})
	}
}
