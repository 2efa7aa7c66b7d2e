/** A conversation: prompts, and for each the replies of up to three columns. */

import { newAnswer, type Answer } from "./answer";
import { newId } from "../../lib/ids";
import { noOptions, type Options } from "../request/options";
import type { Target } from "../request/target";

export const MAX_COLUMNS = 3;

/** One answer, and what the tools that it calls returned. */
export class Step {
  /** Replaced as a whole while it grows: a long answer costs nothing but what shows it. */
  answer = $state.raw<Answer>(newAnswer());
  /** A call's id -> its result. */
  results = $state<Record<string, string>>({});
}

/** What a column replied to a prompt: more than one step where tools were called. */
export class Reply {
  steps = $state.raw<Step[]>([]);
}

/** A prompt and its replies, by column; null where a column was not asked. */
export class Turn {
  readonly id = newId();
  prompt = $state("");
  replies = $state.raw<(Reply | null)[]>([]);

  constructor(prompt: string, replies: (Reply | null)[] = []) {
    this.prompt = prompt;
    this.replies = replies;
  }
}

export class Conversation {
  /** Another one when it goes on as a copy. */
  id = $state("");
  /** The time of the state of it that the browser keeps, as far as this tab knows; 0 if it was not kept. */
  kept = 0;
  /** The name that somebody gave it; "" until then. */
  title = $state("");
  targets = $state<Target[]>([[]]);
  options = $state<Options>(noOptions());
  turns = $state.raw<Turn[]>([]);

  constructor(id: string = newId()) {
    this.id = id;
  }

  /** Its name, or how it begins. */
  get name(): string {
    return (
      this.title ||
      (this.turns[0]?.prompt.trim().replace(/\s+/g, " ").slice(0, 80) ?? "") ||
      "New conversation"
    );
  }
}

export type Message =
  | { role: "system" | "user"; content: string }
  | { role: "assistant"; content: string | null; tool_calls?: ToolCall[] }
  | { role: "tool"; tool_call_id: string; content: string };

interface ToolCall {
  id: string;
  type: "function";
  function: { name: string; arguments: string };
}

/**
 * Return the messages that a column is sent for a turn: those before it, its prompt, and the first `steps` steps of
 * the column's own reply. For a turn that the column was not asked, the reply of the first that was stands in. A turn
 * without any answer, such as one that failed at once, is left out.
 */
export function messagesOf(conversation: Conversation, column: number, turn: Turn, steps = 0): Message[] {
  const { system } = conversation.options;
  const messages: Message[] = system.trim() ? [{ role: "system", content: system }] : [];
  for (const earlier of conversation.turns) {
    if (earlier === turn) break;
    const reply = earlier.replies[column] ?? earlier.replies.find((other) => other !== null);
    const answers = (reply?.steps ?? []).flatMap(stepMessages);
    if (answers.length) messages.push({ role: "user", content: earlier.prompt }, ...answers);
  }
  const own = turn.replies[column]?.steps.slice(0, steps) ?? [];
  return [...messages, { role: "user", content: turn.prompt }, ...own.flatMap(stepMessages)];
}

/** Return the messages of an answer and of its tools' results; none if it has nothing to say. */
export function stepMessages({ answer, results }: Step): Message[] {
  const { content, calls } = answer;
  if (!calls.length) return content || answer.state === "done" ? [{ role: "assistant", content }] : [];
  const made = calls.map((call): ToolCall => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  const given = calls.filter((call) => call.id in results);
  return [
    { role: "assistant", content: content || null, tool_calls: made },
    ...given.map((call): Message => ({ role: "tool", tool_call_id: call.id, content: results[call.id]! })),
  ];
}
