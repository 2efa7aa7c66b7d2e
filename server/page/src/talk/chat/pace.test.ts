import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { paced, type Drawn } from "./pace";

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

/** Return what was shown of a value that changes every 5 ms, 200 times, with the time. */
function shown(takes: number, drawn: Drawn): [number, number][] {
  let value = 0;
  const seen: [number, number][] = [];
  const { soon } = paced(() => {
    seen.push([performance.now(), value]);
    vi.setSystemTime(Date.now() + takes);
    vi.advanceTimersByTime(takes);
  }, drawn);
  while (value < 200) {
    value++;
    soon();
    vi.advanceTimersByTime(5);
  }
  vi.advanceTimersByTime(1000);
  return seen;
}

test("what changes often is shown at most every 50 ms, and the last change is", () => {
  const seen = shown(0, () => undefined);
  expect(seen.length).toBeGreaterThan(15);
  for (const [place, [at]] of seen.entries())
    if (place) expect(at - seen[place - 1]![0]).toBeGreaterThanOrEqual(50);
  expect(seen.at(-1)![1]).toBe(200);
});

test("what takes long to draw is shown less often", () => {
  const seen = shown(0, (then) => setTimeout(() => then(50), 10));
  for (const [place, [at]] of seen.entries())
    if (place) expect(at - seen[place - 1]![0]).toBeGreaterThanOrEqual(200);
  expect(seen.at(-1)![1]).toBe(200);
});

test("what takes long to make is shown less often", () => {
  const seen = shown(100, () => undefined);
  for (const [place, [at]] of seen.entries())
    if (place) expect(at - seen[place - 1]![0]).toBeGreaterThanOrEqual(400);
});
