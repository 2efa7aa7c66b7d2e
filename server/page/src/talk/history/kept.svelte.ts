/** The conversations that a browser keeps, and the one of them that goes on. */

import { count } from "../../lib/format";
import { Chat } from "../chat/chat.svelte";
import { Conversation } from "../chat/conversation.svelte";
import { History, isFull, PREFIX } from "./history";
import { readRows, rowsOf } from "./rows";
import { TooLong } from "./stored";

const CHANGED =
  "Another tab has changed this conversation. Open it in the list to see it as it is kept; what you send here goes on as a copy.";
const GONE =
  "Another tab has deleted this conversation, or needed its room. It is kept again if it goes on here.";
/** How many lines that cannot be read are named. */
const NAMED = 5;

export class Kept {
  readonly chat: Chat;
  private readonly history: History;
  index = $state.raw<ReturnType<History["index"]>>({ list: [], dropped: 0 });
  /** What came of the last import or export. */
  news = $state("");
  /** Why the conversation that is shown is not kept; "" if it is. */
  trouble = $state("");
  /** What happened to conversations that somebody did not ask for. */
  warning = $state("");
  /** The conversation that was to be opened last, if it cannot be read. */
  unreadable = $state("");

  /** `storage` is null in a browser that keeps nothing for this page. */
  constructor(storage: Storage | null, base: () => string) {
    this.history = new History(storage);
    this.chat = new Chat(base, (changed) => this.keep(changed));
    this.index = this.history.index();
  }

  /** Whether the browser keeps nothing for this page. */
  get blocked(): boolean {
    return this.history.blocked;
  }

  /** Follow what other tabs do, until the returned function is called. */
  watch(): () => void {
    const onstorage = ({ key }: StorageEvent) => {
      if (key === null || key.startsWith(PREFIX)) this.look();
    };
    this.look();
    addEventListener("storage", onstorage);
    return () => removeEventListener("storage", onstorage);
  }

  /** Show a conversation, if it is kept still. */
  resume(id: string): void {
    if (this.index.list.some((row) => row.id === id)) this.open(id);
  }

  /** Show a conversation. The one that is shown may be ahead of what is stored of it, or behind if another tab has it. */
  open(id: string): void {
    const { conversation, running } = this.chat;
    const shown = id === conversation.id;
    if (shown && (running || this.history.current(conversation) !== false)) return;
    const found = this.history.load(id);
    this.news = "";
    this.unreadable = found ? "" : id;
    if (found) this.show(found);
    this.look();
  }

  private show(conversation: Conversation): void {
    [this.trouble, this.warning] = ["", ""]; // first: the one that is left is kept, or not
    this.chat.open(conversation);
  }

  /** Begin a conversation, by default with the targets of the one that is shown; it has the same options. */
  start(targets = this.chat.conversation.targets): void {
    const fresh = new Conversation();
    fresh.targets = targets.map((target) => target.map((entry) => ({ ...entry })));
    fresh.options = { ...this.chat.conversation.options };
    this.show(fresh);
  }

  rename(id: string, name: string): void {
    const renamed = this.find(id);
    if (!renamed) return;
    renamed.title = name;
    this.keep(renamed);
  }

  remove(id: string): void {
    if (id === this.unreadable) this.unreadable = "";
    if (id === this.chat.conversation.id) this.start(); // first: leaving a conversation keeps it
    this.history.remove(id);
    this.index = this.history.index();
  }

  clear(): void {
    this.start();
    this.history.clear();
    this.index = this.history.index();
    [this.news, this.unreadable] = ["", ""];
  }

  /** Return conversations as rows of JSONL, and say how many of them cannot be read. */
  rows(ids: string[]): string {
    const found = ids.map((id) => this.find(id));
    const odd = found.filter((one) => !one).length;
    this.news = odd ? `${count(odd)} of ${count(ids.length)} cannot be read, and are left out.` : "";
    return found.reduce((rows, one) => rows + (one ? rowsOf(one) : ""), "");
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
    if (last) this.show(last);
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

  /** Keep a conversation that has something in it, and forget one that has nothing any more. */
  private keep(changed: Conversation): void {
    if (!changed.turns.length) return this.forget(changed);
    try {
      const { copied, dropped } = this.history.save(changed);
      this.trouble = "";
      const said = [
        ...(copied
          ? ["Another tab has changed this conversation. What you have here goes on as a copy."]
          : []),
        ...(dropped.length ? [`To make room for this one, ${quoted(dropped)} left this browser.`] : []),
      ];
      if (said.length) this.warning = said.join(" ");
      else if ([CHANGED, GONE].includes(this.warning)) this.warning = "";
    } catch (error) {
      this.trouble = `${quoted([changed.name])} is not kept: ${reasonOf(error)}.`;
    }
    this.index = this.history.index();
  }

  /** Forget what is kept of a conversation, unless another tab has changed it. */
  private forget(emptied: Conversation): void {
    this.trouble = "";
    if (!this.history.current(emptied)) return;
    this.history.remove(emptied.id);
    emptied.kept = 0;
    this.index = this.history.index();
  }

  /** See what other tabs have kept or deleted. */
  private look(): void {
    this.index = this.history.index();
    const { conversation } = this.chat;
    const current = this.history.current(conversation);
    if (current === false) this.warning = CHANGED;
    else if (current === null && conversation.kept) this.warning = GONE;
    else if ([CHANGED, GONE].includes(this.warning)) this.warning = "";
  }
}

function quoted(names: string[]): string {
  const shown = names.slice(0, NAMED).map((name) => `“${name}”`);
  return [...shown, ...(names.length > NAMED ? [`${count(names.length - NAMED)} more`] : [])].join(", ");
}

function reasonOf(error: unknown): string {
  if (isFull(error)) return "the browser has no room for it";
  return error instanceof Error ? error.message : String(error);
}
