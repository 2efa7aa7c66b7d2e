/** Who answers in a column: the base, one name, or a mix of adapters. */

export interface Entry {
  /** An adapter, version, alias or address; "" or the base's name is the base. */
  name: string;
  weight: number;
}

/** The adapters of a mix. None is the base; one with weight 1 is just that name. */
export type Target = Entry[];

/** Return the request's fields that name a target. */
export function targetFields(target: Target, base: string): { model: string; adapter?: Entry[] } {
  const entries = named(target, base);
  const [first] = entries;
  if (!first) return { model: base };
  if (entries.length === 1 && first.weight === 1) return { model: first.name };
  return { model: base, adapter: entries.map(({ name, weight }) => ({ name, weight })) };
}

/** Return a target in words: "legal", or "0.7 legal + 0.3 german". */
export function targetLabel(target: Target, base: string): string {
  const entries = named(target, base);
  if (!entries.length) return base;
  if (entries.length === 1 && entries[0]!.weight === 1) return entries[0]!.name;
  return entries.map(({ name, weight }) => `${weight} ${name}`).join(" + ");
}

function named(target: Target, base: string): Target {
  return target
    .map((entry) => ({ ...entry, name: entry.name.trim() }))
    .filter(({ name }) => name && name !== base);
}
