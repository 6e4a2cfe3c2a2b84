// The app's own back end.

/** An answer of the back end that says no, or none at all (status 0). Its text is for the user. */
export class ServerError extends Error {
  constructor(status, text) {
    super(text);
    this.name = "ServerError";
    this.status = status;
  }
}

/** How far the server's clock is ahead of this device's, in seconds; for words alone. */
export let clockAhead = 0;

export async function api(method, path, { body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method, signal, cache: "no-store", redirect: "error",
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    const date = Date.parse(response.headers.get("Date") ?? "");
    if (!Number.isNaN(date)) clockAhead = Math.round((date - Date.now()) / 1000);
    if (response.ok && response.headers.get("Content-Type") === "application/octet-stream") {
      return new Uint8Array(await response.arrayBuffer());
    }
    if (response.ok) return await response.json();
  } catch (error) {
    signal?.throwIfAborted();
    throw new ServerError(0, String(error));
  }
  let text = "The chat server has a problem. Please try again in a minute.";
  try {
    text = (await response.json()).error ?? text;
  } catch { /* a proxy's page */ }
  throw new ServerError(response.status, text);
}

export function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

export const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
