// Messages between devices: each is sealed by the sender's device to the recipient's, so
// that the server keeps what it cannot read, and a new phone needs the backup. It is as
// simple as such a thing can be (ECDH with the devices' keys, HKDF, AES-GCM) and lacks
// what a messenger needs besides, such as forward secrecy: it is not what this example is about.
import { api, base64, fromBase64 } from "./api.js";

const text = new TextEncoder();

async function messageKey(privateKey, theirs, senderKey, recipientKey, usage) {
  const point = await crypto.subtle.importKey("raw", theirs, { name: "ECDH", namedCurve: "P-256" }, false, []);
  const shared = await crypto.subtle.deriveBits({ name: "ECDH", public: point }, privateKey, 256);
  const secret = await crypto.subtle.importKey("raw", shared, "HKDF", false, ["deriveKey"]);
  const info = new Uint8Array([...text.encode("chatapp/v1/message"), ...senderKey, ...recipientKey]);
  return crypto.subtle.deriveKey({ name: "HKDF", hash: "SHA-256", salt: new Uint8Array(), info }, secret,
    { name: "AES-GCM", length: 256 }, false, [usage]);
}

/** Sends a message. Sent again under the same id, it is the same message. */
export async function send(device, to, id, words) {
  const pair = await device.keyPair();
  const { key } = await api("GET", `/api/people/${encodeURIComponent(to)}`);
  const recipientKey = fromBase64(key);
  const aes = await messageKey(pair.privateKey, recipientKey, pair.publicKey, recipientKey, "encrypt");
  const iv = crypto.getRandomValues(new Uint8Array(12));
  const sealed = await crypto.subtle.encrypt({ name: "AES-GCM", iv, additionalData: text.encode(id) }, aes, text.encode(words));
  await api("POST", "/api/messages", { body: {
    to, client_id: id, sender_key: base64(pair.publicKey), recipient_key: key,
    sealed: base64(new Uint8Array([...iv, ...new Uint8Array(sealed)])),
  } });
  await device.addMessages([{ id, peer: to, mine: true, text: words, at: Date.now() }]);
}

/** Fetches what has come. Returns how many messages are new; those to an earlier device are passed over. */
export async function receive(device) {
  const pair = await device.keyPair();
  let added = 0;
  for (;;) {
    const after = (await device.get("after")) ?? 0;
    const envelopes = await api("GET", `/api/messages?after=${after}`);
    const messages = [];
    for (const e of envelopes) {
      if (e.recipient_key !== base64(pair.publicKey)) continue;
      const senderKey = fromBase64(e.sender_key);
      const sealed = fromBase64(e.sealed);
      try {
        const aes = await messageKey(pair.privateKey, senderKey, senderKey, pair.publicKey, "decrypt");
        const plain = await crypto.subtle.decrypt({ name: "AES-GCM", iv: sealed.subarray(0, 12), additionalData: text.encode(e.client_id) }, aes, sealed.subarray(12));
        messages.push({ id: e.client_id, peer: e.from, mine: false, text: new TextDecoder().decode(plain), at: Date.parse(e.sent_at) });
      } catch { /* not sealed to this device: nobody can read it here */ }
    }
    added += await device.addMessages(messages);
    if (envelopes.length === 0) return added;
    await device.set("after", envelopes.at(-1).id);
  }
}
