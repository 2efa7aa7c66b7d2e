import { describe, expect, it } from "vitest";
import { csvRows, fromLines, promptsOf } from "./prompts";

const contents = (parsed: { prompts: { content: string }[][] }): string[] =>
  parsed.prompts.map((prompt) => prompt.at(-1)!.content);

it("takes a prompt from each line of text", () => {
  expect(fromLines("one\r\n\n  two \n").map((prompt) => prompt[0]!.content)).toEqual(["one", "two"]);
});

describe("JSONL", () => {
  it("knows the usual fields", () => {
    const text = [
      '{"prompt": "a"}',
      '{"instruction": "b", "input": "c", "output": "d"}',
      '"e"',
      '{"question": "f", "answer": "g"}',
    ].join("\n");
    expect(contents(promptsOf("x.jsonl", text))).toEqual(["a", "b\n\nc", "e", "f"]);
  });
  it("leaves the answer out of a conversation", () => {
    const messages = [
      { role: "system", content: "s" },
      { role: "user", content: "u" },
      { role: "assistant", content: "a" },
    ];
    expect(promptsOf("x.jsonl", JSON.stringify({ messages })).prompts).toEqual([messages.slice(0, 2)]);
  });
  it("says which lines it skips, and why", () => {
    const { prompts, skipped } = promptsOf("x.jsonl", '{"prompt": "a"}\n{\n\n{"x": 1}\n7');
    expect(prompts).toHaveLength(1);
    expect(skipped.map(({ line }) => line)).toEqual([2, 4, 5]);
    expect(skipped[0]!.reason).toBe("is not JSON");
  });
});

describe("CSV", () => {
  it("reads quotes, and line breaks inside them", () => {
    expect(csvRows('a,"b ""x""\nc"\r\n1,2')).toEqual([
      ["a", 'b "x"\nc'],
      ["1", "2"],
    ]);
  });
  it("takes the column of a known name, otherwise the first", () => {
    expect(contents(promptsOf("x.csv", "id,prompt\n1,hello\n2,world\n"))).toEqual(["hello", "world"]);
    expect(contents(promptsOf("x.csv", "hello,1\nworld,2"))).toEqual(["hello", "world"]);
    expect(promptsOf("x.csv", "id,prompt\n1,\n").skipped).toEqual([
      { line: 2, reason: "has an empty prompt" },
    ]);
  });
});
