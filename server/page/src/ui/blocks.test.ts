import { expect, test } from "vitest";
import { blocks, htmlOf } from "./blocks";

const rendered = (text: string): string => blocks(text).map(htmlOf).join("");

test("blocks together are the whole text", () => {
  const text = "# Title\n\nA *word*.\n\n- one\n- two\n\n```\na < b\n```\n";
  expect(blocks(text)).toHaveLength(4);
  expect(rendered(text)).toBe(
    "<h1>Title</h1>\n<p>A <em>word</em>.</p>\n<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n<pre><code>a &lt; b\n</code></pre>\n",
  );
});

test("a link may be defined in another block", () => {
  expect(rendered("See [it][1].\n\n[1]: https://example.com")).toContain('href="https://example.com"');
});

test.each([">".repeat(3000) + "x", "- ".repeat(3000), "1. ".repeat(3000) + "x", "> - ".repeat(1500)])(
  "deep nesting is shown as it is written (%#)",
  (text) => expect(rendered(`Before\n\n${text}`)).toContain(text.trimEnd().replaceAll(">", "&gt;")),
);

test.each(["a.".repeat(125_000) + "@", "_a_".repeat(10_000), "*a _b ".repeat(4000) + "_ *".repeat(4000)])(
  "a text that takes the parser seconds is shown as it is written (%#)",
  (text) => expect(rendered(text)).toBe(`<p>${text}</p>`),
);

test("long code stays code, and three levels stay a list", () => {
  expect(rendered("```\n" + "x = 1\n".repeat(5000) + "```")).toMatch(/^<pre><code>x = 1/);
  expect(rendered("- a\n  - b\n    - c")).toContain("<li>c</li>");
  expect(rendered("- ".repeat(3) + "x")).toContain("<ul>");
});

test("what is shown as it is written can hold no HTML", () => {
  expect(rendered(">".repeat(30) + "<img src=x>\nb")).toBe(
    `<p>${"&gt;".repeat(30)}&lt;img src=x&gt;<br>b</p>`,
  );
});
