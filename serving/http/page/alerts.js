// What went wrong, in words, with what mends it; where waiting mends it, the page waits and tries again.

import { apiKey } from "./api.js";
import { $, h } from "./dom.js";

let ticking;

/** Takes the message away. */
export function clear() {
  clearInterval(ticking);
  $("#alert").hidden = true;
}

/** Says what `error` means; `again()` asks once more. What nobody waits for (`quietly`) opens no dialog. */
export function explain(error, again, quietly = false) {
  clearInterval(ticking);
  const wait = error.status === 429 || error.status === 503 || error.status === 0 ? Math.ceil(error.retryAfter ?? 3) : null;
  const left = h("span", { class: "count" });
  const act = (words, kind, onclick) => h("button", { type: "button", class: kind, onclick }, words);
  const button = error.status === 401 || error.status === 403 ? act("Enter API key", "primary", askForKey)
    : error.status === 410 ? act("Choose another", "quiet", otherVersion)
    : act("Try again", "quiet", () => { clear(); again(); });
  const place = $("#alert");
  place.className = `alert ${error.status === 410 ? "bad" : "warn"}`;
  place.replaceChildren(
    h("div", {}, h("strong", {}, headline(error)), h("p", {}, [error.message, error.mend].filter(Boolean).map(sentence).join(" ")), wait !== null && left), button);
  place.hidden = false;
  if (wait !== null) countDown(wait, left, again);
  if (error.status === 401 && !quietly) askForKey();
}

function countDown(seconds, place, again) {
  const end = Date.now() + 1000 * seconds;
  const tick = () => {
    const rest = Math.ceil((end - Date.now()) / 1000);
    place.textContent = rest > 0 ? `Trying again in ${rest} s` : "Trying again";
    if (rest > 0) return;
    clear();
    again();
  };
  tick();
  ticking = setInterval(tick, 500);
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? "" : "."}`;
const otherVersion = () => { $("#other").hidden = false; $("#reference").focus(); };

const headline = (error) => ({
  0: "No connection", 401: "An API key is needed", 403: "This key may not do that", 404: "Not served here", 409: "Refused by policy",
  410: "This adapter was revoked", 413: "The picture is too large", 429: "The service is busy", 503: "The service is not ready",
}[error.status] ?? "That did not work");

/** Opens the dialog for the API key. */
export function askForKey() {
  const dialog = $("#key-dialog");
  if (dialog.open) return;
  $("#key-input").value = apiKey.get() ?? "";
  dialog.showModal();
  $("#key-input").select();
}

/** Wires the dialog; `changed()` runs with the new key in place. */
export function keyDialog(changed) {
  const dialog = $("#key-dialog");
  $("#key").addEventListener("click", askForKey);
  $("#key-cancel").addEventListener("click", () => dialog.close());
  $("#key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set($("#key-input").value.trim());
    dialog.close();
    clear();
    changed();
  });
}
