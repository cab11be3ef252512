// A link that makes a picture again: everything that decides its pixels, in the fragment, which no server sees.

import { brief, clamp } from "./dom.js";

const SIGNED = [-4, 4]; // no strength outside of this can be signed

/** The fragment of an edit. */
export function write({ picture, adapter, expressions, strength, seed, steps, stacked, pixels }) {
  const fields = new URLSearchParams({ picture, adapter });
  for (const [name, value] of Object.entries(expressions)) if (value) fields.append("e", `${name}:${brief(value)}`);
  if (strength !== null) fields.set("strength", strength); // without one it is that which suits the adapter
  fields.set("seed", seed);
  fields.set("steps", steps);
  for (const under of stacked ?? []) {
    const name = under.adapter?.split(":")[0];
    fields.append("under", `${name ? `${name}@` : ""}${under.digest}*${under.strength}`);
  }
  if (pixels) fields.set("pixels", pixels);
  return `#${fields.toString().replaceAll("%3A", ":").replaceAll("%40", "@")}`;
}

/** An adapter that lies under the other, and how strongly; null where the text names none. */
function under(text) {
  const cut = text.lastIndexOf("*");
  const strength = Number.parseFloat(text.slice(cut + 1));
  return cut > 0 && Number.isFinite(strength) ? { adapter: text.slice(0, cut).slice(0, 300), strength: clamp(strength, ...SIGNED) } : null;
}

/** The edit that a fragment asks for; null where it asks for none. What is out of range is brought into it. */
export function read(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const picture = fields.get("picture") ?? "";
  const adapter = (fields.get("adapter") ?? "").slice(0, 300);
  if (!picture || !adapter) return null;
  const expressions = {};
  for (const text of fields.getAll("e").slice(0, 12)) {
    const cut = text.lastIndexOf(":");
    const value = Number.parseFloat(text.slice(cut + 1));
    if (cut > 0 && Number.isFinite(value)) expressions[text.slice(0, cut)] = value;
  }
  const number = (name, usual, low, high) => {
    const value = Number.parseFloat(fields.get(name) ?? "");
    return Number.isFinite(value) ? clamp(value, low, high) : usual;
  };
  return {
    picture: picture.slice(0, 100),
    adapter,
    expressions,
    strength: number("strength", null, ...SIGNED),
    seed: Math.trunc(number("seed", 0, 0, Number.MAX_SAFE_INTEGER)),
    steps: Math.trunc(number("steps", 8, 1, 100)),
    stacked: fields.getAll("under").slice(0, 4).map(under).filter(Boolean),
    pixels: /^[0-9a-f]{32}$/.test(fields.get("pixels") ?? "") ? fields.get("pixels") : null,
  };
}
