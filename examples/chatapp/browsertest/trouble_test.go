package browsertest

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// about reports whether a request is part of backing up or restoring.
func about(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, "/vault/") || strings.HasPrefix(r.URL.Path, "/api/backup")
}

// breakAt breaks the nth request of an operation, and all after it, until the link is mended.
func breakAt(n int, how verdict) func(*http.Request) verdict {
	var count atomic.Int32
	return func(r *http.Request) verdict {
		if about(r) && int(count.Add(1)) >= n {
			return how
		}
		return pass
	}
}

// breakAtCapsule is breakAt for sealed requests to the vault.
func breakAtCapsule(n int, how verdict) func(*http.Request) verdict {
	var count atomic.Int32
	return func(r *http.Request) verdict {
		if r.URL.Path == "/v1/relay" && int(count.Add(1)) >= n {
			return how
		}
		return pass
	}
}

// capsules is how many sealed requests the vault was sent since this was last called.
func (d *deployment) capsules() (n int) {
	for _, r := range d.back.sent() {
		if r == "POST /v1/relay" {
			n++
		}
	}
	return n
}

// untilDone performs an operation whose nth request, and all after it, are lost until "Try
// again" is pressed. It reports whether there was an nth.
func (p *phone) untilDone(n int, how verdict, operation func(), done string) bool {
	p.t.Helper()
	p.d.front.set(breakAt(n, how))
	operation()
	p.until("trouble, or the end", `document.getElementById("busy").classList.contains("trouble") && document.getElementById("busy").open || `+shown+` === "`+done+`"`)
	if p.text(shown) == done {
		p.d.front.set(nil)
		return false
	}
	p.says("Nothing is lost")
	if n == 1 {
		p.look("trouble-" + p.text(shown))
	}
	p.d.front.set(nil)
	p.press("Try again")
	p.at(done)
	return true
}

// The network is lost at each step of turning on and of restoring, by turns before the request
// arrives and after. "Try again" goes on, and no try is charged. (That each request can be lost in each
// way is the SDK's to test.)
func TestNetworkLostAtEachStep(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	how := func(n int) verdict { return []verdict{loseRequest, loseAnswer}[n%2] }
	alice := d.alice()
	steps := 0
	for n := 1; ; n++ {
		alice.goes("backup/password")
		on := func() { alice.sets(firstPassword, "Turn on") }
		if !alice.untilDone(n, how(n), on, "backup") {
			break
		}
		steps++
		alice.goes("backup/off")
		alice.press("Turn off and delete the backup")
		alice.at("backup")
		alice.says("Encrypted backup is off")
	}
	if steps < 5 {
		t.Errorf("turning on was broken at %d steps, which is too few", steps)
	}
	steps = 0
	for n := 1; ; n++ {
		next := d.toRestore("alice")
		next.has("10 tries left")
		restore := func() { next.tries(firstPassword) }
		more := next.untilDone(n, how(n), restore, "restore/done")
		next.goes("restore/password")
		next.has("10 tries left")
		if !more {
			break
		}
		steps++
	}
	if steps < 4 {
		t.Errorf("restoring was broken at %d steps, which is too few", steps)
	}
}

// A page that is loaded anew in the middle: of turning on, of restoring.
func TestReload(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	alice := d.newPhone()
	alice.signUp("alice")
	// The last answer of the enrolment is lost, and the page with it. So nobody knows
	// whether the vault has the key; the phone still owns it.
	d.back.set(breakAtCapsule(4, loseAnswer)) // after status, start and stage
	alice.goes("backup/password")
	alice.sets(firstPassword, "Turn on")
	alice.says("Nothing is lost")
	d.back.set(nil)
	alice.open()
	alice.turnsOn(secondPassword)

	next := d.toRestore("alice")
	next.has("10 tries left")
	d.back.set(breakAtCapsule(3, loseRequest)) // after status and start
	next.tries(secondPassword)
	next.says("Nothing is lost")
	d.back.set(nil)
	next.reload()
	next.says("Restoring was interrupted")
	next.look("restore-interrupted")
	next.has("9 tries left")
	next.restores(secondPassword)

	// Interrupted after the key was found, while the backup is fetched.
	other := d.toRestore("alice")
	d.front.set(func(r *http.Request) verdict {
		if r.URL.Path == "/api/backup/blob" {
			return loseRequest
		}
		return pass
	})
	other.tries(secondPassword)
	other.says("Nothing is lost")
	other.open()
	other.says("this costs no try")
	d.front.set(nil)
	d.back.sent()
	other.press("Get my messages")
	other.at("restore/done")
	if n := d.capsules(); n > 0 {
		t.Errorf("the vault was asked again, %d times", n)
	}
}

// Two tabs: while one is at work the other waits; what one does the other shows. And two phones
// that back up: neither loses the other's messages.
func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	bob := d.newPhone()
	bob.signUp("bob")
	alice := d.newPhone()
	alice.signUp("alice")
	second := alice.tab()
	second.goes("backup/password")
	second.types("New backup password", secondPassword)
	second.types("The same password again", secondPassword)
	alice.goes("backup/password")
	alice.types("New backup password", firstPassword)
	alice.types("The same password again", firstPassword)
	d.front.set(breakAt(3, loseRequest)) // it is in the middle
	alice.press("Turn on")
	alice.says("Nothing is lost")
	second.press("Turn on")
	second.says("Another tab of this app is at work on your backup")
	second.look("two-tabs")
	d.front.set(nil)
	alice.press("Try again")
	alice.at("backup")
	second.goes("backup")
	second.until("that backup is on", `document.querySelector("[data-fill=encryption-short]").textContent === "On"`)

	next := d.toRestore("alice")
	next.restores(firstPassword)
	alice.writes("bob", secretMessage)
	next.writes("bob", secretAnswer)
	next.goes("backup")
	alice.goes("backup")
	next.press("Back up now")
	next.says("Backup saved.")
	alice.press("Back up now")
	alice.says("Backup saved.")
	last := d.toRestore("alice")
	last.restores(firstPassword)
	for _, p := range []*phone{alice, last} {
		p.reads("bob", secretMessage)
		p.sees(secretAnswer)
	}
}

// The back end restarts, the vault answers 503, the vault is gone, the SDK does not load.
func TestServersInTrouble(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	alice := d.newPhone()
	// The page is of use before the SDK is there, and without it.
	d.front.set(func(r *http.Request) verdict {
		if strings.HasPrefix(r.URL.Path, "/sdk/") {
			return loseRequest
		}
		return pass
	})
	alice.signUp("alice")
	d.newPhone().signUp("bob")
	alice.writes("bob", secretMessage)
	alice.goes("backup/password")
	on := func() { alice.sets(firstPassword, "Turn on") }
	on()
	alice.says("could not be loaded")
	d.front.set(nil)
	d.back.set(func(*http.Request) verdict { return unavailable })
	alice.press("Try again")
	alice.says("The key vault cannot be reached right now. Nothing is lost.")
	alice.look("vault-unavailable")
	alice.press("Cancel")
	alice.says("Cancelled.")
	d.back.set(nil)

	// Cancelled while a request is under way: that ends at once.
	release := d.front.hold()
	on()
	alice.until("the dialog", `document.getElementById("busy").open`)
	alice.press("Cancel")
	alice.says("Cancelled.")
	alice.at("backup/password")
	release()

	d.restartChatapp()
	on()
	alice.at("backup")
	alice.says("End-to-end encrypted backup is on")

	// In the middle of it the back end ends, and comes back.
	next := d.toRestore("alice")
	next.has("10 tries left")
	d.chatapp.kill()
	next.tries(firstPassword)
	next.says("Nothing is lost")
	d.restartChatapp()
	next.press("Try again")
	next.at("restore/done")
}

// A device's clock that is wrong by a day, either way.
func TestClockIsWrong(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=0s,0s,1h")
	right := d.newPhone()
	right.signUp("alice")
	right.turnsOn(firstPassword)
	for days, words := range map[string]string{"-1": "slow", "1": "fast", "-40": "slow", "40": "fast"} {
		shift := `{
			const Real = Date, by = ` + days + ` * 86400000;
			globalThis.Date = class extends Real {
				constructor(...a) { a.length ? super(...a) : super(Real.now() + by); }
				static now() { return Real.now() + by; }
			};
		}`
		d.front.edit.Store(new(func(path string, body []byte) []byte {
			if path != "/sdk/worker.js" {
				return body
			}
			return append(body, shift...)
		}))
		p := d.newPhone(shift)
		p.signIn("alice")
		p.at("restore")
		p.press("Enter your backup password")
		p.at("restore/password")
		p.until("the attempts, or what is wrong", `document.getElementById("attempts").innerText.includes("tries left") || !document.getElementById("problem").hidden`)
		if p.text(`document.getElementById("problem").hidden ? "" : document.getElementById("problem").innerText`) == "" {
			if strings.HasSuffix(days, "40") {
				t.Errorf("a clock that is wrong by %s days goes unnoticed", days)
			}
			continue // the key list holds for longer
		}
		p.says("This device’s clock is")
		p.says(words)
		p.look("clock-" + days)
	}
	d.front.edit.Store(nil)
}

// Ten wrong passwords: the last one is asked for twice, the key is destroyed, and the screen says
// what is left to do. The old phone puts the key back under a password.
func TestDestroyed(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.newPhone()
	alice.signUp("alice")
	alice.turnsOn(firstPassword)
	next := d.toRestore("alice")
	for range 9 {
		next.tries(wrongPassword)
		next.says("That password is wrong")
		next.until("the dialog is gone", `!document.getElementById("busy").open`)
	}
	next.until("the last try", `document.getElementById("attempts").innerText.includes("This is your last try")`)
	next.look("restore-password-last")
	d.back.sent()
	next.tries(wrongPassword)
	next.says("Tick the box")
	if sent := d.back.sent(); len(sent) > 0 {
		t.Errorf("before the last try was confirmed, the vault was sent %q", sent)
	}
	next.ticks("I know that this is my last try: if it is wrong, the key is destroyed")
	next.press("Restore")
	next.at("restore/destroyed")
	next.look("destroyed")

	alice.goes("chats")
	alice.goes("backup")
	alice.says("This phone still has the key, so nothing is lost.")
	alice.look("backup-destroyed")
	alice.press("Set a password again")
	alice.at("backup/change")
	alice.sets(secondPassword, "Change password")
	alice.at("backup")
	alice.says("Your password opens the backup again.")

	next.press("I still have my old phone")
	next.at("restore/password")
	next.restores(secondPassword)
}

// Somebody who has lost everything starts over. The old phone, if it was not lost after all, brings
// its backup back.
func TestStartOver(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.alice()
	alice.turnsOn(firstPassword)
	thief := d.newPhone()
	thief.signIn("alice")
	thief.at("restore")
	thief.press("I cannot open it any more")
	thief.at("restore/forgotten")
	thief.look("forgotten")
	thief.press("Start over with a new backup")
	thief.at("restore/start-over")
	thief.look("start-over")
	thief.sets(secondPassword, "Delete the old backup and start over")
	thief.at("backup")
	thief.says("End-to-end encrypted backup is on")

	alice.goes("chats")
	alice.goes("backup")
	alice.says("Somebody set up a new backup for your account")
	alice.look("backup-replaced")
	alice.press("Bring my backup back")
	alice.says("Your backup is back.")
	next := d.toRestore("alice")
	next.restores(firstPassword)
	next.reads("bob", secretMessage)
}
