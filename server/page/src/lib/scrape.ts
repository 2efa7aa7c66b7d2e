/** One answer of `/metrics`, and what changed between two. The terminal's twin is adapters/cli/top/scrape.py. */

export type Labels = Readonly<Record<string, string>>;

export interface Series {
  labels: Labels;
  value: number;
}

/** The series of a server at one moment. */
export class Scrape {
  constructor(
    /** Unix time in seconds, of a clock that never jumps. */
    readonly at: number,
    /** Name of a sample, as `manylora_request_seconds_bucket`, -> its series. */
    readonly series: ReadonlyMap<string, readonly Series[]>,
  ) {}

  has(name: string): boolean {
    return this.series.has(name);
  }

  /** Return the sum of the series with these labels; null if the server has no such metric. */
  value(name: string, labels: Labels = {}): number | null {
    const series = this.series.get(name);
    if (!series) return null;
    return series.reduce((sum, one) => (has(one.labels, labels) ? sum + one.value : sum), 0);
  }

  /** Return the sums of a metric's series by a label, of those that `keep` lets pass. */
  by(name: string, label: string, keep: (labels: Labels) => boolean = () => true): Map<string, number> {
    const sums = new Map<string, number>();
    for (const { labels, value } of this.series.get(name) ?? []) {
      const of = labels[label] ?? "";
      if (keep(labels)) sums.set(of, (sums.get(of) ?? 0) + value);
    }
    return sums;
  }

  /** Return a label of a metric that has one series; null if the server has no such metric. */
  label(name: string, label: string): string | null {
    return this.series.get(name)?.[0]?.labels[label] ?? null;
  }
}

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$/;
const LABEL = /\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(,|$)/y;
const SPECIAL: Record<string, number> = { "+Inf": Infinity, Inf: Infinity, "-Inf": -Infinity, NaN: NaN };

/** Parse Prometheus' text format. Throws an Error that has the line for anything else. */
export function parseScrape(text: string, at: number): Scrape {
  const series = new Map<string, Series[]>();
  for (const line of text.split("\n")) {
    if (!line.trim() || line.startsWith("#")) continue;
    const [, name, labels, written] = SAMPLE.exec(line) ?? [];
    const value = written === undefined ? NaN : (SPECIAL[written] ?? Number(written));
    if (name === undefined || (Number.isNaN(value) && written !== "NaN")) throw notPrometheus(line);
    const one = { labels: labels ? labelsOf(labels, line) : {}, value };
    const others = series.get(name);
    if (others) others.push(one);
    else series.set(name, [one]);
  }
  return new Scrape(at, series);
}

function labelsOf(written: string, line: string): Labels {
  const labels: Record<string, string> = {};
  LABEL.lastIndex = 0;
  while (LABEL.lastIndex < written.length) {
    const [, label, value] = LABEL.exec(written) ?? [];
    if (label === undefined || value === undefined) throw notPrometheus(line);
    labels[label] = value.replace(/\\(.)/g, (_, sign: string) => (sign === "n" ? "\n" : sign));
  }
  return labels;
}

function notPrometheus(line: string): Error {
  return new Error(`/metrics is not in Prometheus' format: ${line.slice(0, 200)}`);
}

/** What happened between two scrapes. A counter that is lower than before began again: its server was restarted. */
export class Change {
  constructor(
    readonly before: Scrape,
    readonly now: Scrape,
  ) {}

  get seconds(): number {
    return this.now.at - this.before.at;
  }

  /** Return how much a counter grew; null if the server has no such metric. */
  grown(name: string, labels: Labels = {}): number | null {
    const now = this.now.value(name, labels);
    return now === null ? null : growth(this.before.value(name, labels) ?? 0, now);
  }

  /** Return how much a counter grew per second; null if the server has no such metric. */
  rate(name: string, labels: Labels = {}): number | null {
    const grown = this.grown(name, labels);
    return grown === null || this.seconds <= 0 ? null : grown / this.seconds;
  }

  /** Return the rates of a counter by a label, of the series that `keep` lets pass. */
  rateBy(name: string, label: string, keep?: (labels: Labels) => boolean): Map<string, number> {
    const before = this.before.by(name, label, keep);
    const rates = new Map<string, number>();
    for (const [value, now] of this.now.by(name, label, keep)) {
      rates.set(value, this.seconds > 0 ? growth(before.get(value) ?? 0, now) / this.seconds : 0);
    }
    return rates;
  }

  /** Return the mean of what a histogram or summary observed; null if that was nothing. */
  mean(name: string, labels: Labels = {}): number | null {
    return ratio(this.grown(`${name}_sum`, labels), this.grown(`${name}_count`, labels));
  }

  /**
   * Return a quantile of what a histogram observed, 0 < `share` < 1; null if that was nothing. Straight within a
   * bucket, as Prometheus' `histogram_quantile`; the last bound for what lies above it.
   */
  quantile(name: string, share: number, labels: Labels = {}): number | null {
    const rates = this.rateBy(`${name}_bucket`, "le", (found) => has(found, labels));
    const buckets = [...rates].map(([le, rate]) => [SPECIAL[le] ?? Number(le), rate] as const);
    buckets.sort(([one], [other]) => one - other);
    const all = buckets.at(-1)?.[1];
    if (!all) return null;
    const wanted = share * all;
    let lower = 0;
    let below = 0;
    for (const [bound, rate] of buckets) {
      if (rate >= wanted) {
        return bound === Infinity ? lower : lower + ((bound - lower) * (wanted - below)) / (rate - below);
      }
      lower = bound;
      below = rate;
    }
    return lower;
  }
}

function has(found: Labels, wanted: Labels): boolean {
  return Object.entries(wanted).every(([label, value]) => found[label] === value);
}

function growth(before: number, now: number): number {
  return now < before ? now : now - before;
}

/** Return a part of a whole; null if one of them is not known, or the whole is nothing. */
export function ratio(part: number | null, whole: number | null): number | null {
  return part === null || !whole ? null : part / whole;
}
