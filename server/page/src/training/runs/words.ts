/** How a run does, in words. */

import { count, duration, percent } from "../../lib/format";
import type { Evaluation, Run, RunData, Scores, Settings } from "./run";

export type Kind = "good" | "warn" | "bad" | "accent" | "plain";

/** Return a run's state in a word or two, and how good that is. */
export function stateOf(run: Run): { word: string; kind: Kind } {
  if (run.state === "running") return { word: run.judging ? "being judged" : "running", kind: "accent" };
  if (run.state === "interrupted") return { word: "interrupted", kind: "warn" };
  if (run.state === "failed") return { word: "failed", kind: "bad" };
  if (run.passed === null) return { word: "finished, not judged", kind: "plain" };
  return run.passed ? { word: "passed", kind: "good" } : { word: "refused by the gate", kind: "bad" };
}

/** Return how far a run is: "120 of 400 steps, about 4 min 10 s left". `first` is the run when it was first looked at. */
export function progressOf(run: Run, first?: Run): string {
  if (run.steps === null) return run.step ? `${count(run.step)} steps` : "";
  const done = `${count(run.step)} of ${count(run.steps)} steps`;
  const left = first ? secondsLeft(run, first) : null;
  return left === null ? done : `${done}, about ${duration(left)} left`;
}

/** Times are whole seconds: below so many between two looks a pace is a guess. */
const ENOUGH = 5;

/**
 * Return how long a running run's steps still take, at the pace since it was first looked at; null if that is not known.
 * The time since its start would not do: a resumed run has rested meanwhile.
 */
export function secondsLeft(run: Run, first: Run): number | null {
  const [seconds, steps] = [run.updated - first.updated, run.step - first.step];
  if (run.state !== "running" || run.judging || run.steps === null || seconds < ENOUGH || steps <= 0)
    return null;
  return (seconds / steps) * (run.steps - run.step);
}

/** Return a loss or a divergence: three significant digits. */
export function loss(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? count(Math.round(value)) : String(Number(value.toPrecision(3)));
}

function share(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : percent(value);
}

/** A score of base and adapter, and what the gate asks for; "" if it asks for nothing. */
export interface ScoreRow {
  label: string;
  base: string;
  adapter: string;
  gate: string;
}

const SHARES: [keyof Scores, string, string][] = [
  ["exact_match", "answers that match exactly", "min_exact_match"],
  ["stop_share", "answers that end by themselves", "min_stop_share"],
  ["json_validity", "answers that are JSON", "min_json_validity"],
  ["json_equality", "answers with the right keys and values", ""],
];

/** Return the scores that were measured. */
export function scoreRows({ base, adapter, divergence }: Evaluation, settings: Settings | null): ScoreRow[] {
  const asked = (name: string) => {
    const value = settings?.[name];
    return typeof value === "number" ? value : null;
  };
  const rows: ScoreRow[] = [];
  const add = (label: string, [of, by]: [string, string], gate: string) => {
    if (of !== "–" || by !== "–") rows.push({ label, base: of, adapter: by, gate });
  };
  const most = asked("max_loss_ratio");
  const limit = most === null || base.loss === null ? "" : `at most ${loss(most * base.loss)}`;
  add("loss per token", [loss(base.loss), loss(adapter.loss)], limit);
  for (const [score, label, option] of SHARES) {
    const least = option ? asked(option) : null;
    add(
      label,
      [share(base[score]), share(adapter[score])],
      least === null ? "" : `at least ${percent(least)}`,
    );
  }
  const far = asked("max_divergence");
  add("divergence from the base", ["–", loss(divergence)], far === null ? "" : `at most ${loss(far)}`);
  return rows;
}

/** Return the judgement in sentences. */
export function judgement({ rows, answered, general, base, adapter, divergence }: Evaluation): string[] {
  const said = [];
  if (!rows) said.push("No row was held out, so nothing was measured of what the adapter learned.");
  else if (base.loss !== null && adapter.loss !== null) {
    const change = adapter.loss / base.loss - 1;
    const how =
      change < 0
        ? `${percent(-change)} lower than`
        : change > 0
          ? `${percent(change)} higher than`
          : "the same as";
    said.push(
      `On ${rowsOf(rows)} that it had not seen, the adapter's loss per token is ${loss(adapter.loss)}: ${how} the base's ${loss(base.loss)}.`,
    );
  }
  if (answered && adapter.exact_match !== null) {
    said.push(
      `Of ${count(answered)} answers ${percent(adapter.exact_match)} match exactly, and ${share(base.exact_match)} of the base's.`,
    );
  }
  if (general && divergence !== null) {
    said.push(
      `On ${count(general)} general prompts it differs from the base by ${loss(divergence)} nats per token.`,
    );
  }
  return said;
}

/** Return what a run trained on, in sentences. */
export function dataWords(data: Partial<RunData>): string[] {
  const { train, evaluation, mixed, tokens, trained_tokens: trained, longest, max_length: most } = data;
  const said = [];
  if (train !== undefined) {
    const held = evaluation === undefined ? "" : `, ${count(evaluation)} held out`;
    said.push(
      `${rowsOf(train)} to train on${held}${mixed ? `, ${count(mixed)} general ones mixed in` : ""}.`,
    );
  }
  if (tokens && trained !== undefined) {
    said.push(
      `${count(tokens)} tokens, of which ${count(trained)} (${percent(trained / tokens)}) are learned.`,
    );
  }
  if (longest !== undefined && most !== undefined) {
    said.push(`The longest row has ${count(longest)} tokens of at most ${count(most)}.`);
  }
  if (data.truncated) said.push(`${rowsOf(data.truncated)} were cut off.`);
  const left = Object.entries(data.left_out ?? {}).filter(([, rows]) => rows);
  if (left.length)
    said.push(`Left out: ${left.map(([why, rows]) => `${count(rows)} ${words(why)}`).join(", ")}.`);
  return said;
}

/** Return an option's or a reason's name as words. */
export function words(name: string): string {
  return name.replaceAll("_", " ");
}

function rowsOf(rows: number): string {
  return `${count(rows)} ${rows === 1 ? "row" : "rows"}`;
}
