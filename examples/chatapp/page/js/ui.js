// Small tools of the page.
import { explain, Explained } from "./words.js";

export const $ = (id) => document.getElementById(id);

/** Shows what is wrong, read out at once. actions are [label, function] pairs. */
export function problem(words, actions = []) {
  const box = $("problem");
  box.replaceChildren();
  box.hidden = !words;
  if (!words) return;
  say(box, words, actions);
  box.scrollIntoView({ block: "nearest" });
}

/** Puts words into a box, and buttons below them. */
export function say(box, words, actions = []) {
  const p = document.createElement("p");
  p.textContent = words;
  box.replaceChildren(p);
  if (!actions.length) return;
  const row = document.createElement("div");
  row.className = "actions";
  for (const [label, act] of actions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", act);
    row.append(button);
  }
  box.append(row);
}

/** Says what went well, read out when there is time. */
export const notice = (words) => { $("notice").textContent = words ?? ""; };

/** Puts text in every place that is marked with this name. */
export function fill(name, words) {
  for (const e of document.querySelectorAll(`[data-fill="${name}"]`)) e.textContent = words;
}

export function fieldError(input, place, words) {
  place.textContent = words ?? "";
  place.hidden = !words;
  input.setAttribute("aria-invalid", String(Boolean(words)));
  if (words) {
    input.setAttribute("aria-errormessage", place.id);
    input.focus();
  } else {
    input.removeAttribute("aria-errormessage");
  }
}

/** Asks before what cannot be undone. */
export function ask(words, yes) {
  const dialog = $("ask");
  $("ask-text").textContent = words;
  $("ask-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  $("ask-no").focus();
  return new Promise((resolve) => {
    $("ask-yes").onclick = () => dialog.close("yes");
    $("ask-no").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

/** The user cancelled. Nothing has to be said. */
export class Cancelled extends Error {}

/**
 * Performs work that takes its time, behind a dialog with Cancel. Only one tab does so at a
 * time. work gets a job: job.say(words); await job.insist(operation), which on trouble
 * that may pass explains it, offers to try again, and goes on with what is pending.
 */
export async function busy(words, work) {
  return navigator.locks.request("backup-work", { ifAvailable: true }, async (lock) => {
    if (!lock) {
      throw new Explained("other-tab", "Another tab of this app is at work on your backup. Wait until it has finished, or close it, then try again here.");
    }
    const dialog = $("busy");
    const controller = new AbortController();
    let decide; // set while the user has to choose
    const cancel = () => {
      controller.abort(new Cancelled());
      decide?.(false);
    };
    const say = (text) => { $("busy-text").textContent = text; };
    const job = {
      signal: controller.signal,
      say,
      async insist(operation) {
        for (;;) {
          try {
            controller.signal.throwIfAborted();
            return await operation(controller.signal);
          } catch (error) {
            if (controller.signal.aborted) throw controller.signal.reason;
            const { text, retry } = explain(error);
            if (!retry) throw error;
            if (error.pending) operation = (signal) => error.resume({ signal });
            dialog.classList.add("trouble");
            $("busy-trouble").textContent = error.pending === "recovery"
              ? `${text} If you cancel now, this may count as a wrong try.` : text;
            $("busy-retry").hidden = false;
            $("busy-retry").focus();
            const again = await new Promise((resolve) => { decide = resolve; });
            decide = undefined;
            dialog.classList.remove("trouble");
            $("busy-trouble").textContent = "";
            $("busy-retry").hidden = true;
            $("busy-cancel").focus();
            if (!again) throw new Cancelled();
          }
        }
      },
    };
    const before = document.activeElement;
    $("busy-trouble").textContent = "";
    $("busy-retry").hidden = true;
    $("busy-retry").onclick = () => decide?.(true);
    $("busy-cancel").onclick = () => cancel();
    dialog.oncancel = (event) => {
      event.preventDefault();
      cancel();
    };
    dialog.classList.remove("trouble");
    dialog.showModal();
    say(words);
    try {
      return await work(job);
    } finally {
      dialog.close();
      if (before?.isConnected) before.focus();
    }
  });
}

/** A button that shows the password in the field that it controls. */
export function wireReveal(button) {
  button.addEventListener("click", () => {
    const input = $(button.getAttribute("aria-controls"));
    const shown = input.type === "password";
    input.type = shown ? "text" : "password";
    button.setAttribute("aria-pressed", String(shown));
  });
}
