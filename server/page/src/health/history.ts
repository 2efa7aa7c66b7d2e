/** The last ten minutes of a server's figures, and the looks of the last minute. */

import { Change, type Scrape } from "../lib/scrape";

/** Seconds of the charts. */
export const SHOWN = 600;
/** Seconds over which rates and latencies of one point are taken, as `manylora top` does. */
export const WINDOW = 10;
/** Seconds that sentences and the table of adapters are about. */
export const LATELY = 60;
/** Without a look for so many seconds, what came before is another story: the charts have a gap. */
export const GAP = 15;

/** A figure of a point; `key` tells it from all others. */
export interface Measured {
  key: string;
  of: (change: Change) => number | null;
}

/** Points of charts: for each figure one value at each time; null where there is none. */
export interface Points {
  times: readonly number[];
  values: ReadonlyMap<string, readonly (number | null)[]>;
}

export class History {
  private looks: Scrape[] = [];
  private shown: Points;

  constructor(private readonly figures: readonly Measured[]) {
    this.shown = { times: [], values: new Map(figures.map(({ key }) => [key, []])) };
  }

  get points(): Points {
    return this.shown;
  }

  /** What happened in the last minute, or since the server's start or the first look; null before the second look. */
  get lately(): Change | null {
    return this.since(LATELY);
  }

  /** Take one more look. The first one, and the first one of a restarted server, is a gap in the charts. */
  add(look: Scrape): void {
    const last = this.looks.at(-1);
    if (last && (look.at - last.at > GAP || restarted(last, look))) this.looks = [];
    this.looks = [...this.looks.filter((one) => one.at >= look.at - LATELY), look];
    const change = this.since(WINDOW);
    const times = [...this.shown.times, look.at];
    const drop = times.findIndex((at) => at >= look.at - SHOWN);
    const values = this.figures.map(({ key, of }) => {
      const line = [...(this.shown.values.get(key) ?? []), change && of(change)];
      return [key, line.slice(drop)] as const;
    });
    this.shown = { times: times.slice(drop), values: new Map(values) };
  }

  private since(seconds: number): Change | null {
    const now = this.looks.at(-1);
    // Looks come a little more than their interval apart: half a second more is the same window.
    const before = this.looks.find((one) => now && one.at >= now.at - seconds - 0.5);
    return now && before && before !== now ? new Change(before, now) : null;
  }
}

/** Whether a server has started anew between two looks. */
export function restarted(before: Scrape, now: Scrape): boolean {
  const started = "process_start_time_seconds";
  return before.value(started) !== now.value(started);
}
