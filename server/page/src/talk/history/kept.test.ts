import { beforeEach, expect, test, vi } from "vitest";
import { Conversation, Turn } from "../chat/conversation.svelte";
import { MAX_CONVERSATIONS } from "./history";
import { Memory } from "./memory";
import { MAX_CHARACTERS } from "./stored";

vi.stubGlobal("sessionStorage", new Memory());
vi.stubGlobal("document", { hidden: true }); // nothing is drawn
const { Kept } = await import("./kept.svelte");

/** A server that says "Once", and goes on until nobody listens. */
function fetch(_: string, { signal }: { signal: AbortSignal }): Promise<Response> {
  const chunk = { model: "tiny", choices: [{ delta: { content: "Once" }, finish_reason: null }] };
  const stream = new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\n\n`));
      signal.addEventListener("abort", () => controller.error(signal.reason));
    },
  });
  return Promise.resolve(new Response(stream));
}

/** Let the streams that were stopped end. */
const ended = () => new Promise((resolve) => setTimeout(resolve));

function row(prompt: string, answer = "Yes"): string {
  const messages = [
    { role: "user", content: prompt },
    { role: "assistant", content: answer },
  ];
  return `${JSON.stringify({ messages })}\n`;
}

function rows(number: number): string {
  return Array.from({ length: number }, (_, place) => row(`Prompt ${place + 1}`)).join("");
}

let kept: InstanceType<typeof Kept>;
let memory: Memory;
const names = () => kept.index.list.map(({ name }) => name);
const answer = () => kept.chat.conversation.turns[0]!.replies[0]!.steps[0]!.answer;

/** Begin a conversation that is being answered. Returns its id. */
async function answered(prompt: string): Promise<string> {
  kept.start();
  kept.chat.ask(prompt);
  await vi.waitFor(() => expect(answer().content).toBe("Once"));
  return kept.chat.conversation.id;
}

beforeEach(() => {
  vi.stubGlobal("fetch", fetch);
  memory = new Memory();
  kept = new Kept(memory, () => "tiny");
});

test("a conversation that is deleted while it is answered stays deleted", async () => {
  const id = await answered("First");
  await answered("Second");
  expect(names()).toEqual(["Second", "First"]);
  kept.remove(kept.chat.conversation.id);
  await ended();
  expect([names(), kept.chat.running]).toEqual([["First"], 0]);
  kept.open(id);
  await answered("Third");
  kept.remove(id); // left just now
  await ended();
  expect(names()).toEqual(["Third"]);
  kept.clear();
  await ended();
  expect([names(), [...memory.items.keys()]]).toEqual([[], []]);
});

test("an answer that is left is kept as far as it came", async () => {
  const id = await answered("First");
  await answered("Second");
  kept.open(id);
  expect(answer()).toMatchObject({ content: "Once", state: "stopped" });
  kept.chat.conversation.turns = [...kept.chat.conversation.turns, new Turn("More")];
  kept.rename(id, "Named");
  await ended();
  kept.start();
  kept.open(id);
  expect([kept.chat.conversation.name, kept.chat.conversation.turns.length]).toEqual(["Named", 2]);
});

test("opening the conversation that is shown lets it go on", async () => {
  const id = await answered("First");
  const { conversation } = kept.chat;
  kept.open(id);
  await ended();
  expect(kept.chat.conversation).toBe(conversation);
  expect([kept.chat.running, answer().state]).toEqual([1, "running"]);
});

test("an import fills free places, and says which lines have none", () => {
  const mine = new Conversation();
  mine.turns = [new Turn("Mine")];
  kept.chat.open(mine);
  kept.rename(mine.id, "Mine");
  kept.add("rows.jsonl", rows(150));
  expect(kept.index).toMatchObject({ dropped: 0, list: { length: MAX_CONVERSATIONS } });
  expect(names().at(-1)).toBe("Mine");
  expect(kept.chat.conversation.name).toBe("Prompt 99");
  expect(kept.news).toBe(
    "99 of 150 imported from rows.jsonl.\n" +
      "Line 100 and those after it are left out: 100 conversations are kept, and no more. Delete some to import more.",
  );
  kept.add("again.jsonl", rows(1));
  expect(kept.news).toContain("0 of 1 imported from again.jsonl.\nLine 1 and those after it");
  expect(kept.chat.conversation.name).toBe("Prompt 99");
});

test("an import counts what is kept, and names what is too long", () => {
  kept.add("rows.jsonl", `${row("Long", "x".repeat(MAX_CHARACTERS))}${row("Short")}{}\n`);
  expect(names()).toEqual(["Short"]);
  expect(kept.news).toMatch(
    /^1 of 3 imported from rows.jsonl.\nLine 3: .*\nLine 1: 3,000,\d+ characters are too many/,
  );
  kept.add("half.jsonl", row("A", "x".repeat(MAX_CHARACTERS / 2)));
  expect(kept.news).toBe("1 imported from half.jsonl.");
  kept.add("half.jsonl", row("B", "x".repeat(MAX_CHARACTERS / 2)));
  expect(kept.news).toContain(
    "Line 1 and those after it are left out: 3,000,000 characters are kept, and no more.",
  );
  expect(names()).toEqual(["A", "Short"]);
});

test("conversations go out as rows, the one that is shown as it is now", async () => {
  kept.add("rows.jsonl", row("Stored"));
  await answered("Shown");
  const texts = kept
    .rows(kept.index.list.map(({ id }) => id))
    .trim()
    .split("\n");
  const contents = texts.map(
    (text) => (JSON.parse(text) as { messages: { content: string }[] }).messages[1]!.content,
  );
  expect(contents).toEqual(["Once", "Yes"]);
});

test("another tab's changes and deletions are seen, and nothing is written over", () => {
  kept.add("rows.jsonl", row("Hi"));
  const { id } = kept.chat.conversation;
  const there = new Kept(memory, () => "tiny");
  const seen = new EventTarget();
  vi.stubGlobal("addEventListener", seen.addEventListener.bind(seen));
  vi.stubGlobal("removeEventListener", seen.removeEventListener.bind(seen));
  const told = () => seen.dispatchEvent(Object.assign(new Event("storage"), { key: "manylora.talk.index" }));
  const unwatch = kept.watch();
  expect(kept.warning).toBe("");
  there.open(id);
  there.rename(id, "There");
  told();
  expect(names()).toEqual(["There"]);
  expect(kept.warning).toContain("Another tab has changed this conversation.");
  kept.rename(id, "Here");
  expect([names(), kept.warning]).toEqual([
    ["Here (copy)", "There"],
    expect.stringContaining("goes on as a copy"),
  ]);
  kept.open(id);
  expect([kept.chat.conversation.name, kept.warning]).toEqual(["There", ""]);
  there.remove(id);
  told();
  expect(kept.warning).toContain("Another tab has deleted this conversation, or needed its room.");
  kept.rename(id, "Again");
  expect([names(), kept.warning]).toEqual([["Again", "Here (copy)"], ""]);
  const items = new Map(memory.items);
  memory.clear();
  told();
  expect(kept.warning).toContain("Another tab has deleted this conversation");
  for (const [key, text] of items) memory.setItem(key, text);
  told();
  expect(kept.warning).toBe("");
  unwatch();
});

test("a conversation whose last turn is deleted is not kept any more, unless another tab has changed it", () => {
  kept.add("rows.jsonl", row("Secret"));
  const { conversation } = kept.chat;
  kept.chat.remove(conversation.turns[0]!);
  expect([names(), [...memory.items.values()].join().includes("Secret")]).toEqual([[], false]);
  kept.chat.removeColumn(0);
  expect([names(), kept.warning]).toEqual([[], ""]);
  kept.add("rows.jsonl", row("Shared"));
  const there = new Kept(memory, () => "tiny");
  there.open(kept.chat.conversation.id);
  there.rename(kept.chat.conversation.id, "There");
  kept.chat.remove(kept.chat.conversation.turns[0]!);
  expect(new Kept(memory, () => "tiny").index.list.map(({ name }) => name)).toEqual(["There"]);
});

test("one that was changed elsewhere is shown as it is kept when it is opened again", () => {
  kept.add("rows.jsonl", row("Hi"));
  const { id } = kept.chat.conversation;
  const there = new Kept(memory, () => "tiny");
  there.open(id);
  there.rename(id, "There");
  kept.open(id);
  expect([kept.chat.conversation.name, names()]).toEqual(["There", ["There"]]);
});

test("what is not kept, what is left out and what had to go is said", async () => {
  memory.setItem("manylora.talk.odd", "nonsense");
  kept.open("odd");
  expect(kept.unreadable).toBe("odd");
  expect(kept.rows(["odd"])).toBe("");
  expect(kept.news).toBe("1 of 1 cannot be read, and are left out.");
  kept = new Kept(new Memory(3000), () => "tiny");
  kept.add("rows.jsonl", row("Old", "x".repeat(1000)));
  await answered("y".repeat(1500));
  expect(kept.warning).toBe("To make room for this one, “Old” left this browser.");
  kept.chat.ask("z".repeat(3000));
  expect(kept.trouble).toMatch(/^“y+” is not kept: the browser has no room for it\.$/);
  kept.start();
  await ended();
  kept = new Kept(null, () => "tiny");
  await answered("Hi");
  expect(kept.trouble).toContain("“Hi” is not kept: the browser keeps nothing for this page");
});
