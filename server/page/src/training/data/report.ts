/** What `POST /v1/training/data` says of a file. */

import { bytes, count, percent } from "../../lib/format";

export interface Report {
  files: { file: string; format: string; rows: number; kept: number; unused_fields: string[] }[];
  rows: number;
  train: number;
  evaluation: number;
  tokens: number;
  trained_tokens: number;
  trained_share: number;
  longest: number;
  max_length: number;
  truncated: number;
  left_out: Record<string, number>;
  bad: string[];
  histogram: { from: number; to: number; rows: number }[];
  advice: string[];
}

/** A row as the model sees it. */
export interface SeenRow {
  source: string;
  tokens: number;
  trained: number;
  spans: { text: string; trained: boolean }[];
}

export interface TrainingData {
  report: Report;
  rows: SeenRow[];
}

export const FORMATS = ["auto", "alpaca", "sharegpt", "chat", "completion", "text"] as const;
export type Format = (typeof FORMATS)[number];

/** Options of `manylora train` that change what is made of the data. */
export interface DataOptions {
  format: Format;
  /** Texts of fields; "" is the trainer's default. */
  maxLength: string;
  evalShare: string;
}

/** Return why a file is not sent at all; "" if it may be. `most`: the largest that the server reads. */
export function fileTrouble(file: { name: string; size: number }, most: number | undefined): string {
  if (!/\.(jsonl|json|csv|parquet)$/i.test(file.name)) {
    return `${file.name} is none of the kinds that can be read: JSONL, JSON, CSV and Parquet, by the name's ending.`;
  }
  return most !== undefined && file.size > most
    ? `${file.name} has ${bytes(file.size)}, and this server looks at files of up to ${bytes(most)}. \`manylora train --dry-run\` looks at larger ones.`
    : "";
}

/** Return the form that asks about a file. Rows: how many to look at. */
export function formOf(file: File, options: DataOptions, rows: number): FormData {
  const form = new FormData();
  form.set("file", file);
  form.set("format", options.format);
  form.set("rows", String(rows));
  if (options.maxLength) form.set("max_length", options.maxLength);
  if (options.evalShare) form.set("eval_share", options.evalShare);
  return form;
}

/** Return the facts of a report, each with a name. */
export function facts(report: Report): [string, string][] {
  const formats = [...new Set(report.files.map((file) => file.format))].join(", ");
  const unused = report.files.flatMap((file) => file.unused_fields);
  return [
    ["format", formats],
    ["rows", count(report.rows)],
    ["to train on", count(report.train)],
    ["held out", count(report.evaluation)],
    ["tokens", count(report.tokens)],
    ["learned", `${count(report.trained_tokens)} (${percent(report.trained_share)})`],
    ["longest row", `${count(report.longest)} of ${count(report.max_length)} tokens`],
    ...(unused.length ? [["fields that are not read", unused.join(", ")] as [string, string]] : []),
    ...(report.truncated ? [["cut off", count(report.truncated)] as [string, string]] : []),
  ];
}

/** A bar of the histogram: its share of the highest one. */
export interface Bar {
  label: string;
  rows: number;
  share: number;
}

export function bars(histogram: Report["histogram"]): Bar[] {
  const most = Math.max(...histogram.map((bin) => bin.rows), 1);
  return histogram.map(({ from, to, rows }) => ({
    label: from === to ? count(from) : `${count(from)}–${count(to)}`,
    rows,
    share: rows / most,
  }));
}

/** Tokens with a meaning of their own, as templates of common models write them. */
const SPECIAL = /(<\|[^<>|\n]*\|>|<\/?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[\/?INST\])/;

/** Return a text in pieces, of which some are special tokens. */
export function pieces(text: string): { text: string; special: boolean }[] {
  return text
    .split(SPECIAL)
    .map((piece, place) => ({ text: piece, special: place % 2 === 1 }))
    .filter((piece) => piece.text);
}
