// A passkey as a way to open the backup: its PRF (WebAuthn level 3) answers 32 secret bytes to
// a fixed question, on every device that the passkey reaches, and the backup key is wrapped
// under them. The passkey is no sign-in here, so no server has to verify what it signs.
import { Explained } from "./words.js";

const question = new TextEncoder().encode("chatapp: open my backup, version 1"); // the browser hashes it

/** Whether this browser may have passkeys with a PRF. Only trying tells for sure. */
export async function available() {
  if (typeof PublicKeyCredential !== "function" || !navigator.credentials) return false;
  try {
    const can = await PublicKeyCredential.getClientCapabilities?.();
    return can?.["extension:prf"] !== false;
  } catch {
    return true;
  }
}

const cannot = () => new Explained("no-prf",
  "This passkey cannot open backups: it has no “PRF”. Use a passkey of this phone’s own screen lock or of a current password manager, or use a password instead. Nothing was changed.");

function refused(error) {
  if (error?.name === "NotAllowedError" || error?.name === "AbortError") {
    return new Explained("passkey-cancelled", "The passkey was not used: it was cancelled, took too long, or is not on this device. Try again, or use another way.");
  }
  if (error?.name === "InvalidStateError") {
    return new Explained("passkey-exists", "This device has a passkey for your backup already.");
  }
  if (error?.name === "NotSupportedError" || error?.name === "SecurityError") return cannot();
  return error;
}

const challenge = () => crypto.getRandomValues(new Uint8Array(32));
const prf = { eval: { first: question } };

/** Makes a passkey. Returns {id, secret}. */
export async function create(account, existing) {
  let credential;
  try {
    credential = await navigator.credentials.create({ publicKey: {
      challenge: challenge(), rp: { name: "Chat" },
      user: { id: new TextEncoder().encode(account.user), name: account.name, displayName: `${account.name}: chat backup` },
      pubKeyCredParams: [{ type: "public-key", alg: -7 }, { type: "public-key", alg: -257 }],
      authenticatorSelection: { residentKey: "required", userVerification: "required" },
      excludeCredentials: existing.map((id) => ({ type: "public-key", id })),
      extensions: { prf },
    } });
  } catch (error) {
    throw refused(error);
  }
  const { prf: answer } = credential.getClientExtensionResults();
  if (!answer?.enabled) throw cannot();
  const id = new Uint8Array(credential.rawId);
  // Many authenticators answer only when asked for an assertion.
  return answer.results?.first ? { id, secret: new Uint8Array(answer.results.first) } : open([id]);
}

/** Asks one of these passkeys. Returns {id, secret}. */
export async function open(ids) {
  let credential;
  try {
    credential = await navigator.credentials.get({ publicKey: {
      challenge: challenge(), userVerification: "required",
      allowCredentials: ids.map((id) => ({ type: "public-key", id })),
      extensions: { prf },
    } });
  } catch (error) {
    throw refused(error);
  }
  const { prf: answer } = credential.getClientExtensionResults();
  if (!answer?.results?.first) throw cannot();
  return { id: new Uint8Array(credential.rawId), secret: new Uint8Array(answer.results.first) };
}
