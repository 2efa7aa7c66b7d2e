/**
 * Markdown as blocks and as HTML, which is not safe yet.
 *
 * The parser takes a time that grows with the square of a paragraph's length for some texts, and recurses for each level
 * of nesting. What would take it seconds, or overflow its stack, is shown as it is written.
 */

import { Marked } from "marked";

const marked = new Marked({
  gfm: true,
  breaks: true,
  async: false,
  // HTML in the text is shown as text, as a model that writes HTML means to show it.
  tokenizer: { html: () => undefined, tag: () => undefined },
  renderer: {
    // An image would be fetched from where it is, and tell that server that somebody reads: a link does not.
    image({ href, raw, text }) {
      const words = { type: "text" as const, raw: text, text: text || href, escaped: false };
      return this.link({ type: "link", raw, href, text, title: null, tokens: [words] });
    },
  },
});

/** Longest block that is parsed, in characters; code may be longer, for nothing in it is parsed. */
const MAX_BLOCK = 8_000;
/** Longest text that is divided into blocks. */
const MAX_TEXT = 500_000;
/** A line with 20 levels of quotes or lists. People write three. */
const DEEP = /^[ \t]*(?:(?:>|[-*+][ \t]|\d{1,9}[.)][ \t])[ \t]*){20}/m;
const FENCE = /^ {0,3}(?:```|~~~)/;

/** Return the paragraphs, lists, tables, ... of a text, which can be rendered each alone: as a text grows, only the last changes. */
export function blocks(markdown: string): string[] {
  if (markdown.length > MAX_TEXT || DEEP.test(markdown)) return [markdown];
  const tokens = new marked.Lexer(marked.defaults).blockTokens(markdown);
  // The target of a link may be defined in another block.
  if (tokens.some((token) => token.type === "def")) return [markdown];
  return tokens.filter((token) => token.type !== "space").map((token) => token.raw);
}

/** Return the HTML of a block. */
export function htmlOf(block: string): string {
  const long = block.length > MAX_BLOCK && !FENCE.test(block);
  return long || block.length > MAX_TEXT || DEEP.test(block)
    ? asWritten(block)
    : (marked.parse(block) as string);
}

function asWritten(text: string): string {
  const escaped = text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return `<p>${escaped.trimEnd().replaceAll("\n", "<br>")}</p>`;
}
