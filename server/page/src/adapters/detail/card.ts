/** What is shown of a model card. */

import type { Curves } from "../registry";

/** Return a card's text without the block of YAML at its top, which is for hubs. */
export function cardText(markdown: string): string {
  return markdown.replace(/^---\r?\n[^]*?\r?\n---[ \t]*(?:\r?\n|$)/, "").trim();
}

/** Return the steps of all curves, and the loss of each curve at each step; null where it has none. */
export function lossLines(curves: Curves | null): {
  steps: number[];
  lines: { label: string; values: (number | null)[] }[];
} {
  const named = [
    { label: "training", points: curves?.loss ?? [] },
    { label: "evaluation", points: curves?.evaluation ?? [] },
  ].filter(({ points }) => points.length);
  const all = named.flatMap(({ points }) => points.map(([step]) => step));
  const steps = [...new Set(all)].sort((one, other) => one - other);
  const lines = named.map(({ label, points }) => {
    const values = new Map(points);
    return { label, values: steps.map((step) => values.get(step) ?? null) };
  });
  return { steps, lines };
}
