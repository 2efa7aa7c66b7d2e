import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { poll } from "./poll";

const page = Object.assign(new EventTarget(), { hidden: false });

/** Hide the page, or let somebody come back to it. */
function hide(hidden: boolean): void {
  page.hidden = hidden;
  page.dispatchEvent(new Event("visibilitychange"));
}

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("document", page);
});

afterEach(() => {
  vi.useRealTimers();
  page.hidden = false;
});

test("it works now, after each pause, and no more after its end", async () => {
  let pause = 5;
  const work = vi.fn(() => Promise.resolve());
  const end = poll(() => pause, work);
  expect(work).toHaveBeenCalledTimes(1);
  await vi.advanceTimersByTimeAsync(5000);
  expect(work).toHaveBeenCalledTimes(2);
  pause = 20;
  await vi.advanceTimersByTimeAsync(5000);
  expect(work).toHaveBeenCalledTimes(3);
  await vi.advanceTimersByTimeAsync(19_000);
  expect(work).toHaveBeenCalledTimes(3);
  end();
  hide(false);
  await vi.advanceTimersByTimeAsync(60_000);
  expect(work).toHaveBeenCalledTimes(3);
});

test("nothing is asked while the page is hidden, and at once when somebody comes back", async () => {
  const work = vi.fn(() => Promise.resolve());
  const end = poll(5, work);
  await vi.advanceTimersByTimeAsync(1000);
  hide(true);
  await vi.advanceTimersByTimeAsync(60_000);
  expect(work).toHaveBeenCalledTimes(1);
  hide(false);
  expect(work).toHaveBeenCalledTimes(2);
  await vi.advanceTimersByTimeAsync(5000);
  expect(work).toHaveBeenCalledTimes(3);
  end();
});

test("what is being asked is asked again when somebody comes back meanwhile", async () => {
  let answer = (): void => undefined;
  const work = vi.fn(() => new Promise<void>((resolve) => (answer = resolve)));
  const end = poll(5, work);
  hide(false);
  expect(work).toHaveBeenCalledTimes(1);
  answer();
  await vi.advanceTimersByTimeAsync(0);
  expect(work).toHaveBeenCalledTimes(2);
  answer();
  await vi.advanceTimersByTimeAsync(4000);
  expect(work).toHaveBeenCalledTimes(2);
  end();
});
