/** What the server says of its registry: docs/registry.md. */

import { call, pathOf, send } from "../lib/api";
import type { UsageRow } from "./usage";

export interface VersionFields {
  content: string | null;
  rank: number | null;
  /** Number of layers that it changes. */
  targets: number | null;
  size_bytes: number | null;
  residency: "device" | "host" | "disk" | null;
  status: "ready" | "refused" | null;
  /** Why this server cannot serve it. */
  reason?: string;
  /** Where it came from, as in the receipt. */
  source?: string | null;
}

export interface Adapter extends VersionFields {
  id: string;
  created: number;
  active: number | null;
  pinned: boolean;
  aliases: string[];
  versions: number[];
}

export interface Version extends VersionFields {
  version: number;
  created: number;
}

export interface Receipt {
  checked: number;
  base_fingerprint: string;
  trained_on?: string | null;
  base_mismatch_allowed?: boolean;
  unknown_fields_allowed?: string[];
  probe?: {
    prompt_tokens: number;
    max_logit_change: number;
    kl: number;
    top_token_changed: boolean;
    seconds: number;
  };
  source: string;
  taken_from?: string;
  other_adapters?: string[];
  ignored_files?: string[];
  ignored_count?: number;
}

export interface Curves {
  loss?: [number, number][];
  evaluation?: [number, number][];
  learning_rate?: [number, number][];
}

/** What our trainer wrote beside the weights. */
export interface Card {
  markdown: string | null;
  manifest: Record<string, unknown> | null;
  curves: Curves | null;
  samples: unknown[] | null;
}

export interface AdapterDetails extends Adapter {
  version_details?: Version[];
  receipt: Receipt | null;
  card?: Card | null;
}

export interface RefusedFolder {
  name: string;
  source: string;
  reason: string;
  since: number;
}

export interface Target {
  adapter: string;
  weight: number;
  /** The version that it means now; null if that was removed. */
  serves?: string | null;
}

export interface Alias {
  id: string;
  created: number;
  targets: Target[];
}

/** Something with its ETag: a change says that it is about this state, and fails if there is another by then. */
export interface Known<T> {
  value: T;
  etag: string;
}

export interface Page<T> {
  data: T[];
  has_more: boolean;
}

const PAGE = 1000;

/** Return all items of a list, page by page, and the last page for what else it says. */
export async function allPages<T extends { id: string }, P extends Page<T> = Page<T>>(
  path: string,
  query: [string, string][] = [],
  signal?: AbortSignal,
): Promise<{ items: T[]; last: P }> {
  const items: T[] = [];
  while (true) {
    const words = new URLSearchParams([...query, ["limit", String(PAGE)]]);
    const after = items.at(-1)?.id;
    if (after !== undefined) words.set("after", after);
    const last = await call<P>("GET", `${path}?${words}`, { signal });
    items.push(...last.data);
    if (!last.has_more) return { items, last };
  }
}

/** Return one thing with its ETag. */
export async function get<T>(path: string, signal?: AbortSignal): Promise<Known<T>> {
  return known<T>(await send("GET", path, { signal }));
}

/** Change something that is as it was shown. Throws ApiError; its status is 412 if somebody else changed it. */
export async function change<T>(
  method: string,
  path: string,
  etag: string,
  body?: unknown,
): Promise<Known<T>> {
  return known<T>(await send(method, path, { body, headers: { "if-match": etag } }));
}

async function known<T>(response: Response): Promise<Known<T>> {
  return { value: (await response.json()) as T, etag: response.headers.get("etag") ?? "" };
}

export const adapterPath = (reference: string): string => `/v1/adapters/${pathOf(reference)}`;
export const aliasPath = (name: string): string => `/v1/aliases/${pathOf(name)}`;

/** Return the rows of the last days, summed over keys. */
export async function usageOf(
  days: readonly string[],
  groupBy: ("day" | "adapter")[],
  adapter?: string,
  signal?: AbortSignal,
): Promise<UsageRow[]> {
  const query: [string, string][] = groupBy.map((by) => ["group_by", by]);
  query.push(["start", days[0]!], ["end", days.at(-1)!]);
  if (adapter !== undefined) query.push(["adapter", adapter]);
  return (await allPages<UsageRow>("/v1/usage", query, signal)).items;
}
