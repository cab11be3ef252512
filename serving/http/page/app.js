// The page: one state, drawn by its parts; every change goes through `changed`.

import { Adapters, paintLive } from "./adapters.js";
import { clear, explain, keyDialog } from "./alerts.js";
import { ask, base64, pictureOf } from "./api.js";
import { Compare } from "./compare.js";
import { pixelDigest } from "./digest.js";
import { $, clamp, icon, toast, worded } from "./dom.js";
import { fill, History, Strip } from "./gallery.js";
import { read, write } from "./link.js";
import { Live } from "./live.js";
import { Pad } from "./pad.js";
import { Portraits } from "./portraits.js";
import { slider, Sliders } from "./sliders.js";

const SETTLED = 700;
const PREVIEWS = 3;

// `strength` and `steps` null are what suits the adapter, `stacked` null what the service puts under it.
const state = { picture: null, coded: null, expressions: {}, strength: null, seed: 0, steps: null, stacked: null };
let wanted = null; // the digest of the pixels that an opened link promises
let settling = null;
let drawn = null; // the expressions and the range that the controls show
let strength = null; // its slider, once the range is known
let made = null;

const compare = new Compare($("#compare"));
const sliders = new Sliders($("#sliders"), (name, value) => express({ [name]: value }));
const pad = new Pad($("#pad"), (x, y) => express({ [$("#blend-x").value]: x, [$("#blend-y").value]: y }));
const strip = new Strip({ request: (rows) => request(rows.map((row) => ({ ...state.expressions, ...row }))), pick: (name, value) => express({ [name]: value }), failed: explain });
const past = new History((link) => { if (link === location.hash) open(link); else location.hash = link; });
const live = new Live(async () => { const body = await request([state.expressions]); return body && { ...body, previews: state.steps === null || state.steps > 2 ? PREVIEWS : 0 }; }, {
  started() { $("#compare").classList.add("busy"); $("#progress").value = 0; },
  stepped(step, steps, picture) { $("#progress").value = step / steps; if (picture) compare.edited(picture); },
  answered, failed(error) { idle(); explain(error, () => live.now()); },
});
const adapters = new Adapters({
  chosen() { state.stacked = null; adopt(); changed(); },
  moved(now, before) {
    if (now.digest !== before.digest) state.stacked = null;
    adopt();
    toast(now.state === "revoked" ? `${now.reference} was revoked` : `${now.reference} is now version ${now.version ?? "?"}`);
    if (now.digest !== before.digest || now.state !== "ready") changed();
  },
  failed(error, quietly) { if (!quietly || error.status === 401) explain(error, start, quietly); },
});
const portraits = new Portraits(take, (message) => explain(Object.assign(new Error(message), { status: 400 }), () => $("#file").click()));

/** The body of a request for these rows, or null where a part of it is not there yet. */
async function request(rows) {
  const status = adapters.current;
  if (!state.picture || !status) return null;
  state.coded ??= base64(state.picture.blob);
  const { strength, seed, steps, stacked } = state;
  const asked = rows.map((row) => Object.fromEntries(Object.entries(row).filter(([, value]) => value)));
  // A single face has a link that promises its pixels, so it shares no batch with strangers.
  const what = asked.length === 1 ? { expressions: asked[0], exact: true } : { rows: asked };
  return { image: await state.coded, adapter: status.reference, ...what, seed, ...(strength !== null && { strength }), ...(steps && { steps }), ...(stacked && { stacked }) };
}

function take(picture) {
  Object.assign(state, { picture, coded: null });
  compare.portrait(picture.blob);
  outdated();
  changed();
}

/** Some expressions have new intensities. */
function express(values) {
  Object.assign(state.expressions, values);
  paint();
  changed();
}

/** Something decides other pixels now; what was said before is over. An edit that starts later takes no message away. */
function changed() {
  clear();
  clearTimeout(settling);
  settling = null;
  live.change();
}

/** The strip and the map show another portrait, adapter or noise. */
function outdated() {
  strip.stale();
  $("#pad").classList.add("stale");
}

function paint() {
  sliders.set(state.expressions);
  pad.set(state.expressions[$("#blend-x").value] ?? 0, state.expressions[$("#blend-y").value] ?? 0);
  strength?.set(state.strength);
  $("#seed").value = state.seed;
  $("#steps").value = state.steps ?? "";
}

/** Draws the controls that the signed card of the current adapter asks for. */
function adopt() {
  const status = adapters.current;
  paintLive(status);
  const { expressions = [], strength_min: min = 0, strength_max: max = 1 } = status?.facts ?? {};
  outdated();
  const wish = JSON.stringify([expressions, min, max]);
  if (!expressions.length || wish === drawn) return;
  drawn = wish;
  state.expressions = Object.fromEntries(Object.entries(state.expressions).filter(([name]) => expressions.includes(name)).map(([name, value]) => [name, clamp(value, min, max)]));
  if (state.strength !== null) state.strength = clamp(state.strength, min, max);
  strength = slider({ id: "strength", name: "Adapter strength", min, max, usual: clamp(1, min, max), changed: (value) => { state.strength = value; outdated(); changed(); } });
  $("#strength-field").replaceChildren(strength.row);
  sliders.draw(expressions, min, max, state.expressions);
  const other = expressions[1] ?? expressions[0];
  fill($("#blend-x"), expressions, $("#blend-x").value || (expressions.includes("happy") ? "happy" : expressions[0]));
  fill($("#blend-y"), expressions, $("#blend-y").value || (expressions.includes("surprised") ? "surprised" : other));
  strip.offer(expressions, min, max);
  if (!$("#strip").children.length && expressions.includes("happy")) $("#strip-of").value = "happy";
  aim();
}

/** The pad's two expressions. */
function aim() {
  const { strength_min: min = 0, strength_max: max = 1 } = adapters.current?.facts ?? {};
  pad.draw([$("#blend-x").value, $("#blend-y").value], min, max);
  pad.paint([]);
  paint();
}

function idle() {
  $("#compare").classList.remove("busy");
  $("#progress").value = 0;
}

async function answered(answer, body, milliseconds) {
  const result = answer.results[0];
  const blob = pictureOf(result.image);
  idle();
  compare.edited(blob);
  const name = answer.adapter_name ?? result.adapter?.split(":")[0] ?? "";
  const version = answer.adapter_version ?? result.adapter?.split(":")[1];
  const by = version ? `${name} version ${version}` : name;
  const picture = state.picture.key;
  const link = { picture, adapter: `${name}@${answer.adapter_digest ?? result.adapter_digest}`, expressions: body.expressions, strength: body.strength ?? null, seed: body.seed, steps: result.steps, stacked: result.stacked };
  $("#steps").placeholder = result.steps;
  made = { blob, by, link, words: worded(body.expressions) };
  $("#made").textContent = made.words;
  const took = milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
  $("#facts").textContent = `${by} · seed ${body.seed} · ${result.steps} steps · ${took}`;
  offer(blob);
  if (adapters.current?.digest && adapters.current.digest !== (answer.adapter_digest ?? result.adapter_digest)) adapters.poll();
  clearTimeout(settling);
  settling = setTimeout(() => settle(made), SETTLED);
}

/** The hand rests: the picture goes into the history and its link into the address. */
async function settle({ blob, by, link, words }) {
  const pixels = await pixelDigest(blob);
  const fragment = write({ ...link, pixels });
  if (made.blob !== blob) return;
  $("#said").textContent = `The picture is ready: ${words}, by ${by}.`;
  if (wanted) {
    toast(wanted === pixels ? "The same picture, pixel for pixel" : "Made again, but not pixel for pixel: another machine or batch computes a little differently");
    document.body.dataset.reproduced = String(wanted === pixels);
    wanted = null;
  }
  globalThis.history.replaceState(null, "", fragment);
  $("#copy").disabled = false;
  await past.add({ link: fragment, picture: link.picture, blob, by, expressions: link.expressions, seed: link.seed });
}

function offer(blob) {
  const button = $("#download");
  if (button.href) URL.revokeObjectURL(button.href);
  button.href = URL.createObjectURL(blob);
  button.removeAttribute("aria-disabled");
  button.download = `${made.words.replace(/[^a-z0-9.]+/gi, "-")}-${state.seed}.png`;
}

/** Makes the picture of a link again. */
async function open(fragment) {
  const asked = read(fragment);
  if (!asked) return false;
  try {
    await adapters.choose(adapters.current && adapters.current.state === "ready" && asked.adapter === `${adapters.current.name}@${adapters.current.digest}` ? adapters.current.reference : asked.adapter);
  } catch (error) {
    explain(error, () => open(fragment));
    return false;
  }
  const { expressions, strength, seed, steps, stacked } = asked;
  Object.assign(state, { expressions, strength, seed, steps, stacked });
  paint();
  if (!(await portraits.byKey(asked.picture))) {
    explain(Object.assign(new Error("This link was made with a picture that is not in this browser."), { status: 404, mend: "Drop the same picture to make it again." }), () => $("#file").click());
    return false;
  }
  wanted = asked.pixels;
  delete document.body.dataset.reproduced;
  return true;
}

async function drawMap() {
  const [across, up] = [$("#blend-x").value, $("#blend-y").value];
  const body = await request(pad.tiles().map(([x, y]) => ({ ...state.expressions, [across]: x, [up]: y })));
  if (!body) return;
  $("#map").disabled = true;
  try {
    const { results } = await ask("v1/edits", { body });
    if (across === $("#blend-x").value && up === $("#blend-y").value) pad.paint(results.map((one) => pictureOf(one.image)));
  } catch (error) {
    explain(error, drawMap);
  } finally {
    $("#map").disabled = false;
  }
}

/** A field for a whole number; one that may be empty is null then. */
function number(id, name, low, high, optional = false) {
  const input = $(id);
  input.addEventListener("input", () => {
    const value = Math.trunc(input.valueAsNumber);
    const empty = optional && input.value === "" && !input.validity.badInput;
    if (!Number.isFinite(value) && !empty) return;
    state[name] = empty ? null : clamp(value, low, high);
    outdated();
    changed();
  });
  input.addEventListener("blur", () => { input.value = state[name] ?? ""; });
}

function theme() {
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const draw = () => {
    $("#theme").replaceChildren(icon(dark() ? "sun" : "moon"));
    $("#theme").setAttribute("aria-label", dark() ? "Use the light scheme" : "Use the dark scheme");
  };
  $("#theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* storage is off */ }
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

function wire() {
  theme();
  number("#seed", "seed", 0, Number.MAX_SAFE_INTEGER);
  number("#steps", "steps", 1, 100, true);
  $("#dice").addEventListener("click", () => { state.seed = Math.floor(Math.random() * 1e6); outdated(); paint(); changed(); });
  $("#reset").addEventListener("click", () => { state.expressions = {}; paint(); changed(); });
  $("#map").addEventListener("click", drawMap);
  for (const id of ["#blend-x", "#blend-y"]) $(id).addEventListener("change", aim);
  $("#copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      toast("The link is copied");
    } catch {
      toast("The link is in the address bar");
    }
  });
  $(".skip").addEventListener("click", (event) => { event.preventDefault(); $("#controls").focus(); }); // the fragment is the picture's
  addEventListener("hashchange", () => open(location.hash));
  keyDialog(start);
}

/** Learns what is served, and makes the first picture. */
async function start() {
  try {
    await adapters.load();
  } catch (error) {
    explain(error, start);
    return;
  }
  clear();
  adopt();
  if (!adapters.current) {
    explain(Object.assign(new Error("No adapter is served yet."), { status: 503, mend: "Promote one, for example with registry promote." }), start);
    return;
  }
  if (state.picture) changed();
  else if (!(await open(location.hash)) && !read(location.hash)) {
    const { expressions = [] } = adapters.current.facts ?? {};
    const first = expressions.includes("happy") ? "happy" : expressions[0];
    if (first) state.expressions = { [first]: clamp(0.8, adapters.current.facts.strength_min ?? 0, adapters.current.facts.strength_max ?? 1) };
    paint();
    await portraits.sample(Portraits.first);
  }
}

wire();
start();
