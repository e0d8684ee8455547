// The gallery's memory: IndexedDB, bounded; where a browser gives none, the pictures last as long as the page.

const NAME = 'trt-serve';
const PICTURES = 'pictures';
export const MOST = 120;
const MOST_BYTES = 256 * 2 ** 20;

let opening = null;

function open() {
  opening ??= new Promise((resolve) => {
    try {
      const asked = indexedDB.open(NAME, 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore(PICTURES, { keyPath: 'id' });
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => resolve(null);
      asked.onblocked = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opening;
}

async function use(mode, act) {
  const database = await open();
  if (!database) return null;
  return new Promise((resolve, reject) => {
    const work = database.transaction(PICTURES, mode);
    const asked = act(work.objectStore(PICTURES));
    work.oncomplete = () => resolve(asked.result);
    work.onabort = () => reject(work.error);
  });
}

export const isKept = async () => (await open()) !== null;

/** Return all pictures, the newest first. */
export async function all() {
  return ((await use('readonly', (store) => store.getAll())) ?? []).sort((a, b) => (a.id < b.id ? 1 : -1));
}

export const put = (item) => use('readwrite', (store) => store.put(item));
export const remove = (id) => use('readwrite', (store) => store.delete(id));
export const clear = () => use('readwrite', (store) => store.clear());

/** Return those of `items`, the newest first, that are too many or too large to keep. */
export function tooMany(items) {
  let bytes = 0;
  return items.filter((item, number) => {
    bytes += item.blob.size + (item.start?.size ?? 0);
    return number > 0 && (number >= MOST || bytes > MOST_BYTES);
  });
}
