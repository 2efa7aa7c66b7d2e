/** Comparisons that this browser keeps, in IndexedDB: they outgrow what localStorage may hold. */

import { comparisonOf, type Comparison } from "./comparison";

const NAME = "manylora.comparisons";
const STORE = "comparisons";
let opened: Promise<IDBDatabase> | undefined;

/** What is kept is not what the page began with: another tab has changed the comparison, or forgotten it. */
export class Overtaken extends Error {}

/** What is kept under an id cannot be read as a comparison. */
export class Unreadable extends Error {
  constructor() {
    super("what it keeps under this address is no comparison: another version of the page may have kept it");
  }
}

/** Return all comparisons, the latest first, and the ids of what else is kept and cannot be read. */
export async function comparisons(): Promise<{ list: Comparison[]; unreadable: string[] }> {
  const all = await asked("readonly", (store) => store.getAll() as IDBRequest<{ id: string }[]>);
  const list = all.map(comparisonOf).filter((one) => one !== null);
  const unreadable = all.filter((one) => comparisonOf(one) === null).map(({ id }) => id);
  return { list: list.sort((one, other) => other.created - one.created), unreadable };
}

/** Return how many are kept, those that cannot be read too. */
export async function countKept(): Promise<number> {
  return asked("readonly", (store) => store.count());
}

/** Return a comparison; undefined if this browser has none of that id. Throws Unreadable. */
export async function load(id: string): Promise<Comparison | undefined> {
  const found = await asked("readonly", (store) => store.get(id) as IDBRequest<unknown>);
  if (found === undefined) return undefined;
  const comparison = comparisonOf(found);
  if (!comparison) throw new Unreadable();
  return comparison;
}

/**
 * Keep a comparison as it is now, and count its revision up. Resolves when it is stored: a reload then finds it. Throws
 * Overtaken if what is kept is another revision than the one that it was made of.
 */
export async function save(comparison: Comparison): Promise<void> {
  const { revision } = comparison;
  const kept = { ...comparison, revision: revision + 1 };
  let overtaken = false;
  try {
    await asked("readwrite", (store) => {
      const before = store.get(comparison.id) as IDBRequest<Partial<Comparison> | undefined>;
      before.onsuccess = () => {
        overtaken = (before.result?.revision ?? 0) !== revision;
        if (overtaken) store.transaction.abort();
        else store.put(kept);
      };
      return before;
    });
  } catch (error) {
    throw overtaken ? new Overtaken() : error;
  }
  comparison.revision = kept.revision;
}

export async function forget(...ids: string[]): Promise<void> {
  for (const id of ids) await asked("readwrite", (store) => store.delete(id));
}

/** Forget all of them. */
export async function clear(): Promise<void> {
  await asked("readwrite", (store) => store.clear());
}

/** Do something in a transaction; return its result when the whole transaction is stored. */
async function asked<T>(mode: IDBTransactionMode, ask: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const transaction = (await database()).transaction(STORE, mode);
  return new Promise((resolve, reject) => {
    const failed = () => reject(transaction.error ?? new Error("the browser keeps nothing"));
    transaction.onabort = failed; // also of an error: what no room is left for fails at the end only
    const request = ask(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
  });
}

/** Return the database. It is opened again after it could not be, or was closed by the browser. */
function database(): Promise<IDBDatabase> {
  const again = () => (opened = undefined);
  opened ??= new Promise<IDBDatabase>((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onerror = () => reject(request.error ?? new Error("the browser keeps nothing"));
    request.onsuccess = () => {
      request.result.onclose = again;
      request.result.onversionchange = () => (request.result.close(), again());
      resolve(request.result);
    };
  });
  opened.catch(again);
  return opened;
}
