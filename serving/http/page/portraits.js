// Where portraits come from: samples, files, drops, pastes, and what this browser kept. Each is known by its digest.

import { sha256 } from "./digest.js";
import { $, h } from "./dom.js";
import { pictures } from "./store.js";

const SAMPLES = [
  ["human-1", "Brown hair"], ["human-3", "Bun"], ["human-6", "Glasses"], ["human-2", "Earrings"], ["anime-5", "Blond, drawn"], ["anime-3", "Blue hair, drawn"],
];
const KINDS = ["image/png", "image/jpeg", "image/webp"];
const MOST_BYTES = 6 << 20;
const MOST_SIDE = 1536;

export class Portraits {
  /** `taken(picture)` gets {key, name, blob}; `refused(message)` says why one was not taken. */
  constructor(taken, refused) {
    Object.assign(this, { taken, refused });
    $("#samples").replaceChildren(...SAMPLES.map(([name, title]) => h("button", {
      type: "button", class: "thumb", "aria-pressed": "false", "data-key": name, "aria-label": `Sample portrait: ${title}`, onclick: () => this.sample(name),
    }, h("img", { src: new URL(`samples/${name}.png`, import.meta.url).href, alt: "", width: 56, height: 56 }))));
    $("#file").addEventListener("change", (event) => { this.file(event.target.files[0]); event.target.value = ""; });
    document.addEventListener("paste", (event) => this.file([...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"))));
    this.#drops();
  }

  /** The samples that ship with the page. */
  static get first() {
    return SAMPLES[0][0];
  }

  /** Takes a sample. */
  async sample(name) {
    const answer = await fetch(new URL(`samples/${name}.png`, import.meta.url));
    this.#take({ key: name, name, blob: await answer.blob() });
  }

  /** Takes a file from this machine; one that is too large for a quick edit is made smaller first. */
  async file(file) {
    if (!file) return;
    try {
      let blob = file;
      const bitmap = await createImageBitmap(file);
      if (!KINDS.includes(file.type) || file.size > MOST_BYTES) blob = await smaller(bitmap);
      bitmap.close();
      const key = `sha256:${await sha256(new Uint8Array(await blob.arrayBuffer()))}`;
      const picture = { key, name: file.name || "pasted picture", blob: new Blob([blob], { type: blob.type }) };
      await pictures.put(picture);
      this.#take(picture);
    } catch {
      this.refused(`${file.name || "That file"} is not a picture that this browser can read. Use a PNG, JPEG or WebP file.`);
    }
  }

  /** Takes the picture that a link names; false where this browser does not have it. */
  async byKey(key) {
    if (SAMPLES.some(([name]) => name === key)) {
      await this.sample(key);
      return true;
    }
    const kept = await pictures.get(key);
    if (kept) this.#take(kept);
    return Boolean(kept);
  }

  #take(picture) {
    const place = $("#samples");
    let mine = [...place.children].find((one) => one.dataset.key === picture.key);
    if (!mine) {
      place.querySelector("[data-own]")?.remove();
      mine = h("button", { type: "button", class: "thumb", "data-key": picture.key, "data-own": "", "aria-label": `Your picture: ${picture.name}`, onclick: () => this.#take(picture) },
        h("img", { src: URL.createObjectURL(picture.blob), alt: "", width: 56, height: 56 }));
      place.append(mine);
    }
    for (const one of place.children) one.setAttribute("aria-pressed", String(one === mine));
    this.taken(picture);
  }

  #drops() {
    const zone = $("#dropzone");
    let inside = 0;
    const holds = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    addEventListener("dragenter", (event) => { if (holds(event)) { inside++; zone.classList.add("on"); } });
    addEventListener("dragleave", (event) => { if (holds(event) && --inside <= 0) { inside = 0; zone.classList.remove("on"); } });
    addEventListener("dragover", (event) => { if (holds(event)) event.preventDefault(); });
    addEventListener("drop", (event) => {
      inside = 0;
      zone.classList.remove("on");
      if (!holds(event)) return;
      event.preventDefault();
      this.file(event.dataTransfer.files[0]);
    });
  }
}

async function smaller(bitmap) {
  const share = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = h("canvas", { width: Math.round(bitmap.width * share), height: Math.round(bitmap.height * share) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("empty"))), "image/png"));
}
