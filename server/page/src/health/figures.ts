/** The figures that the charts of Health show, each made of what changed between two looks at `/metrics`. */

import { bytes, count, duration, percent } from "../lib/format";
import { ratio, type Change, type Labels } from "../lib/scrape";

export interface Figure {
  label: string;
  of: (change: Change) => number | null;
}

export interface ChartOf {
  title: string;
  figures: Figure[];
  format: (value: number) => string;
}

export interface Section {
  title: string;
  charts: ChartOf[];
}

/** Routes that machines ask all the time, this page among them. */
const PROBES = new Set(["/livez", "/readyz", "/health", "/metrics"]);
export const HTTP = "manylora_http_requests_total";
export const FIRST_TEXT = "manylora_time_to_first_token_seconds";
export const BETWEEN = "manylora_time_between_tokens_seconds";
export const END_TO_END = "manylora_request_seconds";
export const QUEUE = "manylora_queue_seconds";
export const ADAPTER_WAIT = "manylora_adapter_wait_seconds";
export const PREFILL = "manylora_prefill_seconds";
export const LOADS = "manylora_adapter_load_seconds";

/** Return the HTTP requests a second, without probes, that ended with a status that `keep` lets pass. */
export function requestsBy(change: Change, keep: (status: string) => boolean): number | null {
  if (!change.now.has(HTTP)) return null;
  const wanted = (labels: Labels) => !PROBES.has(labels["route"] ?? "") && keep(labels["status"] ?? "");
  return [...change.rateBy(HTTP, "route", wanted).values()].reduce((sum, rate) => sum + rate, 0);
}

function starts(digit: string): (status: string) => boolean {
  return (status) => status.startsWith(digit) && status !== "429";
}

function rate(name: string, labels?: Labels): Figure["of"] {
  return (change) => change.rate(name, labels);
}

function gauge(name: string): Figure["of"] {
  return (change) => change.now.value(name);
}

/** Return a share of two counters' growth: `part` of `part` and `rest`. */
export function shareOf(part: string, rest: string): Figure["of"] {
  return (change) => {
    const [some, others] = [change.grown(part), change.grown(rest)];
    return some === null || others === null ? null : ratio(some, some + others);
  };
}

/** Return the share of the sequences that began and took a block from the prefix cache. */
function prefixHits(change: Change): number | null {
  return ratio(
    change.grown("manylora_prefix_cache_hits_total"),
    change.grown("manylora_prefix_cache_queries_total"),
  );
}

function quantiles(title: string, name: string): ChartOf {
  const shares = [0.5, 0.95];
  return {
    title,
    figures: shares.map((share) => ({
      label: `p${share * 100}`,
      of: (change) => change.quantile(name, share),
    })),
    format: latency,
  };
}

/** Return a latency: below 10 ms with a decimal, for there it matters. */
export function latency(seconds: number): string {
  return seconds > 0 && seconds < 0.01 ? `${(seconds * 1000).toFixed(1)} ms` : duration(seconds);
}

/** Return a rate or a mean count: 1,234, 12, 3.4, 0.25. */
export function few(value: number): string {
  if (value >= 10 || Number.isInteger(value)) return count(Math.round(value));
  return value >= 1 ? value.toFixed(1) : String(Number(value.toPrecision(2)));
}

export const SECTIONS: Section[] = [
  {
    title: "Throughput",
    charts: [
      {
        title: "Tokens a second",
        format: few,
        figures: [
          { label: "answers", of: rate("manylora_sampled_tokens_total") },
          { label: "prompts, computed", of: rate("manylora_computed_prompt_tokens_total") },
          { label: "prompts, cached", of: rate("manylora_cached_prompt_tokens_total") },
        ],
      },
      {
        title: "Requests a second, by status",
        format: few,
        figures: [
          { label: "2xx", of: (change) => requestsBy(change, starts("2")) },
          { label: "4xx", of: (change) => requestsBy(change, starts("4")) },
          { label: "429", of: (change) => requestsBy(change, (status) => status === "429") },
          { label: "5xx", of: (change) => requestsBy(change, starts("5")) },
        ],
      },
      {
        title: "Sequences",
        format: few,
        figures: [
          { label: "running", of: gauge("manylora_requests_running") },
          { label: "waiting", of: gauge("manylora_requests_waiting") },
        ],
      },
    ],
  },
  {
    title: "Latency",
    charts: [
      quantiles("First text", FIRST_TEXT),
      quantiles("Between tokens", BETWEEN),
      quantiles("End to end", END_TO_END),
      quantiles("In the queue", QUEUE),
      quantiles("Waiting for an adapter", ADAPTER_WAIT),
      {
        title: "Time of a load",
        format: latency,
        figures: [
          { label: "cold", of: (change) => change.mean(LOADS, { start: "cold" }) },
          { label: "warm", of: (change) => change.mean(LOADS, { start: "warm" }) },
        ],
      },
    ],
  },
  {
    title: "Memory and adapters",
    charts: [
      {
        title: "KV blocks",
        format: few,
        figures: [
          { label: "used", of: gauge("manylora_kv_blocks_used") },
          { label: "cached", of: gauge("manylora_kv_blocks_cached") },
          { label: "in all", of: gauge("manylora_kv_blocks") },
        ],
      },
      {
        title: "Preemptions a second",
        format: few,
        figures: [{ label: "preemptions", of: rate("manylora_preemptions_total") }],
      },
      {
        title: "Hits",
        format: percent,
        figures: [
          { label: "prefix cache", of: prefixHits },
          { label: "slots", of: shareOf("manylora_slot_hits_total", "manylora_slot_misses_total") },
          {
            label: "host cache",
            of: shareOf("manylora_host_cache_hits_total", "manylora_host_cache_misses_total"),
          },
        ],
      },
      {
        title: "Adapters on the device",
        format: few,
        figures: [
          { label: "adapters", of: gauge("manylora_device_adapters") },
          { label: "pinned", of: gauge("manylora_pinned_adapters") },
          { label: "slots", of: gauge("manylora_device_slots") },
        ],
      },
      {
        title: "Adapter loads a second",
        format: few,
        figures: [
          { label: "cold", of: rate(`${LOADS}_count`, { start: "cold" }) },
          { label: "warm", of: rate(`${LOADS}_count`, { start: "warm" }) },
          { label: "evictions", of: rate("manylora_adapter_evictions_total") },
        ],
      },
      {
        title: "Host cache",
        format: bytes,
        figures: [
          { label: "used", of: gauge("manylora_host_cache_bytes") },
          { label: "capacity", of: gauge("manylora_host_cache_capacity_bytes") },
        ],
      },
    ],
  },
];

/** Metrics that a server which is as new as this page has. */
export const EXPECTED = [
  HTTP,
  ...[FIRST_TEXT, BETWEEN, END_TO_END, QUEUE, ADAPTER_WAIT, LOADS].map((name) => `${name}_count`),
  "manylora_sampled_tokens_total",
  "manylora_kv_blocks",
  "manylora_device_slots",
  "manylora_host_cache_bytes",
];
