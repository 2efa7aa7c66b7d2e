/** Conversations as rows of JSONL that `manylora train` reads: `{"messages": [...], "tools": [...]}`. */

import { newAnswer } from "../chat/answer";
import {
  Conversation,
  messagesOf,
  Reply,
  Step,
  stepMessages,
  Turn,
  type Message,
} from "../chat/conversation.svelte";
import { optionFields } from "../request/options";
import { parseJson } from "../request/json";

/** Return one row for each column that answered. Turns without an answer are left out, as they are from requests. */
export function rowsOf(conversation: Conversation): string {
  return conversation.targets.map((_, column) => rowOf(conversation, column)).join("");
}

function rowOf(conversation: Conversation, column: number): string {
  const turns = conversation.turns.filter((turn) => turn.replies[column]);
  const last = turns.findLast((turn) => turn.replies[column]!.steps.some((step) => saysSomething(step)));
  if (!last) return "";
  const { steps } = last.replies[column]!;
  const messages = messagesOf(conversation, column, last, steps.findLastIndex(saysSomething) + 1).filter(
    (message, place, all) => !isEmpty(message) && !(message.role === "user" && isEmpty(all[place + 1])),
  );
  while (messages.at(-1)?.role === "tool") messages.pop(); // a row ends with the assistant
  const { tools } = optionFields(conversation.options).fields;
  return `${JSON.stringify(tools ? { messages, tools } : { messages })}\n`;
}

function saysSomething(step: Step): boolean {
  return stepMessages(step).some(
    (message) => message.role === "assistant" && (message.content || message.tool_calls),
  );
}

/** Whether a message is an answer without anything in it, from which nothing can be learned. */
function isEmpty(message: Message | undefined): boolean {
  return message?.role === "assistant" && !message.content && !message.tool_calls;
}

/** A conversation, and the line that it was read from, from 1. */
export interface Read {
  line: number;
  conversation: Conversation;
}

/** Return the conversations of rows, and what is wrong with the others. */
export function readRows(text: string): { rows: Read[]; errors: string[] } {
  const rows: Read[] = [];
  const errors: string[] = [];
  for (const [place, line] of text.split(/\r?\n/).entries()) {
    if (!line.trim()) continue;
    const { value, error } = parseJson(line);
    try {
      if (error !== undefined) throw new RowError(error);
      rows.push({ line: place + 1, conversation: conversationOf(value as Row) });
    } catch (problem) {
      if (!(problem instanceof RowError)) throw problem;
      errors.push(`Line ${place + 1}: ${problem.message}`);
    }
  }
  return { rows, errors };
}

class RowError extends Error {}

interface Row {
  messages?: unknown;
  tools?: unknown;
}

function conversationOf(row: Row): Conversation {
  if (!Array.isArray(row?.messages)) throw new RowError("a row is an object with a list of `messages`");
  const conversation = new Conversation();
  if (Array.isArray(row.tools)) conversation.options.tools = JSON.stringify(row.tools, null, 2);
  for (const [place, message] of (row.messages as Partial<Message>[]).entries()) {
    try {
      add(conversation, message);
    } catch (problem) {
      if (problem instanceof RowError) throw new RowError(`messages[${place}]: ${problem.message}`);
      throw problem;
    }
  }
  if (!conversation.turns.length) throw new RowError("there is no message of the user");
  return conversation;
}

function add(conversation: Conversation, message: Partial<Message>): void {
  const role = message?.role as string | undefined;
  const content = textOf(message?.content);
  if (role === "system" || role === "developer") {
    if (conversation.turns.length)
      throw new RowError("instructions after the first turn cannot be shown here");
    conversation.options.system = [conversation.options.system, content].filter(Boolean).join("\n\n");
  } else if (role === "user") {
    conversation.turns = [...conversation.turns, new Turn(content, [null])];
  } else if (role === "assistant" || role === "tool") {
    const turn = conversation.turns.at(-1);
    if (!turn) throw new RowError(`the first turn must be the user's, not the ${role}'s`);
    if (role === "assistant") addAnswer(turn, content, (message as { tool_calls?: unknown }).tool_calls);
    else addResult(turn, content, (message as { tool_call_id?: string }).tool_call_id);
  } else throw new RowError("`role` must be system, user, assistant or tool");
}

function addAnswer(turn: Turn, content: string, calls: unknown): void {
  const reply = turn.replies[0] ?? new Reply();
  const step = new Step();
  step.answer = {
    ...newAnswer(),
    state: "done",
    content,
    calls: Array.isArray(calls) ? calls.map(callOf) : [],
  };
  reply.steps = [...reply.steps, step];
  turn.replies = [reply];
}

function addResult(turn: Turn, content: string, id: string | undefined): void {
  const step = turn.replies[0]?.steps.at(-1);
  const call = step?.answer.calls.find((other) =>
    id === undefined ? !(other.id in step.results) : other.id === id,
  );
  if (!step || !call) throw new RowError("no call before it has this `tool_call_id`");
  step.results[call.id] = content;
}

function callOf(value: unknown, place: number) {
  const call = value as { id?: string; function?: { name?: string; arguments?: unknown } };
  if (typeof call?.function?.name !== "string")
    throw new RowError("`tool_calls` have a function's name each");
  const given = call.function.arguments ?? {};
  const text = typeof given === "string" ? given : JSON.stringify(given);
  return { id: call.id ?? `call_${place}`, name: call.function.name, arguments: text };
}

function textOf(content: unknown): string {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  if (
    Array.isArray(content) &&
    content.every((part) => typeof (part as { text?: unknown })?.text === "string")
  )
    return content.map((part) => (part as { text: string }).text).join("");
  throw new RowError("`content` must be text");
}
