/** A blind comparison of two targets: prompts, their answers, and votes that do not know whose answer is whose. */

import type { Prompt } from "./prompts";
import { resultOf, type Result } from "./statistics";
import { isNumber, isObject, isText } from "../../lib/shapes";

export interface Answer {
  text: string;
  /** What served it: `legal@2`, or the base. */
  served: string;
  tokens: number;
  /** Why it has no text. */
  error?: string;
}

/** Which of the two targets; "tie" for neither. */
export type Vote = 0 | 1 | "tie";

export interface Pair {
  prompt: Prompt;
  answers: [Answer | null, Answer | null];
  /** The target whose answer stands left. */
  left: 0 | 1;
  vote: Vote | null;
}

export interface Sampling {
  system: string;
  temperature: number;
  max_tokens: number;
  seed: number;
}

export interface Comparison {
  id: string;
  created: number;
  targets: [string, string];
  sampling: Sampling;
  pairs: Pair[];
  /** Places of the pairs that were voted on, in that order, to take votes back. */
  order: number[];
  /** How often it was kept. */
  revision: number;
}

/** Return a new comparison. `random` returns numbers in [0, 1). */
export function compare(
  targets: [string, string],
  prompts: readonly Prompt[],
  sampling: Sampling,
  random: () => number = Math.random,
): Comparison {
  return {
    id: `${Date.now().toString(36)}${Math.floor(random() * 1e6).toString(36)}`,
    created: Math.floor(Date.now() / 1000),
    targets,
    sampling,
    pairs: prompts.map((prompt) => ({
      prompt,
      answers: [null, null],
      left: random() < 0.5 ? 0 : 1,
      vote: null,
    })),
    order: [],
    revision: 0,
  };
}

/** Return what a browser has kept as a comparison; null if it is none, whoever wrote it. */
export function comparisonOf(value: unknown): Comparison | null {
  if (!isObject(value)) return null;
  const { id, created, targets, sampling, pairs, order, revision = 0 } = value;
  if (typeof id !== "string" || !isNumber(created) || !isNumber(revision)) return null;
  if (!Array.isArray(targets) || targets.length !== 2 || !targets.every(isText)) return null;
  if (!isObject(sampling) || !isText(sampling.system)) return null;
  if (![sampling.temperature, sampling.max_tokens, sampling.seed].every(isNumber)) return null;
  if (!Array.isArray(pairs) || !pairs.every(isPair) || !Array.isArray(order)) return null;
  if (!order.every((place) => Number.isInteger(place) && place >= 0 && place < pairs.length)) return null;
  return { ...value, revision } as unknown as Comparison;
}

function isPair(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { prompt, answers, left, vote } = value;
  const isMessage = (one: unknown) => isObject(one) && isText(one.role) && isText(one.content);
  return (
    Array.isArray(prompt) &&
    prompt.length > 0 &&
    prompt.every(isMessage) &&
    Array.isArray(answers) &&
    answers.length === 2 &&
    answers.every((answer) => answer === null || isAnswer(answer)) &&
    (left === 0 || left === 1) &&
    (vote === null || vote === 0 || vote === 1 || vote === "tie")
  );
}

function isAnswer(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { text, served, tokens, error } = value;
  return isText(text) && isText(served) && isNumber(tokens) && (error === undefined || isText(error));
}

/** Whether both answers of a pair are there, so that it can be voted on. */
export function whole(pair: Pair): boolean {
  return pair.answers.every((answer) => answer !== null && answer.error === undefined);
}

/** Whether both gave the same text: that is a tie without a look at it. */
export function same(pair: Pair): boolean {
  return whole(pair) && pair.answers[0]!.text === pair.answers[1]!.text;
}

/** Return what is still to be asked: places of pairs and targets. Answers that failed are asked for again. */
export function missing(comparison: Comparison): [pair: number, target: 0 | 1][] {
  return comparison.pairs.flatMap((pair, place) =>
    ([0, 1] as const)
      .filter((target) => pair.answers[target] === null || pair.answers[target].error !== undefined)
      .map((target): [number, 0 | 1] => [place, target]),
  );
}

/** Return the place of the next pair to vote on; null if there is none yet. */
export function next(comparison: Comparison): number | null {
  const place = comparison.pairs.findIndex((pair) => pair.vote === null && whole(pair) && !same(pair));
  return place < 0 ? null : place;
}

/** Vote for the pair at `place`: for the left one, the right one or neither. */
export function vote(comparison: Comparison, place: number, choice: "left" | "right" | "tie"): void {
  const pair = comparison.pairs[place]!;
  const right: 0 | 1 = pair.left === 0 ? 1 : 0;
  pair.vote = choice === "tie" ? "tie" : choice === "left" ? pair.left : right;
  comparison.order.push(place);
}

/** Take the last vote back; return its pair's place, null if there is none. */
export function undo(comparison: Comparison): number | null {
  const place = comparison.order.pop();
  if (place === undefined) return null;
  comparison.pairs[place]!.vote = null;
  return place;
}

/** Return what the votes come to, and how many ties of them are pairs with the same text. */
export function tally(comparison: Comparison): Result & { same: number } {
  const count = (wanted: Vote): number => comparison.pairs.filter((pair) => pair.vote === wanted).length;
  const equal = comparison.pairs.filter(same).length;
  return { ...resultOf([count(0), count(1)], count("tie") + equal), same: equal };
}

/** Return the comparison as JSON Lines: a line for each prompt. */
export function asJsonLines(comparison: Comparison): string {
  const { targets, sampling } = comparison;
  const lines = comparison.pairs.map((pair) => ({
    messages: pair.prompt,
    a: { target: targets[0], ...pair.answers[0] },
    b: { target: targets[1], ...pair.answers[1] },
    left: pair.left === 0 ? "a" : "b",
    vote: same(pair) ? "same" : pair.vote === null ? null : pair.vote === "tie" ? "tie" : "ab"[pair.vote],
    sampling,
  }));
  return lines.map((line) => `${JSON.stringify(line)}\n`).join("");
}
