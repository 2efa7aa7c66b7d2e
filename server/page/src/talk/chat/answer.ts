/** One answer of a model, put together from the chunks of a stream. */

export interface Call {
  id: string;
  name: string;
  arguments: string;
}

/** A token, how likely it was (a logarithm), and what else was likely. */
export interface Token {
  text: string;
  logprob: number;
  top: { text: string; logprob: number }[];
}

/** A version of an adapter that was applied, and the alias that led to it. */
export interface Applied {
  name: string;
  weight: number;
  alias?: string;
}

/** Where the time went on the server. */
export interface Explained {
  queue_ms: number;
  load_ms: number;
  prefill_ms: number;
  decode_ms: number;
  adapter_load: "cold" | "warm" | null;
  batch_adapters: number;
  preemptions: number;
}

export interface Answer {
  state: "running" | "done" | "stopped" | "failed";
  /** Why it failed. */
  reason: string;
  content: string;
  reasoning: string;
  calls: Call[];
  tokens: Token[];
  /** OpenAI's reason for the end; null if it did not come to one. */
  finish: string | null;
  /** Who answered; null until the server says it. */
  applied: Applied[] | null;
  model: string;
  prompt: number | null;
  cached: number;
  completion: number | null;
  /** Milliseconds from the request to the first text, as seen here. */
  first: number | null;
  /** Milliseconds from the request to the end, as seen here. */
  took: number | null;
  explained: Explained | null;
}

interface Delta {
  content?: string | null;
  reasoning_content?: string | null;
  tool_calls?: { index: number; id?: string; function: { name?: string; arguments?: string } }[];
}

interface Logprob {
  token: string;
  logprob: number;
  bytes: number[] | null;
  top_logprobs: Logprob[];
}

/** A chunk of a stream of `POST /v1/chat/completions`. */
export interface Chunk {
  model: string;
  adapter?: Applied[];
  choices: { delta: Delta; finish_reason: string | null; logprobs?: { content: Logprob[] } | null }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number };
  } | null;
  explain?: Explained;
}

/** Return the answer to a request that was just sent. */
export function newAnswer(): Answer {
  return {
    state: "running", reason: "", content: "", reasoning: "", calls: [], tokens: [], finish: null, applied: null,
    model: "", prompt: null, cached: 0, completion: null, first: null, took: null, explained: null,
  }; // prettier-ignore
}

/** Puts chunks together. `answer` changes with each; who shows it takes a copy when it likes. */
export class Reader {
  readonly answer = newAnswer();
  private readonly characters = new Characters();

  /** Add a chunk that came `milliseconds` after the request. */
  push(chunk: Chunk, milliseconds: number): void {
    const { answer } = this;
    answer.model = chunk.model;
    if (chunk.adapter) answer.applied = chunk.adapter;
    if (chunk.usage) {
      answer.prompt = chunk.usage.prompt_tokens;
      answer.completion = chunk.usage.completion_tokens;
      answer.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    if (chunk.explain) answer.explained = chunk.explain;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
    if (content || reasoning || calls?.length) answer.first ??= milliseconds;
    answer.content += content ?? "";
    answer.reasoning += reasoning ?? "";
    for (const call of calls ?? []) this.addCall(call);
    for (const token of choice.logprobs?.content ?? []) this.addToken(token);
    answer.finish = choice.finish_reason ?? answer.finish;
  }

  private addCall({ index, id, function: its }: NonNullable<Delta["tool_calls"]>[number]): void {
    const call = (this.answer.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= its.name ?? "";
    call.arguments += its.arguments ?? "";
  }

  private addToken({ token, logprob, bytes, top_logprobs }: Logprob): void {
    const text = bytes ? this.characters.push(bytes) : token;
    const top = top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob }));
    this.answer.tokens.push({ text, logprob, top });
  }
}

/** Return tokens a second: those after the first, in the time that they took; null if there were too few. */
export function speedOf(answer: Answer): number | null {
  if (answer.completion === null || answer.completion < 2) return null;
  const decode = answer.explained?.decode_ms ?? (answer.took ?? 0) - (answer.first ?? 0);
  return decode > 0 ? ((answer.completion - 1) * 1000) / decode : null;
}

/** Return who answered: "legal@3", "0.7 legal@3 + 0.3 german@1", or the model's name. */
export function answeredBy({ applied, model }: Answer): string {
  if (!applied?.length) return model;
  const words = applied.map(({ name, weight, alias }) => {
    const whole = alias && alias !== name ? `${name} (by ${alias})` : name;
    return applied.length === 1 && weight === 1 ? whole : `${weight} ${whole}`;
  });
  return words.join(" + ");
}

/** Bytes of tokens -> text. A character that several tokens have belongs to the last of them. */
class Characters {
  private readonly decoder = new TextDecoder();

  push(bytes: number[]): string {
    return this.decoder.decode(new Uint8Array(bytes), { stream: true });
  }
}
