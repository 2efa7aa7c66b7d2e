/** Conversations kept in this browser: the newest, as many as fit. */

import { count } from "../../lib/format";
import { newAnswer, type Answer } from "../chat/answer";
import { Conversation, Reply, Step, Turn } from "../chat/conversation.svelte";
import { noOptions, type Options } from "../request/options";
import type { Target } from "../request/target";

export interface Summary {
  id: string;
  name: string;
  /** Unix time in milliseconds. */
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

/** What is stored of a conversation. The probabilities of tokens are not: they would fill the store. */
interface Stored {
  title: string;
  targets: Target[];
  options: Options;
  turns: { prompt: string; replies: (StoredStep[] | null)[] }[];
}

interface StoredStep {
  answer: Partial<Answer>;
  results: Record<string, string>;
}

const PREFIX = "manylora.talk.";
const INDEX = `${PREFIX}index`;
export const MAX_CONVERSATIONS = 100;
/** Browsers keep 5 million characters for a site. */
export const MAX_CHARACTERS = 3_000_000;

/** A conversation is too long, however few others are kept. */
export class TooLong extends RangeError {
  constructor(length: number) {
    super(`${count(length)} characters are too many to be kept: ${count(MAX_CHARACTERS)} at most`);
  }
}

export class History {
  constructor(private readonly storage: Pick<Storage, "getItem" | "setItem" | "removeItem">) {}

  /** Return what is stored. It is read each time: another tab may have changed it. */
  index(): Index {
    return { list: [], dropped: 0, ...parsed<Partial<Index>>(this.storage.getItem(INDEX)) };
  }

  load(id: string): Conversation | null {
    const stored = parsed<Stored>(this.storage.getItem(PREFIX + id));
    return stored && revived(id, stored);
  }

  /** Keep a conversation as the newest. Older ones are dropped where there is no room. */
  save(conversation: Conversation, now = Date.now()): void {
    const text = textOf(conversation);
    const index = this.withNew(conversation, text, now);
    while (index.list.length > 1 && whyFull(index.list)) this.drop(index);
    while (true) {
      try {
        this.write(conversation.id, text, index);
        return;
      } catch (error) {
        if (index.list.length <= 1) throw error; // it does not fit alone
        this.drop(index);
      }
    }
  }

  /** Keep a new conversation as the newest, if there is room beside the others. Throws a RangeError that says why not. */
  add(conversation: Conversation, now = Date.now()): void {
    const text = textOf(conversation);
    const index = this.withNew(conversation, text, now);
    const full = whyFull(index.list);
    if (full) throw new RangeError(full);
    try {
      this.write(conversation.id, text, index);
    } catch {
      this.storage.removeItem(PREFIX + conversation.id);
      throw new RangeError("this browser has no more room for the page");
    }
  }

  remove(id: string): void {
    this.storage.removeItem(PREFIX + id);
    const index = this.index();
    index.list = index.list.filter((other) => other.id !== id);
    this.storage.setItem(INDEX, JSON.stringify(index));
  }

  /** Forget all of them, and what was dropped. */
  clear(): void {
    for (const { id } of this.index().list) this.storage.removeItem(PREFIX + id);
    this.storage.removeItem(INDEX);
  }

  private withNew({ id, name }: Conversation, text: string, now: number): Index {
    const index = this.index();
    const others = index.list.filter((other) => other.id !== id);
    return { ...index, list: [{ id, name, updated: now, size: text.length }, ...others] };
  }

  private write(id: string, text: string, index: Index): void {
    this.storage.setItem(PREFIX + id, text);
    this.storage.setItem(INDEX, JSON.stringify(index));
  }

  private drop(index: Index): void {
    const oldest = index.list.pop();
    if (!oldest) return;
    this.storage.removeItem(PREFIX + oldest.id);
    index.dropped++;
  }
}

/** Return why so many are not kept; "" if they are. */
function whyFull(list: Summary[]): string {
  if (list.length > MAX_CONVERSATIONS) return `${MAX_CONVERSATIONS} conversations are kept, and no more`;
  const size = list.reduce((sum, summary) => sum + summary.size, 0);
  return size > MAX_CHARACTERS ? `${count(MAX_CHARACTERS)} characters are kept, and no more` : "";
}

/** Return what is stored of a conversation. Throws TooLong. */
function textOf(conversation: Conversation): string {
  const text = JSON.stringify(stored(conversation));
  if (text.length > MAX_CHARACTERS) throw new TooLong(text.length);
  return text;
}

function parsed<T>(text: string | null): T | null {
  try {
    return text === null ? null : (JSON.parse(text) as T);
  } catch {
    return null; // something else wrote there
  }
}

function stored({ title, targets, options, turns }: Conversation): Stored {
  const steps = (reply: Reply | null) =>
    reply && reply.steps.map(({ answer, results }) => ({ answer: { ...answer, tokens: [] }, results }));
  const kept = turns.map(({ prompt, replies }) => ({ prompt, replies: replies.map(steps) }));
  return { title, targets, options, turns: kept };
}

function revived(id: string, { title, targets, options, turns }: Stored): Conversation {
  const conversation = new Conversation(id);
  conversation.title = title;
  conversation.targets = targets;
  conversation.options = { ...noOptions(), ...options };
  conversation.turns = turns.map(
    ({ prompt, replies }) =>
      new Turn(
        prompt,
        replies.map((steps) => steps && reply(steps)),
      ),
  );
  return conversation;
}

function reply(steps: StoredStep[]): Reply {
  const made = new Reply();
  made.steps = steps.map(({ answer, results }) => {
    const step = new Step();
    const state = answer.state === "running" ? "stopped" : (answer.state ?? "done"); // the page was closed
    step.answer = { ...newAnswer(), ...answer, state };
    step.results = results;
    return step;
  });
  return made;
}
