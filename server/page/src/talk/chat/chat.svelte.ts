/** What happens in a conversation: prompts are sent, answers grow, turns change. */

import { flushSync } from "svelte";
import { ApiError, stream } from "../../lib/api";
import { Reader, type Answer, type Chunk } from "./answer";
import { Conversation, MAX_COLUMNS, Reply, Step, Turn } from "./conversation.svelte";
import { paced } from "./pace";
import { PATH, requestFor } from "../request/request";

export class Chat {
  conversation = $state.raw(new Conversation());
  /** How many answers are growing. */
  running = $state(0);
  /** Said to those who do not see it: what has just ended. */
  news = $state("");
  private readonly streams = new Map<Step, AbortController>();

  constructor(
    private readonly base: () => string,
    /** Called when something is worth keeping. */
    private readonly onchange: (conversation: Conversation) => void,
  ) {}

  /** Show another conversation. Answers that grow are stopped. */
  open(conversation: Conversation): void {
    this.leave();
    this.conversation = conversation;
  }

  /**
   * Stop all answers, and keep what they have now. Streams end later: who keeps a conversation then brings one back
   * that was deleted meanwhile.
   */
  leave(): void {
    if (!this.running) return;
    this.stop();
    this.streams.clear();
    this.running = 0;
    this.onchange(this.conversation);
  }

  /** Send a prompt to every column. */
  ask(prompt: string): void {
    const turn = new Turn(
      prompt,
      this.conversation.targets.map(() => null),
    );
    this.conversation.turns = [...this.conversation.turns, turn];
    this.answerAll(turn);
  }

  /** Send a turn with other words. The turns after it are dropped: they answered something else. */
  resend(turn: Turn, prompt: string): void {
    const { conversation } = this;
    this.stop();
    turn.prompt = prompt;
    conversation.turns = conversation.turns.slice(0, conversation.turns.indexOf(turn) + 1);
    this.answerAll(turn);
  }

  /** Ask a column for a new answer to a turn. */
  answer(turn: Turn, column: number): void {
    for (const step of turn.replies[column]?.steps ?? []) this.streams.get(step)?.abort();
    const reply = new Reply();
    turn.replies = this.conversation.targets.map((_, place) =>
      place === column ? reply : (turn.replies[place] ?? null),
    );
    void this.run(turn, column, reply);
  }

  /** Send the results of the tools that the last step calls. */
  goOn(turn: Turn, column: number): void {
    const reply = turn.replies[column];
    if (reply) void this.run(turn, column, reply);
  }

  remove(turn: Turn): void {
    for (const reply of turn.replies) for (const step of reply?.steps ?? []) this.streams.get(step)?.abort();
    this.conversation.turns = this.conversation.turns.filter((other) => other !== turn);
    this.onchange(this.conversation);
  }

  addColumn(): void {
    const { targets } = this.conversation;
    if (targets.length < MAX_COLUMNS) targets.push([]);
  }

  removeColumn(column: number): void {
    const { conversation } = this;
    for (const turn of conversation.turns) {
      for (const step of turn.replies[column]?.steps ?? []) this.streams.get(step)?.abort();
      turn.replies = turn.replies.filter((_, place) => place !== column);
    }
    conversation.targets.splice(column, 1);
    this.onchange(conversation);
  }

  /** Stop all answers. What they have stays. */
  stop(): void {
    for (const controller of this.streams.values()) controller.abort();
  }

  private answerAll(turn: Turn): void {
    for (const column of this.conversation.targets.keys()) this.answer(turn, column);
    this.onchange(this.conversation);
  }

  private async run(turn: Turn, column: number, reply: Reply): Promise<void> {
    const { conversation } = this;
    const body = requestFor(conversation, column, turn, this.base(), reply.steps.length);
    const step = new Step();
    reply.steps = [...reply.steps, step];
    const controller = new AbortController();
    this.streams.set(step, controller);
    this.running = this.streams.size;
    await read(step, body, controller.signal);
    if (!this.streams.delete(step)) return; // it was left
    this.running = this.streams.size;
    this.news = `Column ${column + 1}: ${ENDS[step.answer.state]}`;
    this.onchange(conversation);
  }
}

const ENDS: Record<Answer["state"], string> = {
  running: "",
  done: "the answer is complete",
  stopped: "stopped",
  failed: "the answer failed",
};

/** Read the answer to a request into a step. Errors become its reason. */
async function read(step: Step, body: object, signal: AbortSignal): Promise<void> {
  const begun = performance.now();
  const reader = new Reader();
  const { answer } = reader;
  const pace = paced(() => {
    step.answer = { ...answer, calls: answer.calls.map((call) => ({ ...call })), tokens: [...answer.tokens] };
    flushSync();
  });
  try {
    for await (const chunk of stream<Chunk>(PATH, { body, signal })) {
      reader.push(chunk, performance.now() - begun);
      pace.soon();
    }
    answer.state = "done";
  } catch (error) {
    answer.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) answer.reason = reasonOf(error);
  }
  answer.took = performance.now() - begun;
  pace.now();
}

/** Return what to tell about an error, with what to do next. */
function reasonOf(error: unknown): string {
  if (!(error instanceof ApiError)) return `The connection broke: ${String(error)}`;
  return error.retryAfter === null
    ? error.message
    : `${error.message} Try again in ${Math.ceil(error.retryAfter)} s.`;
}
