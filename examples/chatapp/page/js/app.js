// The page: which screen is shown, who is signed in, and the chats. Backup's screens are in
// screens.js. It works before, and without, the SDK: only backup needs that.
import { api } from "./api.js";
import { Backup } from "./backup.js";
import { Device } from "./device.js";
import { receive, send } from "./messages.js";
import { backupScreens } from "./screens.js";
import { $, ask, notice, problem, wireReveal } from "./ui.js";
import { explain } from "./words.js";

const pollEvery = 2000; // milliseconds, while the page is visible

/** What the screens share. */
const state = { account: undefined, device: undefined, backup: undefined };

let channel; // tells other tabs that something changed
let poll;

const screens = {
  "sign-in": {},
  chats: { show: showChats },
  chat: { show: showChat },
  settings: { show: () => { $("me").textContent = state.account.name; } },
  ...backupScreens(state, { go, changed }),
};

let parting = ""; // what the next screen says of what was done

/** Goes to a screen, which says these words. */
function go(route, words = "") {
  if (location.hash === `#/${route}`) {
    notice(words);
    return showRoute();
  }
  parting = words;
  location.hash = `#/${route}`;
  return undefined;
}

/** Another tab, and this one's screen, should look again. */
function changed() { channel?.postMessage("changed"); }

let current;

async function showRoute() {
  let route = decodeURI(location.hash.replace(/^#\/?/, ""));
  if (!state.account) route = "sign-in";
  else if (route === "" || route === "sign-in" || (!screens[route] && !route.startsWith("chat/"))) route = "chats";
  const name = route.startsWith("chat/") ? "chat" : route;
  const screen = screens[name];
  screens[current]?.hide?.();
  current = name;
  problem("");
  try {
    await screen.show?.(route);
  } catch (error) {
    if (error.status === 401) return signedOut();
    const { text } = explain(error);
    reveal(name);
    problem(text, [["Try again", () => showRoute()]]);
    return undefined;
  }
  if (current === name) reveal(name);
  return undefined;
}

function reveal(name) {
  for (const section of document.querySelectorAll("[data-screen]")) section.hidden = section.dataset.screen !== name;
  const heading = document.querySelector(`[data-screen="${name}"] h1`);
  document.title = `${heading.textContent} · Chat`;
  $("nav").hidden = !state.account;
  for (const link of document.querySelectorAll("[data-nav]")) {
    const here = (name.startsWith("chat") ? "chats" : "settings") === link.dataset.nav;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  heading.focus();
  window.scrollTo(0, 0);
}

async function signedIn(account) {
  state.account = account;
  state.device = await Device.open(account.user);
  state.backup = new Backup(account, state.device);
  channel = new BroadcastChannel(`chat-${account.user}`);
  channel.onmessage = ({ data }) => (data === "erased" ? location.reload() : refreshed());
  const { publicKey } = await state.device.keyPair();
  await api("PUT", "/api/device-key", { body: { key: btoa(String.fromCharCode(...publicKey)) } });
  clearInterval(poll);
  poll = setInterval(receiveNow, pollEvery);
  await state.backup.refresh();
  if (state.backup.stored || location.hash.startsWith("#/backup")) {
    // Wanted soon; if it fails now, whoever needs it says so.
    if (Backup.supported()) state.backup.sdk().catch(() => {});
  }
}

function signedOut() {
  clearInterval(poll);
  state.account = undefined;
  return go("sign-in");
}

async function refreshed() {
  await state.backup.refresh().catch(() => {}); // the screen's own try says what is wrong
  if (current === "chat") await showMessages();
  else await screens[current]?.show?.(decodeURI(location.hash.slice(2)));
}

// -- signing in

$("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  problem("");
  const path = event.submitter?.value === "sign-up" ? "/api/accounts" : "/api/session";
  try {
    const account = await api("POST", path, { body: { name: form.name.value, password: form.password.value } });
    form.reset();
    await signedIn(account);
    // A new device: offer what it can get back.
    go(state.backup.stored && !state.backup.on ? "restore" : "chats");
  } catch (error) {
    problem(explain(error).text);
  }
});

$("sign-out").addEventListener("click", async () => {
  const lost = (await state.device.messages()).length > 0 ? " The messages on it that are not in a backup are lost." : "";
  if (!(await ask(`Sign out and erase this device?${lost}`, "Sign out and erase"))) return;
  try {
    await api("DELETE", "/api/session");
  } catch (error) {
    problem(explain(error).text);
    return;
  }
  clearInterval(poll);
  await state.device.erase();
  channel.postMessage("erased");
  history.replaceState(null, "", "/");
  location.reload();
});

// -- chats

async function showChats() {
  const messages = (await state.device.messages()).sort((a, b) => a.at - b.at);
  const latest = new Map();
  for (const m of messages) latest.set(m.peer, m);
  $("chat-list").replaceChildren(...[...latest.values()].sort((a, b) => b.at - a.at).map((m) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = `#/chat/${encodeURIComponent(m.peer)}`;
    const name = document.createElement("span");
    name.textContent = m.peer;
    const last = document.createElement("small");
    last.textContent = (m.mine ? "You: " : "") + (m.text.length > 60 ? `${m.text.slice(0, 60)}…` : m.text);
    link.append(name, last);
    item.append(link);
    return item;
  }));
  $("no-chats").hidden = latest.size > 0;
}

$("new-chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  problem("");
  const peer = event.target.peer.value.trim().toLowerCase();
  try {
    await api("GET", `/api/people/${encodeURIComponent(peer)}`);
    event.target.reset();
    go(`chat/${encodeURIComponent(peer)}`);
  } catch (error) {
    problem(explain(error).text);
  }
});

let peer;

async function showChat(route) {
  peer = decodeURIComponent(route.slice("chat/".length));
  $("h-chat").textContent = peer;
  await showMessages();
}

async function showMessages() {
  const list = $("messages");
  const messages = (await state.device.messages()).filter((m) => m.peer === peer).sort((a, b) => a.at - b.at);
  // Only what is new is added, so that only that is read out.
  if (list.dataset.peer !== peer) list.replaceChildren();
  list.dataset.peer = peer;
  const shown = new Set([...list.children].map((li) => li.dataset.id));
  for (const m of messages) {
    if (shown.has(m.id)) continue;
    const item = document.createElement("li");
    item.dataset.id = m.id;
    if (m.mine) item.className = "mine";
    const who = document.createElement("span");
    who.className = "who";
    who.textContent = `${m.mine ? "You" : m.peer}: `;
    const time = document.createElement("time");
    time.dateTime = new Date(m.at).toISOString();
    time.textContent = new Date(m.at).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" });
    item.append(who, document.createTextNode(m.text), time);
    list.append(item);
  }
  list.scrollTop = list.scrollHeight;
}

$("compose").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = event.target.text;
  const words = input.value;
  if (!words.trim()) return;
  problem("");
  // The same id when it is sent again, so that nobody gets it twice.
  if (input.dataset.words !== words) {
    input.dataset.words = words;
    input.dataset.id = crypto.randomUUID();
  }
  try {
    await send(state.device, peer, input.dataset.id, words);
    input.value = "";
    delete input.dataset.words;
    changed();
    await showMessages();
  } catch (error) {
    const { text } = explain(error);
    problem(`Not sent. ${text}`);
  }
  input.focus();
});

let receiving = false;

async function receiveNow() {
  if (document.hidden || receiving) return;
  receiving = true;
  try {
    if ((await receive(state.device)) > 0) {
      changed();
      if (current === "chat") await showMessages();
      else if (current === "chats") await showChats();
    }
  } catch (error) {
    if (error.status === 401) signedOut();
    // Otherwise the next round tries again; sending says what is wrong.
  } finally {
    receiving = false;
  }
}

// -- start

$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the screen's
  $("main").focus();
});
for (const button of document.querySelectorAll(".reveal")) wireReveal(button);

window.addEventListener("hashchange", () => {
  notice(parting);
  parting = "";
  showRoute();
});

try {
  await signedIn(await api("GET", "/api/me"));
} catch (error) {
  if (error.status !== 401) {
    reveal("loading");
    problem(explain(error).text, [["Try again", () => location.reload()]]);
    throw error;
  }
}
// What was interrupted is said, wherever the page is opened again.
if (state.backup?.begun) go(state.backup.on ? "backup" : "restore/start-over");
else if (state.account && sessionStorage.getItem("restoring") && !location.hash.startsWith("#/restore")) go("restore");
else await showRoute();
