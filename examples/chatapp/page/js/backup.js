// End-to-end encrypted backup, on the SDK: what the screens do. Nothing here touches the page.
import { api, base64, fromBase64 } from "./api.js";
import * as passkey from "./passkey.js";
import { Explained } from "./words.js";

const messageBytes = (messages) => new TextEncoder().encode(JSON.stringify({ version: 1, messages }));

export class Backup {
  #account; // {name, user, tenant, fingerprint}
  #device;
  #loading; // the SDK's promise
  #vault;
  stored; // what the back end has: {version, mode, passkeys, size, saved_at} or null
  kept; // {bytes, facts} of this device's backup key, or undefined

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

  /** An operation on the vault, with the key that this device keeps if there is one. */
  async #with(job, operation) {
    const result = await job.insist(async (signal) => {
      try {
        const open = await this.#open(signal);
        return await operation({ ...open, signal });
      } catch (error) {
        if (error.code === "stopped") this.#forgetSDK(); // the next try loads it anew
        throw error;
      }
    });
    if (this.#vault) await this.#device.set("serial", await this.#vault.serial());
    return result;
  }

  /** Learns what the back end and this device have. */
  async refresh() {
    this.kept = await this.#device.keptKey("key");
    this.stored = (await api("GET", "/api/backup")).backup;
  }

  /** Whether this device can back up: it has the key of the backup there is. */
  get on() { return Boolean(this.kept); }

  async vaultStatus() {
    const { vault } = await this.#open();
    return vault.status();
  }

  #key(open, kept = this.kept) { return new open.BackupKey(kept.bytes); }

  async #keep(key, facts) {
    await this.#device.keepKey("key", key.bytes(), facts);
    await this.#device.remove("pending");
    this.kept = await this.#device.keptKey("key");
  }

  // -- turning on

  /**
   * With a password. The key is kept as "pending" before the vault gets it, so that set-up can be
   * repeated after any interruption: whoever has the key owns what the vault has.
   */
  async turnOnWithPassword(job, password, { startOver = false } = {}) {
    if (startOver) {
      const made = await this.#with(job, ({ vault, signal }) => replace(vault, password, signal));
      await this.#keep(made.key, { mode: "password", generation: made.generation });
    } else {
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
    }
    await this.backUp(job, { mode: "password", passkeys: startOver ? [] : undefined, replace: startOver });
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
    if (!this.kept) await this.#keep(key, { mode });
    await this.backUp(job, { mode, passkeys: [...old, { id: base64(id), wrapped: base64(wrapped) }] });
  }

  // -- backing up

  /**
   * Seals this device's messages and stores them. If another device was faster, its messages
   * are taken in first.
   */
  async backUp(job, { mode = this.kept.facts.mode, passkeys, replace = false } = {}) {
    job.say("Backing up…");
    const open = await job.insist((signal) => this.sdk(signal));
    const key = this.#key(open);
    for (let round = 0; ; round++) {
      const messages = await this.#device.messages();
      const blob = await job.insist((signal) => open.sdk.seal(key, messageBytes(messages), { signal }));
      try {
        const { backup } = await job.insist((signal) => api("PUT", "/api/backup", {
          signal, headers: { "If-Match": String(this.stored?.version ?? 0) },
          body: { mode, passkeys: passkeys ?? this.stored?.passkeys ?? [], blob: base64(blob) },
        }));
        this.stored = backup;
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
    const made = await this.#with(job, async (open) => {
      const change = newKey ? "changePasswordAndKey" : "changePassword";
      return open.vault[change](this.#key(open), password, { signal: open.signal });
    });
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    // Passkeys wrap the old key.
    if (newKey) await this.backUp(job, { passkeys: [] });
  }

  /** After the vault's key was destroyed: the same key, under a password again. */
  async setPasswordAgain(job, password) {
    const made = await this.#with(job, (open) => open.vault.enrolKey(password, this.#key(open), { signal: open.signal }));
    await this.#keep(made.key, { mode: "password", generation: made.generation });
    await this.backUp(job);
  }

  /** Brings this device's key back, where somebody without it set up another one. */
  async reinstate(job) {
    await this.#with(job, (open) => open.vault.reinstate(this.#key(open), { signal: open.signal }));
    await this.backUp(job, { replace: true });
  }

  async turnOff(job) {
    if (this.kept.facts.mode === "password") {
      await this.#with(job, async (open) => {
        try {
          await open.vault.turnOff(this.#key(open), { signal: open.signal });
        } catch (error) {
          // Gone already, perhaps by an earlier try.
          if (!["not-enrolled", "key-destroyed", "forbidden"].includes(error.code)) throw error;
        }
      });
    }
    await job.insist((signal) => api("DELETE", "/api/backup", { signal }));
    await this.#device.remove("key");
    this.kept = this.stored = undefined;
  }
}

// What an app does with the vault, in a line each.

const recover = (vault, password, signal) => vault.recover(password, { signal });

async function replace(vault, password, signal) {
  try {
    return await vault.replaceWithoutProof(password, { signal });
  } catch (error) {
    if (!["not-enrolled", "key-destroyed", "frozen"].includes(error.code)) throw error;
    return vault.enrol(password, { signal }); // there is nothing to replace
  }
}
