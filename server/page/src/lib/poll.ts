/** Repeats a request while somebody looks. */

import { untrack } from "svelte";

/**
 * Do `work` now and again `seconds` after it has ended, until the returned function is called. While the page is
 * hidden nothing is done. `work` gets a signal that is aborted at the end, and handles its own errors. An effect that
 * polls does not depend on what `work` reads: otherwise what it fetched would start it anew.
 */
export function poll(seconds: number, work: (signal: AbortSignal) => Promise<void>): () => void {
  const ended = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const round = async () => {
    if (!document.hidden) await work(ended.signal);
    if (!ended.signal.aborted) timer = setTimeout(round, seconds * 1000);
  };
  untrack(() => void round());
  return () => {
    ended.abort();
    clearTimeout(timer);
  };
}
