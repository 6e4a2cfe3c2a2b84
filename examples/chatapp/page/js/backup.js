// End-to-end encrypted backup, on the SDK: what the screens do. Nothing here touches the page.
import { api, base64, fromBase64 } from "./api.js";
import * as passkey from "./passkey.js";
import { duration, Explained } from "./words.js";

const same = (a, b) => a?.length === b?.length && a.every((v, i) => v === b[i]);
const activeOf = (status) => status.generations.find((g) => g.state === "active");
const didNotHappen = ["conflict", "forbidden", "already-enrolled", "started-over"];
const messageBytes = (messages) => new TextEncoder().encode(JSON.stringify({ version: 1, messages }));

export class Backup {
  #account; // {name, user, tenant, fingerprint}
  #device;
  #loading; // the SDK's promise
  #vault;
  stored; // what the back end has: {version, mode, passkeys, size, saved_at} or null
  kept; // {bytes, facts} of this device's backup key, or undefined
  /**
   * What was begun and whose end this device does not know, or undefined: {what, before}. what is "change", "new-key",
   * "start-over", "reinstate" or "off"; before is the generation that was active. saving: the vault has done its part,
   * and what is missing is the backup under the new key.
   */
  begun;

  constructor(account, device) {
    this.#account = account;
    this.#device = device;
  }

  static supported() { return typeof WebAssembly === "object" && typeof Worker === "function"; }

  /** Loads the SDK. It is wanted early, and may fail and be wanted again. */
  sdk(signal) {
    if (!Backup.supported()) throw new Explained("unsupported", "This browser cannot encrypt backups. Open this page in a current browser.");
    this.#loading ??= import("/sdk/bkv.js").then(({ SDK, BackupKey }) => SDK.load().then((sdk) => ({ sdk, BackupKey }))).catch((error) => {
      this.#loading = undefined;
      throw error?.code ? error : Object.assign(new Error(String(error)), { code: "not-loaded" });
    });
    return this.#loading.then((loaded) => {
      signal?.throwIfAborted();
      return loaded;
    });
  }

  async #open(signal) {
    const { sdk, BackupKey } = await this.sdk(signal);
    try {
      this.#vault ??= await sdk.openVault({
        url: "/vault", fingerprint: this.#account.fingerprint, tenant: this.#account.tenant, user: this.#account.user,
        token: async () => "session", // the back end puts the user's token in its place
        lastSerial: (await this.#device.get("serial")) ?? "",
      });
    } catch (error) {
      if (error.code === "stopped") this.#forgetSDK();
      throw error;
    }
    return { sdk, BackupKey, vault: this.#vault };
  }

  #forgetSDK() {
    this.#loading = this.#vault = undefined;
  }

  /**
   * An operation on the vault. If it was noted, these refusals say that it did not happen, and
   * it is forgotten.
   */
  async #with(job, operation, refusals = []) {
    let result;
    try {
      result = await job.insist(async (signal) => {
        try {
          const open = await this.#open(signal);
          return await operation({ ...open, signal });
        } catch (error) {
          if (error.code === "stopped") this.#forgetSDK(); // the next try loads it anew
          throw error;
        }
      });
    } catch (error) {
      if (refusals.includes(error.code)) await this.leaveIt();
      throw error;
    }
    if (this.#vault) await this.#device.set("serial", await this.#vault.serial());
    return result;
  }

  /** Learns what the back end and this device have. */
  async refresh() {
    await this.#look();
    this.stored = (await api("GET", "/api/backup")).backup;
  }

  async #look() {
    this.kept = await this.#device.keptKey("key");
    const pending = await this.#device.keptKey("pending");
    const saving = ["new-key", "start-over"].includes(pending?.facts.what) && same(pending.bytes, this.kept?.bytes);
    // A key that is gone already: turning off got to its end.
    this.begun = pending?.facts.what && (this.kept || pending.facts.what !== "off") ? { ...pending.facts, saving } : undefined;
  }

  /** Whether this device can back up: it has the key of the backup there is. */
  get on() { return Boolean(this.kept); }

  /** What the vault has; of a key that it does not know, no generations. */
  async vaultStatus() {
    const { vault } = await this.#open();
    return statusOf(vault);
  }

  #key(open, kept = this.kept) { return new open.BackupKey(kept.bytes); }

  async #keep(key, facts) {
    await this.#device.keepKey("key", key.bytes(), facts);
    await this.#look();
    if (!this.begun?.saving) await this.leaveIt();
  }

  /**
   * Notes what is about to be asked of the vault, with the key that will be in use then, until its end is
   * known: so that a page that is loaded anew can tell how far it got, and owns what the vault has.
   */
  async #begin(open, key, what) {
    const before = activeOf(await statusOf(open.vault, open.signal))?.id ?? "";
    await this.#device.keepKey("pending", key.bytes(), { what, before });
    await this.#look();
  }

  /** Forgets what was begun. */
  async leaveIt() {
    await this.#device.remove("pending");
    this.begun = undefined;
  }

  // -- turning on

  /**
   * With a password. The key is kept as "pending" before the vault gets it, so that set-up can be
   * repeated after any interruption: whoever has the key owns what the vault has.
   */
  async turnOnWithPassword(job, password) {
    const kept = this.kept ?? (await this.#device.keptKey("pending"));
    const made = await this.#with(job, async (open) => {
      const key = kept ? this.#key(open, kept) : await open.sdk.newKey();
      await this.#device.keepKey("pending", key.bytes());
      try {
        return await open.vault.enrolKey(password, key, { signal: open.signal });
      } catch (error) {
        if (error.code !== "already-enrolled") throw error;
        // Ours, from a set-up that was interrupted? Then the key proves it.
        try {
          return await open.vault.changePassword(key, password, { signal: open.signal });
        } catch (second) {
          throw second.code === "forbidden" ? error : second;
        }
      }
    });
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    await this.backUp(job, { mode: "password" });
  }

  /** A new backup in the place of one that nobody can open. After an interruption, the same again. */
  async startOver(job, password) {
    const begun = this.begun?.what === "start-over" ? await this.#device.keptKey("pending") : undefined;
    const made = await this.#with(job, async (open) => {
      const key = begun ? this.#key(open, begun) : await open.sdk.newKey();
      if (!begun) await this.#begin(open, key, "start-over");
      return replace(open.vault, password, key, open.signal);
    }, didNotHappen);
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    await this.backUp(job, { mode: "password" });
  }

  /** A key for 64-digit mode, shown before it is in use. */
  async newDigits(job) {
    return this.#with(job, async (open) => {
      const kept = this.kept ?? (await this.#device.keptKey("pending"));
      const key = kept ? this.#key(open, kept) : await open.sdk.newKey();
      if (!this.kept) await this.#device.keepKey("pending", key.bytes());
      return open.sdk.digits(key);
    });
  }

  async turnOnWithDigits(job) {
    const pending = await this.#device.keptKey("pending");
    const { BackupKey } = await job.insist((signal) => this.sdk(signal));
    await this.#keep(new BackupKey(pending.bytes), { mode: "digits" });
    await this.backUp(job, { mode: "digits" });
  }

  /** Adds a passkey to a backup that is on, or turns it on with a passkey alone. */
  async addPasskey(job) {
    const open = await job.insist((signal) => this.sdk(signal));
    const key = this.kept ? this.#key(open) : await open.sdk.newKey();
    const old = this.stored?.passkeys ?? [];
    const { id, secret } = await passkey.create(this.#account, old.map((p) => fromBase64(p.id)));
    const wrapped = await open.sdk.wrapKey(key, secret, [this.#account.tenant, this.#account.user]);
    const mode = this.kept ? this.kept.facts.mode : "passkey";
    await this.backUp(job, { key, mode, passkeys: [...old, { id: base64(id), wrapped: base64(wrapped) }] });
    // Not before: what the passkey wraps is stored with the backup, and nowhere else.
    if (!this.kept) await this.#keep(key, { mode });
  }

  // -- backing up

  /**
   * Seals this device's messages and stores them. If another device was faster, its messages
   * are taken in first.
   */
  async backUp(job, { key, mode = this.kept.facts.mode, passkeys, replace = false } = {}) {
    job.say("Backing up…");
    const open = await job.insist((signal) => this.sdk(signal));
    key ??= this.#key(open);
    const saving = this.begun?.saving;
    if (saving) passkeys = []; // they wrap the old key
    replace ||= saving && this.begun.what === "start-over";
    for (let round = 0; ; round++) {
      const messages = await this.#device.messages();
      const blob = await job.insist((signal) => open.sdk.seal(key, messageBytes(messages), { signal }));
      try {
        const { backup } = await job.insist((signal) => api("PUT", "/api/backup", {
          signal, headers: { "If-Match": String(this.stored?.version ?? 0) },
          body: { mode, passkeys: passkeys ?? this.stored?.passkeys ?? [], blob: base64(blob) },
        }));
        this.stored = backup;
        if (saving) await this.leaveIt();
        return;
      } catch (error) {
        if (error.status !== 409 || round === 3) throw error;
        this.stored = (await job.insist((signal) => api("GET", "/api/backup", { signal }))).backup;
        if (this.stored && !replace) await this.#merge(job, open, key);
      }
    }
  }

  async #merge(job, open, key) {
    const blob = await job.insist((signal) => api("GET", "/api/backup/blob", { signal }));
    const plain = await open.sdk.unseal(key, blob);
    return this.#device.addMessages(JSON.parse(new TextDecoder().decode(plain)).messages);
  }

  // -- restoring

  /** By password: one try. Returns {messages, failuresSince}. */
  async restoreWithPassword(job, password) {
    const got = await this.#with(job, ({ vault, signal }) => recover(vault, password, signal));
    const messages = await this.#restore(job, got.key, { mode: "password", generation: got.generation });
    return { messages, failuresSince: got.failuresSince };
  }

  async restoreWithDigits(job, digits) {
    const { sdk } = await job.insist((signal) => this.sdk(signal));
    return { messages: await this.#restore(job, await sdk.parseDigits(digits), { mode: "digits" }), failuresSince: 0 };
  }

  async restoreWithPasskey(job) {
    const { sdk } = await job.insist((signal) => this.sdk(signal));
    const { id, secret } = await passkey.open(this.stored.passkeys.map((p) => fromBase64(p.id)));
    const { wrapped } = this.stored.passkeys.find((p) => p.id === base64(id)) ?? {};
    if (!wrapped) throw new Explained("passkey-unknown", "This passkey is not one of this backup’s.");
    const key = await sdk.unwrapKey(fromBase64(wrapped), secret, [this.#account.tenant, this.#account.user]);
    return { messages: await this.#restore(job, key, { mode: this.stored.mode }), failuresSince: 0 };
  }

  /** With the key that this device has: after a restore that was interrupted. */
  async restoreAgain(job) {
    const open = await job.insist((signal) => this.sdk(signal));
    return { messages: await this.#restore(job, this.#key(open), this.kept.facts) };
  }

  async #restore(job, key, facts) {
    job.say("Getting your messages…");
    const open = await job.insist((signal) => this.sdk(signal));
    // Kept only if it opens the backup; but from the vault it comes with proof, and is kept
    // first, so that a connection that is lost here costs no second try.
    if (facts.generation) await this.#keep(key, facts);
    const added = await this.#merge(job, open, key);
    await this.#keep(key, facts);
    return added;
  }

  // -- changing

  /** Sets another password, with the key as proof; with newKey, another key too. */
  async changePassword(job, password, newKey) {
    // A new key, from a change that was interrupted: perhaps the vault has it already.
    const begun = this.begun?.what === "new-key" ? await this.#device.keptKey("pending") : undefined;
    const made = await this.#with(job, async (open) => {
      const key = this.#key(open);
      const next = begun ? this.#key(open, begun) : newKey ? await open.sdk.newKey() : key;
      if (!begun) await this.#begin(open, next, newKey ? "new-key" : "change");
      try {
        if (next === key) return await open.vault.changePassword(key, password, { signal: open.signal });
        return await open.vault.changePasswordAndKey(key, password, next, { signal: open.signal });
      } catch (error) {
        if (begun && error.code === "forbidden") return open.vault.changePassword(next, password, { signal: open.signal });
        throw error;
      }
    }, begun ? ["forbidden"] : didNotHappen);
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    if (this.begun?.saving) await this.backUp(job);
  }

  /** Whether this device's key opens the stored backup. */
  async opens() {
    const open = await this.sdk();
    try {
      await open.sdk.unseal(this.#key(open), await api("GET", "/api/backup/blob"));
      return true;
    } catch (error) {
      if (error.code === "wrong-key") return false;
      throw error;
    }
  }

  /** After a change that was interrupted: this generation is what it made. */
  async adopt(generation) {
    await this.#device.keepKey("key", this.kept.bytes, { ...this.kept.facts, generation });
    await this.leaveIt();
    await this.#look();
  }

  /** After the vault's key was destroyed: the same key, under a password again. */
  async setPasswordAgain(job, password) {
    const made = await this.#with(job, async (open) => {
      await this.#begin(open, this.#key(open), "change");
      return open.vault.enrolKey(password, this.#key(open), { signal: open.signal });
    }, didNotHappen);
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    await this.backUp(job);
  }

  /** Brings this device's key back, where somebody without it set up another one. */
  async reinstate(job) {
    await this.#with(job, async (open) => {
      await this.#begin(open, this.#key(open), "reinstate");
      try {
        await open.vault.reinstate(this.#key(open), { signal: open.signal });
      } catch (error) {
        // Done already, by an earlier try?
        const back = error.code === "conflict" && activeOf(await statusOf(open.vault, open.signal))?.id === this.kept.facts.generation;
        if (!back) throw error;
      }
    }, didNotHappen);
    await this.backUp(job, { replace: true });
    await this.leaveIt();
  }

  async turnOff(job) {
    // After a change that was interrupted the vault may have either key.
    const other = ["new-key", "off"].includes(this.begun?.what) ? await this.#device.keptKey("pending") : this.kept;
    await this.#device.keepKey("pending", other.bytes, { what: "off" });
    await this.#look();
    if (this.kept.facts.mode === "password") {
      for (const owner of same(other.bytes, this.kept.bytes) ? [this.kept] : [this.kept, other]) {
        await this.#with(job, async (open) => {
          try {
            await open.vault.turnOff(this.#key(open, owner), { signal: open.signal });
          } catch (error) {
            // Gone already, perhaps by an earlier try.
            if (!["not-enrolled", "key-destroyed", "forbidden"].includes(error.code)) throw error;
          }
        });
      }
    }
    await job.insist((signal) => api("DELETE", "/api/backup", { signal }));
    await this.forget();
  }

  /** Forgets the key of a backup that is no more. */
  async forget() {
    await this.#device.remove("key");
    await this.leaveIt();
    this.kept = this.stored = undefined;
  }
}

// What an app does with the vault, in a line each.

const recover = (vault, password, signal) => vault.recover(password, { signal });

async function replace(vault, password, key, signal) {
  try {
    return await vault.replaceWithoutProof(password, key, { signal });
  } catch (error) {
    // There is nothing to replace.
    if (["not-enrolled", "key-destroyed", "frozen"].includes(error.code)) return vault.enrolKey(password, key, { signal });
    const frozen = error.code === "conflict" && (await statusOf(vault, signal)).generations.find((g) => g.state === "frozen");
    if (!frozen) throw error;
    // It was replaced already. By us? Then the key proves it.
    try {
      return await vault.changePassword(key, password, { signal });
    } catch (second) {
      if (second.code !== "forbidden") throw second;
      throw new Explained("started-over", `Somebody started over already, so it cannot be done once more for ${duration(frozen.expiresSeconds ?? 0)}. If that was you, the password that you set then opens the new backup.`);
    }
  }
}

async function statusOf(vault, signal) {
  try {
    return await vault.status({ signal });
  } catch (error) {
    if (error.code !== "not-enrolled") throw error;
    return { generations: [] };
  }
}
