/** What the browser keeps. A browser that keeps nothing for this page (a setting) throws at each access. */

export type Area = "localStorage" | "sessionStorage";

/** Return an area of the browser's storage; null if the browser keeps nothing for this page. */
export function areaOf(area: Area): Storage | null {
  try {
    return globalThis[area];
  } catch {
    return null;
  }
}

/** Return what is kept under a key; null if it is nothing. */
export function kept(area: Area, key: string): string | null {
  try {
    return globalThis[area].getItem(key);
  } catch {
    return null;
  }
}

/** Keep a value under a key, or forget it (null), if the browser lets us. */
export function keep(area: Area, key: string, value: string | null): void {
  try {
    if (value === null) globalThis[area].removeItem(key);
    else globalThis[area].setItem(key, value);
  } catch {
    // It lasts until the page is left.
  }
}

/** Forget all values. */
export function clear(area: Area): void {
  try {
    globalThis[area].clear();
  } catch {
    // A browser that does not let us has kept nothing.
  }
}
