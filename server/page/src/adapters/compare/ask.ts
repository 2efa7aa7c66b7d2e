/** Asks two targets for their answers, a few at once. */

import { ApiError, call } from "../../lib/api";
import { missing, type Answer, type Comparison, type Sampling } from "./comparison";
import type { Prompt } from "./prompts";

const AT_ONCE = 4;
/** How often a request is sent again that the server has no room for. */
const TRIES = 20;

interface Answered {
  choices: { message?: { content: string | null }; text?: string }[];
  usage: { completion_tokens: number };
  model: string;
  adapter: { name: string }[];
}

/**
 * Ask for all answers that are missing. `onanswer` is called after each. Ends early when `signal` is aborted; what is
 * there by then stays.
 */
export async function askAll(
  comparison: Comparison,
  chat: boolean,
  onanswer: () => void,
  signal: AbortSignal,
): Promise<void> {
  const left = missing(comparison);
  const worker = async (): Promise<void> => {
    for (let one = left.shift(); one && !signal.aborted; one = left.shift()) {
      const [place, target] = one;
      const pair = comparison.pairs[place]!;
      // Both get the same seed, and each prompt another.
      const sampling = { ...comparison.sampling, seed: comparison.sampling.seed + place };
      const answer = await ask(comparison.targets[target], pair.prompt, sampling, chat, signal);
      if (answer === null) return;
      pair.answers[target] = answer;
      onanswer();
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

/** Whether the browser lets tabs know of each other: it does where the page comes from a secure origin. */
export const tabsKnowEachOther = (): boolean => "locks" in navigator;

/**
 * Do something for a comparison, if no other tab does so now: what one keeps would overtake the other. Otherwise call
 * `onwait`, and wait until the other one has ended. Returns whether it was done here. Throws if `signal` is aborted
 * while it waits. Tabs that do not know of each other do not wait.
 */
export async function inOneTab(
  id: string,
  work: () => Promise<void>,
  onwait: () => void,
  signal: AbortSignal,
): Promise<boolean> {
  const name = `manylora.comparison.${id}`;
  const alone = async (lock: Lock | null): Promise<boolean> => {
    if (lock) await work();
    return lock !== null;
  };
  if (!tabsKnowEachOther()) return work().then(() => true);
  if (await navigator.locks.request(name, { ifAvailable: true }, alone)) return true;
  onwait();
  await navigator.locks.request(name, { signal }, () => undefined);
  return false;
}

/** Return an answer, or one that says why there is none; null if it was stopped. */
async function ask(
  model: string,
  prompt: Prompt,
  sampling: Sampling,
  chat: boolean,
  signal: AbortSignal,
): Promise<Answer | null> {
  const { system, ...settings } = sampling;
  const messages = system ? [{ role: "system", content: system }, ...prompt] : prompt;
  const what = chat ? { messages } : { prompt: messages.map(({ content }) => content).join("\n\n") };
  const path = chat ? "/v1/chat/completions" : "/v1/completions";
  for (let tried = 1; ; tried++) {
    try {
      const body = { model, ...what, ...settings };
      const answered = await call<Answered>("POST", path, { body, signal });
      const choice = answered.choices[0];
      return {
        text: choice?.message?.content ?? choice?.text ?? "",
        served: answered.adapter.map(({ name }) => name).join(" + ") || answered.model,
        tokens: answered.usage.completion_tokens,
      };
    } catch (error) {
      if (signal.aborted) return null;
      if (!(error instanceof ApiError))
        return failed(`The server's answer cannot be read: ${String(error)}.`);
      if (![429, 503].includes(error.status) || error.retryAfter === null || tried === TRIES) {
        return failed(error.message);
      }
      await pause(error.retryAfter, signal);
    }
  }
}

function failed(error: string): Answer {
  return { text: "", served: "", tokens: 0, error };
}

function pause(seconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
