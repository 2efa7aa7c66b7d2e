import { expect, test } from "vitest";
import type { Evaluation, Run } from "./run";
import { dataWords, judgement, loss, progressOf, scoreRows, secondsLeft, stateOf } from "./words";

const RUN: Run = {
  id: "legal",
  state: "running",
  judging: false,
  base: "tiny",
  step: 100,
  steps: 400,
  loss: 1.2345,
  best_evaluation: null,
  started: 1000,
  ended: null,
  updated: 1050,
  passed: null,
  reason: null,
};
const NONE = { loss: null, exact_match: null, stop_share: null, json_validity: null, json_equality: null };
const JUDGED: Evaluation = {
  rows: 20,
  answered: 18,
  general: 12,
  base: { ...NONE, loss: 2, exact_match: 0.05, stop_share: 1 },
  adapter: { ...NONE, loss: 0.5, exact_match: 0.85, stop_share: 1 },
  divergence: 0.0213,
  failures: [],
  passed: true,
};

test.each([
  [{}, "running", "accent"],
  [{ judging: true }, "being judged", "accent"],
  [{ state: "interrupted" }, "interrupted", "warn"],
  [{ state: "failed", passed: true }, "failed", "bad"],
  [{ state: "finished", passed: true }, "passed", "good"],
  [{ state: "finished", passed: false }, "refused by the gate", "bad"],
  [{ state: "finished" }, "finished, not judged", "plain"],
] as [Partial<Run>, string, string][])("the state of %o", (change, word, kind) => {
  expect(stateOf({ ...RUN, ...change })).toEqual({ word, kind });
});

test("progress has the time that is left, while that is known", () => {
  const first = { ...RUN, step: 50, updated: 1025 };
  expect(progressOf(RUN, first)).toBe("100 of 400 steps, about 2 min 30 s left");
  expect(progressOf(RUN)).toBe("100 of 400 steps");
  expect(progressOf({ ...RUN, steps: null }, first)).toBe("100 steps");
  expect(progressOf({ ...RUN, state: "finished" }, first)).toBe("100 of 400 steps");
  expect(secondsLeft({ ...RUN, judging: true }, first)).toBeNull();
  expect(secondsLeft(RUN, { ...first, updated: 1046 })).toBeNull();
  expect(secondsLeft(RUN, RUN)).toBeNull();
  expect(secondsLeft({ ...RUN, step: 40 }, first)).toBeNull(); // resumed from an earlier checkpoint
});

test("losses have three digits", () => {
  expect([0, 0.012345, 1.2345, 12.345, 123.4, null, undefined].map(loss)).toEqual(["0", "0.0123", "1.23", "12.3", "123", "–", "–"]); // prettier-ignore
});

test("the judgement in sentences", () => {
  expect(judgement(JUDGED)).toEqual([
    "On 20 rows that it had not seen, the adapter's loss per token is 0.5: 75% lower than the base's 2.",
    "Of 18 answers 85% match exactly, and 5.0% of the base's.",
    "On 12 general prompts it differs from the base by 0.0213 nats per token.",
  ]);
  expect(judgement({ ...JUDGED, adapter: { ...NONE, loss: 3 }, divergence: null })).toEqual([
    "On 20 rows that it had not seen, the adapter's loss per token is 3: 50% higher than the base's 2.",
  ]);
  expect(judgement({ ...JUDGED, rows: 0, answered: 0, general: 0, base: NONE, adapter: NONE })).toEqual([
    "No row was held out, so nothing was measured of what the adapter learned.",
  ]);
});

test("scores that were measured, with what the gate asks for", () => {
  expect(scoreRows(JUDGED, { max_loss_ratio: 0.9, min_exact_match: 0.8, max_divergence: null, min_json_validity: 0.5 })).toEqual([
    { label: "loss per token", base: "2", adapter: "0.5", gate: "at most 1.8" },
    { label: "answers that match exactly", base: "5.0%", adapter: "85%", gate: "at least 80%" },
    { label: "answers that end by themselves", base: "100%", adapter: "100%", gate: "" },
    { label: "divergence from the base", base: "–", adapter: "0.0213", gate: "" },
  ]); // prettier-ignore
  expect(scoreRows(JUDGED, null).map((row) => row.gate)).toEqual(["", "", "", ""]);
});

test("data in sentences, as far as it is known", () => {
  const left_out = { duplicates: 3, too_long: 1, invalid: 0 };
  expect(dataWords({ train: 180, evaluation: 20, mixed: 30, tokens: 9000, trained_tokens: 3000, longest: 120, max_length: 2048, truncated: 2, left_out })).toEqual([
    "180 rows to train on, 20 held out, 30 general ones mixed in.",
    "9,000 tokens, of which 3,000 (33%) are learned.",
    "The longest row has 120 tokens of at most 2,048.",
    "2 rows were cut off.",
    "Left out: 3 duplicates, 1 too long.",
  ]); // prettier-ignore
  expect(dataWords({ train: 1 })).toEqual(["1 row to train on."]);
  expect(dataWords({})).toEqual([]);
});
