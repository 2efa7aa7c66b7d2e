/** How much adapters were used, from `GET /v1/usage`: docs/usage.md. */

export interface UsageRow {
  id: string;
  day: string | null;
  /** A version; versions joined by `+` for a mix; empty for the base. */
  adapter: string | null;
  requests: number;
  prompt_tokens: number;
  output_tokens: number;
}

export type Measure = "requests" | "prompt_tokens" | "output_tokens";

export const DAYS = 30;
const DAY_MS = 86400_000;

/** Return the last days (UTC), the latest last, as `2026-11-30`. */
export function lastDays(count: number, now: number = Date.now()): string[] {
  return Array.from({ length: count }, (_, place) =>
    new Date(now - (count - 1 - place) * DAY_MS).toISOString().slice(0, 10),
  );
}

/** Return the Unix time of a day's noon (UTC), which is on that day in nearly all time zones. */
export function noonOf(day: string): number {
  return Date.parse(`${day}T12:00:00Z`) / 1000;
}

/** Return the requests of each adapter by name. A request of a mix counts for each of its adapters. */
export function requestsByName(rows: readonly UsageRow[]): Map<string, number> {
  const sums = new Map<string, number>();
  for (const row of rows) {
    const names = (row.adapter ?? "").split("+").map((version) => version.replace(/@\d+$/, ""));
    for (const name of new Set(names)) sums.set(name, (sums.get(name) ?? 0) + row.requests);
  }
  return sums;
}

/** Return for each version of `name` its use on each of `days`, most used first; mixes count for their version. */
export function byVersion(
  rows: readonly UsageRow[],
  name: string,
  days: readonly string[],
  measure: Measure,
): { label: string; values: number[] }[] {
  const lines = new Map<string, number[]>();
  for (const row of rows) {
    const place = days.indexOf(row.day ?? "");
    const version = (row.adapter ?? "").split("+").find((one) => one.replace(/@\d+$/, "") === name);
    if (place < 0 || version === undefined) continue;
    const label = version.slice(name.length) || name;
    const values = lines.get(label) ?? days.map(() => 0);
    values[place]! += row[measure];
    lines.set(label, values);
  }
  const sum = (values: number[]): number => values.reduce((all, value) => all + value, 0);
  return [...lines]
    .map(([label, values]) => ({ label, values }))
    .sort((one, other) => sum(other.values) - sum(one.values));
}
