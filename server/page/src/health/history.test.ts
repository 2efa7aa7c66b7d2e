import { expect, test } from "vitest";
import { GAP, History, LATELY, SHOWN, WINDOW } from "./history";
import { parseScrape } from "../lib/scrape";

function look(at: number, tokens: number, start = 1) {
  return parseScrape(`tokens_total ${tokens}\nprocess_start_time_seconds ${start}`, at);
}

function history() {
  return new History([{ key: "tokens", of: (change) => change.rate("tokens_total") }]);
}

test("a point is the rate of the last ten seconds, or of what there is of them", () => {
  const seen = history();
  for (const [at, tokens] of [[0, 0], [2, 10], [4, 20], [10, 50], [12, 100]] as const) seen.add(look(at, tokens)); // prettier-ignore
  expect(seen.points.times).toEqual([0, 2, 4, 10, 12]);
  expect(seen.points.values.get("tokens")).toEqual([null, 5, 5, 5, 9]);
  expect(seen.lately?.seconds).toBe(12);
});

test("a restart of the server is a gap, and what came before it is forgotten", () => {
  const seen = history();
  seen.add(look(0, 1000));
  seen.add(look(2, 1010));
  seen.add(look(4, 2000, 2)); // more than before, so that the counter alone does not tell
  expect(seen.lately).toBeNull();
  seen.add(look(6, 2008, 2));
  expect(seen.points.values.get("tokens")).toEqual([null, 5, null, 4]);
});

test("so is a while in which nobody looked", () => {
  const seen = history();
  seen.add(look(0, 0));
  seen.add(look(2, 10));
  seen.add(look(2 + GAP + 1, 500));
  expect(seen.points.values.get("tokens")).toEqual([null, 5, null]);
});

test("ten minutes are kept, and looks of one", () => {
  const seen = history();
  for (let at = 0; at <= SHOWN + 60; at += 2) seen.add(look(at, at * 3));
  const { times, values } = seen.points;
  expect([times[0], times.at(-1), times.length]).toEqual([60, SHOWN + 60, SHOWN / 2 + 1]);
  expect(values.get("tokens")).toHaveLength(times.length);
  expect(seen.lately?.seconds).toBe(LATELY);
  expect(WINDOW).toBeLessThan(LATELY);
});
