/** Comparisons that this browser keeps, in IndexedDB: they outgrow what localStorage may hold. */

import type { Comparison } from "./comparison";

const NAME = "manylora.comparisons";
const STORE = "comparisons";
let opened: Promise<IDBDatabase> | undefined;

/** Return all comparisons, the latest first. */
export async function comparisons(): Promise<Comparison[]> {
  const all = await asked((store) => store.getAll() as IDBRequest<Comparison[]>, "readonly");
  return all.sort((one, other) => other.created - one.created);
}

/** Return a comparison; undefined if this browser has none of that id. */
export async function load(id: string): Promise<Comparison | undefined> {
  return asked((store) => store.get(id) as IDBRequest<Comparison | undefined>, "readonly");
}

/** Keep a comparison as it is now. */
export async function save(comparison: Comparison): Promise<void> {
  await asked((store) => store.put(comparison), "readwrite");
}

export async function forget(id: string): Promise<void> {
  await asked((store) => store.delete(id), "readwrite");
}

/** Forget all of them. */
export async function clear(): Promise<void> {
  await asked((store) => store.clear(), "readwrite");
}

async function asked<T>(ask: (store: IDBObjectStore) => IDBRequest<T>, mode: IDBTransactionMode): Promise<T> {
  opened ??= open();
  return answered(ask((await opened).transaction(STORE, mode).objectStore(STORE)));
}

function open(): Promise<IDBDatabase> {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return answered(request);
}

function answered<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("the browser keeps nothing"));
  });
}
