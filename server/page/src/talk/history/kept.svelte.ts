/** The conversations that a browser keeps, and the one of them that goes on. */

import { count } from "../../lib/format";
import { Chat } from "../chat/chat.svelte";
import { Conversation } from "../chat/conversation.svelte";
import { History, TooLong } from "./history";
import { readRows, rowsOf } from "./rows";

const NO_ROOM = "This conversation is not kept: the browser has no room for it.";
/** How many lines that cannot be read are named. */
const NAMED = 5;

export class Kept {
  readonly chat: Chat;
  private readonly history: History;
  index = $state.raw<ReturnType<History["index"]>>({ list: [], dropped: 0 });
  /** What came of the last import, or what is not kept. */
  news = $state("");

  constructor(storage: ConstructorParameters<typeof History>[0], base: () => string) {
    this.history = new History(storage);
    this.chat = new Chat(base, (changed) => this.keep(changed));
    this.index = this.history.index();
  }

  /** Show a conversation if it is kept still. */
  resume(id: string): void {
    const found = this.history.load(id);
    if (found) this.chat.open(found);
  }

  /** Show a conversation. The one that is shown may be ahead of what is stored of it. */
  open(id: string): void {
    this.news = "";
    if (id === this.chat.conversation.id) return;
    const found = this.history.load(id);
    if (found) this.chat.open(found);
    else this.news = "This conversation cannot be read any more: another version of the page kept it.";
  }

  /** Begin a conversation, by default with the targets of the one that is shown; it has the same options. */
  start(targets = this.chat.conversation.targets): void {
    const fresh = new Conversation();
    fresh.targets = targets.map((target) => target.map((entry) => ({ ...entry })));
    fresh.options = { ...this.chat.conversation.options };
    this.chat.open(fresh);
  }

  rename(id: string, name: string): void {
    const renamed = this.find(id);
    if (!renamed) return;
    renamed.title = name;
    this.keep(renamed);
  }

  remove(id: string): void {
    if (id === this.chat.conversation.id) this.start(); // first: leaving a conversation keeps it
    this.history.remove(id);
    this.index = this.history.index();
  }

  clear(): void {
    this.start();
    this.history.clear();
    this.index = this.history.index();
    this.news = "";
  }

  /** Return conversations as rows of JSONL. */
  rows(ids: string[]): string {
    return ids.map((id) => this.find(id)).reduce((rows, found) => rows + (found ? rowsOf(found) : ""), "");
  }

  /** Keep the conversations of a file as far as there is room beside the others, and show the last of them. */
  add(file: string, text: string): void {
    const { rows, errors } = readRows(text);
    const all = rows.length + errors.length;
    const added: Conversation[] = [];
    let full: string[] = [];
    for (const { line, conversation } of rows) {
      try {
        this.history.add(conversation);
        added.push(conversation);
      } catch (problem) {
        if (!(problem instanceof RangeError)) throw problem;
        if (problem instanceof TooLong) errors.push(`Line ${line}: ${problem.message}`);
        else {
          full = [
            `Line ${line} and those after it are left out: ${problem.message}. Delete some to import more.`,
          ];
          break;
        }
      }
    }
    const last = added.at(-1);
    if (last) this.chat.open(last);
    this.index = this.history.index();
    const share = added.length === all ? count(all) : `${count(added.length)} of ${count(all)}`;
    const more = errors.length - NAMED;
    this.news = [
      `${share} imported from ${file}.`,
      ...full,
      ...errors.slice(0, NAMED),
      ...(more > 0 ? [`${count(more)} more lines cannot be kept.`] : []),
    ].join("\n");
  }

  private find(id: string): Conversation | null {
    return id === this.chat.conversation.id ? this.chat.conversation : this.history.load(id);
  }

  /** Keep a conversation that has something in it. */
  private keep(changed: Conversation): void {
    if (!changed.turns.length) return;
    try {
      this.history.save(changed);
      if (this.news === NO_ROOM) this.news = "";
    } catch {
      this.news = NO_ROOM;
    }
    this.index = this.history.index();
  }
}
