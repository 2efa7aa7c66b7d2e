import { expect, test } from "vitest";
import { parseJson } from "./json";

test.each(['{"a": [1, -2.5e3, true, null, {"b": "\\u00e9\\n"}]}', "[]", "{}", ' "x" ', "0"])(
  "%s is JSON",
  (text) => {
    expect(parseJson(text)).toEqual({ value: JSON.parse(text) as unknown });
  },
);

test.each([
  ["", "line 1, column 1: the text ends, expected a value"],
  ['{"a": 1,}', "line 1, column 9: expected a name in quotes"],
  ["{a: 1}", "line 1, column 2: expected a name in quotes or }"],
  ['{"a" 1}', "line 1, column 6: expected :"],
  ['{\n  "a": [1, 2\n}', "line 3, column 1: expected , or ]"],
  ["[1, ]", "line 1, column 5: expected a value"],
  ["[1 2]", "line 1, column 4: expected , or ]"],
  ['{"a": 1', "line 1, column 8: the text ends, expected , or }"],
  ["{} {}", "line 1, column 4: expected the end"],
  ["[tru]", "line 1, column 2: expected a value or ]"],
  ["[01]", "line 1, column 2: expected a value or ]"],
  ["'a'", "line 1, column 1: expected a value"],
  ['["a\nb"]', "line 1, column 2: a string that is not closed, or has a character to escape"],
  ['{"a": "b}', "line 1, column 7: a string that is not closed, or has a character to escape"],
  ["[}", "line 1, column 2: expected a value or ]"],
])("%s is none", (text, error) => {
  expect(() => JSON.parse(text)).toThrow();
  expect(parseJson(text)).toEqual({ error });
});

test("whatever is cut from JSON is refused with a place", () => {
  const text = '{"name": "f", "list": [1, {"x": null}, "\\u00e9"], "n": -1.5}';
  for (let end = 0; end < text.length; end++)
    expect(parseJson(text.slice(0, end)).error).toMatch(/^line 1, column \d+: /);
});
