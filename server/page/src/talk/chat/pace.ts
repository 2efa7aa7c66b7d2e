/** Shows what changes often, but not more often than people see or the browser can draw. */

const EVERY_MS = 50;
/** Showing takes at most about this share of the time: the rest is for keys, clicks and scrolling. */
const SHARE = 0.25;

export interface Pace {
  /** Show it within a moment. */
  soon: () => void;
  /** Show it now. */
  now: () => void;
}

/** Tells how many milliseconds the browser took to draw what was just shown. */
export type Drawn = (then: (milliseconds: number) => void) => void;

/** Return when to call `show`: at most every 50 ms, and less often if that and drawing take long. */
export function paced(show: () => void, drawn: Drawn = drawnInFrame): Pace {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let next = -Infinity;
  const now = () => {
    clearTimeout(timer);
    timer = undefined;
    const begun = performance.now();
    show();
    const took = performance.now() - begun;
    next = begun + Math.max(EVERY_MS, took / SHARE);
    drawn((frame) => (next = Math.max(next, begun + (took + frame) / SHARE)));
  };
  const wait = () => setTimeout(due, Math.max(0, next - performance.now()));
  const due = () => {
    if (performance.now() < next) timer = wait();
    else now();
  };
  return { soon: () => (timer ??= wait()), now };
}

function drawnInFrame(then: (milliseconds: number) => void): void {
  if (document.hidden) return; // nothing is drawn
  requestAnimationFrame(() => {
    const begun = performance.now();
    setTimeout(() => then(performance.now() - begun));
  });
}
