/** What is broken or near a limit: rules about the last minute, as the alerts in docs/operations.md. */

import { count, percent } from "../../lib/format";
import { HTTP, requestsBy } from "../figures";
import { are, LIMITS, type Look, type Rule } from "./finding";
import { ratio, type Change } from "../../lib/scrape";

const engine: Look = (change) => {
  const healthy = change.now.value("manylora_healthy");
  if (healthy !== LIMITS.engine) return null;
  return {
    severity: "bad",
    figure: healthy,
    text: "The engine has stopped, or three steps in a row failed.",
    help: "Keep the log, and restart the server.",
  };
};

const registry: Look = (change) => {
  const available = change.now.value("manylora_registry_available");
  if (available !== LIMITS.registry) return null;
  return {
    severity: "bad",
    figure: available,
    text: "The registry's database cannot be reached: requests are served, registrations and changes are not.",
    help: "Bring the database back; no restart of the server is needed.",
  };
};

const errors: Look = (change) => {
  const all = requestsBy(change, () => true) ?? 0;
  const failed = requestsBy(change, (status) => status >= "500") ?? 0;
  const share = ratio(failed, all) ?? 0;
  if (share < LIMITS.errors) return null;
  return {
    severity: "bad",
    figure: share,
    text: `${percent(share)} of the requests end with a server error: ${count(Math.round(failed * change.seconds))} of ${count(Math.round(all * change.seconds))}.`,
    help: "The log has each at level error, with the request's id.",
  };
};

/** Requests refused with 429 for another reason than a limit of their key. */
const refused: Look = (change) => {
  const all = change.grown(HTTP, { status: "429" }) ?? 0;
  const counted = all - (change.grown("manylora_key_limit_refusals_total") ?? 0);
  if (counted < LIMITS.refused) return null;
  return {
    severity: "bad",
    figure: counted,
    text: `${are(counted, "request was", "requests were")} refused because too many wait.`,
    help: "Add a replica. A longer queue (--max-queue) serves no more, it only makes everybody wait.",
  };
};

/** Return a rule about a counter that should not grow. */
function grows(
  rule: Rule,
  counter: string,
  severity: "bad" | "warn" | "info",
  text: (count: number) => string,
  help: string,
): Look {
  return (change: Change) => {
    const figure = change.grown(counter) ?? 0;
    return figure >= LIMITS[rule] ? { severity, figure, text: text(figure), help } : null;
  };
}

/** Return a rule about a gauge that comes near another one. */
function nears(
  rule: Rule,
  [part, whole]: [string, string],
  text: (share: number) => string,
  help: string,
): Look {
  return ({ now }: Change) => {
    const figure = ratio(now.value(part), now.value(whole)) ?? 0;
    return figure >= LIMITS[rule] ? { severity: "warn", figure, text: text(figure), help } : null;
  };
}

export const BROKEN: Partial<Record<Rule, Look>> = {
  engine,
  registry,
  errors,
  refused,
  steps: grows(
    "steps",
    "manylora_engine_failed_steps_total",
    "bad",
    (failed) => `${are(failed, "step", "steps")} failed, and requests with them.`,
    "The log names them (No step succeeds with). The same adapter each time: activate its previous version.",
  ),
  memory: grows(
    "memory",
    "manylora_engine_out_of_memory_total",
    "bad",
    (failed) => `Memory was short ${are(failed, "time", "times")}: steps were made smaller and tried again.`,
    "Lower --host-cache-gib, --kv-memory-gib or --max-batch-tokens.",
  ),
  loadFailures: grows(
    "loadFailures",
    "manylora_adapter_load_failures_total",
    "bad",
    (failed) => `${are(failed, "load of an adapter", "loads of adapters")} failed.`,
    "The log says which and why. If its bytes are gone or damaged, register it again.",
  ),
  deadlines: grows(
    "deadlines",
    "manylora_deadlines_exceeded_total",
    "warn",
    (ended) =>
      `${are(ended, "answer", "answers")} ended unfinished because the time that was given was over.`,
    "Clients set it as timeout; the server cannot keep it under this load.",
  ),
  connections: grows(
    "connections",
    "manylora_connections_refused_total",
    "warn",
    (counted) => `${are(counted, "connection was", "connections were")} refused.`,
    "Raise --max-connections or --max-connections-per-address, or find who opens them.",
  ),
  keys: grows(
    "keys",
    "manylora_key_limit_refusals_total",
    "info",
    (counted) =>
      `${are(counted, "request was", "requests were")} refused because the API key had reached a limit.`,
    "That is what limits are for. Talk to the client, or raise the key's limit.",
  ),
  store: nears(
    "store",
    ["manylora_store_bytes", "manylora_store_quota_bytes"],
    (share) => `Stored adapters take ${percent(share)} of their quota: at 100% registrations are refused.`,
    "Remove adapters and old versions, or raise --store-quota-gib.",
  ),
  descriptors: nears(
    "descriptors",
    ["process_open_fds", "process_max_fds"],
    (share) => `${percent(share)} of the process's file descriptors are in use.`,
    "Raise the limit (LimitNOFILE, ulimit -n), and find who opens connections.",
  ),
};
