import { expect, test } from "vitest";
import { bars, facts, fileTrouble, formOf, pieces, type Report } from "./report";

const REPORT: Report = {
  files: [{ file: "rows.jsonl", format: "chat", rows: 1203, kept: 1200, unused_fields: [] }],
  rows: 1203,
  train: 1080,
  evaluation: 120,
  tokens: 90000,
  trained_tokens: 30000,
  trained_share: 1 / 3,
  longest: 120,
  max_length: 2048,
  truncated: 0,
  left_out: { duplicates: 3 },
  bad: [],
  histogram: [],
  advice: [],
};

test("facts of a report", () => {
  expect(facts(REPORT)).toEqual([
    ["format", "chat"],
    ["rows", "1,203"],
    ["to train on", "1,080"],
    ["held out", "120"],
    ["tokens", "90,000"],
    ["learned", "30,000 (33%)"],
    ["longest row", "120 of 2,048 tokens"],
  ]);
  expect(facts({ ...REPORT, truncated: 2 }).at(-1)).toEqual(["cut off", "2"]);
  const files = [{ ...REPORT.files[0]!, unused_fields: ["id", "source"] }];
  expect(facts({ ...REPORT, files }).at(-1)).toEqual(["fields that are not read", "id, source"]);
});

test("bars are shares of the highest", () => {
  expect(bars([{ from: 10, to: 24, rows: 40 }, { from: 25, to: 1039, rows: 10 }, { from: 2000, to: 2000, rows: 0 }])).toEqual([
    { label: "10–24", rows: 40, share: 1 },
    { label: "25–1,039", rows: 10, share: 0.25 },
    { label: "2,000", rows: 0, share: 0 },
  ]); // prettier-ignore
  expect(bars([{ from: 0, to: 1, rows: 0 }])[0]?.share).toBe(0);
});

test("special tokens are told from text", () => {
  expect(pieces("<|im_start|>user\n2 < 3 | 4 > 1<|im_end|></s>")).toEqual([
    { text: "<|im_start|>", special: true },
    { text: "user\n2 < 3 | 4 > 1", special: false },
    { text: "<|im_end|>", special: true },
    { text: "</s>", special: true },
  ]);
  expect(pieces("")).toEqual([]);
});

test("fields that are left empty are not sent", () => {
  const file = new File(["{}"], "rows.jsonl");
  const form = formOf(file, { format: "chat", maxLength: "", evalShare: "0.2" }, 5);
  expect([...form.keys()]).toEqual(["file", "format", "rows", "eval_share"]);
  expect(form.get("eval_share")).toBe("0.2");
  expect(formOf(file, { format: "auto", maxLength: "512", evalShare: "" }, 5).get("max_length")).toBe("512");
});

test("files that the server would refuse are not sent", () => {
  expect(fileTrouble({ name: "rows.JSONL", size: 10 }, 10)).toBe("");
  expect(fileTrouble({ name: "rows.csv", size: 10 }, undefined)).toBe("");
  expect(fileTrouble({ name: "rows.xlsx", size: 10 }, 10)).toContain("rows.xlsx is none of the kinds");
  expect(fileTrouble({ name: "rows.csv", size: 2 ** 26 + 2 ** 20 }, 2 ** 26)).toContain(
    "65 MiB, and this server looks at files of up to 64 MiB",
  );
});
