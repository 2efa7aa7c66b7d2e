/** Markdown of models and model cards, as HTML that can run nothing and asks no other server. */

import DOMPurify from "dompurify";
import { htmlOf } from "./blocks";

/** Elements that stay. No images, no forms, no styles. */
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
]; // prettier-ignore

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Return safe HTML of a block, or of a short text. */
export function render(markdown: string): string {
  return DOMPurify.sanitize(htmlOf(markdown), {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "align", "start"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  });
}
