// The intensity strip and the history: rows of small pictures that are also controls.

import { ask, pictureOf } from "./api.js";
import { $, brief, h, show, worded } from "./dom.js";
import { history } from "./store.js";

const FACES = 8;

/** Intensities of the strip, from the lowest to the highest that is signed. */
const intensities = (min, max) => Array.from({ length: FACES }, (_, index) => Math.round((min + ((max - min) * index) / (FACES - 1)) * 100) / 100);

export class Strip {
  /** `request(rows)` gives the body of a request; `pick(name, value)` sets a slider; `failed(error)`. */
  constructor({ request, pick, failed }) {
    Object.assign(this, { request, pick, failed });
    this.place = $("#strip");
    this.button = $("#sweep");
    this.button.addEventListener("click", () => this.draw());
  }

  /** The expressions of the adapter and their signed range. */
  offer(names, min, max) {
    Object.assign(this, { min, max });
    fill($("#strip-of"), names, $("#strip-of").value);
  }

  /** What it shows was made with other settings. */
  stale() {
    this.place.classList.add("stale");
  }

  /** One request for all intensities. */
  async draw() {
    const name = $("#strip-of").value;
    const values = intensities(this.min, this.max);
    const body = await this.request(values.map((value) => ({ [name]: value })));
    if (!body) return;
    this.button.disabled = true;
    this.place.setAttribute("aria-busy", "true");
    try {
      const { results } = await ask("v1/edits", { body });
      this.#paint(name, values, results.map((one) => pictureOf(one.image)));
    } catch (error) {
      this.failed(error, () => this.draw());
    } finally {
      this.button.disabled = false;
      this.place.removeAttribute("aria-busy");
    }
  }

  #paint(name, values, blobs) {
    for (const image of this.place.querySelectorAll("img")) URL.revokeObjectURL(image.dataset.url);
    this.place.classList.remove("stale");
    this.place.replaceChildren(...blobs.map((blob, index) => {
      const image = h("img", { alt: "" });
      show(image, blob);
      return h("li", {}, h("button", {
        type: "button", class: "frame", "aria-label": `${name} ${brief(values[index])}: use this`, onclick: () => this.pick(name, values[index]),
      }, image, h("span", {}, brief(values[index]))));
    }));
  }
}

export class History {
  /** `open(link)` goes to an entry. */
  constructor(open) {
    this.open = open;
    this.place = $("#history");
    $("#clear").addEventListener("click", () => history.clear().then(() => this.paint()));
    this.paint();
  }

  /** Keeps a picture that was made. */
  async add(entry) {
    await history.add({ ...entry, when: Date.now() });
    await this.paint();
  }

  /** Shows what is kept. */
  async paint() {
    const entries = await history.all();
    for (const image of this.place.querySelectorAll("img")) URL.revokeObjectURL(image.dataset.url);
    this.place.replaceChildren(...entries.map((entry) => {
      const image = h("img", { alt: "" });
      show(image, entry.blob);
      const words = worded(entry.expressions);
      return h("li", {}, h("a", {
        href: entry.link, class: "frame", "aria-label": `${words}, ${entry.by}, seed ${entry.seed}`, onclick: (event) => { event.preventDefault(); this.open(entry.link); },
      }, image, h("span", {}, words), h("small", {}, entry.by)));
    }));
    $("#clear").hidden = entries.length === 0;
  }
}

/** Options of a select; keeps what was chosen where it is still there. */
export function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}
