import { expect, it } from "vitest";
import { faultOf, promoted, sharesOf, withShare } from "./weights";

const targets = [
  { adapter: "a@1", weight: 3 },
  { adapter: "a@2", weight: 1 },
  { adapter: "b", weight: 2 },
];

it("shows weights as shares", () => {
  expect(sharesOf(targets)).toEqual([50, 16.7, 33.3]);
  expect(sharesOf([{ adapter: "a", weight: 0 }])).toEqual([0]);
});

it("sets one share, and leaves the proportions of the others", () => {
  expect(withShare(targets, 1, 60).map(({ weight }) => weight)).toEqual([24, 60, 16]);
  expect(withShare(targets.slice(0, 2), 1, 25).map(({ weight }) => weight)).toEqual([75, 25]);
  expect(withShare(promoted(targets, 0), 0, 40).map(({ weight }) => weight)).toEqual([40, 30, 30]);
});

it("promotes one, and keeps the others as targets", () => {
  expect(promoted(targets, 1).map(({ weight }) => weight)).toEqual([0, 100, 0]);
});

it("says what is wrong", () => {
  expect(faultOf(targets)).toBe("");
  expect(faultOf([])).not.toBe("");
  expect(faultOf([{ adapter: " ", weight: 1 }])).toContain("name");
  expect(faultOf([targets[0]!, { adapter: "a@1 ", weight: 1 }])).toContain("twice");
  expect(faultOf([{ adapter: "a", weight: 0 }])).toContain("above 0");
});
