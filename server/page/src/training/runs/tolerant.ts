/**
 * Makes a run's records what their types say. The server passes on what lies in a run's folder, which another program
 * may have written: a value of another kind counts as one that was not written.
 */

import { isObject } from "../../lib/shapes";
import type { Evaluation, RunData, RunDetails, Sample, Scores } from "./run";

type Fields = Record<string, unknown>;

/** Return a run as the server answers it, with odd values left out. */
export function tolerant(run: RunDetails): RunDetails {
  return {
    ...run,
    data: run.data && dataOf(run.data),
    evaluation: run.evaluation && evaluationOf(fieldsOf(run.evaluation)),
    samples: listOf(run.samples).filter(isObject).map(sampleOf),
  };
}

function sampleOf(said: Fields): Sample {
  const messages = listOf(said.messages)
    .filter(isObject)
    .map(({ role, content }) => ({
      role: text(role) || "unknown role",
      content: typeof content === "string" ? content : null,
    }));
  return {
    source: text(said.source),
    messages,
    prompt: typeof said.prompt === "string" ? said.prompt : null,
    wanted: text(said.wanted),
    base: text(said.base),
    adapter: text(said.adapter),
  };
}

function evaluationOf(said: Fields): Evaluation {
  return {
    rows: number(said.rows) ?? 0,
    answered: number(said.answered) ?? 0,
    general: number(said.general) ?? 0,
    base: scoresOf(fieldsOf(said.base)),
    adapter: scoresOf(fieldsOf(said.adapter)),
    divergence: number(said.divergence),
    failures: listOf(said.failures).filter((failure) => typeof failure === "string"),
    passed: said.passed === true,
  };
}

function scoresOf(said: Fields): Scores {
  return {
    loss: number(said.loss),
    exact_match: number(said.exact_match),
    stop_share: number(said.stop_share),
    json_validity: number(said.json_validity),
    json_equality: number(said.json_equality),
  };
}

function dataOf(said: Fields): Partial<RunData> {
  const counts = Object.entries(said).filter(([, value]) => number(value) !== null);
  const left = Object.entries(fieldsOf(said.left_out)).filter(([, rows]) => number(rows) !== null);
  return {
    ...(Object.fromEntries(counts) as Partial<RunData>),
    left_out: Object.fromEntries(left) as Record<string, number>,
    files: listOf(said.files)
      .filter(isObject)
      .map(({ file, format, rows }) => ({
        file: text(file),
        format: text(format),
        rows: number(rows) ?? 0,
      })),
  };
}

function fieldsOf(value: unknown): Fields {
  return isObject(value) ? value : {};
}

function listOf(value: unknown): unknown[] {
  return Array.isArray(value) ? (value as unknown[]) : [];
}

function number(value: unknown): number | null {
  return typeof value === "number" ? value : null;
}

/** Return a text; other values as they are written in JSON, so that they can be seen. */
function text(value: unknown): string {
  if (value === null || value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}
