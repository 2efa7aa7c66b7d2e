/** Questions about runs. */

import { call, pathOf } from "../../lib/api";
import type { RunDetails, RunList } from "./run";
import { tolerant } from "./tolerant";

/** Return the runs that have changed last, the first `most` of them. */
export async function askRuns(most: number, signal: AbortSignal): Promise<RunList> {
  return call<RunList>("GET", `/v1/training/runs?limit=${most}`, { signal });
}

export async function askRun(name: string, signal: AbortSignal): Promise<RunDetails> {
  return tolerant(await call<RunDetails>("GET", `/v1/training/runs/${pathOf(name)}`, { signal }));
}

/** Return why a request failed, and when it may be tried again. */
export function whyNot(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const after = (error as { retryAfter?: number | null }).retryAfter;
  return after ? `${error.message} It may be tried again in ${after} s.` : error.message;
}
