/** JSON that people type: where it is wrong. */

const TOKEN = /[ \t\r\n]*(?:([{}[\],:])|("(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")|(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.])|(?:true|false|null)(?!\w)))/y; // prettier-ignore

/** A text as JSON, or why it is none: "line 2, column 5: expected a value". */
export type Parsed = { value: unknown; error?: undefined } | { value?: undefined; error: string };

/** Parse a text as JSON. */
export function parseJson(text: string): Parsed {
  try {
    return { value: JSON.parse(text) as unknown };
  } catch (error) {
    const fault = faultOf(text);
    // The engine's own words differ from browser to browser, and often lack the place.
    return { error: fault ? `${place(text, fault.at)}: ${fault.reason}` : (error as Error).message };
  }
}

/** Return "line 2, column 5" for an index into a text. */
function place(text: string, at: number): string {
  const lines = text.slice(0, at).split("\n");
  return `line ${lines.length}, column ${lines.at(-1)!.length + 1}`;
}

type Expected = "a value" | "a value or ]" | "a name in quotes" | "a name in quotes or }" | ":" | ", or ]" | ", or }" | "the end"; // prettier-ignore

/** Return the first place at which a text stops being JSON. */
function faultOf(text: string): { at: number; reason: string } | null {
  const open: ("{" | "[")[] = [];
  let expected: Expected = "a value";
  const after = (): Expected => (!open.length ? "the end" : open.at(-1) === "{" ? ", or }" : ", or ]");
  let end = 0;
  while (true) {
    TOKEN.lastIndex = end;
    const found = TOKEN.exec(text);
    const blank = /^[ \t\r\n]*/.exec(text.slice(end))![0].length;
    const at = end + blank;
    if (!found) {
      if (at >= text.length && expected === "the end") return null;
      if (at >= text.length) return { at, reason: `the text ends, expected ${expected}` };
      if (text[at] === '"')
        return { at, reason: "a string that is not closed, or has a character to escape" };
      return { at, reason: `expected ${expected}` };
    }
    const [, mark, string] = found;
    end = TOKEN.lastIndex;
    if ((mark === "{" || mark === "[") && expected.startsWith("a value")) {
      open.push(mark);
      expected = mark === "{" ? "a name in quotes or }" : "a value or ]";
    } else if (mark && expected.endsWith(mark) && "]}".includes(mark)) {
      open.pop();
      expected = after();
    } else if (mark === "," && expected.startsWith(",")) {
      expected = open.at(-1) === "{" ? "a name in quotes" : "a value";
    } else if (mark === ":" && expected === ":") {
      expected = "a value";
    } else if (string && expected.startsWith("a name")) {
      expected = ":";
    } else if (!mark && expected.startsWith("a value")) {
      expected = after();
    } else {
      return { at, reason: `expected ${expected}` };
    }
  }
}
