/** How an answer is asked for: sampling, the form of the answer, tools. Fields are what people typed. */

import { isObject } from "../../lib/shapes";
import { parseJson } from "./json";

/** The form that an answer must have. */
export type Form = "text" | "json" | "schema" | "regex" | "choice";

export interface Options {
  system: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  max_tokens: string;
  seed: string;
  presence_penalty: string;
  frequency_penalty: string;
  repetition_penalty: string;
  /** One a line. */
  stop: string;
  form: Form;
  /** The schema, the regular expression, or the choices, one a line. */
  pattern: string;
  tools: string;
  tool_choice: "auto" | "required" | "one" | "none";
  /** Whether to ask for the probability of each token. */
  sure: boolean;
}

type Numeric = Exclude<
  keyof Options,
  "system" | "stop" | "form" | "pattern" | "tools" | "tool_choice" | "sure"
>;

export interface NumberField {
  id: Numeric;
  label: string;
  min: number;
  max: number;
  step: number;
  whole?: true;
  /** What happens without it. */
  unset: string;
}

export const NUMBERS: NumberField[] = [
  { id: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, unset: "the model's" },
  { id: "max_tokens", label: "Most tokens", min: 1, max: 1e6, step: 1, whole: true, unset: "the context" },
  { id: "top_p", label: "Top p", min: 0, max: 1, step: 0.05, unset: "the model's" },
  { id: "top_k", label: "Top k", min: -1, max: 1e6, step: 1, whole: true, unset: "the model's" },
  { id: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, unset: "0" },
  { id: "seed", label: "Seed", min: -1e15, max: 1e15, step: 1, whole: true, unset: "random" },
  { id: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, unset: "0" },
  { id: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, unset: "0" },
  {
    id: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.01,
    max: 10,
    step: 0.05,
    unset: "the model's",
  },
];

/** Return options without effect. */
export function noOptions(): Options {
  const numbers = Object.fromEntries(NUMBERS.map(({ id }) => [id, ""])) as Record<Numeric, string>;
  return {
    ...numbers,
    system: "",
    stop: "",
    form: "text",
    pattern: "",
    tools: "",
    tool_choice: "auto",
    sure: false,
  };
}

export const TOP_LOGPROBS = 5;

export type Fields = Record<string, unknown>;
export type Errors = Partial<Record<keyof Options, string>>;

/** Return the request's fields for options, and what is wrong with which of them. */
export function optionFields(options: Options): { fields: Fields; errors: Errors } {
  const fields: Fields = {};
  const errors: Errors = {};
  for (const field of NUMBERS) {
    const typed = options[field.id].trim();
    if (!typed) continue;
    const error = numberError(Number(typed), field);
    if (error) errors[field.id] = error;
    else fields[field.id] = Number(typed);
  }
  readStops(options.stop, fields, errors);
  readForm(options.form, options.pattern, fields, errors);
  readTools(options.tools, options.tool_choice, fields, errors);
  if (options.sure) Object.assign(fields, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  return { fields, errors };
}

/** Return how many options have an effect. */
export function countOf(options: Options): number {
  const unset = noOptions();
  const ids = (Object.keys(unset) as (keyof Options)[]).filter(
    (id) => !["pattern", "tool_choice", "sure"].includes(id),
  );
  return ids.filter((id) => options[id] !== unset[id]).length;
}

function numberError(value: number, { min, max, whole }: NumberField): string | null {
  if (Number.isNaN(value)) return "must be a number";
  if (whole && !Number.isInteger(value)) return "must be a whole number";
  if (value < min || value > max) return max < 1e6 ? `must be ${min} to ${max}` : `must be at least ${min}`;
  return null;
}

function readStops(typed: string, fields: Fields, errors: Errors): void {
  const stops = lines(typed).map(unescape);
  if (stops.length > 16) errors.stop = "at most 16 lines";
  else if (stops.length) fields.stop = stops;
}

function readForm(form: Form, pattern: string, fields: Fields, errors: Errors): void {
  if (form === "json") fields.response_format = { type: "json_object" };
  if (form === "schema") {
    const { value, error } = parseJson(pattern);
    if (error !== undefined) errors.pattern = error;
    else if (!isObject(value)) errors.pattern = "a JSON schema is an object: {...}";
    else fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema: value } };
  }
  if (form === "regex") {
    if (pattern) fields.structured_outputs = { regex: pattern };
    else errors.pattern = "write a regular expression";
  }
  if (form === "choice") {
    const choice = lines(pattern);
    if (choice.length) fields.structured_outputs = { choice };
    else errors.pattern = "write one answer a line";
  }
}

function readTools(typed: string, choice: Options["tool_choice"], fields: Fields, errors: Errors): void {
  if (!typed.trim()) return;
  const { value, error } = parseJson(typed);
  if (error !== undefined) errors.tools = error;
  else if (!Array.isArray(value)) errors.tools = "tools are a list: [...]";
  else {
    const wrong = value.findIndex((tool) => !isTool(tool));
    if (wrong >= 0)
      errors.tools = `tool ${wrong + 1} must be {"type": "function", "function": {"name": ..., ...}}`;
    else if (value.length) {
      fields.tools = value;
      if (choice !== "auto") fields.tool_choice = choice === "one" ? "required" : choice;
      if (choice === "one") fields.parallel_tool_calls = false;
    }
  }
}

/** Return the lines of a text that are not empty. */
function lines(text: string): string[] {
  return text.split("\n").filter((line) => line);
}

/** Return a line with `\n`, `\t` and `\\` as what they stand for. */
function unescape(line: string): string {
  return line.replace(/\\([nt\\])/g, (_, letter: string) => ({ n: "\n", t: "\t" })[letter] ?? "\\");
}

function isTool(value: unknown): boolean {
  return (
    isObject(value) &&
    value.type === "function" &&
    isObject(value.function) &&
    typeof value.function.name === "string"
  );
}
