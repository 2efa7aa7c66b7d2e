/** Why a server is slow: rules about the last minute. What helps is from docs/operations.md. */

import { percent } from "../../lib/format";
import {
  ADAPTER_WAIT,
  BETWEEN,
  END_TO_END,
  FIRST_TEXT,
  LOADS,
  PREFILL,
  QUEUE,
  few,
  latency,
  shareOf,
} from "../figures";
import { are, BAD, LIMITS, many, perMinute, type Look, type Rule } from "./finding";
import { ratio, type Change } from "../../lib/scrape";

const KV_FULL = 0.95;

/** Requests wait for their turn. */
const queue: Look = (change) => {
  const seconds = change.mean(QUEUE) ?? 0;
  if (seconds < LIMITS.queue) return null;
  const waiting = change.now.value("manylora_requests_waiting") ?? 0;
  const answered = change.rate(`${END_TO_END}_count`) ?? 0;
  const full = (kvUse(change) ?? 0) > KV_FULL;
  return {
    severity: seconds >= BAD.queue ? "bad" : "warn",
    figure: seconds,
    text: `Requests wait ${latency(seconds)} before their turn: ${are(waiting)} waiting; ${are(answered * 60)} answered a minute.`,
    help: full
      ? "They wait for KV memory: raise --kv-memory-gib."
      : "Add a replica; or raise --max-batch-sequences if the processor is idle.",
  };
};

/** Requests wait, and none begins. */
const stuck: Look = (change) => {
  const waiting = change.now.value("manylora_requests_waiting") ?? 0;
  const began = change.grown(`${QUEUE}_count`);
  if (waiting < LIMITS.stuck || began !== 0 || change.seconds < 10) return null;
  return {
    severity: "bad",
    figure: waiting,
    text: `${are(waiting)} waiting, and none began in the last ${latency(change.seconds)}.`,
    help: "Look at /readyz and the log: a step may hang, or pinned or busy adapters may hold all slots.",
  };
};

/** More adapters are in use than there are slots. */
const slots: Look = (change) => {
  const missed = shareOf("manylora_slot_misses_total", "manylora_slot_hits_total")(change) ?? 0;
  const evictions = change.grown("manylora_adapter_evictions_total") ?? 0;
  if (missed < LIMITS.slots || evictions < 1) return null;
  const all = change.now.value("manylora_device_slots") ?? 0;
  const used = adaptersInUse(change);
  const loads = change.rate("manylora_adapter_loads_total") ?? 0;
  const often = loads >= 1 ? `${few(loads)} times a second` : `${are(loads * 60, "time", "times")} a minute`;
  const wait = change.mean(ADAPTER_WAIT) ?? 0;
  return {
    severity: wait >= LIMITS.queue ? "bad" : "warn",
    figure: missed,
    text:
      `Adapters are loaded ${often} and take ${latency(change.mean(LOADS) ?? 0)} each: ` +
      `${many(used, "adapter")} share ${many(all, "slot")}, and ${percent(missed)} of their requests wait for a load.`,
    help:
      used > all
        ? "Raise --max-device-adapters and --device-ranks, pin the few that must be quick, or send an adapter's requests to one replica."
        : "Raise --device-ranks: the adapters' ranks do not fit on the device together.",
  };
};

/** Reading an adapter from disk or the store takes long. */
const coldLoads: Look = (change) => {
  const seconds = change.mean(LOADS, { start: "cold" }) ?? 0;
  if (seconds < LIMITS.coldLoads) return null;
  return {
    severity: "warn",
    figure: seconds,
    text: `Reading an adapter from disk or the store takes ${latency(seconds)}.`,
    help: "Use a local disk, or raise --host-cache-gib and --store-cache-gib.",
  };
};

/** Adapters leave host memory and are read again. */
const hostCache: Look = (change) => {
  const missed = shareOf("manylora_host_cache_misses_total", "manylora_host_cache_hits_total")(change) ?? 0;
  const evictions = change.grown("manylora_host_cache_evictions_total") ?? 0;
  if (missed < LIMITS.hostCache || evictions < 1) return null;
  return {
    severity: "warn",
    figure: missed,
    text: `Host memory for adapters is full: ${percent(missed)} of the loads read from disk, and ${are(evictions, "adapter was", "adapters were")} put out of it.`,
    help: "Raise --host-cache-gib.",
  };
};

/** Sequences lose their KV blocks to each other. */
const kv: Look = (change) => {
  const lost = change.grown("manylora_preemptions_total") ?? 0;
  if (lost < LIMITS.kv) return null;
  return {
    severity: lost >= BAD.kv ? "bad" : "warn",
    figure: lost,
    text: `KV memory is full: ${are(lost, "answer was", "answers were")} set back, and their prompts are computed again.`,
    help: "Raise --kv-memory-gib, or lower --max-batch-sequences: fewer at once finish sooner.",
  };
};

/** Most of the time to the first text is the prompt's. */
const prefill: Look = (change) => {
  const firstText = change.mean(FIRST_TEXT) ?? 0;
  const reading = change.mean(PREFILL) ?? 0;
  const waiting = (change.mean(QUEUE) ?? 0) + (change.mean(ADAPTER_WAIT) ?? 0);
  if (firstText < LIMITS.prefill || reading <= waiting) return null;
  const computed = change.grown("manylora_computed_prompt_tokens_total") ?? 0;
  const cached = change.grown("manylora_cached_prompt_tokens_total") ?? 0;
  const began = change.grown("manylora_prefix_cache_queries_total");
  const length = ratio(computed + cached, began);
  const long = length === null ? "" : ` A prompt has ${many(length, "token")}, and`;
  return {
    severity: firstText >= BAD.prefill ? "bad" : "warn",
    figure: reading,
    text:
      `Most of the time goes to reading prompts: ${latency(reading)} of the ${latency(firstText)} until the first text.` +
      `${long || " Of prompts,"} ${percent(ratio(cached, cached + computed) ?? 0)} ${long ? "of them are" : "is"} in the prefix cache.`,
    help: "Put what prompts share at their beginning, for the prefix cache; or raise --max-batch-tokens.",
  };
};

/** Answers pause while prompts are read. */
const stutter: Look = (change) => {
  const [middle, late] = [change.quantile(BETWEEN, 0.5) ?? 0, change.quantile(BETWEEN, 0.95) ?? 0];
  if (late < LIMITS.stutter || late < 4 * middle) return null;
  return {
    severity: "warn",
    figure: late,
    text: `Answers stutter: one token in twenty takes more than ${latency(late)}, most take ${latency(middle)}.`,
    help: "Steps that read prompts delay the others' tokens: halve --max-batch-tokens.",
  };
};

/** All tokens are slow. */
const tokens: Look = (change) => {
  const seconds = change.quantile(BETWEEN, 0.5) ?? 0;
  if (seconds < LIMITS.tokens) return null;
  const running = change.now.value("manylora_requests_running") ?? 0;
  return {
    severity: "warn",
    figure: seconds,
    text: `A token takes ${latency(seconds)}: ${are(running, "answer is", "answers are")} computed at once, ${perMinute(change.rate("manylora_sampled_tokens_total") ?? 0)} tokens a minute.`,
    help: "Lower --max-batch-sequences, so that fewer go on at once and each is quicker; or find what else uses the processor.",
  };
};

export const SLOW: Partial<Record<Rule, Look>> = {
  queue,
  stuck,
  slots,
  coldLoads,
  hostCache,
  kv,
  prefill,
  stutter,
  tokens,
};

function kvUse(change: Change): number | null {
  return ratio(change.now.value("manylora_kv_blocks_used"), change.now.value("manylora_kv_blocks"));
}

/** Return how many adapters had requests that ended, without the base and the sum of all others. */
function adaptersInUse(change: Change): number {
  const base = change.now.label("manylora_build_info", "base");
  const rates = change.rateBy("manylora_adapter_requests_total", "adapter");
  return [...rates].filter(([name, rate]) => rate > 0 && name !== base && name !== "other").length;
}
