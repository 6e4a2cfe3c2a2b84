package browsertest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// Secrets of the story; a search for them finds nothing else.
const (
	accountPassword = "account-Ocelot-12"
	firstPassword   = "password-Narwhal-31"
	secondPassword  = "password-Pangolin-62"
	wrongPassword   = "password-Tapir-4"
	secretMessage   = "meet me by the capybara at noon"
	secretAnswer    = "the wombat and I will be there"
)

var masks = []struct{ pattern, with string }{
	{`\d{1,2} [A-Z][a-z]+ \d{4} at \d{2}:\d{2}`, "DATE"},
	{`\d{2}/\d{2}/\d{4}, \d{2}:\d{2}`, "DATE"},
	{`\b\d+ (bytes|KB)`, "SIZE"},
	{`(?:[0-9a-f]{4}\s+){2,}[0-9a-f]{4}`, "DIGITS"},
	{`Next try in [\d:]+`, "Next try in TIME"},
}

func mask(s string) string {
	for _, m := range masks {
		s = regexp.MustCompile(m.pattern).ReplaceAllString(s, m.with)
	}
	return s
}

// The whole feature, by keyboard alone: turned on with a password, backed up, the phone lost, two
// wrong passwords, restored, changed, restored by the new one, turned off. Each screen is
// looked at.
func TestPassword(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=0s,0s,1h")
	bob := d.newPhone()
	bob.look("sign-in")
	bob.signUp("bob")
	alice := d.newPhone()
	alice.signUp("alice")
	alice.look("chats-empty")
	alice.writes("bob", secretMessage)
	bob.press("Chats")
	bob.until("a chat with alice", `document.getElementById("chat-list").innerText.includes("alice")`)
	bob.writes("alice", secretAnswer)
	alice.sees(secretAnswer)
	alice.look("chat")

	alice.press("Settings")
	alice.at("settings")
	alice.look("settings")
	alice.press("Chats")
	alice.at("settings/chats")
	alice.look("settings-chats")
	alice.press("Chat backup")
	alice.at("backup")
	alice.look("backup-off")
	alice.press("End-to-end encrypted backup")
	alice.at("backup/encryption")
	alice.look("encryption-off")
	alice.press("Create a password")
	alice.at("backup/password")
	alice.look("create-password")

	// What is refused before anything is sent.
	d.back.sent()
	alice.types("New backup password", "short")
	alice.press("Turn on")
	alice.until("a refusal", `document.getElementById("new-error").innerText.includes("at least 8")`)
	alice.types("New backup password", firstPassword)
	alice.types("The same password again", secondPassword)
	alice.press("Turn on")
	alice.until("a refusal", `document.getElementById("new-error").innerText.includes("not the same")`)
	alice.look("create-password-refused")
	if sent := d.back.sent(); len(sent) > 0 {
		t.Errorf("for refused passwords the vault was sent %q", sent)
	}
	alice.types("The same password again", firstPassword)
	release := d.front.hold()
	alice.press("Turn on")
	alice.until("the dialog", `document.getElementById("busy").open`)
	alice.look("busy")
	release()
	alice.at("backup")
	alice.says("End-to-end encrypted backup is on")
	alice.look("backup-on")
	alice.press("Back up now")
	alice.says("Backup saved.")
	alice.press("End-to-end encrypted backup")
	alice.at("backup/encryption")
	alice.look("encryption-on")
	key := alice.key()

	// A new phone.
	next := d.newPhone()
	next.signIn("alice")
	next.at("restore")
	next.look("restore")
	next.press("Enter your backup password")
	next.at("restore/password")
	next.has("10 tries left")
	next.look("restore-password")
	for i, left := range []string{"9 tries left", "8 tries left"} {
		next.tries(wrongPassword)
		next.says("That password is wrong. You have " + left)
		if waits := strings.Contains(next.text(`document.getElementById("problem").innerText`), "Wait 1 hour"); waits != (i == 1) {
			t.Errorf("after %d wrong passwords a wait is shown: %v", i+1, waits)
		}
	}
	next.look("restore-password-wrong")
	d.back.sent()
	next.tries(firstPassword)
	next.says("You can try again in")
	if sent := d.back.sent(); len(sent) > 0 {
		t.Errorf("before its time, the vault was sent %q", sent)
	}

	// The old phone sees that somebody tried, and changes the password.
	alice.goes("backup")
	alice.says("Wrong backup passwords were tried 2 times")
	alice.look("backup-guessed")
	alice.press("Change password")
	alice.at("backup/change")
	alice.look("change-password")
	alice.sets(secondPassword, "Change password")
	alice.at("backup")
	alice.says("Your password is changed.")

	// With it the wait is over, and the new password opens the backup.
	next.goes("chats")
	next.goes("restore/password")
	next.has("10 tries left")
	next.restores(secondPassword)
	next.look("restored")
	next.press("Go to my chats")
	next.at("chats")
	next.look("chats")
	next.press("bob")
	next.at("chat")
	next.sees(secretMessage)
	next.sees(secretAnswer)
	if got := next.key(); got != key {
		t.Error("the new phone has another key")
	}

	d.nothingLeaks(key)

	next.goes("backup/off")
	next.look("turn-off")
	next.press("Turn off and delete the backup")
	next.at("backup")
	next.says("Encrypted backup is off")
	last := d.newPhone()
	last.signIn("alice")
	last.at("chats")
}

// key is the device's backup key, in hexadecimal.
func (p *phone) key() string {
	p.t.Helper()
	return p.text(`(async () => {
		const { user } = await (await fetch("/api/me")).json();
		const { Device } = await import("/js/device.js");
		const { bytes } = await (await Device.open(user)).keptKey("key");
		return [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
	})()`)
}

// nothingLeaks searches all that servers store, log and are sent for what must be nowhere.
func (d *deployment) nothingLeaks(keyHex string) {
	d.t.Helper()
	key, err := hex.DecodeString(keyHex)
	if err != nil || len(key) != 32 {
		d.t.Fatalf("a key of %d bytes: %v", len(key), err)
	}
	secrets := map[string][]byte{
		"the key": key, "the key's digits": []byte(keyHex), "the key's base64": []byte(base64.RawStdEncoding.EncodeToString(key)),
		"the key's base64url": []byte(base64.RawURLEncoding.EncodeToString(key)),
	}
	for _, s := range []string{"Narwhal", "Pangolin", "Tapir", "capybara", "wombat"} {
		secrets[s] = []byte(s)
		for shift := range 3 { // base64 at each alignment
			coded := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", shift) + s))
			secrets[fmt.Sprintf("%s in base64, %d", s, shift)] = []byte(coded[2*min(shift, 1)+shift/2 : len(coded)-2])
		}
	}
	places := d.dump()
	for place, bytesThere := range places {
		if len(bytesThere) < 100 && place != "what the vault was sent" { // it is not always involved
			d.t.Errorf("%s has %d bytes, so that a search says nothing", place, len(bytesThere))
		}
		for what, secret := range secrets {
			if bytes.Contains(bytesThere, secret) {
				d.t.Errorf("%s: %s is in it", place, what)
			}
		}
	}
	// The search would find what is there.
	for place, known := range map[string]string{"the chat app's database": "alice", "what the browser sent": accountPassword, "chatapp's log": "request"} {
		if !bytes.Contains(places[place], []byte(known)) {
			d.t.Errorf("%s: %q is not found in it, so that a search says nothing", place, known)
		}
	}
}
