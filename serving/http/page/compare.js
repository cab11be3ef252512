// Before and after, one over the other; the line between them follows the pointer and the arrow keys.

import { $, clamp, show } from "./dom.js";

export class Compare {
  constructor(element) {
    this.element = element;
    this.before = $(".before", element);
    this.after = $(".after", element);
    this.input = $("input", element);
    this.input.addEventListener("input", () => this.at(Number(this.input.value)));
    element.addEventListener("pointerdown", (event) => {
      if (event.button || this.after.hidden) return;
      element.setPointerCapture(event.pointerId);
      this.input.focus({ preventScroll: true });
      this.#follow(event);
      event.preventDefault();
    });
    element.addEventListener("pointermove", (event) => { if (element.hasPointerCapture(event.pointerId)) this.#follow(event); });
    this.at(50);
  }

  /** Puts the line at a share of the width, 0 to 100. */
  at(share) {
    this.input.value = String(share);
    this.input.setAttribute("aria-valuetext", `${Math.round(share)} % before, ${Math.round(100 - share)} % after`);
    this.element.style.setProperty("--at", `${share}%`);
  }

  /** Shows the portrait; what it was edited to goes. */
  portrait(blob) {
    show(this.before, blob);
    this.before.hidden = false;
    this.after.hidden = true;
    this.element.classList.remove("made");
  }

  /** Shows the edit, or a preview of it; the portrait behind is cut to the same shape. */
  edited(blob) {
    show(this.after, blob);
    this.after.hidden = false;
    this.element.classList.add("made");
    this.after.decode().then(() => {
      const { naturalWidth: width, naturalHeight: height } = this.after;
      if (width && height) this.element.style.setProperty("--aspect", `${width} / ${height}`);
    }).catch(() => {});
  }

  #follow(event) {
    const box = this.element.getBoundingClientRect();
    this.at(clamp((100 * (event.clientX - box.left)) / box.width, 0, 100));
  }
}
