/** What is slow and why, in words. */

import { BROKEN } from "./broken";
import { END_TO_END } from "../figures";
import type { Finding, Rule, Severity } from "./finding";
import type { Change } from "../../lib/scrape";
import { SLOW } from "./slow";

const ORDER: readonly Severity[] = ["bad", "warn", "info"];
const RULES = Object.entries({ ...BROKEN, ...SLOW }) as [Rule, NonNullable<(typeof SLOW)[Rule]>][];

/** Return what the rules find, the worst first. */
export function findings(change: Change): Finding[] {
  const found = RULES.flatMap(([rule, look]) => {
    const said = look(change);
    return said ? [{ rule, ...said }] : [];
  });
  return found.sort((one, other) => ORDER.indexOf(one.severity) - ORDER.indexOf(other.severity));
}

/** Return what to say when the rules find nothing. */
export function allWell(change: Change): string {
  const ended = change.grown(`${END_TO_END}_count`) ?? 0;
  const busy = ended + (change.now.value("manylora_requests_running") ?? 0);
  return busy ? "Nothing is slow." : "Nothing is slow: no request has come.";
}
