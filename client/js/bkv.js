// The SDK of a backup key vault, for pages. Types and documentation are in bkv.d.ts.

/** An error that an app can act on, by its code. */
export class VaultError extends Error {
  #resume;
  constructor(failure, resume, options) {
    super(failure.message, options);
    this.name = "VaultError";
    this.code = failure.code;
    this.attemptsLeft = failure.attemptsLeft;
    this.waitSeconds = failure.waitSeconds;
    this.pending = failure.kind; // "recovery", "enrolment" or undefined
    this.#resume = resume;
  }
  resume(options) {
    if (!this.#resume) throw new TypeError("nothing is pending");
    return this.#resume(options);
  }
}

/** A backup key. It does not print, and JSON does not take it. */
export class BackupKey {
  #bytes;
  constructor(bytes) {
    if (!(bytes instanceof Uint8Array) || bytes.length !== 32) throw new TypeError("a backup key has 32 bytes");
    this.#bytes = bytes.slice();
  }
  bytes() { return this.#bytes.slice(); }
  toString() { return "[redacted]"; }
  toJSON() { throw new TypeError("a backup key is not marshalled; call bytes() to store it"); }
}

const base64 = (bytes) => btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const bytesOf = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));

// A lone surrogate would become U+FFFD on its way, and another password.
function wellFormed(password) {
  if (typeof password !== "string") throw new TypeError("a password is a string");
  if (/[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/.test(password)) {
    throw new VaultError({ code: "invalid-password", message: "the password is not valid Unicode" });
  }
  return password;
}

const keyOf = (key) => {
  if (!(key instanceof BackupKey)) throw new TypeError("want a BackupKey");
  return base64(key.bytes());
};

/** The program in its worker. */
export class SDK {
  #worker;
  #calls = new Map(); // id → {resolve, reject}
  #tokens = new Map(); // vault → the app's token function
  #last = 0;
  #dead;

  static supported() {
    return typeof WebAssembly === "object" && typeof Worker === "function";
  }

  static load({ signal, worker = new URL("./worker.js", import.meta.url) } = {}) {
    const sdk = new SDK();
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      if (!SDK.supported()) throw new VaultError({ code: "unsupported", message: "this browser has no WebAssembly or no workers" });
      sdk.#worker = new Worker(worker, { type: "module", name: "backup-key-vault" });
      const fail = (error) => { sdk.#end(error); reject(error); };
      const aborted = () => fail(signal.reason);
      signal?.addEventListener("abort", aborted, { once: true });
      sdk.#worker.onerror = (event) => {
        event.preventDefault();
        fail(new VaultError({ code: "not-loaded", message: "the SDK could not be loaded" }));
      };
      sdk.#worker.onmessage = ({ data }) => {
        if (data.ready) {
          signal?.removeEventListener("abort", aborted);
          resolve(sdk);
        } else if (data.failed) {
          fail(new VaultError({ code: "not-loaded", message: `the SDK could not be loaded: ${data.failed}` }));
        } else if (data.exited) {
          fail(new VaultError({ code: "stopped", message: "the SDK stopped, perhaps for want of memory" }));
        } else if (data.needToken) {
          sdk.#token(data);
        } else {
          sdk.#settle(data);
        }
      };
    });
  }

  close() {
    this.#end(new VaultError({ code: "stopped", message: "the SDK was closed" }));
  }

  #end(error) {
    this.#dead ??= error;
    this.#worker?.terminate();
    for (const call of this.#calls.values()) call.reject(this.#dead);
    this.#calls.clear();
  }

  async #token({ needToken, vault }) {
    try {
      const value = await this.#tokens.get(vault)();
      if (typeof value !== "string") throw new TypeError("token() returned no string");
      this.#worker.postMessage({ token: needToken, value });
    } catch (error) {
      this.#worker.postMessage({ token: needToken, error: String(error) });
    }
  }

  #settle({ id, result, data, error }) {
    const call = this.#calls.get(id);
    this.#calls.delete(id);
    if (!call) return;
    if (error === undefined) {
      call.resolve({ ...JSON.parse(result), data });
      return;
    }
    const failure = JSON.parse(error);
    if (failure.code === "cancelled" && !failure.pending) {
      call.reject(call.signal.reason);
      return;
    }
    const resume = failure.pending && (async (options) => keyed(await this.call("resume", { pending: failure.pending }, options)));
    call.reject(new VaultError(failure, resume, call.signal?.aborted ? { cause: call.signal.reason } : undefined));
  }

  /** One operation of the program; the methods below are what apps call. */
  call(op, params, { signal, data } = {}) {
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      if (this.#dead) throw this.#dead;
      const id = ++this.#last;
      this.#calls.set(id, { resolve, reject, signal });
      signal?.addEventListener("abort", () => this.#calls.has(id) && this.#worker.postMessage({ cancel: id }), { once: true });
      this.#worker.postMessage({ id, op, params: JSON.stringify(params), data });
    });
  }

  async openVault({ url, fingerprint, tenant, user, token, lastSerial = "" }, options) {
    if (typeof token !== "function") throw new TypeError("token is a function that returns a promise of a token");
    const base = new URL(url, globalThis.location?.href).href;
    const { vault } = await this.call("open", { base, fingerprint, tenant, user, lastSerial }, options);
    this.#tokens.set(vault, token);
    return new Vault(this, vault);
  }

  async newKey() { return (await keyed(this.call("newKey", {}))).key; }
  async digits(key) { return (await this.call("digits", { key: keyOf(key) })).text; }
  async parseDigits(digits) { return (await keyed(this.call("parseDigits", { digits: String(digits) }))).key; }
  async seal(key, plain, options) { return (await this.call("seal", { key: keyOf(key) }, { ...options, data: plain })).data; }
  async unseal(key, blob, options) { return (await this.call("unseal", { key: keyOf(key) }, { ...options, data: blob })).data; }
  async wrapKey(key, secret, context) {
    return bytesOf((await this.call("wrapKey", { key: keyOf(key), secret: base64(secret), context })).wrapped);
  }
  async unwrapKey(wrapped, secret, context) {
    return (await keyed(this.call("unwrapKey", { wrapped: base64(wrapped), secret: base64(secret), context }))).key;
  }
}

const keyed = async (answer) => {
  const { key, data: _, ...rest } = await answer;
  return { ...rest, key: key && new BackupKey(bytesOf(key)) };
};

/** One vault, for one user. */
export class Vault {
  #sdk;
  #vault;
  constructor(sdk, vault) {
    this.#sdk = sdk;
    this.#vault = vault;
  }
  #call(op, params, options) { return this.#sdk.call(op, { vault: this.#vault, ...params }, options); }
  async status(options) {
    const { data: _, ...status } = await this.#call("status", {}, options);
    return status;
  }
  async serial() { return (await this.#call("serial", {})).text; }
  async enrol(password, options) { return keyed(this.#call("enrol", { password: wellFormed(password) }, options)); }
  async enrolKey(password, key, options) { return keyed(this.#call("enrolKey", { password: wellFormed(password), key: keyOf(key) }, options)); }
  async replaceWithoutProof(password, key, options) {
    return keyed(this.#call("replaceWithoutProof", { password: wellFormed(password), key: keyOf(key) }, options));
  }
  async recover(password, options) { return keyed(this.#call("recover", { password: wellFormed(password) }, options)); }
  async recoverGeneration(password, generation, options) {
    return keyed(this.#call("recoverGeneration", { password: wellFormed(password), generation }, options));
  }
  async changePassword(key, password, options) {
    return keyed(this.#call("changePassword", { password: wellFormed(password), key: keyOf(key) }, options));
  }
  async changePasswordAndKey(key, password, newKey, options) {
    return keyed(this.#call("changePasswordAndKey", { password: wellFormed(password), key: keyOf(key), newKey: keyOf(newKey) }, options));
  }
  async turnOff(key, options) { await this.#call("turnOff", { key: keyOf(key) }, options); }
  async turnOffWithoutProof(options) { await this.#call("turnOffWithoutProof", {}, options); }
  async reinstate(key, options) { await this.#call("reinstate", { key: keyOf(key) }, options); }
  async close() { await this.#call("close", {}); }
}
