/** Keys on the keyboard that work anywhere in the page. */

/** Words for the help, by the key or keys that do it. */
export const SHORTCUTS: [string, string][] = [
  ["g t", "go to Talk"],
  ["g a", "go to Adapters"],
  ["g r", "go to Training"],
  ["g h", "go to Health"],
  ["/", "search, or write a prompt"],
  ["Esc", "stop an answer, or close a dialog"],
  ["?", "show these keys"],
];

const GO: Record<string, string> = { t: "talk", a: "adapters", r: "training", h: "health" };
const PREFIX_MS = 1500;

/** What a key asks for. */
export type Command = { go: string } | "search" | "help" | null;

/** Return a function from a key to what it asks for; it remembers a `g` for a moment. */
export function commands(now: () => number = Date.now): (key: string) => Command {
  let prefixed = -Infinity;
  return (key) => {
    if (now() - prefixed < PREFIX_MS) {
      prefixed = -Infinity;
      const view = GO[key];
      return view ? { go: view } : null;
    }
    if (key === "g") prefixed = now();
    if (key === "/") return "search";
    if (key === "?") return "help";
    return null;
  };
}

/** Whether a key pressed here is text that somebody writes. */
export function writes(target: EventTarget | null): boolean {
  return (
    target instanceof HTMLElement &&
    (target.isContentEditable ||
      target.matches("textarea, select, input:not([type=range], [type=checkbox], [type=radio])"))
  );
}
