/** Weights of an alias's targets as shares of 100. */

import type { Target } from "../registry";

/** Return the share of each target in percent, rounded to a tenth. */
export function sharesOf(targets: readonly Target[]): number[] {
  const sum = targets.reduce((all, { weight }) => all + weight, 0);
  return targets.map(({ weight }) => (sum ? Math.round((1000 * weight) / sum) / 10 : 0));
}

/** Return targets with the share of the one at `place` set to `share` percent; the others keep their proportions. */
export function withShare(targets: readonly Target[], place: number, share: number): Target[] {
  const others = targets.reduce((sum, { weight }, at) => (at === place ? sum : sum + weight), 0);
  const rest = 100 - share;
  return targets.map((target, at) => {
    if (at === place) return { ...target, weight: share };
    const part = others ? target.weight / others : 1 / (targets.length - 1);
    return { ...target, weight: Math.round(rest * part * 1000) / 1000 };
  });
}

/** Return targets of which one has all; the others stay, with nothing, so that the way back is a click, too. */
export function promoted(targets: readonly Target[], place: number): Target[] {
  return targets.map((target, at) => ({ ...target, weight: at === place ? 100 : 0 }));
}

/** Return why the server would not take these targets; "" if it would, as far as one can see here. */
export function faultOf(targets: readonly Target[]): string {
  const names = targets.map(({ adapter }) => adapter.trim());
  if (!names.length || names.some((name) => !name)) return "Each target needs a name.";
  if (new Set(names).size < names.length) return "A target is named twice.";
  if (!targets.some(({ weight }) => weight > 0)) return "At least one target needs a share above 0.";
  return "";
}
