/** Conversations kept in this browser: the newest, as many as fit. */

import { count } from "../../lib/format";
import { newId } from "../../lib/ids";
import { isNumber, isObject, isText } from "../../lib/shapes";
import type { Conversation } from "../chat/conversation.svelte";
import { conversationOf, MAX_CHARACTERS, parsed, textOf } from "./stored";

export interface Summary {
  id: string;
  name: string;
  /** Unix time in milliseconds of the last change; 0 if it is not known. It tells one state of a conversation from another. */
  updated: number;
  /** Length of what is stored, in characters. */
  size: number;
}

interface Index {
  /** The newest first. */
  list: Summary[];
  /** How many were dropped to make room. */
  dropped: number;
}

/** What came of keeping a conversation. */
interface Saved {
  /** Whether it is kept as another one now, because what was kept of it was changed meanwhile. */
  copied: boolean;
  /** Names of the conversations that were dropped to make room. */
  dropped: string[];
}

export const PREFIX = "manylora.talk.";
const INDEX = `${PREFIX}index`;
/** Written for a moment, to see how much room there is. */
const ROOM = "manylora.room";
export const MAX_CONVERSATIONS = 100;

export class History {
  /** `storage` is null in a browser that keeps nothing for this page. */
  constructor(private readonly storage: Storage | null) {}

  get blocked(): boolean {
    return this.storage === null;
  }

  /**
   * Return what is stored. It is read each time: another tab may have changed it. What counts is which conversations
   * are there; the stored index has their names and order, and may be damaged, or be behind. What it lacks is read from
   * the conversations themselves, and stands by its age.
   */
  index(): Index {
    const stored = parsed(this.storage?.getItem(INDEX) ?? null);
    const { list, dropped } = isObject(stored) ? stored : {};
    const known = new Map((Array.isArray(list) ? list.filter(isSummary) : []).map((row) => [row.id, row]));
    const ids = this.ids();
    const rows = [...known.values()].filter(({ id }) => ids.has(id));
    const lacking = [...ids].filter((id) => !known.has(id)).map((id) => this.summary(id));
    return {
      list: lacking.length ? [...rows, ...lacking].sort((one, other) => other.updated - one.updated) : rows,
      dropped: isNumber(dropped) ? dropped : 0,
    };
  }

  /** Return a conversation; null if it is not kept, or cannot be read. */
  load(id: string): Conversation | null {
    const text = this.storage?.getItem(PREFIX + id) ?? null;
    const found = text === null ? null : conversationOf(id, text);
    if (found) found.kept = this.updated(id) ?? 0;
    return found;
  }

  /** Whether what is kept of a conversation is what it was when it was read or kept here; null if nothing is. */
  current({ id, kept }: Conversation): boolean | null {
    const updated = this.updated(id);
    return updated === null ? null : updated === kept;
  }

  /**
   * Keep a conversation as the newest. Older ones are dropped where there is no room. If it fails, nothing is changed.
   * What another tab has kept of it meanwhile stays: this one is then kept as a copy.
   */
  save(conversation: Conversation, now = Date.now()): Saved {
    const copied = this.current(conversation) === false;
    const [id, title] = copied
      ? [newId(), `${conversation.name} (copy)`]
      : [conversation.id, conversation.title];
    const updated = this.next(id, now);
    const text = textOf(conversation, updated, title);
    const index = this.withNew({ id, name: title || conversation.name, updated, size: text.length });
    const dropped = this.writeWithRoom(id, text, index);
    Object.assign(conversation, { id, title, kept: updated });
    return { copied, dropped };
  }

  /** Keep a new conversation as the newest, if there is room beside the others. Throws a RangeError that says why not. */
  add(conversation: Conversation, now = Date.now()): void {
    const { id, name } = conversation;
    const updated = this.next(id, now);
    const text = textOf(conversation, updated);
    const index = this.withNew({ id, name, updated, size: text.length });
    const full = whyFull(index.list);
    if (full) throw new RangeError(full);
    try {
      this.write(id, text, index);
    } catch {
      this.storage?.removeItem(PREFIX + id);
      throw new RangeError(this.blocked ? NOTHING_KEPT : "this browser has no more room for the page");
    }
    conversation.kept = updated;
  }

  remove(id: string): void {
    this.storage?.removeItem(PREFIX + id);
    this.storage?.setItem(INDEX, JSON.stringify(this.index()));
  }

  /** Forget all of them, and what was dropped. */
  clear(): void {
    for (const id of this.ids()) this.storage?.removeItem(PREFIX + id);
    this.storage?.removeItem(INDEX);
  }

  private ids(): Set<string> {
    const { storage } = this;
    const keys = Array.from({ length: storage?.length ?? 0 }, (_, place) => storage!.key(place) ?? "");
    return new Set(
      keys.filter((key) => key.startsWith(PREFIX) && key !== INDEX).map((key) => key.slice(PREFIX.length)),
    );
  }

  private updated(id: string): number | null {
    return this.index().list.find((row) => row.id === id)?.updated ?? null;
  }

  /** Return what can be said of a conversation that the index does not have. */
  private summary(id: string): Summary {
    const text = this.textAt(PREFIX + id);
    const found = conversationOf(id, text);
    return { id, name: found?.name ?? "Cannot be read", updated: found?.kept ?? 0, size: text.length };
  }

  private textAt(key: string): string {
    return this.storage?.getItem(key) ?? "";
  }

  /** Return the time of the next state of a conversation: later than that of the last one, whatever the clock says. */
  private next(id: string, now: number): number {
    return Math.max(now, (this.updated(id) ?? 0) + 1);
  }

  private withNew(row: Summary): Index {
    const index = this.index();
    return { ...index, list: [row, ...index.list.filter(({ id }) => id !== row.id)] };
  }

  /** Write a conversation, and drop others until there is room. Returns their names. All stay if it fails all the same. */
  private writeWithRoom(id: string, text: string, index: Index): string[] {
    const names: string[] = [];
    const before: [key: string, text: string | null][] = [
      [PREFIX + id, this.storage?.getItem(PREFIX + id) ?? null],
    ];
    let spare: Summary[] | undefined;
    const drop = (why: unknown): void => {
      spare ??= this.spare(id, text, index);
      const oldest = spare.pop();
      if (!oldest) throw why;
      index.list = index.list.filter((row) => row !== oldest);
      before.push([PREFIX + oldest.id, this.storage!.getItem(PREFIX + oldest.id)]);
      this.storage!.removeItem(PREFIX + oldest.id);
      index.dropped++;
      names.push(oldest.name);
    };
    try {
      while (true) {
        for (let full = whyFull(index.list); full; full = whyFull(index.list)) drop(new RangeError(full));
        try {
          this.write(id, text, index);
          return names;
        } catch (error) {
          if (!isFull(error)) throw error;
          drop(error);
        }
      }
    } catch (error) {
      for (const [key, was] of before) {
        if (was === null) this.storage?.removeItem(key);
        else this.storage?.setItem(key, was);
      }
      throw error;
    }
  }

  /**
   * Return the others that may be dropped for a conversation. Throws if it has no room even without them: dropping them
   * and bringing them back would tell other tabs that they were deleted.
   */
  private spare(id: string, text: string, index: Index): Summary[] {
    // What cannot be read stays until somebody deletes it: another version of the page may read it.
    const spare = index.list.filter(
      (row) => row.id !== id && conversationOf(row.id, this.textAt(PREFIX + row.id)),
    );
    const list = index.list.filter((row) => !spare.includes(row));
    const full = whyFull(list);
    if (full) throw new RangeError(`${full}. Delete those that cannot be read`);
    const keys = [INDEX, PREFIX + id, ...spare.map((row) => PREFIX + row.id)];
    const room = keys.reduce((sum, key) => sum + this.textAt(key).length, 0);
    const lacking = text.length + JSON.stringify({ ...index, list }).length - room;
    if (lacking > 0) {
      this.storage!.setItem(ROOM, "x".repeat(lacking));
      this.storage!.removeItem(ROOM);
    }
    return spare;
  }

  private write(id: string, text: string, index: Index): void {
    if (!this.storage) throw new Error(NOTHING_KEPT);
    this.storage.setItem(PREFIX + id, text);
    this.storage.setItem(INDEX, JSON.stringify(index));
  }
}

const NOTHING_KEPT = "the browser keeps nothing for this page: its settings forbid it";

/** Whether an error of a browser's storage means that there is no room. */
export function isFull(error: unknown): boolean {
  return error instanceof DOMException && /quota/i.test(error.name);
}

/** Return why so many are not kept; "" if they are. */
function whyFull(list: Summary[]): string {
  if (list.length > MAX_CONVERSATIONS) return `${MAX_CONVERSATIONS} conversations are kept, and no more`;
  const size = list.reduce((sum, summary) => sum + summary.size, 0);
  return size > MAX_CHARACTERS ? `${count(MAX_CHARACTERS)} characters are kept, and no more` : "";
}

function isSummary(value: unknown): value is Summary {
  return (
    isObject(value) &&
    isText(value.id) &&
    isText(value.name) &&
    isNumber(value.updated) &&
    isNumber(value.size)
  );
}
