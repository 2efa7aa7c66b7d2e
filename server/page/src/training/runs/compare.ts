/** Several runs side by side. */

import type { Curve, Settings } from "./run";

/** A line of a chart. */
export interface Line {
  label: string;
  values: (number | null)[];
}

/** How many runs fit side by side. */
export const MOST = 4;

/** Return curves over a common axis of steps, each with a label. */
export function overSteps(curves: readonly (readonly [label: string, curve: Curve])[]): {
  x: number[];
  lines: Line[];
} {
  const steps = new Set(curves.flatMap(([, curve]) => curve.map(([step]) => step)));
  const x = [...steps].sort((one, other) => one - other);
  const lines = curves.map(([label, curve]) => {
    const values = new Map(curve);
    return { label, values: x.map((step) => values.get(step) ?? null) };
  });
  return { x, lines };
}

/** A setting of several runs, as texts. */
export interface SettingRow {
  name: string;
  values: string[];
  /** Whether the runs do not agree. */
  differs: boolean;
}

/** Return the settings of runs, those that differ first, each kind by name. */
export function settingRows(settings: readonly (Settings | null)[]): SettingRow[] {
  const names = [...new Set(settings.flatMap((one) => Object.keys(one ?? {})))].sort();
  const rows = names.map((name) => {
    const values = settings.map((one) => valueText(one?.[name]));
    return { name, values, differs: values.some((value) => value !== values[0]) };
  });
  return [...rows.filter((row) => row.differs), ...rows.filter((row) => !row.differs)];
}

/** A setting that nobody set. */
export const UNSET = "–";

/** Return a setting's value as a text. */
export function valueText(value: unknown): string {
  if (value === null || value === undefined) return UNSET;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(valueText).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Return the names of the runs that an address asks to lay side by side. Names have no commas. */
export function namesIn(query: URLSearchParams): string[] {
  const names = (query.get("compare") ?? "").split(",").filter(Boolean);
  return [...new Set(names)].slice(0, MOST);
}
