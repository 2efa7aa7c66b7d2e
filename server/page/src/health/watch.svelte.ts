/** Looks at `/metrics` and `/readyz` every two seconds while somebody watches; what it saw stays until a reload. */

import { ApiError, send } from "../lib/api";
import { poll } from "../lib/poll";
import { SECTIONS } from "./figures";
import { History, type Points } from "./history";
import { parseScrape, type Change, type Scrape } from "../lib/scrape";

const SECONDS = 2;

/** Return what tells a figure from those of other charts. */
export function keyOf(chart: string, figure: string): string {
  return `${chart}: ${figure}`;
}

const FIGURES = SECTIONS.flatMap(({ charts }) =>
  charts.flatMap(({ title, figures }) => figures.map(({ label, of }) => ({ key: keyOf(title, label), of }))),
);

class Watch {
  private history = new History(FIGURES);
  points = $state.raw<Points>(this.history.points);
  /** What happened in the last minute; null before the second look. */
  lately = $state.raw<Change | null>(null);
  look = $state.raw<Scrape | null>(null);
  /** The word of `/readyz`: "ready", or why not; null before the first answer. */
  ready = $state<string | null>(null);
  /** Why there are no newer figures. */
  trouble = $state("");
  /** Seconds after which the server asks to come back; null if it does not say. */
  retryAfter = $state<number | null>(null);

  /** Begin to look; the returned function ends that. */
  start(): () => void {
    return poll(SECONDS, async (signal) => {
      try {
        await Promise.all([this.askReady(signal), this.askMetrics(signal)]);
        this.trouble = "";
      } catch (error) {
        if (signal.aborted) return;
        this.trouble = error instanceof Error ? error.message : String(error);
        this.retryAfter = error instanceof ApiError ? error.retryAfter : null;
      }
    });
  }

  private async askMetrics(signal: AbortSignal): Promise<void> {
    const text = await (await send("GET", "/metrics", { signal })).text();
    this.look = parseScrape(text, (performance.timeOrigin + performance.now()) / 1000);
    this.history.add(this.look);
    this.points = this.history.points;
    this.lately = this.history.lately;
  }

  /** Not `send`: a server that is not ready answers with an error status, and that is an answer here. */
  private async askReady(signal: AbortSignal): Promise<void> {
    try {
      const response = await fetch("/readyz", { signal, cache: "no-store" });
      this.ready = ((await response.json()) as { status: string }).status;
    } catch (error) {
      if (!signal.aborted) this.ready = "no answer";
      else throw error;
    }
  }
}

let watch: Watch | undefined;

/** Return the page's watch. It outlives the view: who comes back sees the charts go on. */
export function useWatch(): Watch {
  watch ??= new Watch();
  return watch;
}
