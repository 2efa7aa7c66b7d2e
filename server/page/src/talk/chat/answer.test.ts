import { expect, test } from "vitest";
import { answeredBy, newAnswer, Reader, speedOf, type Chunk } from "./answer";

const chunk = (
  delta: Chunk["choices"][number]["delta"],
  more: Partial<Chunk["choices"][number]> = {},
): Chunk => ({
  model: "tiny",
  adapter: [],
  choices: [{ delta, finish_reason: null, ...more }],
});

function read(...chunks: Chunk[]) {
  const reader = new Reader();
  chunks.forEach((each, place) => reader.push(each, 10 * (place + 1)));
  return reader.answer;
}

test("text, reasoning and the end", () => {
  const answer = read(
    chunk({ content: "" }),
    chunk({ reasoning_content: "hm" }),
    chunk({ content: "Hel" }),
    chunk({ content: "lo" }),
    chunk({}, { finish_reason: "stop" }),
    {
      model: "tiny",
      adapter: [{ name: "legal@3", weight: 1, alias: "prod" }],
      choices: [],
      usage: { prompt_tokens: 7, completion_tokens: 5, prompt_tokens_details: { cached_tokens: 4 } },
    },
  );
  expect(answer).toMatchObject({
    content: "Hello",
    reasoning: "hm",
    finish: "stop",
    first: 20,
    prompt: 7,
    cached: 4,
    completion: 5,
  });
  expect(answeredBy(answer)).toBe("legal@3 (by prod)");
});

test("calls of tools come in pieces, also several", () => {
  const answer = read(
    chunk({ tool_calls: [{ index: 0, id: "a", function: { name: "f", arguments: '{"x"' } }] }),
    chunk({ tool_calls: [{ index: 0, function: { arguments: ": 1}" } }] }),
    chunk({ tool_calls: [{ index: 1, id: "b", function: { name: "g", arguments: "{}" } }] }),
  );
  expect(answer.calls).toEqual([
    { id: "a", name: "f", arguments: '{"x": 1}' },
    { id: "b", name: "g", arguments: "{}" },
  ]);
});

test("a character of several tokens belongs to the last", () => {
  const [first, second] = new TextEncoder().encode("é");
  const token = (bytes: number[]) => ({ token: "?", logprob: -1, bytes, top_logprobs: [] });
  const answer = read(
    chunk({ content: "é" }, { logprobs: { content: [token([first!]), token([second!, 33])] } }),
  );
  expect(answer.tokens.map(({ text }) => text)).toEqual(["", "é!"]);
});

test("speed is that of the tokens after the first", () => {
  const answer = { ...newAnswer(), completion: 11, first: 500, took: 2500 };
  expect(speedOf(answer)).toBe(5);
  expect(speedOf({ ...answer, completion: 1 })).toBe(null);
  expect(speedOf(newAnswer())).toBe(null);
});

test("a mix and the base have names", () => {
  const applied = [
    { name: "legal@1", weight: 0.5 },
    { name: "german@2", weight: 1 },
  ];
  expect(answeredBy({ ...newAnswer(), model: "base", applied })).toBe("0.5 legal@1 + 1 german@2");
  expect(answeredBy({ ...newAnswer(), model: "base", applied: [] })).toBe("base");
});
