/** The request that a column sends. */

import type { Conversation, Message, Turn } from "../chat/conversation.svelte";
import { messagesOf } from "../chat/conversation.svelte";
import { optionFields, type Fields } from "./options";
import { targetFields, type Entry } from "./target";

export const PATH = "/v1/chat/completions";

/** The body of `POST /v1/chat/completions`. */
export interface ChatRequest extends Fields {
  model: string;
  adapter?: Entry[];
  messages: Message[];
}

/** Return the request for a turn in a column, after the first `steps` steps of its reply. */
export function requestFor(
  conversation: Conversation,
  column: number,
  turn: Turn,
  base: string,
  steps = 0,
): ChatRequest {
  return {
    ...targetFields(conversation.targets[column] ?? [], base),
    messages: messagesOf(conversation, column, turn, steps),
    ...optionFields(conversation.options).fields,
    stream: true,
    stream_options: { include_usage: true },
    explain: true,
  };
}
