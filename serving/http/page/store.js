// What this browser keeps: pictures by their digest, and the history. Without IndexedDB both last as long as the tab.

const KEPT = 48;
const memory = { pictures: new Map(), history: new Map() };
const opened = new Promise((resolve) => {
  try {
    const asked = indexedDB.open("adapter-foundry", 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("pictures", { keyPath: "key" });
      asked.result.createObjectStore("history", { keyPath: "link" });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = asked.onblocked = () => resolve(null);
  } catch {
    resolve(null);
  }
});

async function act(name, mode, work) {
  const base = await opened;
  if (!base) return undefined;
  return new Promise((resolve, reject) => {
    const change = base.transaction(name, mode);
    const asked = work(change.objectStore(name));
    change.oncomplete = () => resolve(asked?.result);
    change.onerror = change.onabort = () => reject(change.error);
  });
}

async function put(name, key, value) {
  memory[name].set(key, value);
  await act(name, "readwrite", (store) => store.put(value)).catch(() => {});
}

async function all(name) {
  const found = await act(name, "readonly", (store) => store.getAll()).catch(() => undefined);
  return found ?? [...memory[name].values()];
}

async function drop(name, key) {
  memory[name].delete(key);
  await act(name, "readwrite", (store) => store.delete(key)).catch(() => {});
}

export const pictures = {
  get: async (key) => memory.pictures.get(key) ?? act("pictures", "readonly", (store) => store.get(key)).catch(() => undefined),
  put: (picture) => put("pictures", picture.key, { ...picture, when: Date.now() }),
};

export const history = {
  /** Entries, the newest first. */
  all: async () => (await all("history")).sort((a, b) => b.when - a.when),
  /** Keeps an entry; the oldest go, and with them the pictures that no entry names any more. */
  async add(entry) {
    await put("history", entry.link, entry);
    const entries = await history.all();
    await Promise.all(entries.slice(KEPT).map((old) => drop("history", old.link)));
    await tidy(entries.slice(0, KEPT));
  },
  async clear() {
    await Promise.all((await history.all()).map((entry) => drop("history", entry.link)));
  },
};

async function tidy(entries) {
  const named = new Set(entries.map((entry) => entry.picture));
  const old = (await all("pictures")).filter((one) => !named.has(one.key) && Date.now() - one.when > 3_600_000);
  await Promise.all(old.map((one) => drop("pictures", one.key)));
}
