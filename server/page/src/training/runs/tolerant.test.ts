import { expect, it } from "vitest";
import type { RunDetails } from "./run";
import { tolerant } from "./tolerant";
import { dataWords, judgement, scoreRows } from "./words";

const RUN = {
  id: "legal",
  data: { train: 3, tokens: "90", left_out: { duplicate: "2", bad: 1 }, files: [null, { file: "a.jsonl", rows: "3" }] },
  samples: [null, { source: "a:1", wanted: 4, base: "x" }, { source: "a:1", messages: [null, { role: "user", content: 1 }] }],
  evaluation: { rows: 20, answered: "18", base: { loss: "2" }, adapter: null, divergence: "0.1", failures: ["a", "a", 1, null] },
} as unknown as RunDetails; // prettier-ignore

it("takes values of another kind for values that were not written", () => {
  const { data, samples, evaluation } = tolerant(RUN);
  expect(dataWords(data!)).toEqual(["3 rows to train on.", "Left out: 1 bad."]);
  expect(data!.files).toEqual([{ file: "a.jsonl", format: "", rows: 0 }]);
  expect(samples).toEqual([
    { source: "a:1", messages: [], prompt: null, wanted: "4", base: "x", adapter: "" },
    { source: "a:1", messages: [{ role: "user", content: null }], prompt: null, wanted: "", base: "", adapter: "" }, // prettier-ignore
  ]);
  expect(evaluation).toMatchObject({ rows: 20, answered: 0, failures: ["a", "a"], passed: false });
  expect(judgement(evaluation!)).toEqual([]);
  expect(scoreRows(evaluation!, { max_loss_ratio: "1" })).toEqual([]);
});

it("leaves out what is no list and no object at all", () => {
  const odd = { ...RUN, data: null, samples: "x", evaluation: { failures: "no" } } as unknown as RunDetails;
  expect(tolerant(odd)).toMatchObject({ data: null, samples: [], evaluation: { failures: [] } });
});

it("leaves good records as they are", () => {
  const scores = { loss: 1, exact_match: 0.5, stop_share: 1, json_validity: null, json_equality: null };
  const good = {
    ...RUN,
    data: { train: 3, left_out: { bad: 1 }, files: [{ file: "a", format: "chat", rows: 3 }] },
    samples: [{ source: "a", messages: [{ role: "user", content: "x" }], prompt: null, wanted: "y", base: "", adapter: "y" }], // prettier-ignore
    evaluation: { rows: 1, answered: 1, general: 0, base: scores, adapter: scores, divergence: null, failures: [], passed: true }, // prettier-ignore
  } as unknown as RunDetails;
  expect(tolerant(good)).toEqual(good);
});
