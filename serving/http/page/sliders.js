// Sliders: a range input with a name and its value. Arrow keys move by 0.05, with Shift by 0.01; Delete is neutral.

import { brief, clamp, h } from "./dom.js";

/** One slider; `changed(value)` runs while it moves. A value of null is the usual one. */
export function slider({ id, name, min, max, value = null, usual = 0, changed }) {
  const output = h("output", { for: id, class: "value" });
  const input = h("input", { type: "range", id, min, max, step: 0.01, value: value ?? usual, oninput: () => { paint(); changed(Number(input.value)); } });
  const paint = () => {
    const now = Number(input.value);
    output.textContent = now.toFixed(2);
    input.style.setProperty("--at", `${(100 * (now - min)) / (max - min || 1)}%`);
    input.setAttribute("aria-valuetext", brief(now));
    row.classList.toggle("on", Math.abs(now - usual) > 0.001);
  };
  const row = h("div", { class: "slider" }, h("label", { for: id }, name), output, input);
  const move = (to) => { input.value = String(clamp(to, min, max)); input.dispatchEvent(new Event("input", { bubbles: true })); };
  input.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (way && !event.ctrlKey && !event.metaKey && !event.altKey) move(Number(input.value) + way * (event.shiftKey ? 0.01 : 0.05));
    else if (event.key === "Delete" || event.key === "Backspace") move(usual);
    else return;
    event.preventDefault();
  });
  input.addEventListener("dblclick", () => move(usual));
  paint();
  return {
    row,
    set(to) {
      const wanted = to ?? usual;
      if (Number(input.value) !== wanted) { input.value = String(wanted); paint(); }
    },
  };
}

/** The sliders of an adapter's expressions. */
export class Sliders {
  constructor(place, changed) {
    this.place = place;
    this.changed = changed;
    this.rows = new Map();
  }

  /** Draws a slider for each expression that the signed card names. */
  draw(names, min, max, values) {
    this.rows = new Map(names.map((name, index) => [
      name,
      slider({ id: `expression-${index}`, name, min, max, value: values[name] ?? 0, usual: clamp(0, min, max), changed: (value) => this.changed(name, value) }),
    ]));
    this.place.replaceChildren(...Array.from(this.rows.values(), (one) => one.row));
  }

  /** Shows these values. */
  set(values) {
    for (const [name, one] of this.rows) one.set(values[name] ?? 0);
  }
}
