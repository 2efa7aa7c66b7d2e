import { expect, test } from "vitest";
import { namesIn, overSteps, settingRows, valueText } from "./compare";

test("curves of different steps share an axis", () => {
  const curves = overSteps([
    ["a", [[1, 5], [10, 3]]],
    ["b", [[2, 6], [10, 2]]],
    ["none", []],
  ]); // prettier-ignore
  expect(curves).toEqual({
    x: [1, 2, 10],
    lines: [
      { label: "a", values: [5, null, 3] },
      { label: "b", values: [null, 6, 2] },
      { label: "none", values: [null, null, null] },
    ],
  });
});

test("a step that a resumed run went through twice has its last value", () => {
  expect(overSteps([["a", [[1, 5], [2, 4], [2, 3]]]])).toEqual({ x: [1, 2], lines: [{ label: "a", values: [5, 3] }] }); // prettier-ignore
});

test("settings that differ come first", () => {
  expect(
    settingRows([{ r: 16, epochs: 3, seed: 0 }, { r: 8, epochs: 3, packing: true, seed: 0 }, null]),
  ).toEqual([
    { name: "epochs", values: ["3", "3", "–"], differs: true },
    { name: "packing", values: ["–", "yes", "–"], differs: true },
    { name: "r", values: ["16", "8", "–"], differs: true },
    { name: "seed", values: ["0", "0", "–"], differs: true },
  ]);
  expect(
    settingRows([
      { r: 16, seed: 0 },
      { r: 8, seed: 0 },
    ]).map((row) => [row.name, row.differs]),
  ).toEqual([
    ["r", true],
    ["seed", false],
  ]);
});

test("values as texts", () => {
  expect([null, undefined, true, false, 0.001, "cosine", ["q", 1], { a: 1 }].map(valueText)).toEqual([
    "–", "–", "yes", "no", "0.001", "cosine", "q, 1", '{"a":1}',
  ]); // prettier-ignore
});

test("an address names up to four runs, each once", () => {
  expect(namesIn(new URLSearchParams("compare=a,b/c,a,,d,e,f"))).toEqual(["a", "b/c", "d", "e"]);
  expect(namesIn(new URLSearchParams(""))).toEqual([]);
});
