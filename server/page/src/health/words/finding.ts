/** What the rules about a server's figures say. */

import { count } from "../../lib/format";
import type { Change } from "../../lib/scrape";

export type Severity = "bad" | "warn" | "info";

/** A sentence about something that is slow or broken, and what helps. */
export interface Finding {
  rule: Rule;
  severity: Severity;
  /** The number that the rule looked at. */
  figure: number;
  text: string;
  help: string;
}

/** Looks at the last minute; null if the rule has nothing to say. */
export type Look = (change: Change) => Omit<Finding, "rule"> | null;

/** From which figure on a rule speaks. Shares are from 0 to 1, counts are of the last minute. */
export const LIMITS = {
  /** Seconds from arrival to the first step, as a mean. */
  queue: 1,
  /** Requests that wait while none begins. */
  stuck: 1,
  /** Share of the sequences with adapters that waited for one. */
  slots: 0.5,
  /** Seconds of a load from disk or the shared store, as a mean. */
  coldLoads: 1,
  /** Share of the loads that found the adapter not in host memory. */
  hostCache: 0.5,
  /** Sequences that lost their KV blocks. */
  kv: 1,
  /** Seconds to the first text, as a mean, of which reading the prompt is the most. */
  prefill: 1,
  /** Seconds between two tokens, of one in twenty. */
  stutter: 0.25,
  /** Seconds between two tokens, of every second one. */
  tokens: 0.3,
  /** 0: the engine does not work. */
  engine: 0,
  /** Steps that failed. */
  steps: 1,
  /** Steps that failed for lack of memory. */
  memory: 1,
  /** Share of the requests that end with a status of 500 and above. */
  errors: 0.02,
  /** Adapters that could not be loaded. */
  loadFailures: 1,
  /** 0: the registry's database cannot be reached. */
  registry: 0,
  /** Requests refused because too many wait. */
  refused: 1,
  /** Requests refused because of a limit of their key. */
  keys: 1,
  /** Answers that ended because their time was over. */
  deadlines: 1,
  /** Connections refused. */
  connections: 1,
  /** Share of the quota for stored adapters. */
  store: 0.9,
  /** Share of the process's file descriptors. */
  descriptors: 0.8,
} as const;

export type Rule = keyof typeof LIMITS;

/** Limits from which on a finding is not only a warning. */
export const BAD = { queue: 5, prefill: 10, kv: 30 } as const;

/** Return a count and its noun: "1 request", "1,200 requests". */
export function many(value: number, noun: string): string {
  return `${count(Math.round(value))} ${noun}${Math.round(value) === 1 ? "" : "s"}`;
}

/** Return a count and a verb: "1 is", "34 are". */
export function are(value: number, one = "is", several = "are"): string {
  return `${count(Math.round(value))} ${Math.round(value) === 1 ? one : several}`;
}

/** Return a rate per second as a count a minute. */
export function perMinute(rate: number): string {
  return count(Math.round(rate * 60));
}
