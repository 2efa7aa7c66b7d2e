/** Prompts of a comparison: typed, one a line, or from a file. */

export interface Message {
  role: string;
  content: string;
}

/** What is asked: a conversation that ends with the user. */
export type Prompt = Message[];

export interface Parsed {
  prompts: Prompt[];
  /** Lines that have no prompt, with why. */
  skipped: { line: number; reason: string }[];
}

/** Fields of rows of data that hold a prompt, the first that is there. */
const FIELDS = ["prompt", "question", "instruction", "input", "text", "query"];

/** Return the prompts of a file by the end of its name; anything but JSONL and CSV is text, one prompt a line. */
export function promptsOf(name: string, text: string): Parsed {
  if (/\.(jsonl|ndjson)$/i.test(name)) return fromJsonLines(text);
  if (/\.csv$/i.test(name)) return fromCsv(text);
  return { prompts: fromLines(text), skipped: [] };
}

/** Return a prompt for each line that is not empty. */
export function fromLines(text: string): Prompt[] {
  const lines = text.split(/\r?\n/).map((line) => line.trim());
  return lines.filter(Boolean).map((content) => [{ role: "user", content }]);
}

function fromJsonLines(text: string): Parsed {
  const parsed: Parsed = { prompts: [], skipped: [] };
  for (const [place, line] of text.split(/\r?\n/).entries()) {
    if (!line.trim()) continue;
    const found = promptOfRow(line);
    if (typeof found === "string") parsed.skipped.push({ line: place + 1, reason: found });
    else parsed.prompts.push(found);
  }
  return parsed;
}

/** Return the prompt of a row of JSON, or why there is none. */
function promptOfRow(line: string): Prompt | string {
  let row: unknown;
  try {
    row = JSON.parse(line);
  } catch {
    return "is not JSON";
  }
  if (typeof row === "string" && row.trim()) return [{ role: "user", content: row }];
  if (typeof row !== "object" || row === null) return "is neither an object nor a text";
  const fields = row as Record<string, unknown>;
  if (Array.isArray(fields.messages)) return untilLastUser(fields.messages);
  const field = FIELDS.find((name) => typeof fields[name] === "string" && fields[name]);
  if (field === undefined) return `has no field messages, ${FIELDS.join(", ")}`;
  const input = field === "instruction" && typeof fields.input === "string" ? fields.input : "";
  return [{ role: "user", content: [fields[field] as string, input].filter(Boolean).join("\n\n") }];
}

/** Return a conversation until its last user's turn: rows of training data end with the answer. */
function untilLastUser(messages: unknown[]): Prompt | string {
  const isMessage = (one: unknown): one is Message =>
    typeof one === "object" &&
    one !== null &&
    typeof (one as Message).role === "string" &&
    typeof (one as Message).content === "string";
  if (!messages.every(isMessage)) return "has messages without the texts role and content";
  const last = messages.findLastIndex((message) => message.role === "user");
  if (last < 0) return "has no message of a user";
  return messages.slice(0, last + 1).map(({ role, content }) => ({ role, content }));
}

function fromCsv(text: string): Parsed {
  const [head = [], ...rows] = csvRows(text);
  const names = head.map((name) => name.trim().toLowerCase());
  const named = FIELDS.map((field) => names.indexOf(field)).find((place) => place >= 0);
  const parsed: Parsed = { prompts: [], skipped: [] };
  // Without a column of a known name, the first one has the prompts, and there is no header.
  for (const [place, row] of (named === undefined ? [head, ...rows] : rows).entries()) {
    const content = (row[named ?? 0] ?? "").trim();
    if (content) parsed.prompts.push([{ role: "user", content }]);
    else if (row.some(Boolean)) {
      parsed.skipped.push({ line: place + (named === undefined ? 1 : 2), reason: "has an empty prompt" });
    }
  }
  return parsed;
}

/** Return the fields of CSV (RFC 4180). */
export function csvRows(text: string): string[][] {
  const rows: string[][] = [];
  let row: string[] = [];
  const field = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/y;
  while (field.lastIndex < text.length) {
    const [whole, quoted, plain, end] = field.exec(text) ?? [];
    if (whole === undefined) break; // a quote that is never closed
    row.push(quoted === undefined ? (plain ?? "") : quoted.replaceAll('""', '"'));
    if (end !== ",") {
      rows.push(row);
      row = [];
    }
  }
  if (row.length) rows.push([...row, ""]);
  return rows;
}
