package pkcs11util_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// What other vendors' tokens do leads to the profile under which they work.
func TestCheckFindsTheProfile(t *testing.T) {
	t.Parallel()
	shim := tokentest.NewShimmed(t)
	for _, v := range vendors {
		t.Run(v.name, func(t *testing.T) {
			shim.Clear()
			shim.Set(v.settings...)
			report := check(t, shim.Config())
			if !report.Usable || report.Profile != v.profile {
				t.Fatalf("%s: %q, proposes %+v; the profile is %+v", report.Verdict, report.Failed(), report.Profile, v.profile)
			}
			needed := v.profile != pkcs11util.DefaultProfile()
			if warned := line(t, report, "profile").Result == pkcs11util.CheckWarn; warned != needed {
				t.Errorf("profile: %+v", line(t, report, "profile"))
			}

			cfg := shim.Config()
			cfg.Profile = v.profile
			if report := check(t, cfg); !report.Usable || report.Profile != v.profile || line(t, report, "profile").Result != pkcs11util.CheckOK {
				t.Errorf("under its profile: %s, %+v", report.Verdict, line(t, report, "profile"))
			}
			for _, other := range []struct {
				name    string
				profile pkcs11util.Profile
			}{{"plain", pkcs11util.DefaultProfile()}, {"all at once", vendors[len(vendors)-1].profile}} {
				cfg.Profile = other.profile
				cfg.Profile.MaxDataBytes = v.profile.MaxDataBytes
				report := check(t, cfg)
				fits := fits(v.name, v.profile, cfg.Profile)
				if got := report.Failed(); fits != (len(got) == 0) || !fits && !slices.Equal(got, []string{"profile"}) {
					t.Errorf("with the profile of %s: failed %q", other.name, got)
				}
			}
		})
	}
}

// What a token does wrong fails in the lines that are about it, and in no others.
func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	shim := tokentest.NewShimmed(t)
	for _, c := range []struct {
		name     string
		settings []tokentest.Setting
		hidden   []uint
		failed   []string
	}{
		{"one IV for none", []tokentest.Setting{tokentest.NilIVIsZero}, nil, nil},
		{"no IV refused", []tokentest.Setting{tokentest.NilIVRefused}, nil, nil},
		{"wrong tags", []tokentest.Setting{tokentest.BadTagOpens}, nil, []string{"wrong tag", "wrong associated data"}},
		{"one secret for all", []tokentest.Setting{tokentest.SameSecret}, nil, []string{"ECDH", "profile"}},
		{"another point", []tokentest.Setting{tokentest.OtherPoint}, nil, []string{"ECDH", "profile"}},
		{"another point now and then", []tokentest.Setting{tokentest.OtherPoint, tokentest.LieEvery(7)}, nil, []string{"whole points"}},
		{"extraction", []tokentest.Setting{tokentest.Extraction}, nil, []string{"reading CKA_VALUE", "wrapping keys out"}},
		{"write protection", []tokentest.Setting{tokentest.WriteProtected}, nil, []string{"token"}},
		{"duplicates", []tokentest.Setting{tokentest.Duplicates}, nil, []string{"look-up by label"}},
		{"signatures", []tokentest.Setting{tokentest.BadSignatures}, nil, []string{"HMAC-SHA-256", "ECDSA"}},
		{"random numbers", []tokentest.Setting{tokentest.SameRandom}, nil, []string{"random numbers"}},
		{"vendor's key derivation", []tokentest.Setting{tokentest.VendorKDF}, nil, []string{"ECDH", "profile"}},
		{"nothing readable, nothing wrapped", []tokentest.Setting{tokentest.SensitiveRefused}, []uint{pkcs11.CKM_AES_KEY_WRAP}, []string{"ECDH", "profile"}},
		{"little data", []tokentest.Setting{tokentest.DataLimit(300)}, nil, []string{"data limit", "profile"}},
		{"no ECDH", nil, []uint{pkcs11.CKM_ECDH1_DERIVE}, []string{"ECDH", "profile"}},
		{"no GCM", nil, []uint{pkcs11.CKM_AES_GCM}, []string{"AES-GCM", "profile"}},
		{"no HMAC", nil, []uint{pkcs11.CKM_SHA256_HMAC}, []string{"HMAC-SHA-256"}},
		{"no AES keys", nil, []uint{pkcs11.CKM_AES_KEY_GEN}, []string{"key for master", "profile"}},
		{"no key pairs", nil, []uint{pkcs11.CKM_EC_KEY_PAIR_GEN}, []string{"key for oprf", "key for identity", "profile"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			shim.Clear()
			shim.Set(c.settings...)
			shim.Hide(c.hidden...)
			before := labels(t, shim.Token)
			report := check(t, shim.Config())
			if got := report.Failed(); !slices.Equal(got, c.failed) || report.Usable != (len(c.failed) == 0) {
				for _, l := range report.Lines {
					t.Logf("%+v", l)
				}
				t.Errorf("%s; failed %q, want %q", report.Verdict, got, c.failed)
			}
			for _, l := range report.Lines {
				if l.Result == pkcs11util.CheckFail && (l.Why == "" || l.Do == "") {
					t.Errorf("nobody can act on %+v", l)
				}
			}
			shim.Clear()
			if after := labels(t, shim.Token); !slices.Equal(after, before) && !slices.Contains(c.settings, tokentest.Duplicates) {
				t.Errorf("the token holds %q, and held %q", after, before)
			}
		})
	}
}

// A call that fails is a line that fails, and the check goes on.
func TestCheckGoesOnAfterFaults(t *testing.T) {
	t.Parallel()
	shim := tokentest.EmptyShimmed(t)
	for function, failed := range map[string]string{
		"C_GenerateRandom": "random numbers", "C_SetAttributeValue": "renaming", "C_DestroyObject": "destroying",
	} {
		shim.Clear()
		shim.Fail(function, pkcs11.CKR_DEVICE_ERROR, tokentest.Always)
		report := check(t, shim.Config())
		if report.Usable || !slices.Contains(report.Failed(), failed) || len(report.Lines) < 20 {
			t.Errorf("%s: %s, %d lines", function, report.Verdict, len(report.Lines))
		}
	}
}

// A service that opens a token goes through the part of the check that needs no writing, and names the line.
func TestOpenNamesTheFailedLine(t *testing.T) {
	t.Parallel()
	shim := tokentest.NewShimmed(t)
	for _, c := range []struct {
		line    string
		setting tokentest.Setting
		hidden  []uint
	}{
		{"wrong tag", tokentest.BadTagOpens, nil},
		{"reading CKA_VALUE", tokentest.Extraction, nil},
		{"ECDH", tokentest.OtherPoint, nil},
		{"ECDH", tokentest.VendorKDF, nil},
		{"AES-GCM", tokentest.IVAppended, nil},
		{"HMAC-SHA-256", tokentest.Setting{}, []uint{pkcs11.CKM_SHA256_HMAC}},
		{"ECDSA", tokentest.Setting{}, []uint{pkcs11.CKM_ECDSA}},
	} {
		shim.Clear()
		shim.Hide(c.hidden...)
		if c.hidden == nil {
			shim.Set(c.setting)
		}
		wrote := shim.Calls("C_CreateObject") + shim.Calls("C_GenerateKey") + shim.Calls("C_SetAttributeValue")
		_, err := pkcs11util.Open(t.Context(), shim.Config())
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("line %q", c.line)) {
			t.Errorf("%s: %v", c.line, err)
		}
		if shim.Calls("C_CreateObject")+shim.Calls("C_GenerateKey")+shim.Calls("C_SetAttributeValue") != wrote {
			t.Errorf("%s: opening wrote to the token", c.line)
		}
	}
}
