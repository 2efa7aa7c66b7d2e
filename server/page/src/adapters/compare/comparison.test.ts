import { describe, expect, it } from "vitest";
import {
  asJsonLines,
  compare,
  comparisonOf,
  missing,
  next,
  tally,
  undo,
  vote,
  type Answer,
} from "./comparison";

const sampling = { system: "", temperature: 0, max_tokens: 8, seed: 1 };
const answer = (text: string, served = "a@1"): Answer => ({ text, served, tokens: 1 });

function started(random = Math.random) {
  const prompts = ["one", "two", "three"].map((content) => [{ role: "user", content }]);
  return compare(["a@1", "b@2"], prompts, sampling, random);
}

describe("a comparison", () => {
  it("asks both for each prompt, and again for what failed", () => {
    const comparison = started();
    expect(missing(comparison)).toHaveLength(6);
    comparison.pairs[1]!.answers = [answer("x"), { ...answer(""), error: "too long" }];
    expect(missing(comparison)).toContainEqual([1, 1]);
    expect(missing(comparison)).toHaveLength(5);
    expect(next(comparison)).toBeNull();
  });

  it("counts a vote for the target, on whichever side it stands", () => {
    const sides = [0.9, 0.1, 0.9, 0.1][Symbol.iterator]();
    const comparison = started(() => sides.next().value ?? 0.9);
    for (const pair of comparison.pairs) pair.answers = [answer("x"), answer("y", "b@2")];
    expect(new Set(comparison.pairs.map((pair) => pair.left)).size).toBe(2);
    for (const [place, pair] of comparison.pairs.entries()) {
      expect(next(comparison)).toBe(place);
      vote(comparison, place, pair.left === 1 ? "left" : "right");
    }
    expect(next(comparison)).toBeNull();
    expect(tally(comparison).wins).toEqual([0, 3]);
  });

  it("takes votes back, the last first", () => {
    const comparison = started();
    for (const pair of comparison.pairs) pair.answers = [answer("x"), answer("y")];
    vote(comparison, 0, "tie");
    vote(comparison, 1, "left");
    expect(undo(comparison)).toBe(1);
    expect(next(comparison)).toBe(1);
    expect(tally(comparison)).toMatchObject({ ties: 1, same: 0 });
    expect(undo(comparison)).toBe(0);
    expect(undo(comparison)).toBeNull();
  });

  it("does not ask about equal answers: they are ties", () => {
    const comparison = started();
    comparison.pairs[0]!.answers = [answer("x"), answer("x")];
    comparison.pairs[1]!.answers = [answer("x"), answer("y")];
    expect(next(comparison)).toBe(1);
    expect(tally(comparison)).toMatchObject({ wins: [0, 0], ties: 1, same: 1 });
  });

  it("is a line of JSON for each prompt", () => {
    const comparison = started();
    comparison.pairs[0]!.answers = [answer("x"), answer("y", "b@2")];
    vote(comparison, 0, "tie");
    const lines = asJsonLines(comparison).trimEnd().split("\n");
    expect(lines).toHaveLength(3);
    expect(JSON.parse(lines[0]!)).toMatchObject({ a: { target: "a@1", text: "x" }, vote: "tie" });
    expect(JSON.parse(lines[1]!)).toMatchObject({ b: { target: "b@2" }, vote: null });
  });

  it("is read as it was kept, also by a version that counted no revisions", () => {
    const comparison = started();
    comparison.pairs[0]!.answers = [answer("x"), { ...answer(""), error: "too long" }];
    vote(comparison, 0, "tie");
    const { revision: _, ...before } = structuredClone(comparison);
    expect(comparisonOf(before)).toEqual({ ...before, revision: 0 });
    expect(comparisonOf({ ...before, revision: 3 })).toEqual({ ...before, revision: 3 });
  });

  it.each([
    ["nothing", () => null],
    ["a text", () => "x"],
    ["no pairs", (good: object) => ({ ...good, pairs: undefined })],
    ["pairs of another shape", (good: object) => ({ ...good, pairs: [{ prompt: "Hi" }] })],
    ["three targets", (good: object) => ({ ...good, targets: ["a", "b", "c"] })],
    ["votes for no pair", (good: object) => ({ ...good, order: [7] })],
    ["no sampling", (good: object) => ({ ...good, sampling: null })],
  ])("is no comparison: %s", (_, odd: (good: object) => unknown) => {
    expect(comparisonOf(odd(started()))).toBeNull();
  });
});
