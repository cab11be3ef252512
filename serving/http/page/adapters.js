// The picker of adapters, and what is signed about the one that answers. Cards come from strangers: all of it is text.

import { ask } from "./api.js";
import { $, brief, h, icon } from "./dom.js";

const EVERY = 3000;
const OTHER = "\0other";

export class Adapters {
  /** The listener has `chosen(status)`, `moved(status, before)`, `failed(error)`. */
  constructor(listener) {
    this.listener = listener;
    this.select = $("#adapter");
    this.statuses = new Map();
    this.pinned = new Set();
    this.reference = null;
    this.select.addEventListener("change", () => (this.select.value === OTHER ? this.#ask() : this.choose(this.select.value)));
    $("#other").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = $("#reference").value.trim();
      if (text) this.choose(text).then(() => { $("#other").hidden = true; this.select.focus(); }, (error) => this.listener.failed(error));
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.poll(); });
    setInterval(() => { if (!document.hidden && this.reference) this.poll(); }, EVERY);
  }

  /** The status of the chosen reference. */
  get current() {
    return this.statuses.get(this.reference);
  }

  /** Asks the service what is served; a version that moved is told. Raises `Refused`. */
  async load() {
    const { adapters: listed, default: usual } = await ask("v1/adapters");
    const followed = new Map(listed.map((one) => [one.reference, one]));
    for (const reference of this.pinned) {
      if (followed.has(reference)) continue;
      const last = this.statuses.get(reference);
      const one = reference === this.reference || !last ? await this.#one(reference, last) : last;
      followed.set(reference, one);
    }
    const before = this.current;
    this.statuses = followed;
    this.reference ??= usual ?? listed[0]?.reference ?? null;
    this.#paint();
    const now = this.current;
    if (before && now && (before.digest !== now.digest || before.state !== now.state)) this.listener.moved(now, before);
  }

  /** The same, where nobody waits for it. */
  poll() {
    return this.load().catch((error) => { if (error.status !== 0) this.listener.failed(error, true); });
  }

  /** Takes a reference, followed or not. Raises `Refused` where the service does not know it. */
  async choose(reference) {
    if (!this.statuses.has(reference)) {
      this.statuses.set(reference, await this.#one(reference));
      this.pinned.add(reference);
    }
    this.reference = reference;
    this.#paint();
    this.listener.chosen(this.current);
  }

  async #one(reference, last) {
    try {
      const said = await ask(`v1/adapters/${encodeURIComponent(reference)}`);
      return { ...said, reference };
    } catch (error) {
      if (!last) throw error;
      return error.status === 410 ? { ...last, state: "revoked", problem: error.message } : last;
    }
  }

  #ask() {
    $("#other").hidden = false;
    this.select.value = this.reference ?? "";
    $("#reference").focus();
  }

  #paint() {
    const shown = JSON.stringify([...this.statuses.values()].map((one) => [one.reference, one.version, one.state]));
    if (shown !== this.shown) {
      const options = Array.from(this.statuses.values(), (one) => h("option", { value: one.reference }, title(one)));
      this.select.replaceChildren(...options, h("option", { value: OTHER }, "Another version…"));
      this.shown = shown;
    }
    if (this.reference) this.select.value = this.reference;
    const key = JSON.stringify([this.current?.digest, this.current?.state, this.current?.problem, this.reference]);
    if (this.current && key !== this.key) paintFacts(this.current);
    this.key = key;
  }
}

const title = (one) => {
  const pinned = one.reference.includes("@sha256:") ? `${one.name ?? one.reference.split("@")[0]}, pinned` : one.reference;
  return one.version ? `${pinned} · version ${one.version}` : pinned;
};

const SCAN = { pass: ["Scan passed", "good"], review: ["Scan needs a review", "warn"], block: ["Scan failed", "bad"] };

/** Badges and the table of signatures. */
function paintFacts(status) {
  const facts = status.facts ?? {};
  const verdict = text(facts.scan?.verdict);
  const statements = facts.statements ?? [];
  const signed = statements.filter((one) => one.signed !== false);
  const badges = [];
  if (status.state === "revoked") badges.push(badge("warning", "Revoked", "bad"));
  else if (status.state === "refused") badges.push(badge("warning", "Newest version refused", "warn"));
  else if (status.state === "loading" && status.problem) badges.push(badge("warning", "Not served yet", "warn"));
  if (facts.license) badges.push(badge("paper", text(facts.license), "plain", "Licence of the adapter"));
  if (verdict) badges.push(badge("shield", ...(SCAN[verdict] ?? [`Scan: ${verdict}`, "bad"]), "What the scan of its weights found"));
  if (statements.length) badges.push(badge("pen", `${signed.length} signed ${signed.length === 1 ? "statement" : "statements"}`, signed.length === statements.length ? "good" : "warn"));
  $("#badges").replaceChildren(...badges);
  $("#description").textContent = text(facts.description ?? (status.state === "loading" ? status.problem : ""));
  $("#statements").replaceChildren(
    h("dl", { class: "facts-list" },
      pair("Digest", h("code", {}, text(status.digest))),
      pair("Base", facts.base ? `${text(facts.base.id)} (${text(facts.base.license)})` : ""),
      facts.rank && pair("Rank", text(facts.rank)),
      status.since && pair("Serving since", new Date(status.since * 1000).toLocaleString()),
      status.problem && pair("Problem", text(status.problem))),
    statements.length > 0 && table(["Statement", "Says", "Signed by", "Key"], statements.map((one) => [
      text(one.kind), says(one), one.signed === false ? "nobody who may" : text(one.role), keys(one)])),
    (facts.ingredients ?? []).length > 0 && table(["Made from", "Kind", "Licence"], facts.ingredients.map((one) => [
      text(one.name), text(one.kind), text(one.license)])));
}

const text = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));
const says = (one) => [one.verdict ?? one.result ?? one.outcome, one.by && `by ${text(one.by)}`, one.reason].filter(Boolean).map(text).join(", ");
const keys = (one) => h("code", {}, (one.key_ids ?? []).map((id) => text(id).slice(0, 12)).join(", "));
const pair = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
const badge = (picture, words, kind, title) => h("span", { class: `badge ${kind}`, title }, icon(picture), words);
const table = (head, rows) => h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": head[0] }, h("table", {},
  h("thead", {}, h("tr", {}, head.map((one) => h("th", { scope: "col" }, one)))),
  h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));

/** The line in the header: what answers now. */
export function paintLive(status) {
  const place = $("#live");
  place.hidden = !status;
  if (!status) return;
  place.className = `live ${status.state}${status.problem ? " trouble" : ""}`;
  const version = status.version ? `version ${brief(status.version)}` : status.state;
  place.replaceChildren(h("span", { class: "lamp", "aria-hidden": "true" }), h("strong", {}, text(status.name ?? status.reference)), ` ${status.state === "revoked" ? "revoked" : version}`);
  place.title = text(status.problem ?? status.digest);
}
