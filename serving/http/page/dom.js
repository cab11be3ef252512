// Elements without markup: whatever text comes from outside goes in as text.

export const $ = (selector, root = document) => root.querySelector(selector);

/** Makes an element; `props` are properties, except class, data-*, aria-*, role, for and listeners (onclick …). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (/^(class|role|for|style-|aria-|data-)/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** One of the icons that index.html draws as symbols. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** The object URL of a blob in an image; the one that it showed before is given back. */
export function show(image, blob) {
  const old = image.dataset.url;
  const url = URL.createObjectURL(blob);
  image.dataset.url = url;
  image.src = url;
  // Not before the new one is painted, or the picture blinks.
  image.decode().catch(() => {}).finally(() => old && URL.revokeObjectURL(old));
}

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** A number as people read it: 0.8, 1.25. */
export const brief = (value) => String(Math.round(value * 100) / 100);

/** "happy 0.8, sad 0.25", or "neutral". */
export function worded(expressions, neutral = "neutral") {
  const parts = Object.entries(expressions).filter(([, value]) => value).map(([name, value]) => `${name} ${brief(value)}`);
  return parts.length ? parts.join(", ") : neutral;
}

let hide;
/** A short message that goes away by itself. */
export function toast(text) {
  const place = $("#toast");
  place.textContent = text;
  place.classList.add("on");
  clearTimeout(hide);
  hide = setTimeout(() => place.classList.remove("on"), 5000);
}
