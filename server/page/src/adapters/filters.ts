/** Which adapters of a list are shown, and in which order. */

import type { Adapter } from "./registry";

export type State = "any" | "ready" | "refused" | "inactive";
export type Order = "id" | "rank" | "size_bytes" | "requests" | "created";

export interface Filters {
  /** Words that the name, an alias or the source must have, all of them. */
  words: string;
  state: State;
  residency: "any" | "device" | "host" | "disk";
  /** Where it came from: a kind that `originOf` returns. */
  origin: string;
  pinned: boolean;
  aliased: boolean;
}

export const ALL: Filters = {
  words: "",
  state: "any",
  residency: "any",
  origin: "any",
  pinned: false,
  aliased: false,
};

/** Return the kind of place that an adapter came from: `upload`, `folder`, `hf`, `s3`, ...; "" if it is not known. */
export function originOf(source: string | null | undefined): string {
  return source ? (/^[a-z0-9+]+(?=:\/\/)|^\w+/i.exec(source)?.[0] ?? "").toLowerCase() : "";
}

export function stateOf(adapter: Adapter): Exclude<State, "any"> {
  if (adapter.active === null) return "inactive";
  return adapter.status === "refused" ? "refused" : "ready";
}

/** Return the adapters that pass. */
export function matching(adapters: readonly Adapter[], filters: Filters): Adapter[] {
  const words = filters.words.toLowerCase().split(/\s+/).filter(Boolean);
  return adapters.filter((adapter) => {
    const text = [adapter.id, ...adapter.aliases, adapter.source ?? ""].join("\n").toLowerCase();
    return (
      words.every((word) => text.includes(word)) &&
      (filters.state === "any" || stateOf(adapter) === filters.state) &&
      (filters.residency === "any" || adapter.residency === filters.residency) &&
      (filters.origin === "any" || originOf(adapter.source) === filters.origin) &&
      (!filters.pinned || adapter.pinned) &&
      (!filters.aliased || adapter.aliases.length > 0)
    );
  });
}

/** Return the adapters in an order: names ascend, numbers descend, and equal ones are by name. */
export function ordered(
  adapters: readonly Adapter[],
  order: Order,
  requests: ReadonlyMap<string, number>,
): Adapter[] {
  if (order === "id") return [...adapters]; // as the server lists them
  const value = (adapter: Adapter): number =>
    order === "requests" ? (requests.get(adapter.id) ?? 0) : (adapter[order] ?? -1);
  return [...adapters].sort((one, other) => value(other) - value(one));
}
