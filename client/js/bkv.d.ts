/**
 * The SDK of a backup key vault, for pages. It runs in a Web Worker as WebAssembly; a page
 * imports bkv.js and needs, in its Content-Security-Policy, worker-src 'self', connect-src
 * 'self' and script-src 'self' 'wasm-unsafe-eval'.
 *
 *     const sdk = await SDK.load();
 *     const vault = await sdk.openVault({ url: "/vault", fingerprint, tenant, user, token });
 *     const { key } = await vault.enrol(password);        // a new key, now kept by the vault
 *     const { key } = await vault.recover(password);      // the same key, in any browser
 *     const blob = await sdk.seal(key, bytes);            // what the app's back end stores
 *
 * Every operation returns a promise and rejects with a VaultError, with the reason of its
 * AbortSignal, or with a TypeError for an argument of a wrong type.
 *
 * The app's back end forwards GET /v1/vault and POST /v1/relay under url, and can read
 * neither request nor answer: they travel in capsules that only the pinned vault opens.
 */

/** What went wrong. */
export type Code =
  /** Not the pinned vault. Send it nothing more. */
  | "wrong-vault"
  /** The vault's signed key list is not of now: the device's clock is wrong, or somebody replays an old list. */
  | "stale-keys"
  /** The password is empty, over 1024 bytes or no valid Unicode. Nothing was sent. */
  | "invalid-password"
  /** The attempt failed and was charged: attemptsLeft, waitSeconds. */
  | "wrong-password"
  /** No attempt is answered yet, and none was charged: waitSeconds. */
  | "too-early"
  /** Too many requests; nothing was charged: waitSeconds. */
  | "rate-limited"
  /** The vault keeps no key for this user. */
  | "not-enrolled"
  /** enrol would replace a key: recover it, or change its password. */
  | "already-enrolled"
  /** Turned off without its owner's proof, and not yet gone: recoverGeneration or reinstate. */
  | "frozen"
  /** The key is gone for good. */
  | "key-destroyed"
  /** Another device or tab was faster; nothing changed. Look at the status. */
  | "conflict"
  /** The key does not own the generation, or the token is another user's. */
  | "forbidden"
  /** The vault accepts no token that the app gives: the user has to sign in again. */
  | "unauthenticated"
  /** token() failed. */
  | "no-token"
  /** The app's back end, or something before it, did not pass the request on as it was. */
  | "not-forwarded"
  /** The vault offers no relay key that this version takes: update the app or the vault. */
  | "outdated"
  /** The vault could not be reached after several tries. */
  | "unavailable"
  /** An answer that no vault gives: something between alters it, or the app needs an update. */
  | "bad-response"
  /** The signal was aborted while the operation was past recall: see pending. */
  | "cancelled"
  /** parseDigits: not 64 hexadecimal digits. */
  | "invalid-digits"
  /** unseal, unwrapKey: not a blob of this SDK, or cut off. */
  | "not-a-backup"
  /** unseal, unwrapKey: another key or secret, or an altered blob. */
  | "wrong-key"
  /** The browser has no WebAssembly, or no workers. */
  | "unsupported"
  /** The SDK's files could not be fetched: load again later. */
  | "not-loaded"
  /** The SDK was closed or ended, perhaps for want of memory: load it again. */
  | "stopped"
  /** A call that no page should make, or another tenant's name than the token's. */
  | "invalid-argument"
  | "internal";

/** An error that an app can act on. Its message is for developers and holds no secret. */
export class VaultError extends Error {
  readonly code: Code;
  /** wrong-password: attempts left before the key is destroyed. */
  readonly attemptsLeft?: number;
  /** Seconds to wait from now, whatever the device's clock says. 0: none. */
  readonly waitSeconds?: number;
  /**
   * Set if the operation was begun and its end is not known, whatever the code: resume()
   * goes on with the same bytes. It costs no further attempt and never enrols twice;
   * calling the operation anew might. An attempt that is not finished within five
   * minutes counts as failed. It is lost with the page.
   */
  readonly pending?: "recovery" | "enrolment";
  resume(options?: Options): Promise<Enrolled | Recovered>;
}

export interface Options {
  /**
   * Cancels: the promise rejects with the signal's reason, or, if the operation was past recall,
   * with a VaultError that is pending and has the reason as its cause. Stretching a
   * password cannot be interrupted, so that may take a second or two.
   */
  signal?: AbortSignal;
}

/** A backup key: 32 bytes. Whoever has it reads the backup. */
export class BackupKey {
  /** From bytes() of an earlier one. */
  constructor(bytes: Uint8Array);
  /** For storing it on this device, and nowhere else. */
  bytes(): Uint8Array;
}

export interface Enrolled {
  key: BackupKey;
  /** 32 hexadecimal digits. */
  generation: string;
}

export interface Recovered extends Enrolled {
  /** Attempts since the last success and failures in all, this attempt in neither. Show the user those that are not his own. */
  failuresSince: number;
  failuresTotal: number;
}

export interface Generation {
  id: string;
  state: "staged" | "active" | "frozen" | "destroyed";
  /** Why it was destroyed: exhausted and failures are wrong guesses. */
  reason?: string;
  createdAt: string;
  /** Frozen: seconds until it is destroyed. Staged: until it can be activated no more. */
  expiresSeconds?: number;
  failuresSince: number;
  failuresTotal: number;
}

export interface Status {
  /** Shared by all live generations. */
  attemptsLeft: number;
  maxAttempts: number;
  /** Seconds until an attempt is answered; 0: at once, or there is none left. */
  waitSeconds: number;
  generations: Generation[];
}

export interface VaultConfig {
  /** Where the app's back end forwards to the vault; relative to the page. */
  url: string;
  /** The vault's, as its operator publishes it. It comes with the app, never from the connection that it is to check. */
  fingerprint: string;
  /** The app and its user, byte for byte as the vault knows them. */
  tenant: string;
  user: string;
  /**
   * Returns a fresh JWT for the user, or anything that is not empty if the back end puts one in
   * its place. Called again when one is refused.
   */
  token(): Promise<string>;
  /** What serial() returned when the app ran last, so that older key lists are not believed. */
  lastSerial?: string;
}

/** The program in its worker. One serves any number of vaults, and of operations at a time. */
export class SDK {
  /** Whether this browser can run it at all. */
  static supported(): boolean;
  /** Fetches and starts it: about 2 MB compressed. Errors: unsupported, not-loaded. */
  static load(options?: Options & { worker?: string | URL }): Promise<SDK>;
  /** Ends it; what is under way rejects with stopped. */
  close(): void;
  /** Sends nothing. Errors: invalid-argument. */
  openVault(config: VaultConfig): Promise<Vault>;

  /** For 64-digit mode, where the vault is not involved. */
  newKey(): Promise<BackupKey>;
  /** The key for its owner to write down: four lines of four groups of four. */
  digits(key: BackupKey): Promise<string>;
  /** Reads digits in either case, with any white space. Errors: invalid-digits. */
  parseDigits(digits: string): Promise<BackupKey>;

  /** Encrypts a backup that fits into memory, for storage that others read. */
  seal(key: BackupKey, plain: Uint8Array, options?: Options): Promise<Uint8Array>;
  /** Undoes seal. Errors: not-a-backup, wrong-key. */
  unseal(key: BackupKey, blob: Uint8Array, options?: Options): Promise<Uint8Array>;

  /**
   * Encrypts the key under a secret of at least 32 bytes that nobody can guess, such as a
   * passkey's PRF output; never a password. The context names app and account, and has
   * to be the same again.
   */
  wrapKey(key: BackupKey, secret: Uint8Array, context: string[]): Promise<Uint8Array>;
  /** Undoes wrapKey. Errors: not-a-backup, wrong-key. */
  unwrapKey(wrapped: Uint8Array, secret: Uint8Array, context: string[]): Promise<BackupKey>;
}

/**
 * A vault, for one user. All operations can fail with wrong-vault, stale-keys,
 * unauthenticated, no-token, forbidden, rate-limited, not-forwarded, outdated, unavailable
 * and bad-response.
 */
export class Vault {
  /** Charges nothing. Errors: not-enrolled. */
  status(options?: Options): Promise<Status>;
  /** To be kept for VaultConfig.lastSerial. */
  serial(): Promise<string>;
  /** Makes a key and puts it into the vault. Errors: invalid-password, already-enrolled, conflict; may be pending. */
  enrol(password: string, options?: Options): Promise<Enrolled>;
  /** enrol for a key that exists. */
  enrolKey(password: string, key: BackupKey, options?: Options): Promise<Enrolled>;
  /**
   * For a user who has lost both device and password: a new key in the place of the old one,
   * which can still be recovered with its own password, or reinstated with its
   * key, for the vault's grace time. Keep the new key first: if the page ends before the
   * answer, changePassword with it goes on. Errors: as enrol, not-enrolled, frozen, key-destroyed.
   */
  replaceWithoutProof(password: string, newKey: BackupKey, options?: Options): Promise<Enrolled>;
  /**
   * Makes one attempt. Errors without a charge: invalid-password, not-enrolled, frozen, too-early,
   * conflict. wrong-password: charged. key-destroyed: it was the last one. May be pending.
   */
  recover(password: string, options?: Options): Promise<Recovered>;
  /** recover for one generation, frozen or active. */
  recoverGeneration(password: string, generation: string, options?: Options): Promise<Recovered>;
  /** The same key under a new password; the old password is worthless at once. Errors: as enrol, forbidden. */
  changePassword(key: BackupKey, password: string, options?: Options): Promise<Enrolled>;
  /**
   * changePassword with a new key: seal the backup anew before the old one is forgotten. Keep the
   * new key first: if the page ends before the answer, one of the two owns what the vault has.
   */
  changePasswordAndKey(key: BackupKey, password: string, newKey: BackupKey, options?: Options): Promise<Enrolled>;
  /** Destroys what the vault keeps for this key. Errors: forbidden, not-enrolled, key-destroyed. */
  turnOff(key: BackupKey, options?: Options): Promise<void>;
  /** For a user who has lost both: freezes it. Errors: not-enrolled, frozen, conflict. */
  turnOffWithoutProof(options?: Options): Promise<void>;
  /** Brings this key's frozen generation back; the one that replaced it is destroyed. Errors: forbidden, conflict. */
  reinstate(key: BackupKey, options?: Options): Promise<void>;
  /** The vault object is of no use afterwards. */
  close(): Promise<void>;
}
