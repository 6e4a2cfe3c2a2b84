// What went wrong, in words for the user, with the way on. The guide's table says the same.
import { ServerError, clockAhead } from "./api.js";

/** "5 minutes", "2 hours": how long to wait, rounded up; the vault's clock is known to a second or two, which make no hour. */
export function duration(seconds) {
  const unit = (n, name) => `${n} ${name}${n === 1 ? "" : "s"}`;
  if (seconds < 60) return unit(Math.max(1, seconds), "second");
  const minutes = Math.ceil((seconds - 5) / 60);
  if (minutes < 60) return unit(minutes, "minute");
  const hours = Math.ceil(minutes / 60);
  return hours < 48 ? unit(hours, "hour") : unit(Math.ceil(hours / 24), "day");
}

/** "7 days": the time left until a deadline, rounded down; seven days less some minutes are seven days still. */
export function timeLeft(seconds) {
  const [minutes, hours] = [Math.floor(seconds / 60), Math.floor(seconds / 3600)];
  if (hours < 1) return duration(minutes * 60);
  return hours < 48 ? duration(hours * 3600) : duration(Math.floor((seconds + 1800) / 86400) * 86400);
}

/** How much it is, rounded to the nearest. */
function roughly(seconds) {
  const hours = Math.round(seconds / 3600);
  if (hours < 2) return `${Math.round(seconds / 60)} minutes`;
  return hours < 48 ? `${hours} hours` : `${Math.round(hours / 24)} days`;
}

export const tries = (n) => (n === 1 ? "1 try" : `${n} tries`);

/** An error of this page's own, with words for the user. */
export class Explained extends Error {
  constructor(code, words) {
    super(words);
    this.name = "Explained";
    this.code = code;
  }
}

const vaultWords = {
  "wrong-vault": "Something between this phone and the key vault is not what it should be, so nothing was sent. Try another network. If this stays, the app needs an update.",
  "bad-response": "The key vault gave an answer that makes no sense. Try another network. If this stays, the app needs an update.",
  "invalid-password": "This password cannot be used. Choose another one.",
  "rate-limited": "That was a lot of changes in a short time.",
  "key-destroyed": "This backup’s key is gone: the wrong password was entered too often.",
  "not-enrolled": "The key vault has no key for your account.",
  "already-enrolled": "Your account has an encrypted backup already. Restore it, or start over.",
  frozen: "Your backup was turned off without its key. Its old password still opens it for some days.",
  conflict: "Another phone or tab was faster. Nothing was lost. Look again, then try once more.",
  forbidden: "This phone’s backup key is not the one in the vault: the backup was set up anew elsewhere. Restore it here to go on.",
  unauthenticated: "The key vault does not know this sign-in. Sign in again.",
  "no-token": "The chat server could not be reached.",
  "not-forwarded": "The chat server did not pass the request on to the key vault. Nothing is lost.",
  outdated: "This version of the app is too old for the key vault. Load the page again, or update the app.",
  unavailable: "The key vault cannot be reached right now. Nothing is lost.",
  cancelled: "It was cancelled before its end was known.",
  "not-a-backup": "The stored backup is damaged or of a newer version of this app. Update the app and try again.",
  "wrong-key": "This key does not open the backup. It may belong to an older one.",
  unsupported: "This browser cannot encrypt backups. Open this page in a current browser.",
  "not-loaded": "A part of the app could not be loaded. Check the connection.",
  stopped: "The encryption stopped, perhaps because this device is short of memory. Close other tabs and try again.",
};

/** Returns {text, retry}: retry says whether trying again, unchanged, can help. */
export function explain(error) {
  const offline = navigator.onLine === false;
  if (error instanceof Explained) return { text: error.message, retry: false };
  if (error instanceof ServerError) {
    if (error.status === 0) {
      return { text: offline ? "You are offline. Nothing is lost: connect, then try again." : "The chat server cannot be reached. Nothing is lost: check the connection, then try again.", retry: true };
    }
    return { text: error.message, retry: error.status >= 500 };
  }
  switch (error?.code) {
    case "stale-keys": {
      const off = Math.abs(clockAhead);
      const text = off > 30 * 60
        ? `This device’s clock is ${roughly(off)} ${clockAhead > 0 ? "slow" : "fast"}, so it cannot tell whether the key vault is genuine. Set the right date and time, then try again.`
        : "The key vault’s proof of identity is out of date. Check this device’s date and time, then try again.";
      return { text, retry: true };
    }
    case "too-early":
      return { text: `You can try again in ${duration(error.waitSeconds)}. This try was not counted.`, retry: false };
    case "rate-limited":
      return { text: `${vaultWords["rate-limited"]} Wait ${duration(error.waitSeconds)}, then try again.`, retry: true };
    case "wrong-password":
      return { text: `That password is wrong. You have ${tries(error.attemptsLeft)} left.`, retry: false };
    case "unavailable": case "not-forwarded": case "no-token": case "not-loaded": case "stopped":
      return { text: offline ? "You are offline. Nothing is lost: connect, then try again." : vaultWords[error.code], retry: true };
  }
  if (vaultWords[error?.code]) return { text: vaultWords[error.code], retry: error.pending !== undefined };
  if (error?.name === "QuotaExceededError") {
    return { text: "This device has no room left. Free some space, then try again.", retry: true };
  }
  console.error(error);
  return { text: "Something went wrong that should not have. Load the page again; your messages are kept.", retry: false };
}
