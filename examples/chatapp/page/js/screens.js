// The screens of Settings, Chats, Chat backup, End-to-end encrypted backup, and of restoring.
import { Backup } from "./backup.js";
import * as passkey from "./passkey.js";
import { $, busy, Cancelled, fieldError, fill, notice, problem, say, wireReveal } from "./ui.js";
import { duration, explain, timeLeft, tries } from "./words.js";

const minPassword = 8; // characters; the vault's ten tries do the rest
const hopeless = new Set(["password", "passwort", "12345678", "123456789", "1234567890", "qwertyui", "qwertyuiop", "11111111", "00000000", "iloveyou", "sunshine", "football"]);

const activeOf = (status) => status.generations.find((g) => g.state === "active");
/** Whether the key was destroyed by wrong passwords. */
const guessedAway = (status) => status.generations.some((g) => ["exhausted", "failures"].includes(g.reason));

/** The screens by route. */
export function backupScreens(state, { go, changed }) {
  const b = () => state.backup;

  /** Performs work behind the dialog; afterwards goes on, or says what is wrong. */
  async function run(words, work, { then, failed, cancelled } = {}) {
    problem("");
    notice("");
    try {
      const result = await busy(words, work);
      changed();
      await then?.(result);
    } catch (error) {
      if (error instanceof Cancelled) {
        notice("Cancelled.");
        await cancelled?.();
        return;
      }
      if (await failed?.(error)) return;
      const { text } = explain(error);
      problem(text, waysOn(error));
    }
  }

  /** Buttons for what helps. */
  function waysOn(error) {
    switch (error.code) {
      case "started-over":
        return [["Enter the password", () => go("restore/password")]];
      case "already-enrolled": case "forbidden": case "wrong-key":
        return [["Restore", () => go("restore")], ["Start over", () => go("restore/start-over")]];
      case "unauthenticated":
        return [["Sign in again", () => location.reload()]];
      case "conflict": case "other-tab":
        return [["Look again", () => location.reload()]];
    }
    if (error.status === 409) return [["Look again", () => location.reload()]];
    if (error.status === 401) return [["Sign in again", () => location.reload()]];
    return [];
  }

  // -- what is shown on several screens

  function describe() {
    const stored = b().stored;
    fill("last-backup", stored ? new Date(stored.saved_at).toLocaleString(undefined, { dateStyle: "long", timeStyle: "short" }) : "Never");
    fill("backup-size", stored ? size(stored.size) : "–");
    fill("encryption-short", b().on ? "On" : stored ? "On; this device does not have the key" : "Off");
    const mode = b().kept?.facts.mode;
    const also = stored?.passkeys.length ? ` or ${stored.passkeys.length === 1 ? "your passkey" : "one of your passkeys"}` : "";
    fill("encryption-long", { password: `Your password${also} opens it.`, digits: `Your 64-digit key${also} opens it.`, passkey: "Your passkey opens it." }[mode] ?? "");
  }

  const size = (n) => (n < 1024 ? `${n} bytes` : n < 1 << 20 ? `${Math.ceil(n / 1024)} KB` : `${(n / (1 << 20)).toFixed(1)} MB`);

  /** Shows of each choice what fits. */
  async function choices(screen) {
    const when = b().on ? "on" : b().stored ? "elsewhere" : "off";
    const section = document.querySelector(`[data-screen="${screen}"]`);
    for (const e of section.querySelectorAll("[data-when]")) e.hidden = e.dataset.when !== when;
    for (const e of section.querySelectorAll("[data-mode]")) e.hidden = !e.dataset.mode.split(" ").includes(b().kept?.facts.mode);
    const can = Backup.supported();
    const prf = can && (await passkey.available());
    for (const e of section.querySelectorAll(".passkey-way")) e.hidden = !prf;
    for (const e of section.querySelectorAll(".no-passkey")) e.hidden = prf || !can;
  }

  /** Learns what there is, and shows it; if that fails, what is known. */
  async function look() {
    try {
      await b().refresh();
    } finally {
      describe();
      $("back-up").hidden = !b().on;
      $("restore-row").hidden = !b().stored;
    }
  }

  // -- Chat backup

  async function showBackup() {
    $("vault-notice").replaceChildren();
    await look();
    if (!Backup.supported()) return;
    if (b().begun && !b().on) {
      warn("Starting over with a new backup was interrupted.", ["Go on", () => go("restore/start-over")]);
    } else if (b().on && (b().begun || b().kept.facts.mode === "password")) {
      lookAtVault();
    }
  }

  const warn = (words, ...actions) => say($("vault-notice"), words, actions);

  /** Tells what the vault knows of this device's key, if it is something to know. */
  async function lookAtVault() {
    let status = { generations: [] };
    try {
      if (b().kept.facts.mode === "password") status = await b().vaultStatus();
      if (b().begun && (await lookAtBegun(status))) return;
    } catch (error) {
      if (b().begun) {
        warn(`${begunWords[b().begun.what]} was interrupted, and how far it got cannot be seen right now. ${explain(error).text}`, ["Look again", () => showBackup()]);
      } else if (["stale-keys", "wrong-vault"].includes(error.code)) {
        warn(explain(error).text);
      }
      return; // it is only to tell; what needs the vault says what is wrong
    }
    const active = activeOf(status);
    // A key that came by passkey does not know its generation.
    const { generation = active?.id } = b().kept.facts;
    const mine = status.generations.find((g) => g.id === generation);
    if (mine?.state === "frozen") {
      warn(`Somebody set up a new backup for your account, or turned yours off, without this phone’s key. If that was not you, bring yours back within ${timeLeft(mine.expiresSeconds ?? 0)}.`,
        ["Bring my backup back", reinstate]);
    } else if (!active) {
      warn(`Your password no longer opens the backup: ${guessedAway(status) ? "after too many wrong tries its key was destroyed in the vault" : "it was turned off in the vault"}. This phone still has the key, so nothing is lost.`,
        ["Set a password again", () => go("backup/change")]);
    } else if (!mine) {
      warn("Your backup was set up anew on another phone, or its password was changed there. Restore it here to go on backing up.", ["Restore", () => go("restore")]);
    } else if (mine.failuresSince > 0) {
      warn(`Wrong backup passwords were tried ${mine.failuresSince === 1 ? "once" : `${mine.failuresSince} times`} since it was last opened. If that was not you, somebody is guessing; ${tries(status.attemptsLeft)} left before the key is destroyed. You can change the password now.`,
        ["Change password", () => go("backup/change")]);
    }
  }

  const begunWords = { change: "Changing your password", "new-key": "Changing your password and key", "start-over": "Starting over", reinstate: "Bringing your backup back", off: "Turning off" };
  const saved = async () => {
    await showBackup();
    notice("Backup saved.");
  };
  const backUp = () => run("Backing up…", (job) => b().backUp(job), { then: saved });
  $("back-up").addEventListener("click", backUp);
  const reinstate = () => run("Bringing your backup back…", (job) => b().reinstate(job), {
    then: async () => {
      await showBackup();
      notice("Your backup is back.");
    },
    cancelled: showBegun,
  });

  /**
   * Says how far it got, what was begun and interrupted on this device, and what can be done. Returns whether that is all there
   * is to say.
   */
  async function lookAtBegun(status) {
    const { what, before, saving } = b().begun;
    const { mode, generation } = b().kept.facts;
    const active = activeOf(status);
    const leave = (label) => [label, async () => { await b().leaveIt(); await showBackup(); }];
    const change = (label) => [label, () => go("backup/change")];
    if (what === "off") {
      const opens = mode !== "password" || Boolean(active);
      if (!b().stored && (mode !== "password" || !active)) {
        await b().forget();
        await showBackup();
        notice("Turning off was interrupted, and was done all the same: encrypted backup is off, and the stored backup is deleted.");
      } else if (opens) {
        warn("Turning off was interrupted before anything was turned off. Your backup is as it was.", ["Turn off now", turnOff], leave("Keep the backup"));
      } else {
        warn("Turning off was interrupted halfway. Your password opens nothing any more, but the backup is still stored.", ["Turn off now", turnOff], change("Set a password again"));
      }
      return true;
    }
    if (saving) {
      $("back-up").hidden = true; // there is one in the words
      warn(`${begunWords[what]} was interrupted at its end. Your new password is set, but your messages are not yet backed up under it.`, ["Back up now", backUp]);
      return true;
    }
    if (what === "reinstate") {
      if (active?.id !== generation) return false; // it is as it was
      $("back-up").hidden = true;
      warn(`${begunWords[what]} was interrupted at its end. Your password opens it again, but your messages are not yet backed up.`, ["Back up now", reinstate]);
      return true;
    }
    if (!active || status.generations.some((g) => g.state === "frozen" && [before, generation].includes(g.id))) return false;
    if (active.id === before) {
      warn(`${begunWords[what]} was interrupted before it was done. Your old password still opens the backup.`, change("Change password"), leave("Keep the old password"));
      return true;
    }
    if (what === "new-key") {
      warn(`${begunWords[what]} was interrupted halfway: the old password opens nothing any more, and the backup is not yet under the new key. Nothing is lost. Set the new password once more to finish.`, change("Set the password"));
      return true;
    }
    if (!(await b().opens())) return false;
    await b().adopt(active.id);
    notice("Changing your password was interrupted, and was done all the same: the new password opens your backup.");
    return false;
  }

  // -- turning on

  async function showEncryption() {
    await look();
    await choices("backup/encryption");
    $("no-wasm").hidden = Backup.supported();
    $("ways").hidden = !Backup.supported();
  }

  /** Fills a form for a new password. It is emptied when the screen is left. */
  function newPassword(id, label, { offerNewKey = false, danger = false } = {}, submit) {
    const form = $(id);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const { first, second, newKey } = form.elements;
      const error = $("new-error");
      fieldError(first, error, "");
      fieldError(second, error, "");
      if ([...first.value].length < minPassword) return fieldError(first, error, `Use at least ${minPassword} characters.`);
      if (hopeless.has(first.value.toLowerCase())) return fieldError(first, error, "Others would try this password first. Choose another one.");
      if (first.value !== second.value) return fieldError(second, error, "The two passwords are not the same. Type it again.");
      return submit(first.value, newKey.checked);
    });
    return {
      fields() {
        form.replaceChildren($("new-password-fields").content.cloneNode(true));
        const button = form.querySelector("button.primary");
        button.textContent = label;
        if (danger) button.className = "danger";
        form.querySelector(".new-key").hidden = !(offerNewKey && offerNewKey());
        wireReveal(form.querySelector(".reveal"));
      },
      empty() { form.replaceChildren(); },
    };
  }

  const on = async () => {
    go("backup", "End-to-end encrypted backup is on, and your messages are backed up.");
  };
  const stretching = "Protecting your key with the password. This takes a few seconds…";
  const create = newPassword("create-password", "Turn on", {}, (password) => run(stretching, (job) => b().turnOnWithPassword(job, password), { then: on }));
  const startOver = newPassword("start-over", "Delete the old backup and start over", { danger: true }, (password) =>
    run(stretching, (job) => b().startOver(job, password), { then: on, cancelled: showBegun }));
  let again = false; // the vault has no key: it is put there again, and not replaced
  const change = newPassword("change-password", "Change password", { offerNewKey: () => !again && b().begun?.what !== "new-key" }, (password, newKey) =>
    run(stretching, (job) => (again ? b().setPasswordAgain(job, password) : b().changePassword(job, password, newKey)), {
      then: () => {
        go("backup", again ? "Your password opens the backup again." : "Your password is changed.");
      },
      cancelled: showBegun,
    }));

  /** After an interruption: to where it is said how far it got. */
  function showBegun() {
    if (b().begun) go(b().on ? "backup" : "restore/start-over", "Cancelled.");
  }

  async function showChange() {
    await look();
    if (!b().on || b().kept.facts.mode !== "password") return go("backup/encryption");
    again = false;
    try {
      again = !activeOf(await b().vaultStatus());
    } catch { /* it shows when the form is sent */ }
    change.fields();
    return undefined;
  }

  // -- 64 digits

  let lastGroup;

  async function showDigits() {
    await look();
    $("digits").textContent = "";
    lastGroup = undefined;
    fieldError($("digits-group"), $("digits-error"), "");
    $("confirm-digits").reset();
    $("confirm-digits").hidden = b().on;
    if (b().stored && !b().on) return go("backup/encryption");
    await run("Making your key…", (job) => b().newDigits(job), {
      then: (digits) => {
        $("digits").textContent = digits;
        lastGroup = digits.slice(-4);
      },
    });
    return undefined;
  }

  $("confirm-digits").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = event.target.group;
    if (!lastGroup || input.value.trim().toLowerCase() !== lastGroup) {
      fieldError(input, $("digits-error"), "These are not the last four digits of the key above. Look at what you wrote down.");
      return;
    }
    fieldError(input, $("digits-error"), "");
    run("Turning on…", (job) => b().turnOnWithDigits(job), { then: on });
  });

  // -- passkey

  $("make-passkey").addEventListener("click", () => {
    const was = b().on;
    run("Waiting for your passkey…", (job) => b().addPasskey(job), {
      then: () => {
        go("backup", was ? "Your passkey opens the backup too, from now on." : "End-to-end encrypted backup is on, and your messages are backed up.");
      },
    });
  });

  // -- turning off

  const turnOff = () => run("Turning off…", (job) => b().turnOff(job), {
    then: () => {
      go("backup", "Encrypted backup is off, and the stored backup is deleted.");
    },
    cancelled: showBegun,
  });
  $("turn-off").addEventListener("click", turnOff);

  // -- restoring

  async function showRestore() {
    await look();
    if (!b().stored) {
      go("backup");
      return;
    }
    const can = Backup.supported();
    const prf = can && (await passkey.available());
    const hasPasskeys = b().stored.passkeys.length > 0;
    $("restore-no-wasm").hidden = can;
    $("restore-ways").hidden = !can;
    for (const e of $("restore-ways").querySelectorAll("[data-mode]")) e.hidden = e.dataset.mode !== b().stored.mode;
    $("restore-passkey-row").hidden = !(hasPasskeys && prf);
    $("restore-no-passkey").hidden = !(hasPasskeys && can && !prf);
    sayInterrupted();
  }

  /** A reload, or a browser that was closed, in the middle of a restore. */
  function sayInterrupted() {
    if (!sessionStorage.getItem("restoring")) return;
    sessionStorage.removeItem("restoring");
    if (b().on) {
      problem("Restoring was interrupted after your key was found. The key is on this device now, so this costs no try.", [["Get my messages", getMessages]]);
    } else {
      problem("Restoring was interrupted. Nothing is lost: enter your password again. If it had been sent already, that may count as a try.");
    }
  }

  const getMessages = () => run("Getting your messages…", (job) => b().restoreAgain(job), { then: done });

  const done = ({ messages, failuresSince = 0 }) => {
    sessionStorage.removeItem("restoring");
    fill("restored", messages === 1 ? "1 message was restored." : `${messages} messages were restored.`);
    const others = failuresSince - ownFailures;
    ownFailures = 0;
    $("foreign-failures").hidden = others <= 0;
    $("foreign-failures").textContent = others > 0
      ? `Besides yours, ${others === 1 ? "one wrong password was" : `${others} wrong passwords were`} tried since the backup was last opened. If that was not you on another phone, somebody was guessing: change your password under Chat backup.` : "";
    go("restore/done");
  };

  let ownFailures = 0; // of this page, since the last success
  let waitUntil = 0; // performance.now() when the next try is answered
  let ticking;
  let left; // attempts, when known

  function showAttempts() {
    $("attempts").textContent = left === undefined ? "" : left === 1
      ? "This is your last try. If it is wrong, the key is destroyed."
      : `You have ${tries(left)} left. After the last wrong one the key is destroyed.`;
    $("last-try").hidden = left !== 1;
    $("last-try-check").checked = false;
  }

  function countDown(seconds) {
    clearInterval(ticking);
    waitUntil = performance.now() + seconds * 1000;
    const tick = () => {
      const rest = Math.ceil((waitUntil - performance.now()) / 1000);
      const clock = $("countdown");
      clock.hidden = rest <= 0;
      const [h, m, s] = [Math.floor(rest / 3600), Math.floor((rest % 3600) / 60), rest % 60];
      clock.textContent = rest > 0 ? `Next try in ${h ? `${h}:${String(m).padStart(2, "0")}` : m}:${String(s).padStart(2, "0")}` : "";
      if (rest <= 0) {
        clearInterval(ticking);
        if (seconds > 0) notice("You can try again now.");
      }
    };
    tick();
    if (seconds > 0) ticking = setInterval(tick, 1000);
  }

  async function showRestorePassword() {
    await look();
    if (!b().stored) return go("backup");
    $("restore-with-password").reset();
    left = undefined;
    showAttempts();
    countDown(0);
    sayInterrupted();
    lookAtAttempts();
    return undefined;
  }

  /** Shows attempts left and the wait before the next try. It does not hold up the screen. */
  async function lookAtAttempts() {
    try {
      const status = await b().vaultStatus();
      const open = status.generations.some((g) => ["active", "frozen"].includes(g.state));
      if (!open && !guessedAway(status)) {
        problem("The key vault has no key for this backup: it was turned off or set up elsewhere. If your old phone still has your messages, set up backup there again.", [["Start over", () => go("restore/start-over")]]);
        return;
      }
      if (!open) {
        go("restore/destroyed");
        return;
      }
      left = status.attemptsLeft;
      showAttempts();
      countDown(status.waitSeconds);
    } catch (error) {
      if (error.code === "key-destroyed") go("restore/destroyed");
      else problem(explain(error).text, [["Try again", () => { problem(""); lookAtAttempts(); }]]);
    }
  }

  $("restore-with-password").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = event.target.password;
    const wait = Math.ceil((waitUntil - performance.now()) / 1000);
    if (wait > 0) {
      problem(`You can try again in ${duration(wait)}. Nothing was sent.`);
      return;
    }
    if (left === 1 && !$("last-try-check").checked) {
      problem("This is your last try. Tick the box below the password if you want to use it.");
      $("last-try-check").focus();
      return;
    }
    sessionStorage.setItem("restoring", "yes");
    run("Opening your backup. This takes a few seconds…", (job) => b().restoreWithPassword(job, input.value), {
      then: done,
      failed: async (error) => {
        sessionStorage.removeItem("restoring");
        switch (error.code) {
          case "wrong-password":
            ownFailures++;
            left = error.attemptsLeft;
            showAttempts();
            problem(`${explain(error).text}${error.waitSeconds > 0 ? ` Wait ${duration(error.waitSeconds)} before the next one.` : ""}`);
            countDown(error.waitSeconds);
            input.value = "";
            input.focus();
            return true;
          case "too-early":
            countDown(error.waitSeconds);
            return false;
          case "key-destroyed":
            ownFailures = 0;
            go("restore/destroyed");
            return true;
          case "wrong-key":
            input.value = "";
            problem("Your password is right, but the stored backup is under an older key: somebody started over, or changed the key, and was interrupted before the messages were backed up. A phone that still has them can back them up now. If there is none, replace the old backup by what is on this phone.",
              [["Replace the old backup", () => run("Backing up…", (job) => b().backUp(job, { passkeys: [] }), { then: () => go("backup", "Backup saved.") })]]);
            return true;
        }
        return false;
      },
    });
  });

  $("restore-with-digits").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = event.target.digits;
    fieldError(input, $("key-digits-error"), "");
    run("Opening your backup…", (job) => b().restoreWithDigits(job, input.value), {
      then: done,
      failed: async (error) => {
        if (error.code === "invalid-digits") {
          const count = (input.value.match(/[0-9a-f]/gi) ?? []).length;
          fieldError(input, $("key-digits-error"), /[^0-9a-f\s]/i.test(input.value)
            ? "Only the digits 0 to 9, the letters a to f and spaces belong in the key. Look for an o, an l or a dash."
            : `The key has 64 digits; there are ${count}.`);
          return true;
        }
        if (error.code === "wrong-key") {
          fieldError(input, $("key-digits-error"), "This is not the key of this backup. Compare it with what you wrote down, group by group.");
          return true;
        }
        return false;
      },
    });
  });

  const withPasskey = () => run("Waiting for your passkey…", (job) => b().restoreWithPasskey(job), { then: done });
  $("restore-passkey").addEventListener("click", withPasskey);
  $("destroyed-passkey").addEventListener("click", withPasskey);
  for (const button of document.querySelectorAll(".refresh")) button.addEventListener("click", () => go("restore/password"));

  async function showStartOver() {
    await look();
    startOver.fields();
    $("start-over-begun").replaceChildren();
    if (b().begun && !b().on) lookAtStartOver();
  }

  async function lookAtStartOver() {
    const words = $("start-over-begun");
    const { before } = b().begun;
    try {
      const active = activeOf(await b().vaultStatus());
      if (active && active.id !== before) {
        say(words, "Starting over was interrupted halfway: the old password is put aside and the new one is set, but nothing is backed up under it yet. To finish, set the new password once more.");
      } else {
        say(words, "Starting over was interrupted before anything was changed: the old backup is as it was. You can start over now, or leave it.",
          [["Leave the old backup as it is", async () => { await b().leaveIt(); go("restore"); }]]);
      }
    } catch (error) {
      say(words, `Starting over was interrupted, and how far it got cannot be seen right now. ${explain(error).text}`, [["Look again", () => showStartOver()]]);
    }
  }

  async function showDestroyed() {
    await look();
    $("destroyed-passkey-row").hidden = !(b().stored?.passkeys.length && (await passkey.available()));
  }

  return {
    "settings/chats": { show: look },
    backup: { show: showBackup },
    "backup/encryption": { show: showEncryption },
    "backup/password": { show: async () => { await look(); create.fields(); }, hide: () => create.empty() },
    "backup/change": { show: showChange, hide: () => change.empty() },
    "backup/digits": { show: showDigits, hide: () => { $("digits").textContent = ""; } },
    "backup/passkey": { show: async () => { await look(); await choices("backup/passkey"); } },
    "backup/off": { show: look },
    restore: { show: showRestore },
    "restore/password": { show: showRestorePassword, hide: () => { clearInterval(ticking); $("restore-with-password").reset(); } },
    "restore/digits": { show: () => $("restore-with-digits").reset(), hide: () => $("restore-with-digits").reset() },
    "restore/destroyed": { show: showDestroyed },
    "restore/forgotten": {},
    "restore/start-over": { show: showStartOver, hide: () => startOver.empty() },
    "restore/done": {},
  };
}
