/** What `/metrics` says of an alias's versions: docs/metrics.md. */

import { Change, Scrape } from "../../lib/scrape";

export interface Figures {
  version: string;
  requests: number;
  errors: number;
  /** Requests whose client left. */
  cancelled: number;
  /** Answer tokens. */
  tokens: number;
  /** Seconds; null without a request. */
  firstToken: { p50: number; p95: number } | null;
  answer: { p50: number; p95: number } | null;
}

/** A look before which nothing happened: figures since the server's start. */
export const START = new Scrape(0, new Map());

/** Return the figures of each version that served `alias` between two looks, or that `versions` names. */
export function figuresOf(
  before: Scrape,
  now: Scrape,
  alias: string,
  versions: readonly string[],
): Figures[] {
  const change = new Change(before, now);
  const served = now
    .by("manylora_alias_requests_total", "version", (labels) => labels.alias === alias)
    .keys();
  return [...new Set([...versions, ...served])].map((version) => {
    const labels = { alias, version };
    const requests = (outcome: string): number =>
      change.grown("manylora_alias_requests_total", { ...labels, outcome }) ?? 0;
    const quantiles = (name: string): { p50: number; p95: number } | null => {
      const [p50, p95] = [change.quantile(name, 0.5, labels), change.quantile(name, 0.95, labels)];
      return p50 === null || p95 === null ? null : { p50, p95 };
    };
    const [ok, errors, cancelled] = [requests("ok"), requests("error"), requests("cancelled")];
    return {
      version,
      requests: ok + errors + cancelled,
      errors,
      cancelled,
      tokens: change.grown("manylora_alias_output_tokens_total", labels) ?? 0,
      firstToken: quantiles("manylora_alias_time_to_first_token_seconds"),
      answer: quantiles("manylora_alias_request_seconds"),
    };
  });
}
