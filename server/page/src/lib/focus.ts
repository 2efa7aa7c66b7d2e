/** Where the keyboard goes on when what had the focus has gone from the page. */

import { tick } from "svelte";

/**
 * Focus the first of these that is there once the page is drawn again, else the view. Without this the focus falls to
 * the page's body, and whoever uses the keyboard begins at its top. Does nothing if something has the focus.
 */
export async function refocus(...places: (() => Element | null | undefined)[]): Promise<void> {
  await tick();
  if (document.activeElement !== document.body) return;
  for (const place of [...places, () => document.getElementById("main")]) {
    const element = place();
    if (element instanceof HTMLElement && element.isConnected) element.focus();
    if (document.activeElement !== document.body) return;
  }
}
