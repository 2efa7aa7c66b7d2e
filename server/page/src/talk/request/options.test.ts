import { expect, test } from "vitest";
import { countOf, noOptions, NUMBERS, optionFields, type Options } from "./options";

const read = (options: Partial<Options>) => optionFields({ ...noOptions(), ...options });

test("options that nobody set are no fields", () => {
  expect(read({})).toEqual({ fields: {}, errors: {} });
  expect(countOf(noOptions())).toBe(0);
});

test.each(NUMBERS)("$id is a number within its limits", ({ id, min, max, whole }) => {
  expect(read({ [id]: ` ${min} ` }).fields).toEqual({ [id]: min });
  expect(read({ [id]: String(max) }).fields).toEqual({ [id]: max });
  expect(read({ [id]: String(min - 1) }).errors[id]).toMatch(/must be/);
  expect(read({ [id]: "a" }).errors[id]).toBe("must be a number");
  if (whole) expect(read({ [id]: String(min + 0.5) }).errors[id]).toBe("must be a whole number");
  expect(countOf({ ...noOptions(), [id]: "1" })).toBe(1);
});

test("stops are lines, with escapes", () => {
  expect(read({ stop: "END\n\n\\n\\n\na\\\\nb" }).fields).toEqual({ stop: ["END", "\n\n", "a\\nb"] });
  expect(read({ stop: "x\n".repeat(17) }).errors.stop).toBe("at most 16 lines");
});

test("the form of an answer", () => {
  expect(read({ form: "json", pattern: "ignored" }).fields).toEqual({
    response_format: { type: "json_object" },
  });
  expect(read({ form: "schema", pattern: '{"type": "object"}' }).fields).toEqual({
    response_format: { type: "json_schema", json_schema: { name: "answer", schema: { type: "object" } } },
  });
  expect(read({ form: "schema", pattern: '{"type": }' }).errors.pattern).toBe(
    "line 1, column 10: expected a value",
  );
  expect(read({ form: "schema", pattern: "[]" }).errors.pattern).toMatch(/object/);
  expect(read({ form: "regex", pattern: "[a-z]+" }).fields).toEqual({
    structured_outputs: { regex: "[a-z]+" },
  });
  expect(read({ form: "choice", pattern: "yes\nno\n" }).fields).toEqual({
    structured_outputs: { choice: ["yes", "no"] },
  });
  for (const form of ["regex", "choice"] as const) expect(read({ form }).errors.pattern).toMatch(/^write/);
});

test("tools are functions", () => {
  const tool = { type: "function", function: { name: "f" } };
  expect(read({ tools: JSON.stringify([tool]) }).fields).toEqual({ tools: [tool] });
  expect(read({ tools: JSON.stringify([tool]), tool_choice: "required" }).fields.tool_choice).toBe(
    "required",
  );
  expect(read({ tools: JSON.stringify([tool]), tool_choice: "one" }).fields).toEqual({
    tools: [tool],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  expect(read({ tools: " " }).fields).toEqual({});
  expect(read({ tools: "{}" }).errors.tools).toBe("tools are a list: [...]");
  expect(read({ tools: JSON.stringify([tool, { name: "g" }]) }).errors.tools).toMatch(/^tool 2 must be/);
});

test("how sure it was is asked for with alternatives", () => {
  expect(read({ sure: true }).fields).toEqual({ logprobs: true, top_logprobs: 5 });
});
