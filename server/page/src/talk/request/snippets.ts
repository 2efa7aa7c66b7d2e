/** A request as a command or a program that somebody can copy. */

import type { Fields } from "./options";

export const KEY = "YOUR_KEY";

/** Arguments that OpenAI's Python client knows; others go through `extra_body`. */
const OPENAI = new Set([
  "model", "messages", "temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "stop",
  "response_format", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "stream", "stream_options",
]); // prettier-ignore

/** Return a command for a shell. */
export function curl(origin: string, request: Fields): string {
  const body = json(request).replaceAll("'", "'\\''");
  return `curl -N ${origin}/v1/chat/completions \\
  -H 'authorization: Bearer ${KEY}' \\
  -H 'content-type: application/json' \\
  -d '${body}'
`;
}

/** Return a program in Python, with OpenAI's package. */
export function python(origin: string, request: Fields): string {
  const known = Object.entries(request).filter(([name]) => OPENAI.has(name));
  const extra = Object.fromEntries(Object.entries(request).filter(([name]) => !OPENAI.has(name)));
  const lines = known.map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, "    ")},`);
  return `from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key="${KEY}")
stream = client.chat.completions.create(
${lines.join("\n")}
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)${
          request.tools
            ? `
        for call in choice.delta.tool_calls or []:
            print(call.function.name or "", call.function.arguments or "", end="", flush=True)`
            : ""
        }
`;
}

/** Return a program in JavaScript, with OpenAI's package. */
export function javascript(origin: string, request: Fields): string {
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${origin}/v1", apiKey: "${KEY}" });
const stream = await client.chat.completions.create(${json(request)});
for await (const chunk of stream) {
  for (const choice of chunk.choices) {
    process.stdout.write(choice.delta.content ?? "");${
      request.tools
        ? `
    for (const call of choice.delta.tool_calls ?? [])
      process.stdout.write((call.function.name ?? "") + (call.function.arguments ?? ""));`
        : ""
    }
  }
}
`;
}

function json(value: unknown): string {
  return plain(JSON.stringify(value, null, 2));
}

/** Escape characters of a JSON text that are not seen, or change how the others are: they would hide what is sent. */
function plain(text: string): string {
  return text.replace(
    /[\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Return a JSON value as Python writes it. */
function literal(value: unknown, indent: string): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  // A string of JSON means the same in Python.
  if (typeof value !== "object") return plain(JSON.stringify(value));
  const inner = `${indent}    `;
  const list = Array.isArray(value);
  const items = list
    ? value.map((item) => literal(item, inner))
    : Object.entries(value).map(([name, item]) => `${literal(name, inner)}: ${literal(item, inner)}`);
  const [open, close] = list ? "[]" : "{}";
  return items.length
    ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`
    : `${open}${close}`;
}
