import { expect, test } from "vitest";
import { levelOf, likely, linesOf, visible } from "./likely";

test("steps of probability", () => {
  expect([1, 0.9, 0.89, 0.6, 0.59, 0.31, 0.29, 0].map((share) => levelOf(Math.log(share)))).toEqual([
    0, 0, 1, 1, 2, 2, 3, 3,
  ]);
});

test("probabilities in words", () => {
  expect([1, 0.5, 0.031, 0.0009, 0].map((share) => likely(Math.log(share)))).toEqual([
    "100%",
    "50%",
    "3.1%",
    "<0.1%",
    "<0.1%",
  ]);
});

test("what has no shape is seen", () => {
  expect(visible(' a"\n\\\u202e\u0000\u200b')).toBe('␣a"\\n\\\\\\u{202e}\\u0000\\u{200b}');
});

test("tokens by line: a line ends after a token that ends in a new line", () => {
  const tokens = ["a", " b\n", "\n\n", "c\nd", "e"].map((text) => ({ text, logprob: -1, top: [] }));
  expect(linesOf(tokens).map(({ start, tokens: its }) => [start, its.map(({ text }) => text)])).toEqual([
    [0, ["a", " b\n"]],
    [2, ["\n\n"]],
    [3, ["c\nd", "e"]],
  ]);
  expect(linesOf([])).toEqual([]);
});
