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
export const MAX_CONVERSATIONS = 100;

export class History {
  /** `storage` is null in a browser that keeps nothing for this page. */
  constructor(private readonly storage: Storage | null) {}

  get blocked(): boolean {
    return this.storage === null;
  }

  /**
   * Return what is stored. It is read each time: another tab may have changed it. What counts is which conversations
   * are there; the stored index has their names and order, and may be damaged, or be behind.
   */
  index(): Index {
    const stored = parsed(this.storage?.getItem(INDEX) ?? null);
    const { list, dropped } = isObject(stored) ? stored : {};
    const known = new Map((Array.isArray(list) ? list.filter(isSummary) : []).map((row) => [row.id, row]));
    const ids = this.ids();
    return {
      list: [
        ...[...known.values()].filter(({ id }) => ids.has(id)),
        ...[...ids].filter((id) => !known.has(id)).map((id) => this.summary(id)),
      ],
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
    const text = textOf(conversation, title);
    const index = this.withNew(id, title || conversation.name, text, now);
    const dropped = this.writeWithRoom(id, text, index);
    Object.assign(conversation, { id, title, kept: index.list[0]!.updated });
    return { copied, dropped };
  }

  /** Keep a new conversation as the newest, if there is room beside the others. Throws a RangeError that says why not. */
  add(conversation: Conversation, now = Date.now()): void {
    const text = textOf(conversation);
    const index = this.withNew(conversation.id, conversation.name, text, now);
    const full = whyFull(index.list);
    if (full) throw new RangeError(full);
    try {
      this.write(conversation.id, text, index);
    } catch {
      this.storage?.removeItem(PREFIX + conversation.id);
      throw new RangeError(this.blocked ? NOTHING_KEPT : "this browser has no more room for the page");
    }
    conversation.kept = index.list[0]!.updated;
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
    const text = this.storage!.getItem(PREFIX + id) ?? "";
    return { id, name: conversationOf(id, text)?.name ?? "Cannot be read", updated: 0, size: text.length };
  }

  private withNew(id: string, name: string, text: string, now: number): Index {
    const index = this.index();
    const others = index.list.filter((other) => other.id !== id);
    const updated = Math.max(now, (this.updated(id) ?? 0) + 1);
    return { ...index, list: [{ id, name, updated, size: text.length }, ...others] };
  }

  /** Write a conversation, and drop others until there is room. Returns their names. All stay if it fails all the same. */
  private writeWithRoom(id: string, text: string, index: Index): string[] {
    const names: string[] = [];
    const before: [key: string, text: string | null][] = [
      [PREFIX + id, this.storage?.getItem(PREFIX + id) ?? null],
    ];
    const drop = (): void => {
      const oldest = index.list.pop()!;
      before.push([PREFIX + oldest.id, this.storage!.getItem(PREFIX + oldest.id)]);
      this.storage!.removeItem(PREFIX + oldest.id);
      index.dropped++;
      names.push(oldest.name);
    };
    while (true) {
      try {
        while (index.list.length > 1 && whyFull(index.list)) drop();
        this.write(id, text, index);
        return names;
      } catch (error) {
        if (index.list.length > 1 && isFull(error)) drop();
        else {
          for (const [key, was] of before) {
            if (was === null) this.storage?.removeItem(key);
            else this.storage?.setItem(key, was);
          }
          throw error;
        }
      }
    }
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
