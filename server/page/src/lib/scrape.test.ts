import { expect, test } from "vitest";
import cases from "./change_cases.json";
import { Change, parseScrape } from "./scrape";

interface Case {
  case: string;
  seconds: number;
  before: string[];
  now: string[];
  rate?: Record<string, number | null>;
  rate_by?: Record<string, { label: string; rates: Record<string, number> }>;
  mean?: Record<string, number | null>;
  quantile?: Record<string, Record<string, number | null>>;
}

/** `tests/unit/adapters/cli/test_top.py` gives the terminal's twin the same cases. */
test.each(cases as unknown as Case[])("$case", ({ seconds, before, now, ...wanted }) => {
  const change = new Change(parseScrape(before.join("\n"), 100), parseScrape(now.join("\n"), 100 + seconds));
  for (const [name, rate] of Object.entries(wanted.rate ?? {})) close(change.rate(name), rate);
  for (const [name, { label, rates }] of Object.entries(wanted.rate_by ?? {})) {
    expect(Object.fromEntries(change.rateBy(name, label))).toEqual(rates);
  }
  for (const [name, mean] of Object.entries(wanted.mean ?? {})) close(change.mean(name), mean);
  for (const [name, shares] of Object.entries(wanted.quantile ?? {})) {
    for (const [share, value] of Object.entries(shares)) close(change.quantile(name, Number(share)), value);
  }
});

function close(got: number | null, wanted: number | null): void {
  if (wanted === null) expect(got).toBeNull();
  else expect(got).toBeCloseTo(wanted, 9);
}

test("values that are no plain numbers, and timestamps", () => {
  const scrape = parseScrape("a +Inf\nb -Inf\nc NaN\nd 1.5e+09 1700000000000\n\n# EOF\n", 0);
  expect(["a", "b", "c", "d"].map((name) => scrape.value(name))).toEqual([Infinity, -Infinity, NaN, 1.5e9]);
});

test.each(["<html>", "name", 'name{a="b} 1', "name{a=b} 1", "name one"])("%s is not Prometheus'", (line) => {
  expect(() => parseScrape(`up 1\n${line}\n`, 0)).toThrow(line);
});

test("series are told apart by some of their labels", () => {
  const scrape = parseScrape('x{a="1",b="1"} 1\nx{a="1",b="2"} 2\nx{a="2",b="1"} 4', 0);
  expect(scrape.value("x", { a: "1" })).toBe(3);
  expect(scrape.value("x", { a: "3" })).toBe(0);
  expect(scrape.value("y")).toBeNull();
  expect(scrape.by("x", "a", (labels) => labels["b"] === "1")).toEqual(
    new Map([
      ["1", 1],
      ["2", 4],
    ]),
  );
});

test("a quantile of the series with a label", () => {
  const buckets = (alias: string, first: number) =>
    `x_bucket{alias="${alias}",le="1"} ${first}\nx_bucket{alias="${alias}",le="+Inf"} ${first}`;
  const change = new Change(parseScrape("", 0), parseScrape(`${buckets("a", 4)}\n${buckets("b", 0)}`, 1));
  expect(change.quantile("x", 0.5, { alias: "a" })).toBe(0.5);
  expect(change.quantile("x", 0.5, { alias: "b" })).toBeNull();
});
