import { expect, it } from "vitest";
import { byVersion, lastDays, noonOf, requestsByName, type UsageRow } from "./usage";

function row(day: string, adapter: string, requests: number): UsageRow {
  return {
    id: `${day}/${adapter}`,
    day,
    adapter,
    requests,
    prompt_tokens: 10 * requests,
    output_tokens: requests,
  };
}

const rows = [
  row("2026-11-28", "acme/legal@1", 2),
  row("2026-11-30", "acme/legal@1", 1),
  row("2026-11-30", "acme/legal@2", 7),
  row("2026-11-30", "acme/legal@2+german@1", 1),
  row("2026-11-30", "", 5),
];

it("lists days in UTC, the latest last", () => {
  expect(lastDays(3, Date.UTC(2026, 11, 1, 0, 30))).toEqual(["2026-11-29", "2026-11-30", "2026-12-01"]);
  expect(noonOf("2026-11-30")).toBe(Date.UTC(2026, 10, 30, 12) / 1000);
});

it("sums requests by name, those of mixes for each of their adapters", () => {
  expect(requestsByName(rows)).toEqual(new Map([["acme/legal", 11], ["german", 1], ["", 5]])); // prettier-ignore
});

it("draws a line for each version, with 0 on days without use", () => {
  const days = ["2026-11-28", "2026-11-29", "2026-11-30"];
  expect(byVersion(rows, "acme/legal", days, "requests")).toEqual([
    { label: "@2", values: [0, 0, 8] },
    { label: "@1", values: [2, 0, 1] },
  ]);
  expect(byVersion(rows, "acme/legal", days, "prompt_tokens")[1]!.values).toEqual([20, 0, 10]);
  expect(byVersion(rows, "acme", days, "requests")).toEqual([]);
});
