// What this device keeps: messages, its own key pair, and the backup key. All of it
// in IndexedDB, in a database for each account.
//
// The backup key lies there encrypted under a key that WebCrypto does not hand out. That
// keeps it out of plain files; whoever controls the page can still use it. An
// installed app has the system's keystore for this.

const request = (r) => new Promise((resolve, reject) => {
  r.onsuccess = () => resolve(r.result);
  r.onerror = () => reject(r.error);
});

export class Device {
  #db;
  #name;

  static async open(user) {
    const device = new Device();
    device.#name = `chat-${user}`;
    const opening = indexedDB.open(device.#name, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("values");
      opening.result.createObjectStore("messages", { keyPath: "id" });
    };
    device.#db = await request(opening);
    device.#db.onversionchange = () => device.#db.close(); // another tab erases the device
    return device;
  }

  #store(name, mode) { return this.#db.transaction(name, mode).objectStore(name); }
  get(key) { return request(this.#store("values", "readonly").get(key)); }
  set(key, value) { return request(this.#store("values", "readwrite").put(value, key)); }
  remove(key) { return request(this.#store("values", "readwrite").delete(key)); }

  messages() { return request(this.#store("messages", "readonly").getAll()); }

  /** Adds messages; one that is there already stays as it is. Returns how many were new. */
  async addMessages(messages) {
    const transaction = this.#db.transaction("messages", "readwrite");
    const store = transaction.objectStore("messages");
    let added = 0;
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    for (const m of messages) {
      store.get(m.id).onsuccess = ({ target }) => {
        if (target.result) return;
        added++;
        store.put(m);
      };
    }
    await done;
    return added;
  }

  /** The pair that messages are sealed to. Made once. */
  async keyPair() {
    return navigator.locks.request(`${this.#name}-pair`, async () => {
      let pair = await this.get("pair");
      if (!pair) {
        const { privateKey, publicKey } = await crypto.subtle.generateKey({ name: "ECDH", namedCurve: "P-256" }, false, ["deriveBits"]);
        pair = { privateKey, publicKey: new Uint8Array(await crypto.subtle.exportKey("raw", publicKey)) };
        await this.set("pair", pair);
      }
      return pair;
    });
  }

  /** Keeps a backup key under a name: "key" is in use, "pending" is about to be. */
  async keepKey(name, bytes, facts = {}) {
    const lock = await crypto.subtle.generateKey({ name: "AES-GCM", length: 256 }, false, ["encrypt", "decrypt"]);
    const iv = crypto.getRandomValues(new Uint8Array(12));
    const sealed = new Uint8Array(await crypto.subtle.encrypt({ name: "AES-GCM", iv }, lock, bytes));
    await this.set(name, { lock, iv, sealed, facts });
  }

  /** Returns {bytes, facts}, or undefined. */
  async keptKey(name) {
    const kept = await this.get(name);
    if (!kept) return undefined;
    const bytes = new Uint8Array(await crypto.subtle.decrypt({ name: "AES-GCM", iv: kept.iv }, kept.lock, kept.sealed));
    return { bytes, facts: kept.facts };
  }

  async erase() {
    this.#db.close();
    await request(indexedDB.deleteDatabase(this.#name));
  }
}
