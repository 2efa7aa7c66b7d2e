import { expect, test } from "vitest";
import { Conversation, Turn } from "../chat/conversation.svelte";
import { requestFor } from "./request";
import { curl, javascript, python } from "./snippets";

const NASTY = `it's "q" \\ \u202e\u2028 \n$HOME \`x\` </script> é 🙂 \u0007'''`;

function request() {
  const conversation = new Conversation();
  conversation.targets = [[{ name: "legal", weight: 0.5 }, { name: "german", weight: 1 }]]; // prettier-ignore
  const options = { system: NASTY, temperature: "0.5", top_k: "40", seed: "7", stop: "a'b", sure: true };
  const tools = '[{"type": "function", "function": {"name": "f", "parameters": {"a": [null, true, {}]}}}]';
  Object.assign(conversation.options, options, { form: "schema", pattern: '{"type": "object"}', tools });
  return requestFor(conversation, 0, new Turn(NASTY), "tiny");
}

/** Return the words of a POSIX command that quotes with ' only. */
function words(command: string): string[] {
  const found = command.replaceAll("\\\n", " ").matchAll(/(?:'[^']*'|\\'|[^\s'])+/g);
  return [...found].map(([word]) =>
    word.replace(/'([^']*)'|\\(')/g, (_, quoted, escaped) => quoted ?? escaped),
  );
}

test("the command sends what the page sends", () => {
  const found = words(curl("http://host:1", request()));
  expect(found.slice(0, 3)).toEqual(["curl", "-N", "http://host:1/v1/chat/completions"]);
  expect(found).toContain("authorization: Bearer YOUR_KEY");
  expect(JSON.parse(found[found.indexOf("-d") + 1]!)).toEqual(request());
  expect(found).toHaveLength(9);
});

test("the program in JavaScript sends what the page sends", () => {
  const code = javascript("http://host:1", request());
  const body = /create\((.*)\);\nfor await/s.exec(code)![1]!;
  expect(JSON.parse(body)).toEqual(request());
  expect(new Function(`return (${body})`)()).toEqual(request());
});

test("nothing in a program is hidden from its reader", () => {
  for (const write of [curl, python, javascript])
    expect(write("http://host:1", request())).not.toMatch(/[^\P{C}\n]|\u2028/u);
});

test("what OpenAI's client does not know goes through extra_body", () => {
  const code = python("http://host:1", request());
  const [known, extra] = code.split("extra_body=") as [string, string];
  for (const name of [
    "model",
    "messages",
    "temperature",
    "seed",
    "stop",
    "response_format",
    "tools",
    "logprobs",
  ])
    expect(known).toMatch(new RegExp(`^    ${name}=`, "m"));
  for (const name of ["adapter", "top_k", "explain"]) expect(extra).toContain(`"${name}": `);
  expect(code).toContain('"a": [\n');
  expect(code).toContain("None,");
});
