package browsertest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/webauthn"
)

// In 64-digit mode the vault is not involved. The digits have to be typed back in part before
// anything depends on them.
func TestDigits(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	alice := d.alice()
	alice.goes("backup/encryption")
	alice.press("Use a 64-digit key instead")
	alice.at("backup/digits")
	digits := alice.text(`document.getElementById("digits").textContent`)
	if len(strings.Join(strings.Fields(digits), "")) != 64 {
		t.Fatalf("these are no 64 digits: %q", digits)
	}
	alice.look("digits")
	alice.types("To show that you have them, type the last group of four digits", "zzzz")
	alice.press("I have saved my key: turn on")
	alice.until("a refusal", `document.getElementById("digits-error").innerText.includes("not the last four")`)
	alice.types("To show that you have them, type the last group of four digits", strings.ToUpper(digits[len(digits)-4:]))
	alice.press("I have saved my key: turn on")
	alice.at("backup")
	alice.says("End-to-end encrypted backup is on")
	if n := d.capsules(); n > 0 {
		t.Errorf("in 64-digit mode the vault was asked %d times", n)
	}

	next := d.newPhone()
	next.signIn("alice")
	next.at("restore")
	next.press("Enter your 64-digit key")
	next.at("restore/digits")
	for _, c := range []struct{ typed, words string }{
		{digits[1:], "there are 63"},
		{"o" + digits[1:], "Look for an o, an l or a dash"},
		{strings.ReplaceAll(digits, " ", "-"), "Only the digits"},
		{strings.Repeat("0123 ", 16), "not the key of this backup"},
	} {
		next.types("64 digits (0 to 9, a to f)", c.typed)
		next.press("Restore")
		next.until(c.words, fmt.Sprintf(`document.getElementById("key-digits-error").innerText.includes(%q)`, c.words))
	}
	next.look("restore-digits-refused")
	next.types("64 digits (0 to 9, a to f)", strings.ToUpper(strings.ReplaceAll(digits, "\n", "  ")))
	next.press("Restore")
	next.at("restore/done")
	next.reads("bob", secretMessage)
	d.nothingLeaks(next.key())

	// The digits can be looked up again.
	next.goes("backup/encryption")
	next.press("Show my 64-digit key")
	next.at("backup/digits")
	next.until("the digits", `document.getElementById("digits").textContent !== ""`)
	if got := next.text(`document.getElementById("digits").textContent`); got != digits {
		t.Error("other digits are shown than before")
	}
}

// authenticator is a passkey manager whose user always agrees.
func (p *phone) authenticator(prf bool) {
	p.t.Helper()
	call(p, webauthn.Enable, webauthn.EnableParams{})
	call(p, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
		Protocol: webauthn.AuthenticatorProtocolCtap2, Ctap2version: webauthn.Ctap2versionCtap21, Transport: webauthn.AuthenticatorTransportInternal,
		HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true, HasPrf: prf,
	}})
}

// forget erases the device, as a new phone has nothing; the passkeys came along.
func (p *phone) forget() {
	p.t.Helper()
	p.goes("settings")
	p.press("Sign out and erase this device")
	p.until("the question", `document.getElementById("ask").open`)
	p.look("erase")
	p.press("Sign out and erase")
	p.at("sign-in")
}

// A passkey beside the password: either opens the backup.
func TestPasskeyBesideThePassword(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.newPhone()
	alice.authenticator(true)
	alice.signUp("alice")
	d.newPhone().signUp("bob")
	alice.writes("bob", secretMessage)
	alice.turnsOn(firstPassword)
	key := alice.key()
	alice.press("End-to-end encrypted backup")
	alice.at("backup/encryption")
	alice.press("Add a passkey")
	alice.at("backup/passkey")
	alice.look("passkey")
	alice.press("Create passkey")
	alice.at("backup")
	alice.says("Your passkey opens the backup too")
	// A second one for the same device is refused in words.
	alice.goes("backup/passkey")
	alice.press("Create passkey")
	alice.says("has a passkey for your backup already")
	d.nothingLeaks(key)

	alice.forget()
	alice.signIn("alice")
	alice.at("restore")
	alice.look("restore-passkey")
	d.back.sent()
	alice.press("Use your passkey")
	alice.at("restore/done")
	if alice.key() != key {
		t.Error("the passkey opened another key")
	}
	if n := d.capsules(); n > 0 {
		t.Errorf("for the passkey the vault was asked %d times", n)
	}
	alice.reads("bob", secretMessage)
	alice.goes("backup")
	eventually(t, "the vault is asked for the status", func() bool { return d.capsules() > 0 })
	alice.press("Back up now")
	alice.says("Backup saved.")
	if warning := alice.text(`document.getElementById("vault-notice").innerText`); warning != "" {
		t.Errorf("after a restore by passkey it warns: %s", warning)
	}

	// Elsewhere, where the passkey is not, the password still works.
	next := d.newPhone()
	next.authenticator(true)
	next.signIn("alice")
	next.at("restore")
	next.press("Use your passkey")
	next.says("The passkey was not used")
	next.press("Enter your backup password")
	next.at("restore/password")
	next.restores(firstPassword)

	// With a new key the passkey, which wraps the old one, is dropped.
	next.goes("backup/change")
	next.types("New backup password", secondPassword)
	next.types("The same password again", secondPassword)
	next.ticks("Somebody may know my old password: make a new key as well")
	next.press("Change password")
	next.at("backup")
	next.says("Your password is changed.")
	if next.key() == key {
		t.Error("the key is the old one")
	}
	last := d.newPhone()
	last.signIn("alice")
	last.at("restore")
	if last.text(`String(document.getElementById("restore-passkey-row").hidden)`) != "true" {
		t.Error("a passkey is offered that cannot open the backup")
	}
	last.press("Enter your backup password")
	last.at("restore/password")
	last.restores(secondPassword)
}

// A passkey instead of the password: the vault has nothing.
func TestPasskeyAlone(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	alice := d.newPhone()
	alice.authenticator(true)
	alice.signUp("alice")
	d.newPhone().signUp("bob")
	alice.writes("bob", secretMessage)
	alice.goes("backup/encryption")
	alice.press("Use a passkey")
	alice.at("backup/passkey")
	alice.press("Create passkey")
	alice.at("backup")
	alice.says("End-to-end encrypted backup is on")
	d.nothingLeaks(alice.key())
	alice.forget()
	alice.signIn("alice")
	alice.at("restore")
	alice.press("Use your passkey")
	alice.at("restore/done")
	alice.reads("bob", secretMessage)
	// A password can be added.
	alice.goes("backup/encryption")
	alice.press("Add a password")
	alice.at("backup/password")
	alice.sets(firstPassword, "Turn on")
	alice.at("backup")
	next := d.toRestore("alice")
	next.restores(firstPassword)
}

// A passkey without PRF, and a browser without passkeys or WebAssembly: in words, with a way on.
func TestBrowsersThatLackSomething(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	old := d.newPhone()
	old.authenticator(false)
	old.signUp("alice")
	old.goes("backup/passkey")
	old.press("Create passkey")
	old.says("This passkey cannot open backups")
	old.goes("backup")
	if got := old.text(`document.querySelector("[data-fill=encryption-short]").textContent`); got != "Off" {
		t.Errorf("after a passkey that was refused, backup is %s", got)
	}

	none := d.newPhone(`delete globalThis.PublicKeyCredential`)
	none.signUp("bob")
	none.goes("backup/encryption")
	none.look("encryption-without-passkeys")
	none.until("a hint", `[...document.querySelectorAll(".no-passkey")].some((e) => e.checkVisibility() && e.innerText.includes("A password works everywhere"))`)

	bare := d.newPhone(`delete globalThis.WebAssembly`)
	bare.signUp("carol")
	bare.writes("bob", "hello")
	bare.goes("backup/encryption")
	bare.look("encryption-without-webassembly")
	bare.until("a hint", `document.getElementById("no-wasm").checkVisibility()`)
	none.turnsOn(firstPassword)
	bare = d.newPhone(`delete globalThis.WebAssembly`)
	bare.signIn("bob")
	bare.at("restore")
	bare.look("restore-without-webassembly")
	bare.press("Not now: go to my chats")
	bare.at("chats")
}
