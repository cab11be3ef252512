// The blend pad: two expressions at once, across and up. A map of faces can lie under it.

import { $, brief, clamp, h, show } from "./dom.js";

export const SIDE = 4;

export class Pad {
  /** `changed(x, y)` runs while the point moves. */
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.min = 0;
    this.max = 1;
    this.x = this.y = 0;
    this.names = ["", ""];
    element.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      element.setPointerCapture(event.pointerId);
      element.focus({ preventScroll: true });
      this.#follow(event);
      event.preventDefault();
    });
    element.addEventListener("pointermove", (event) => { if (element.hasPointerCapture(event.pointerId)) this.#follow(event); });
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** The two expressions, and the signed range of both. */
  draw(names, min, max) {
    Object.assign(this, { names, min, max });
    $(".axis-x", this.element).textContent = `${names[0]} →`;
    $(".axis-y", this.element).textContent = `↑ ${names[1]}`;
    const trained = clamp((1 - min) / (max - min || 1), 0, 1);
    this.element.style.setProperty("--trained", `${100 * trained}%`);
    this.element.setAttribute("aria-valuemin", min);
    this.element.setAttribute("aria-valuemax", max);
    this.set(this.x, this.y);
  }

  /** Shows these values. */
  set(x, y) {
    Object.assign(this, { x: clamp(x, this.min, this.max), y: clamp(y, this.min, this.max) });
    const share = (value) => `${(100 * (value - this.min)) / (this.max - this.min || 1)}%`;
    this.element.style.setProperty("--x", share(this.x));
    this.element.style.setProperty("--y", share(this.y));
    this.element.setAttribute("aria-valuenow", brief(this.x));
    this.element.setAttribute("aria-valuetext", `${this.names[0]} ${brief(this.x)}, ${this.names[1]} ${brief(this.y)}`);
  }

  /** The expressions of each tile of the map, row by row from the top. */
  tiles() {
    const at = (index) => this.min + ((this.max - this.min) * index) / (SIDE - 1);
    const found = [];
    for (let row = SIDE - 1; row >= 0; row--) for (let column = 0; column < SIDE; column++) found.push([at(column), at(row)]);
    return found;
  }

  /** Paints the map, one picture a tile; none takes it away. */
  paint(pictures) {
    const place = $(".faces", this.element);
    for (const image of place.children) URL.revokeObjectURL(image.dataset.url);
    place.replaceChildren(...pictures.map((blob) => { const image = h("img", { alt: "" }); show(image, blob); return image; }));
    this.element.classList.toggle("mapped", pictures.length > 0);
    this.element.classList.remove("stale");
  }

  #follow(event) {
    const box = this.element.getBoundingClientRect();
    const value = (share) => Math.round((this.min + clamp(share, 0, 1) * (this.max - this.min)) * 100) / 100;
    this.#move(value((event.clientX - box.left) / box.width), value((box.bottom - event.clientY) / box.height));
  }

  #key(event) {
    const step = event.shiftKey ? 0.01 : 0.05;
    const way = { ArrowRight: [step, 0], ArrowLeft: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step], Home: [-Infinity, -Infinity], End: [Infinity, Infinity] }[event.key];
    if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#move(Math.round((this.x + way[0]) * 100) / 100, Math.round((this.y + way[1]) * 100) / 100);
  }

  #move(x, y) {
    this.set(x, y);
    this.changed(this.x, this.y);
  }
}
