package browsertest

import (
	"net/http"
	"strings"
	"testing"
)

// bothWays are the two ways in which a network is lost.
var bothWays = map[string]verdict{"the request is lost": loseRequest, "the answer is lost": loseAnswer}

// breakStoring breaks what changes the stored backup.
func breakStoring(how verdict) func(*http.Request) verdict {
	return func(r *http.Request) verdict {
		if r.URL.Path == "/api/backup" && r.Method != http.MethodGet {
			return how
		}
		return pass
	}
}

// opensWith sees that this password opens the backup, and that the other one does not.
func (p *phone) opensWith(password, not string) {
	p.t.Helper()
	p.goes("chats")
	p.goes("restore/password")
	p.tries(not)
	p.says("That password is wrong")
	p.restores(password)
}

// The network is lost at each step of changing the password.
func TestNetworkLostWhileChanging(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.alice()
	old, now := secondPassword, firstPassword
	alice.turnsOn(now)
	next := d.toRestore("alice")
	next.restores(now)
	for name, how := range bothWays {
		steps := 0
		for n := 1; ; n++ {
			old, now = now, old
			alice.goes("backup/change")
			more := alice.untilDone(n, how, func() { alice.sets(now, "Change password") }, "backup")
			alice.says("Your password is changed.")
			next.opensWith(now, old)
			if !more {
				break
			}
			steps++
		}
		if steps < 4 {
			t.Errorf("%s: changing was broken at %d steps, which is too few", name, steps)
		}
	}
	next.reads("bob", secretMessage)
}

// Changing the password is interrupted for good: the page is loaded anew, or the user gives up.
func TestChangeInterrupted(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.alice()
	alice.turnsOn(firstPassword)
	key := alice.key()
	next := d.toRestore("alice")
	next.restores(firstPassword)
	const newKey = "Somebody may know my old password: make a new key as well"
	const activation = 5 // after the status twice, start and stage
	changes := func(password string, capsule int, how verdict, newKeyToo bool) {
		t.Helper()
		alice.goes("backup/change")
		if newKeyToo {
			alice.ticks(newKey)
		}
		d.back.set(breakAtCapsule(capsule, how))
		alice.sets(password, "Change password")
		alice.says("Nothing is lost")
		d.back.set(nil)
	}

	changes(secondPassword, activation, loseRequest, false)
	alice.press("Cancel")
	alice.at("backup")
	alice.says("Changing your password was interrupted before it was done. Your old password still opens the backup.")
	alice.look("change-interrupted")
	next.opensWith(firstPassword, secondPassword)
	alice.press("Keep the old password")
	alice.until("that it is forgotten", `document.getElementById("vault-notice").innerText === ""`)

	changes(secondPassword, activation, loseAnswer, false)
	alice.reload()
	alice.at("backup")
	alice.says("Changing your password was interrupted, and was done all the same: the new password opens your backup.")
	next.opensWith(secondPassword, firstPassword)
	alice.reload()
	alice.until("that nothing is amiss", `document.getElementById("vault-notice").innerText === ""`)
	if alice.key() != key {
		t.Error("the key is another one")
	}

	// With a new key. What the vault does not have is not in use; what it has is not lost.
	changes(firstPassword, activation, loseRequest, true)
	alice.reload()
	alice.says("Changing your password and key was interrupted before it was done. Your old password still opens the backup.")
	next.opensWith(secondPassword, firstPassword)
	alice.press("Change password")
	alice.at("backup/change")
	alice.sets(firstPassword, "Change password")
	alice.says("Your password is changed.")
	second := alice.key()
	if second == key {
		t.Error("the key is the old one")
	}
	next.opensWith(firstPassword, secondPassword)
	if next.key() != second {
		t.Error("the new phone has another key")
	}

	changes(secondPassword, activation, loseAnswer, true)
	alice.reload()
	alice.says("the old password opens nothing any more, and the backup is not yet under the new key. Nothing is lost.")
	alice.look("change-of-key-interrupted")
	stranded := d.toRestore("alice")
	stranded.has("10 tries left")
	stranded.tries(secondPassword)
	stranded.says("Your password is right, but the stored backup is under an older key")
	stranded.look("restore-older-key")
	alice.press("Set the password")
	alice.at("backup/change")
	alice.sets(wrongPassword, "Change password")
	alice.says("Your password is changed.")
	next.opensWith(wrongPassword, secondPassword)
	if third := alice.key(); third == second || next.key() != third {
		t.Error("the phones do not have the new key")
	}

	// The vault has the new key, and the backup under it is not stored.
	alice.goes("backup/change")
	alice.ticks(newKey)
	d.front.set(breakStoring(loseRequest))
	alice.sets(firstPassword, "Change password")
	alice.says("Nothing is lost")
	alice.reload()
	alice.says("Your new password is set, but your messages are not yet backed up under it.")
	d.front.set(nil)
	alice.press("Back up now")
	alice.says("Backup saved.")
	next.opensWith(firstPassword, wrongPassword)
	last := d.toRestore("alice")
	last.restores(firstPassword)
	last.reads("bob", secretMessage)
}

// The network is lost at each step of turning off.
func TestNetworkLostWhileTurningOff(t *testing.T) {
	t.Parallel()
	d := deploy(t)
	alice := d.alice()
	for name, how := range bothWays {
		steps := 0
		for n := 1; ; n++ {
			alice.turnsOn(firstPassword)
			alice.goes("backup/off")
			more := alice.untilDone(n, how, func() { alice.press("Turn off and delete the backup") }, "backup")
			alice.says("Encrypted backup is off, and the stored backup is deleted.")
			alice.isOff()
			if !more {
				break
			}
			steps++
		}
		if steps < 3 {
			t.Errorf("%s: turning off was broken at %d steps, which is too few", name, steps)
		}
	}
	alice.reads("bob", secretMessage)
}

// isOff sees that backup is off on this phone, and that neither the back end nor the vault has any.
func (p *phone) isOff() {
	p.t.Helper()
	p.until("that backup is off", `document.querySelector("[data-fill=encryption-short]").textContent === "Off"`)
	if got := p.text(`fetch("/api/backup").then((r) => r.text())`); strings.TrimSpace(got) != `{"backup":null}` {
		p.t.Errorf("the back end has %s", got)
	}
	if got := p.text(`(async () => {
		const account = await (await fetch("/api/me")).json();
		const { Device } = await import("/js/device.js");
		const { Backup } = await import("/js/backup.js");
		const { generations } = await new Backup(account, await Device.open(account.user)).vaultStatus();
		return JSON.stringify(generations.filter((g) => g.state !== "destroyed"));
	})()`); got != "[]" {
		p.t.Errorf("the vault has %s", got)
	}
}

// Turning off is interrupted for good.
func TestTurningOffInterrupted(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.alice()
	alice.turnsOn(firstPassword)
	turnsOff := func(link *link, decide func(*http.Request) verdict) {
		t.Helper()
		alice.goes("backup/off")
		link.set(decide)
		alice.press("Turn off and delete the backup")
		alice.says("Nothing is lost")
		link.set(nil)
	}

	turnsOff(d.back, breakAtCapsule(2, loseRequest)) // after the status
	alice.reload()
	alice.at("backup")
	alice.says("Turning off was interrupted before anything was turned off. Your backup is as it was.")
	alice.look("off-interrupted")
	d.toRestore("alice").restores(firstPassword)
	alice.press("Keep the backup")
	alice.until("that it is forgotten", `document.getElementById("vault-notice").innerText === ""`)

	turnsOff(d.back, breakAtCapsule(2, loseAnswer))
	alice.press("Cancel")
	alice.at("backup")
	alice.says("Turning off was interrupted halfway. Your password opens nothing any more, but the backup is still stored.")
	alice.look("off-halfway")
	alice.press("Set a password again")
	alice.at("backup/change")
	alice.sets(secondPassword, "Change password")
	alice.says("Your password opens the backup again.")
	d.toRestore("alice").restores(secondPassword)

	turnsOff(d.front, breakStoring(loseRequest))
	alice.reload()
	alice.says("Turning off was interrupted halfway.")
	alice.press("Turn off now")
	alice.says("Encrypted backup is off, and the stored backup is deleted.")
	alice.isOff()

	alice.turnsOn(firstPassword)
	turnsOff(d.front, breakStoring(loseAnswer))
	alice.reload()
	alice.says("Turning off was interrupted, and was done all the same")
	alice.isOff()
	alice.reads("bob", secretMessage)
}

// Starting over is interrupted: the page says what is so now, and goes on.
func TestStartOverInterrupted(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	const activation = 5 // after the status twice, start and stage
	d.newPhone().signUp("bob")
	// lost is a user who has a backup, and a new phone on which it is started over.
	lost := func(name string, capsule int, how verdict) *phone {
		t.Helper()
		old := d.newPhone()
		old.signUp(name)
		old.writes("bob", secretMessage)
		old.turnsOn(firstPassword)
		p := d.newPhone()
		p.signIn(name)
		p.at("restore")
		p.goes("restore/start-over")
		d.back.set(breakAtCapsule(capsule, how))
		p.sets(secondPassword, "Delete the old backup and start over")
		if capsule > 0 {
			p.says("Nothing is lost")
		}
		d.back.set(nil)
		return p
	}

	// The vault never heard of it.
	alice := lost("alice", activation, loseRequest)
	alice.reload()
	alice.at("restore/start-over")
	alice.says("Starting over was interrupted before anything was changed: the old backup is as it was.")
	alice.look("start-over-interrupted")
	alice.press("Leave the old backup as it is")
	alice.at("restore")
	alice.press("Enter your backup password")
	alice.at("restore/password")
	alice.restores(firstPassword)
	alice.reads("bob", secretMessage)

	// It did it, and the page does not know.
	carol := lost("carol", activation, loseAnswer)
	stranded := d.toRestore("carol") // on yet another phone
	stranded.tries(secondPassword)
	stranded.says("Your password is right, but the stored backup is under an older key")
	carol.press("Cancel")
	carol.at("restore/start-over")
	carol.says("Starting over was interrupted halfway")
	carol.reload()
	carol.at("restore/start-over")
	carol.says("To finish, set the new password once more.")
	carol.look("start-over-halfway")
	carol.goes("backup")
	carol.says("Starting over with a new backup was interrupted.")
	carol.press("Go on")
	carol.at("restore/start-over")
	carol.sets(wrongPassword, "Delete the old backup and start over")
	carol.at("backup")
	carol.says("End-to-end encrypted backup is on")
	carol.writes("bob", secretAnswer)
	carol.goes("backup")
	carol.press("Back up now")
	carol.says("Backup saved.")
	next := d.toRestore("carol")
	next.restores(wrongPassword)
	next.reads("bob", secretAnswer)

	// Somebody else, or the same person elsewhere, cannot do it once more for a week.
	other := d.newPhone()
	other.signIn("carol")
	other.at("restore")
	other.goes("restore/start-over")
	other.sets(firstPassword, "Delete the old backup and start over")
	other.says("Somebody started over already, so it cannot be done once more for 7 days.")
	other.look("started-over-already")
	if noted := other.text(`(async () => {
		const { user } = await (await fetch("/api/me")).json();
		const { Device } = await import("/js/device.js");
		return String((await (await Device.open(user)).keptKey("pending"))?.facts.what);
	})()`); noted != "undefined" {
		t.Errorf("what was refused is noted as begun: %s", noted)
	}
	other.press("Enter the password")
	other.at("restore/password")
	other.restores(wrongPassword)

	// The new key is there, and the backup is not.
	d.front.set(breakStoring(pass))
	dave := d.newPhone()
	dave.signUp("dave")
	dave.turnsOn(firstPassword)
	dave = d.newPhone()
	dave.signIn("dave")
	dave.at("restore")
	dave.goes("restore/start-over")
	d.front.set(breakStoring(loseRequest))
	dave.sets(secondPassword, "Delete the old backup and start over")
	dave.says("Nothing is lost")
	dave.reload()
	dave.at("backup")
	dave.says("Starting over was interrupted at its end. Your new password is set, but your messages are not yet backed up under it.")
	d.front.set(nil)
	dave.press("Back up now")
	dave.says("Backup saved.")
	d.toRestore("dave").restores(secondPassword)

	// Who has the new password, on a phone that knows nothing else, replaces what nobody can open.
	erin := lost("erin", activation, loseAnswer)
	erin.press("Cancel")
	erin = d.toRestore("erin")
	erin.tries(secondPassword)
	erin.says("Your password is right, but the stored backup is under an older key")
	erin.press("Replace the old backup")
	erin.at("backup")
	erin.says("Backup saved.")
	d.toRestore("erin").restores(secondPassword)
}

// The network is lost while the old phone brings its backup back.
func TestReinstatementInterrupted(t *testing.T) {
	t.Parallel()
	d := deploy(t, "--delays=none")
	alice := d.alice()
	alice.turnsOn(firstPassword)
	const reinstatement = 3 // after the status twice
	replaced := func() {
		t.Helper()
		thief := d.newPhone()
		thief.signIn("alice")
		thief.at("restore")
		thief.goes("restore/start-over")
		thief.sets(secondPassword, "Delete the old backup and start over")
		thief.at("backup")
		alice.goes("chats")
		alice.goes("backup")
		alice.says("Somebody set up a new backup for your account")
	}
	back := func() {
		t.Helper()
		alice.says("Your backup is back.")
		next := d.toRestore("alice")
		next.restores(firstPassword)
		next.reads("bob", secretMessage)
	}
	for _, how := range bothWays {
		replaced()
		d.back.set(breakAtCapsule(reinstatement, how))
		alice.press("Bring my backup back")
		alice.says("Nothing is lost")
		d.back.set(nil)
		alice.press("Try again")
		back()
	}

	replaced()
	d.back.set(breakAtCapsule(reinstatement, loseRequest))
	alice.press("Bring my backup back")
	alice.says("Nothing is lost")
	d.back.set(nil)
	alice.reload()
	alice.says("Somebody set up a new backup for your account")
	d.front.set(breakStoring(loseRequest))
	alice.press("Bring my backup back")
	alice.says("Nothing is lost")
	alice.press("Cancel")
	d.front.set(nil)
	alice.says("Your password opens it again, but your messages are not yet backed up.")
	alice.look("reinstatement-interrupted")
	alice.press("Back up now")
	back()
}

// The network is lost while a passkey is added: beside the password, and alone.
func TestNetworkLostWhileAddingPasskey(t *testing.T) {
	t.Parallel()
	for name, how := range bothWays {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := deploy(t)
			d.newPhone().signUp("bob")
			alice := d.newPhone()
			alice.authenticator(true)
			alice.signUp("alice")
			alice.writes("bob", secretMessage)
			alice.turnsOn(firstPassword)
			alice.goes("backup/passkey")
			if !alice.untilDone(1, how, func() { alice.press("Create passkey") }, "backup") {
				t.Error("nothing was broken")
			}
			alice.says("Your passkey opens the backup too")
			alice.forget()
			alice.signIn("alice")
			alice.at("restore")
			alice.press("Use your passkey")
			alice.at("restore/done")

			carol := d.newPhone()
			carol.authenticator(true)
			carol.signUp("carol")
			carol.writes("bob", secretMessage)
			carol.goes("backup/passkey")
			d.front.set(breakStoring(how))
			carol.press("Create passkey")
			carol.says("Nothing is lost")
			d.front.set(nil)
			carol.reload()
			carol.goes("backup")
			if how == loseRequest { // nothing depends on that passkey
				carol.until("that backup is off", `document.querySelector("[data-fill=encryption-short]").textContent === "Off"`)
				carol.goes("backup/passkey")
				carol.press("Create passkey")
				carol.at("backup")
				carol.says("End-to-end encrypted backup is on")
			}
			carol.forget()
			carol.signIn("carol")
			carol.at("restore")
			carol.press("Use your passkey")
			carol.at("restore/done")
			carol.reads("bob", secretMessage)
		})
	}
}
