/** What each adapter did, in rows that can be sorted. */

import type { Change } from "../lib/scrape";

/** What one adapter did. Rates are per second, times are means in seconds. */
export interface Row {
  name: string;
  requests: number;
  /** Requests with a status of 400 and above. */
  failed: number;
  output: number;
  prompt: number;
  /** Share of the prompts' tokens that came from the prefix cache; null if there were none. */
  cached: number | null;
  firstText: number | null;
  endToEnd: number | null;
  /** Requests since the server's start. */
  inAll: number;
  onDevice: boolean;
}

export type Column = keyof Row;
export interface Sort {
  column: Column;
  descending: boolean;
}

const REQUESTS = "manylora_adapter_requests_total";

/** Return a row for each adapter of which the server has series. */
export function adapterRows(change: Change): Row[] {
  const rates = (name: string) => change.rateBy(`manylora_adapter_${name}`, "adapter");
  const requests = rates("requests_total");
  const failed = change.rateBy(REQUESTS, "adapter", (labels) => (labels["status"] ?? "") >= "400");
  const output = rates("output_tokens_total");
  const prompt = rates("prompt_tokens_total");
  const cached = rates("cached_tokens_total");
  const means = (name: string) => {
    const sums = rates(`${name}_sum`);
    const counts = rates(`${name}_count`);
    return (of: string) => (counts.get(of) ? (sums.get(of) ?? 0) / counts.get(of)! : null);
  };
  const firstText = means("time_to_first_token_seconds");
  const endToEnd = means("request_seconds");
  const inAll = change.now.by(REQUESTS, "adapter");
  const device = namesOnDevice(change);
  return [...requests].map(([name, rate]) => ({
    name,
    requests: rate,
    failed: failed.get(name) ?? 0,
    output: output.get(name) ?? 0,
    prompt: prompt.get(name) ?? 0,
    cached: prompt.get(name) ? (cached.get(name) ?? 0) / prompt.get(name)! : null,
    firstText: firstText(name),
    endToEnd: endToEnd(name),
    inAll: inAll.get(name) ?? 0,
    onDevice: device.has(name),
  }));
}

/** Names of the adapters on the device; the metric has `name@version`. */
function namesOnDevice(change: Change): Set<string> {
  const written = change.now.label("vllm:lora_requests_info", "running_lora_adapters") ?? "";
  return new Set(written.split(",").map((reference) => reference.split("@", 1)[0] ?? ""));
}

/** Return the rows in an order. What is not known comes last, and names decide between equals. */
export function sorted(rows: readonly Row[], { column, descending }: Sort): Row[] {
  const sign = descending ? -1 : 1;
  return rows.toSorted((one, other) => {
    const [a, b] = [one[column], other[column]];
    if (a === null || b === null) return a === b ? byName(one, other) : a === null ? 1 : -1;
    if (typeof a === "string" || typeof b === "string") return sign * byName(one, other);
    return sign * (Number(a) - Number(b)) || byName(one, other);
  });
}

/** Return the next order when somebody clicks on a column's head: figures begin with the largest. */
export function clicked(sort: Sort, column: Column): Sort {
  if (sort.column === column) return { column, descending: !sort.descending };
  return { column, descending: column !== "name" };
}

function byName(one: Row, other: Row): number {
  return one.name < other.name ? -1 : one.name > other.name ? 1 : 0;
}
