// The service's own HTTP interface, below wherever the page lies.

const KEY = "adapter-foundry-key";
let remembered = null;

export const apiKey = {
  get() { try { return sessionStorage.getItem(KEY) ?? remembered; } catch { return remembered; } },
  set(value) {
    remembered = value || null;
    try { value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY); } catch { /* storage is off */ }
  },
};

/** What the service refused, and what mends it. */
export class Refused extends Error {
  constructor(status, { message, mend, type } = {}, retryAfter = null) {
    super(message || `The service answered with ${status}.`);
    this.status = status;
    this.mend = typeof mend === "string" ? mend : "";
    this.type = type;
    this.retryAfter = retryAfter;
  }
}

async function send(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { Accept: accept };
  const key = apiKey.get();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store", credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { message: "The service cannot be reached.", mend: "The page tries again by itself." }, 3);
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new Refused(answer.status, explained(said), seconds(answer.headers.get("Retry-After")));
}

const explained = (said) => {
  const error = said?.error ?? said ?? {};
  return typeof error === "object" ? error : { message: String(error) };
};
const seconds = (text) => { const n = Number.parseFloat(text ?? ""); return Number.isFinite(n) ? Math.max(0, n) : null; };

/** JSON of a GET, or of a POST with a body. */
export const ask = async (path, options) => (await send(path, options)).json();

/** Server-sent events of a POST, each as {event, data}; `data` is parsed JSON. Aborting the signal cancels the edit. */
export async function* events(path, body, signal) {
  const answer = await send(path, { body, signal, accept: "text/event-stream" });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = done ? "" : blocks.pop();
      for (const block of blocks) {
        const found = parsed(block);
        if (found?.event === "error") {
          throw new Refused(Number(found.data?.error?.status) || statusOf(found.data), explained(found.data), seconds(String(found.data?.error?.retry_after ?? "")));
        }
        if (found) yield found;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (!data.length) return null;
  try { return { event, data: JSON.parse(data.join("\n")) }; } catch { return null; }
}

const statusOf = (data) => (/revoked/i.test(`${data?.error?.type} ${data?.error?.code}`) ? 410 : 500);

/** The picture in an answer: base64, or a data URL. */
export function pictureOf(text) {
  const [, kind, coded] = /^(?:data:([^;,]+);base64,)?(.*)$/s.exec(text);
  const bytes = Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: kind || "image/png" });
}

/** Bytes as base64. */
export async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}
