/** The registry as it was seen last, kept while somebody goes from view to view. */

import { ApiError } from "../lib/api";
import { poll } from "../lib/poll";
import { ALL, type Filters, type Order } from "./filters";
import { allPages, usageOf, type Adapter, type Page, type RefusedFolder } from "./registry";
import { DAYS, lastDays, requestsByName } from "./usage";

const SECONDS = 5;
/** A list of more adapters than that is asked for less often. */
const MANY = 500;
const SECONDS_OF_MANY = 20;
const SECONDS_OF_USAGE = 60;

interface AdapterPage extends Page<Adapter> {
  refused: RefusedFolder[];
  store: { bytes: number; quota_bytes: number | null };
}

class Known {
  adapters = $state.raw<Adapter[]>([]);
  refused = $state.raw<RefusedFolder[]>([]);
  store = $state.raw<AdapterPage["store"] | null>(null);
  /** Requests of the last days by name. */
  requests = $state.raw<ReadonlyMap<string, number>>(new Map());
  /** Whether the list has been read. */
  read = $state(false);
  trouble = $state.raw<ApiError | null>(null);
  filters = $state<Filters>({ ...ALL });
  order = $state<Order>("id");
  private listed = -Infinity;
  private used = -Infinity;

  /** Keep the list fresh until the returned function is called. */
  watch(): () => void {
    this.listed = -Infinity;
    return poll(SECONDS, (signal) => this.look(signal));
  }

  /** Read the list anew: it was changed here. */
  async again(): Promise<void> {
    this.listed = -Infinity;
    await this.look();
  }

  private async look(signal?: AbortSignal): Promise<void> {
    const now = performance.now() / 1000;
    try {
      if (this.adapters.length <= MANY || now - this.listed >= SECONDS_OF_MANY) {
        const { items, last } = await allPages<Adapter, AdapterPage>("/v1/adapters", [], signal);
        [this.adapters, this.refused, this.store] = [items, last.refused, last.store];
        [this.read, this.listed] = [true, now];
      }
      if (now - this.used >= SECONDS_OF_USAGE) {
        this.requests = requestsByName(await usageOf(lastDays(DAYS), ["adapter"], undefined, signal));
        this.used = now;
      }
      this.trouble = null;
    } catch (error) {
      if (signal?.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.trouble = error;
    }
  }
}

export const known = new Known();
