/** Repeats a request while somebody looks. */

import { untrack } from "svelte";

/**
 * Do `work` now and again `seconds` after it has ended, until the returned function is called. While the page is
 * hidden nothing is done; who comes back to it sees at once what is so now. `work` gets a signal that is aborted at the
 * end, and handles its own errors. An effect that polls does not depend on what `work` reads: otherwise what it fetched
 * would start it anew.
 */
export function poll(
  seconds: number | (() => number),
  work: (signal: AbortSignal) => Promise<void>,
): () => void {
  const ended = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  let working = false;
  let again = false;
  const round = async () => {
    clearTimeout(timer);
    again = working; // what is being asked may be answered with what was so before
    if (working) return;
    working = true;
    if (!document.hidden) await work(ended.signal);
    working = false;
    if (ended.signal.aborted) return;
    const pause = typeof seconds === "number" ? seconds : seconds();
    timer = setTimeout(round, again ? 0 : pause * 1000);
  };
  const seen = () => {
    if (!document.hidden) void round();
  };
  document.addEventListener("visibilitychange", seen);
  untrack(() => void round());
  return () => {
    ended.abort();
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", seen);
  };
}
