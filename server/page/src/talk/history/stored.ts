/** A conversation as text that the browser keeps, and back. */

import { count } from "../../lib/format";
import { isNumber, isObject, isText } from "../../lib/shapes";
import { newAnswer, type Answer } from "../chat/answer";
import { Conversation, MAX_COLUMNS, Reply, Step, Turn } from "../chat/conversation.svelte";
import { noOptions, type Options } from "../request/options";
import type { Target } from "../request/target";

/** Browsers keep 5 million characters for a site. */
export const MAX_CHARACTERS = 3_000_000;

/** What is stored of a conversation. The probabilities of tokens are not: they would fill the store. */
interface Stored {
  title: string;
  /** When it was kept; texts of older versions lack it. An index that is damaged is made again from it. */
  updated?: number;
  targets: Target[];
  options: Partial<Options>;
  turns: { prompt: string; replies: (StoredStep[] | null)[] }[];
}

interface StoredStep {
  answer: Partial<Answer>;
  results: Record<string, string>;
}

/** A conversation is too long, however few others are kept. */
export class TooLong extends RangeError {
  constructor(length: number) {
    super(`${count(length)} characters are too many to be kept: ${count(MAX_CHARACTERS)} at most`);
  }
}

/** Return what is stored of a conversation, kept at a time and under another title if one is given. Throws TooLong. */
export function textOf(
  { title: own, targets, options, turns }: Conversation,
  updated: number,
  title = own,
): string {
  const steps = (reply: Reply | null) =>
    reply && reply.steps.map(({ answer, results }) => ({ answer: { ...answer, tokens: [] }, results }));
  const kept = turns.map(({ prompt, replies }) => ({ prompt, replies: replies.map(steps) }));
  const stored: Stored = { title, updated, targets, options, turns: kept };
  const text = JSON.stringify(stored);
  if (text.length > MAX_CHARACTERS) throw new TooLong(text.length);
  return text;
}

/** Return the conversation of a stored text; null if it is none, whoever wrote it. */
export function conversationOf(id: string, text: string): Conversation | null {
  const stored = parsed(text);
  return isStored(stored) ? revived(id, stored) : null;
}

/** Return the value of a JSON text; null if it is none. */
export function parsed(text: string | null): unknown {
  try {
    return text === null ? null : JSON.parse(text);
  } catch {
    return null;
  }
}

function revived(id: string, { title, updated, targets, options, turns }: Stored): Conversation {
  const conversation = new Conversation(id);
  conversation.kept = updated ?? 0;
  conversation.title = title;
  conversation.targets = targets;
  conversation.options = { ...noOptions(), ...options };
  conversation.turns = turns.map(
    ({ prompt, replies }) =>
      new Turn(
        prompt,
        replies.map((steps) => steps && reply(steps)),
      ),
  );
  return conversation;
}

function reply(steps: StoredStep[]): Reply {
  const made = new Reply();
  made.steps = steps.map(({ answer, results }) => {
    const step = new Step();
    const state = answer.state === "running" ? "stopped" : (answer.state ?? "done"); // the page was closed
    step.answer = { ...newAnswer(), ...answer, tokens: [], state };
    step.results = results;
    return step;
  });
  return made;
}

type Check = (value: unknown) => boolean;
const orNull =
  (check: Check): Check =>
  (value) =>
    value === null || check(value);
const listOf =
  (check: Check): Check =>
  (value) =>
    Array.isArray(value) && value.every(check);
const oneOf =
  (...values: string[]): Check =>
  (value) =>
    isText(value) && values.includes(value);

const isEntry: Check = (value) => isObject(value) && isText(value.name) && isNumber(value.weight);
const isApplied: Check = (value) => isEntry(value) && isText((value as { alias?: unknown }).alias ?? "");
const isCall: Check = (value) => isObject(value) && [value.id, value.name, value.arguments].every(isText);
const TIMES = ["queue_ms", "load_ms", "prefill_ms", "decode_ms", "batch_adapters", "preemptions"];
const isExplained: Check = (value) => isObject(value) && TIMES.every((field) => isNumber(value[field]));

const ANSWER: Record<keyof Answer, Check> = {
  state: oneOf("running", "done", "stopped", "failed"),
  reason: isText,
  content: isText,
  reasoning: isText,
  calls: listOf(isCall),
  tokens: Array.isArray,
  finish: orNull(isText),
  applied: orNull(listOf(isApplied)),
  model: isText,
  prompt: orNull(isNumber),
  cached: isNumber,
  completion: orNull(isNumber),
  first: orNull(isNumber),
  took: orNull(isNumber),
  explained: orNull(isExplained),
};

const isStep: Check = (value) =>
  isObject(value) &&
  fits({ ...newAnswer(), ...(value.answer as object) }, ANSWER) &&
  isObject(value.results) &&
  Object.values(value.results).every(isText);

const isTurn: Check = (value) =>
  isObject(value) && isText(value.prompt) && listOf(orNull(listOf(isStep)))(value.replies);

const CHOICES: Partial<Record<keyof Options, Check>> = {
  form: oneOf("text", "json", "schema", "regex", "choice"),
  tool_choice: oneOf("auto", "required", "one", "none"),
};

function isStored(value: unknown): value is Stored {
  if (!isObject(value) || !isText(value.title) || !isObject(value.options)) return false;
  const { targets, turns, options, updated } = value;
  const unset = noOptions();
  const columns = Array.isArray(targets) ? targets.length : 0;
  return (
    columns >= 1 &&
    columns <= MAX_COLUMNS &&
    listOf(listOf(isEntry))(targets) &&
    listOf(isTurn)(turns) &&
    isNumber(updated ?? 0) &&
    fits({ ...unset, ...options }, CHOICES) &&
    (Object.keys(unset) as (keyof Options)[]).every(
      (id) => typeof (options[id] ?? unset[id]) === typeof unset[id],
    )
  );
}

function fits<T extends object>(value: T, checks: Partial<Record<keyof T, Check>>): boolean {
  return (Object.keys(checks) as (keyof T)[]).every((field) => checks[field]!(value[field]));
}
