package pkcs11util_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/backup-key-vault/bkv/pkcs11util"
	"github.com/backup-key-vault/bkv/pkcs11util/tokentest"
)

// A token that takes no more keys, or no changes at all, says so in words. Nothing is left behind in it, what is there
// serves on, and the key is made when it can be.
func TestTokenThatTakesNoKeys(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	shim := tokentest.NewShimmed(t)
	before := labels(t, shim.Token)
	works := func() {
		t.Helper()
		if _, err := shim.Seal(ctx, pkcs11util.Master, [16]byte{1}, []byte("text"), []byte("associated")); err != nil {
			t.Errorf("the keys that are there: %v", err)
		}
	}
	for _, c := range []struct {
		function string
		code     uint
		purpose  string
		says     string
	}{
		{"C_GenerateKey", pkcs11.CKR_DEVICE_MEMORY, pkcs11util.Master, "the token is full: "},
		{"C_GenerateKeyPair", pkcs11.CKR_DEVICE_MEMORY, pkcs11util.OPRF, "the token is full: "},
		{"C_GenerateKey", pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11util.MAC, "the token is write-protected: "},
		{"C_GenerateKeyPair", pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11util.Server, "the token is write-protected: "},
		{"C_SetAttributeValue", pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11util.State, "the token is write-protected: "},
	} {
		shim.Fail(c.function, c.code, tokentest.Always)
		err := shim.Keyset.MakeKey(ctx, c.purpose, 2)
		var code pkcs11.Error
		if err == nil || !strings.Contains(err.Error(), c.says) || !errors.As(err, &code) || uint(code) != c.code {
			t.Errorf("%s for %s: %v", c.function, c.purpose, err)
		}
		shim.Fail(c.function, 0, 0)
		works()
	}
	for _, purpose := range []string{pkcs11util.Master, pkcs11util.OPRF, pkcs11util.MAC, pkcs11util.Server, pkcs11util.State} {
		if err := shim.Keyset.MakeKey(ctx, purpose, 2); err != nil {
			t.Errorf("%s, when it can be made: %v", purpose, err)
		}
	}
	after := labels(t, shim.Token)
	if left := slices.DeleteFunc(after, func(l string) bool { return slices.Contains(before, l) || strings.HasSuffix(l, "/2") }); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}

	shim.Fail("C_DestroyObject", pkcs11.CKR_TOKEN_WRITE_PROTECTED, tokentest.Always)
	if err := shim.SetCurrent(pkcs11util.Master, 2, 0); err != nil {
		t.Fatal(err)
	}
	if err := shim.Keyset.DestroyKey(ctx, pkcs11util.Master, 1); err == nil || !strings.Contains(err.Error(), "the token is write-protected: ") {
		t.Errorf("destroying: %v", err)
	}
}

// A token whose initialisation was left half done is named as that, and so is what mends it.
func TestTokenWithoutAPIN(t *testing.T) {
	t.Parallel()
	shim := tokentest.EmptyShimmed(t)
	shim.Fail("C_Login", pkcs11.CKR_USER_PIN_NOT_INITIALIZED, 1)
	if _, err := pkcs11util.Open(t.Context(), shim.Config()); err == nil || !strings.Contains(err.Error(), "not initialised, as it has no user PIN: run vaultctl token init") {
		t.Errorf("%v", err)
	}
}
