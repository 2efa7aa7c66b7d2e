import { expect, test } from "vitest";
import { LIMITS, type Rule } from "./finding";
import { Change, parseScrape } from "../../lib/scrape";
import { allWell, findings } from "./words";

type Values = Record<string, number>;

/** A minute of a server: what its counters grew to, from 0. */
function minute(values: Values, before: Values = {}): Change {
  const text = (all: Values) => Object.entries(all).map(([name, value]) => `${name} ${value}`).join("\n"); // prettier-ignore
  return new Change(parseScrape(text(before), 0), parseScrape(text(values), 60));
}

function histogram(name: string, mean: number, count = 10): Values {
  return { [`${name}_sum`]: mean * count, [`${name}_count`]: count };
}

/** Tokens of which nine in ten come within `middle` seconds, and the others within `late`. */
function between(middle: number, late: number): Values {
  const bucket = (le: string) => `manylora_time_between_tokens_seconds_bucket{le="${le}"}`;
  return { [bucket(String(middle))]: 90, [bucket(String(late))]: 100, [bucket("+Inf")]: 100 };
}

function requests(status: string, count: number, route = "/v1/completions"): Values {
  return { [`manylora_http_requests_total{method="POST",route="${route}",status="${status}"}`]: count };
}

const USED = Object.fromEntries(
  ["a", "b", "c", "base", "other"].map((name) => [`manylora_adapter_requests_total{adapter="${name}"}`, 5]),
);
const SLOTS: Values = {
  ...USED,
  ...histogram("manylora_adapter_load_seconds", 0.12),
  'manylora_build_info{base="base"}': 1,
  manylora_device_slots: 2,
  manylora_slot_misses_total: 126,
  manylora_slot_hits_total: 14,
  manylora_adapter_loads_total: 126,
  manylora_adapter_evictions_total: 120,
};

/** A minute in which exactly one rule speaks, its severity, and some of its words. */
const SPEAKS: [Rule, Values, string, string][] = [
  ["queue", { ...histogram("manylora_queue_seconds", 3.2, 12), ...histogram("manylora_request_seconds", 4, 12), manylora_requests_waiting: 34 }, "warn",
    "Requests wait 3.2 s before their turn: 34 are waiting; 12 are answered a minute."],
  ["queue", histogram("manylora_queue_seconds", 6), "bad", "Requests wait 6.0 s"],
  ["stuck", { ...histogram("manylora_queue_seconds", 0, 0), manylora_requests_waiting: 1 }, "bad", "1 is waiting, and none began in the last 1 min 0 s."],
  ["slots", SLOTS, "warn",
    "Adapters are loaded 2.1 times a second and take 120 ms each: 3 adapters share 2 slots, and 90% of their requests wait for a load."],
  ["slots", { ...SLOTS, ...histogram("manylora_adapter_wait_seconds", 2), manylora_adapter_loads_total: 6 }, "bad", "loaded 6 times a minute"],
  ["coldLoads", { 'manylora_adapter_load_seconds_sum{start="cold"}': 6, 'manylora_adapter_load_seconds_count{start="cold"}': 2 }, "warn", "takes 3.0 s"],
  ["hostCache", { manylora_host_cache_misses_total: 3, manylora_host_cache_hits_total: 1, manylora_host_cache_evictions_total: 2 }, "warn",
    "75% of the loads read from disk, and 2 adapters were put out"],
  ["kv", { manylora_preemptions_total: 5 }, "warn", "KV memory is full: 5 answers were set back"],
  ["kv", { manylora_preemptions_total: 300 }, "bad", "300 answers"],
  ["prefill", { ...histogram("manylora_time_to_first_token_seconds", 2.4), ...histogram("manylora_prefill_seconds", 2.1), ...histogram("manylora_queue_seconds", 0.2),
    manylora_computed_prompt_tokens_total: 9000, manylora_cached_prompt_tokens_total: 1000, manylora_prefix_cache_queries_total: 10 }, "warn",
    "Most of the time goes to reading prompts: 2.1 s of the 2.4 s until the first text. A prompt has 1,000 tokens, and 10% of them are in the prefix cache."],
  ["stutter", between(0.05, 0.8), "warn", "one token in twenty takes more than 425 ms, most take 28 ms"],
  ["tokens", { ...between(0.8, 0.9), manylora_requests_running: 8, manylora_sampled_tokens_total: 600 }, "warn",
    "A token takes 444 ms: 8 answers are computed at once, 600 tokens a minute."],
  ["engine", { manylora_healthy: 0 }, "bad", "The engine has stopped"],
  ["steps", { manylora_engine_failed_steps_total: 2 }, "bad", "2 steps failed"],
  ["memory", { manylora_engine_out_of_memory_total: 1 }, "bad", "Memory was short 1 time:"],
  ["errors", { ...requests("500", 6), ...requests("200", 94), ...requests("503", 900, "/readyz") }, "bad",
    "6.0% of the requests end with a server error: 6 of 100."],
  ["loadFailures", { manylora_adapter_load_failures_total: 1 }, "bad", "1 load of an adapter failed."],
  ["registry", { manylora_registry_available: 0 }, "bad", "database cannot be reached"],
  ["refused", { ...requests("429", 12), manylora_key_limit_refusals_total: 0 }, "bad", "12 requests were refused because too many wait."],
  ["keys", { ...requests("429", 3), manylora_key_limit_refusals_total: 3 }, "info", "3 requests were refused because the API key"],
  ["deadlines", { manylora_deadlines_exceeded_total: 1 }, "warn", "1 answer ended unfinished"],
  ["connections", { manylora_connections_refused_total: 2 }, "warn", "2 connections were refused."],
  ["store", { manylora_store_bytes: 95, manylora_store_quota_bytes: 100 }, "warn", "95% of their quota"],
  ["descriptors", { process_open_fds: 900, process_max_fds: 1000 }, "warn", "90% of the process's file descriptors"],
]; // prettier-ignore

test.each(SPEAKS)("%s speaks", (rule, values, severity, words) => {
  const found = findings(minute(values));
  expect(found.map((one) => [one.rule, one.severity])).toEqual([[rule, severity]]);
  expect(found[0]?.text).toContain(words);
  expect(found[0]?.text).toMatch(/\.$/);
  expect(found[0]?.help).toMatch(/\.$/);
});

test("each rule has a case here", () => {
  expect(new Set(SPEAKS.map(([rule]) => rule))).toEqual(new Set(Object.keys(LIMITS)));
});

/** Minutes just below a limit, or with another cause. */
const SILENT: [string, Values][] = [
  ["short waits", { ...histogram("manylora_queue_seconds", 0.9), manylora_requests_waiting: 3 }],
  ["loads into free slots", { ...SLOTS, manylora_adapter_evictions_total: 0 }],
  ["few misses of slots", { ...SLOTS, manylora_slot_hits_total: 1000 }],
  ["quick reads", { 'manylora_adapter_load_seconds_sum{start="cold"}': 1.9, 'manylora_adapter_load_seconds_count{start="cold"}': 2 }],
  ["a host cache that fills", { manylora_host_cache_misses_total: 3, manylora_host_cache_hits_total: 1, manylora_host_cache_evictions_total: 0 }],
  ["prompts that are read quickly", { ...histogram("manylora_time_to_first_token_seconds", 0.9), ...histogram("manylora_prefill_seconds", 0.8) }],
  ["even tokens", between(0.1, 0.3)],
  ["an error in a hundred requests", { ...requests("500", 1), ...requests("200", 99) }],
  ["a store without a quota", { manylora_store_bytes: 95 }],
  ["no request", { manylora_healthy: 1, manylora_registry_available: 1, manylora_requests_waiting: 0, process_open_fds: 7, process_max_fds: 10 }],
]; // prettier-ignore

test.each(SILENT)("%s: nothing is slow", (_, values) => {
  expect(findings(minute(values))).toEqual([]);
});

test("prompts are not to blame for a queue", () => {
  const change = minute({
    ...histogram("manylora_time_to_first_token_seconds", 9),
    ...histogram("manylora_prefill_seconds", 2),
    ...histogram("manylora_queue_seconds", 7),
    manylora_kv_blocks: 100,
    manylora_kv_blocks_used: 99,
  });
  const [only, ...others] = findings(change);
  expect([only?.rule, others]).toEqual(["queue", []]);
  expect(only?.help).toContain("--kv-memory-gib");
});

test("enough slots, but not for the ranks", () => {
  const change = minute({ ...SLOTS, manylora_device_slots: 16 });
  expect(findings(change)[0]?.help).toContain("--device-ranks: ");
});

test("the worst comes first", () => {
  const change = minute({ ...requests("429", 3), manylora_key_limit_refusals_total: 3, manylora_preemptions_total: 1, manylora_healthy: 0 }); // prettier-ignore
  expect(findings(change).map((one) => one.severity)).toEqual(["bad", "warn", "info"]);
});

test("what was before the minute is not said again", () => {
  expect(findings(minute({ manylora_preemptions_total: 5 }, { manylora_preemptions_total: 5 }))).toEqual([]);
});

test("an idle server and a busy one are told apart", () => {
  expect(allWell(minute({ manylora_request_seconds_count: 0, manylora_requests_running: 0 }))).toContain(
    "no request",
  );
  expect(allWell(minute({ manylora_request_seconds_count: 3 }))).toBe("Nothing is slow.");
  expect(allWell(minute({ manylora_requests_running: 1 }))).toBe("Nothing is slow.");
});
