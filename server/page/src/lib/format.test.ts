import { expect, test } from "vitest";
import { ago, bytes, duration, percent } from "./format";

test("bytes", () => {
  expect([0, 1023, 1536, 10 * 2 ** 20, 3 * 2 ** 40].map(bytes)).toEqual([
    "0 B",
    "1023 B",
    "1.5 KiB",
    "10 MiB",
    "3.0 TiB",
  ]);
});

test("durations", () => {
  expect([0.012, 3.42, 42, 125, 11040].map(duration)).toEqual([
    "12 ms",
    "3.4 s",
    "42 s",
    "2 min 5 s",
    "3 h 4 min",
  ]);
});

test("a minute is not 60 seconds after whole minutes", () => {
  expect(duration(119.7)).toBe("2 min 0 s");
});

test("times ago", () => {
  expect([999, 700, -6000, -200000].map((unix) => ago(unix, 1000))).toEqual([
    "just now",
    "5 min ago",
    "1 h ago",
    "2 d ago",
  ]);
});

test("percentages", () => {
  expect([0, 0.031, 0.5, 1].map(percent)).toEqual(["0%", "3.1%", "50%", "100%"]);
});
