/** One adapter as the page knows it: its versions and their receipts, and the changes that somebody makes to it. */

import { ApiError } from "../../lib/api";
import { known as registry } from "../known.svelte";
import { poll } from "../../lib/poll";
import {
  adapterPath,
  change,
  get,
  type AdapterDetails,
  type Card,
  type Known,
  type Receipt,
} from "../registry";

const SECONDS = 5;

export class ShownAdapter {
  known = $state.raw<Known<AdapterDetails> | null>(null);
  /** Why it cannot be shown. */
  missing = $state.raw<ApiError | null>(null);
  /** Why the last change failed. */
  trouble = $state.raw<ApiError | null>(null);
  /** What was done last, for the live region. */
  done = $state("");
  busy = $state(false);
  private receipts = $state.raw<ReadonlyMap<string, Receipt | null>>(new Map());
  private cards = $state.raw<ReadonlyMap<string, Card | null>>(new Map());

  constructor(readonly name: string) {}

  /** Keep it fresh until the returned function is called. */
  watch(): () => void {
    return poll(SECONDS, (signal) => this.look(signal));
  }

  /** Return the receipt of a version if it has been read; `read` asks for it. */
  receipt(version: number): Receipt | null | undefined {
    return this.receipts.get(`${this.name}@${version}`);
  }

  card(version: number): Card | null | undefined {
    return this.cards.get(`${this.name}@${version}`);
  }

  /** Read the receipt and the card of a version, once: neither ever changes for this base. */
  async read(version: number, signal: AbortSignal): Promise<void> {
    const reference = `${this.name}@${version}`;
    if (this.receipts.has(reference)) return;
    try {
      const { value } = await get<AdapterDetails>(`${adapterPath(reference)}?include=card`, signal);
      this.receipts = new Map(this.receipts).set(reference, value.receipt);
      this.cards = new Map(this.cards).set(reference, value.card ?? null);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.trouble = error;
    }
  }

  activate(version: number): Promise<boolean> {
    return this.change("POST", `${adapterPath(this.name)}/activate`, `@${version} is active now.`, {
      version,
    });
  }

  pin(pinned: boolean): Promise<boolean> {
    const said = pinned ? "Pinned: it stays on the device." : "Not pinned any more.";
    return this.change("POST", `${adapterPath(this.name)}/pin`, said, { pinned });
  }

  /** Remove a version, or the whole adapter. `etag` is that of what the person who confirmed it saw. */
  remove(version: number | null, etag: string): Promise<boolean> {
    const reference = version === null ? this.name : `${this.name}@${version}`;
    return this.change("DELETE", adapterPath(reference), `${reference} is deleted.`, undefined, etag);
  }

  private async change(
    method: string,
    path: string,
    said: string,
    body?: unknown,
    etag: string = this.known?.etag ?? "",
  ): Promise<boolean> {
    this.busy = true;
    this.done = "";
    try {
      await change(method, path, etag, body);
      this.trouble = null;
      this.done = said;
      return true;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.trouble = error;
      return false;
    } finally {
      await Promise.all([this.look(), registry.again()]);
      this.busy = false;
    }
  }

  private async look(signal?: AbortSignal): Promise<void> {
    try {
      this.known = await get<AdapterDetails>(adapterPath(this.name), signal);
      this.missing = null;
    } catch (error) {
      if (signal?.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.missing = error;
      if (error.status === 404) this.known = null;
    }
  }
}
