/** How likely a token was, in steps and in words. */

import { percent } from "../../lib/format";
import type { Token } from "./answer";

/** The steps in which tokens are marked. Those above the first are sure, and not marked. */
export const LEVELS = [
  { id: 1, below: 0.9, label: "60–90%" },
  { id: 2, below: 0.6, label: "30–60%" },
  { id: 3, below: 0.3, label: "below 30%" },
];

/** Return the step of a logarithm of a probability; 0 is sure. */
export function levelOf(logprob: number): number {
  return LEVELS.findLast(({ below }) => Math.exp(logprob) < below)?.id ?? 0;
}

/** Return a probability as a percentage, from its logarithm. */
export function likely(logprob: number): string {
  const share = Math.exp(logprob);
  return share < 0.001 ? "<0.1%" : percent(share);
}

/** Return a token's text so that spaces and characters without a shape are seen. */
export function visible(text: string): string {
  return JSON.stringify(text)
    .slice(1, -1)
    .replaceAll('\\"', '"')
    .replaceAll(" ", "␣")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`);
}

/** Return tokens by line, with the place of the first. As a text grows, the browser lays out the last line only. */
export function linesOf(tokens: Token[]): { start: number; tokens: Token[] }[] {
  const lines: { start: number; tokens: Token[] }[] = [];
  let line: Token[] | undefined;
  for (const [place, token] of tokens.entries()) {
    if (!line) lines.push({ start: place, tokens: (line = []) });
    line.push(token);
    if (token.text.endsWith("\n")) line = undefined;
  }
  return lines;
}
