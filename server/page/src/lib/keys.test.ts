import { expect, test } from "vitest";
import { commands } from "./keys";

test("g and a letter go to a view, within a moment", () => {
  let now = 0;
  const ask = commands(() => now);
  expect(ask("a")).toBeNull();
  expect(ask("g")).toBeNull();
  expect(ask("a")).toEqual({ go: "adapters" });
  ask("g");
  now = 2000;
  expect(ask("t")).toBeNull();
});

test("a letter that no view has ends the prefix", () => {
  const ask = commands();
  ask("g");
  expect(ask("x")).toBeNull();
  expect(ask("t")).toBeNull();
});

test("search and help", () => {
  const ask = commands();
  expect(ask("/")).toBe("search");
  expect(ask("?")).toBe("help");
});
