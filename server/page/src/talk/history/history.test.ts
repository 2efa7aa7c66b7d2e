import { expect, test } from "vitest";
import { newAnswer, type Answer } from "../chat/answer";
import { Conversation, Reply, Step, Turn } from "../chat/conversation.svelte";
import { History, MAX_CONVERSATIONS } from "./history";
import { Memory } from "./memory";
import { readRows, rowsOf } from "./rows";
import { MAX_CHARACTERS } from "./stored";

function reply(...answers: Partial<Answer>[]): Reply {
  const made = new Reply();
  made.steps = answers.map((answer) => {
    const step = new Step();
    step.answer = { ...newAnswer(), state: "done", ...answer };
    return step;
  });
  return made;
}

function talk(prompt: string, ...replies: (Reply | null)[]): Conversation {
  const conversation = new Conversation();
  conversation.targets = replies.map(() => []);
  conversation.turns = [new Turn(prompt, replies)];
  return conversation;
}

test("a conversation comes back, without the probabilities", () => {
  const history = new History(new Memory());
  const tokens = [{ text: "a", logprob: -1, top: [] }];
  const kept = talk("Hi", reply({ content: "Hello", tokens, finish: "stop" }), null);
  kept.options.temperature = "0.5";
  history.save(kept, 5);
  const found = history.load(kept.id)!;
  expect(found.turns[0]).toMatchObject({
    prompt: "Hi",
    replies: [{ steps: [{ answer: { content: "Hello" } }] }, null],
  });
  expect(found.turns[0]!.replies[0]!.steps[0]!.answer.tokens).toEqual([]);
  expect(found.options.temperature).toBe("0.5");
  expect(history.index()).toMatchObject({ list: [{ id: kept.id, name: "Hi", updated: 5 }], dropped: 0 });
  history.remove(kept.id);
  expect([history.load(kept.id), history.index().list]).toEqual([null, []]);
});

test("an answer that was growing when the page was closed was stopped", () => {
  const history = new History(new Memory());
  const kept = talk("Hi", reply({ content: "He", state: "running" }));
  history.save(kept);
  expect(history.load(kept.id)!.turns[0]!.replies[0]!.steps[0]!.answer.state).toBe("stopped");
});

test("the oldest are dropped and counted: too many, too long, no room", () => {
  const many = new History(new Memory());
  for (let place = 0; place < MAX_CONVERSATIONS + 2; place++) many.save(talk(`${place}`, reply({})));
  expect(many.index()).toMatchObject({ dropped: 2, list: { length: MAX_CONVERSATIONS } });
  expect(many.index().list.at(-1)!.name).toBe("2");

  const long = new History(new Memory());
  for (let place = 0; place < 3; place++) long.save(talk("x".repeat(MAX_CHARACTERS / 2), reply({})));
  expect(long.index()).toMatchObject({ dropped: 2, list: { length: 1 } });

  const memory = new Memory(10_000);
  const small = new History(memory);
  for (let place = 0; place < 3; place++) small.save(talk(`${place}${"x".repeat(4000)}`, reply({})));
  expect(small.index()).toMatchObject({ dropped: 1, list: { length: 2 } });
  expect(() => small.save(talk("x".repeat(20_000), reply({})))).toThrow("no room");
  expect(() => long.save(talk("x".repeat(MAX_CHARACTERS), reply({})))).toThrow("too many to be kept");
  expect(long.index().list).toHaveLength(1);
});

test("a conversation that has no room takes nothing from the others", () => {
  const memory = new Memory(10_000);
  const history = new History(memory);
  const mine = talk("Mine", reply({}));
  history.save(talk("Old", reply({})));
  history.save(mine);
  const before = [...memory.items];
  mine.turns = [...mine.turns, new Turn("x".repeat(20_000))];
  const removed: string[] = [];
  const remove = memory.removeItem;
  memory.removeItem = (name) => (removed.push(name), remove(name));
  expect(() => history.save(mine)).toThrow("no room");
  expect(removed).toEqual([]); // another tab would see it go
  expect(new Map(memory.items)).toEqual(new Map(before));
  expect(history.index().dropped).toBe(0);
  mine.turns = [new Turn("x".repeat(9_100))];
  expect(history.save(mine)).toEqual({ copied: false, dropped: ["Old"] });
});

test("what cannot be read stays: others make room, or there is none", () => {
  const memory = new Memory();
  const history = new History(memory);
  memory.setItem("manylora.talk.odd", "nonsense");
  for (let place = 0; place < MAX_CONVERSATIONS; place++) history.save(talk(`${place}`, reply({})));
  expect(history.index()).toMatchObject({ dropped: 1, list: { length: MAX_CONVERSATIONS } });
  const { id } = history.index().list[1]!;
  memory.setItem(`manylora.talk.${id}`, "x".repeat(MAX_CHARACTERS - 100_000)); // the index names it still
  history.save(talk("y".repeat(50_000), reply({})));
  expect(history.load(history.index().list.at(-1)!.id)).toBe(null);
  expect([memory.getItem("manylora.talk.odd"), memory.getItem(`manylora.talk.${id}`)?.length]).toEqual([
    "nonsense",
    MAX_CHARACTERS - 100_000,
  ]);
  memory.setItem("manylora.talk.index", "{");
  const before = new Map(memory.items);
  expect(() => history.save(talk("z".repeat(200_000), reply({})))).toThrow(
    "3,000,000 characters are kept, and no more. Delete those that cannot be read",
  );
  expect(new Map(memory.items)).toEqual(before);
});

test("a damaged index is made again by age, and the oldest makes room", () => {
  const memory = new Memory();
  const history = new History(memory);
  const [middle, oldest, newest] = ["Middle", "Oldest", "Newest"].map((name) => talk(name, reply({})));
  history.save(middle!, 20);
  history.save(oldest!, 10);
  history.save(newest!, 30);
  memory.setItem("manylora.talk.index", "{");
  expect(history.index().list.map(({ name, updated }) => [name, updated])).toEqual([
    ["Newest", 30],
    ["Middle", 20],
    ["Oldest", 10],
  ]);
  expect([history.current(newest!), history.load(middle!.id)!.kept]).toEqual([true, 20]);
  expect(history.save(talk("x".repeat(MAX_CHARACTERS - 700), reply({}))).dropped[0]).toBe("Oldest");
  const old = JSON.parse(memory.getItem(`manylora.talk.${history.index().list[0]!.id}`)!) as object;
  memory.setItem("manylora.talk.before", JSON.stringify({ ...old, updated: undefined }));
  expect(history.index().list.at(-1)).toMatchObject({ id: "before", updated: 0 });
});

test("two tabs with one conversation: the one that is behind goes on as a copy", () => {
  const memory = new Memory();
  const [here, there] = [new History(memory), new History(memory)];
  const mine = talk("Hi", reply({ content: "A" }));
  here.save(mine, 5);
  const { id } = mine;
  const other = there.load(id)!;
  other.turns = [...other.turns, new Turn("There")];
  expect(here.current(mine)).toBe(true);
  there.save(other, 5);
  expect([here.current(mine), there.current(other)]).toEqual([false, true]);
  mine.turns = [...mine.turns, new Turn("Here")];
  expect(here.save(mine)).toEqual({ copied: true, dropped: [] });
  expect(mine.id).not.toBe(id);
  expect(here.index().list.map(({ name }) => name)).toEqual(["Hi (copy)", "Hi"]);
  expect(here.load(id)!.turns.map(({ prompt }) => prompt)).toEqual(["Hi", "There"]);
  expect(here.load(mine.id)!.turns.map(({ prompt }) => prompt)).toEqual(["Hi", "Here"]);
  expect(here.save(mine)).toEqual({ copied: false, dropped: [] });
  there.remove(id);
  expect(there.current(other)).toBe(null);
});

test("what something else wrote there is no conversation, and hides none", () => {
  const memory = new Memory();
  const history = new History(memory);
  const [first, second] = [talk("First", reply({})), talk("Second", reply({}))];
  history.save(first);
  history.save(second);
  for (const index of ["{", "[]", "7", '{"list": 5}', '{"list": [null, {"id": 4}], "dropped": "x"}']) {
    memory.setItem("manylora.talk.index", index);
    const { list, dropped } = history.index();
    expect(list.map(({ name }) => name).sort()).toEqual(["First", "Second"]);
    expect(dropped).toBe(0);
  }
  const good = JSON.parse(memory.getItem(`manylora.talk.${first.id}`)!) as Record<string, unknown>;
  const step = { answer: { content: 5 }, results: {} };
  for (const odd of [
    "nonsense",
    "null",
    '"text"',
    JSON.stringify({ ...good, turns: undefined }),
    JSON.stringify({ ...good, turns: [{ prompt: "Hi", replies: [[step]] }] }),
    JSON.stringify({ ...good, targets: [] }),
    JSON.stringify({ ...good, targets: [[{ name: 3 }]] }),
    JSON.stringify({ ...good, options: { form: "poem" } }),
    JSON.stringify({ ...good, options: { system: 3 } }),
  ]) {
    memory.setItem("manylora.talk.odd", odd);
    expect(history.load("odd")).toBe(null);
    expect(history.index().list.map(({ name }) => name)).toContain("Cannot be read");
  }
  expect(history.index().list).toHaveLength(3);
  history.clear();
  expect(memory.length).toBe(0);
});

test("a browser that keeps nothing says so", () => {
  const history = new History(null);
  expect([history.blocked, history.index(), history.load("a")]).toEqual([
    true,
    { list: [], dropped: 0 },
    null,
  ]);
  expect(() => history.save(talk("Hi", reply({})))).toThrow("the browser keeps nothing for this page");
  expect(() => history.add(talk("Hi", reply({})))).toThrow("the browser keeps nothing for this page");
});

test("rows for training go out and come in", () => {
  const conversation = talk(
    "Weather?",
    reply({ calls: [{ id: "c", name: "f", arguments: "{}" }] }, { content: "Sun" }),
  );
  conversation.options.system = "Be brief.";
  conversation.options.tools = '[{"type": "function", "function": {"name": "f"}}]';
  conversation.turns[0]!.replies[0]!.steps[0]!.results.c = "20 °C";
  conversation.turns = [...conversation.turns, new Turn("Failed", [reply({ state: "failed" })])];
  const text = rowsOf(conversation);
  expect(JSON.parse(text)).toEqual({
    messages: [
      { role: "system", content: "Be brief." },
      { role: "user", content: "Weather?" },
      {
        role: "assistant",
        content: null,
        tool_calls: [{ id: "c", type: "function", function: { name: "f", arguments: "{}" } }],
      },
      { role: "tool", tool_call_id: "c", content: "20 °C" },
      { role: "assistant", content: "Sun" },
    ],
    tools: [{ type: "function", function: { name: "f" } }],
  });
  const { rows, errors } = readRows(`${text}\n`);
  expect(errors).toEqual([]);
  expect(rowsOf(rows[0]!.conversation)).toBe(text);
});

test("each column that answered is a row; an empty answer and its prompt are left out", () => {
  const both = talk("Hi", reply({ content: "A" }), reply({ content: "B" }));
  both.turns = [new Turn("Empty?", [reply({ content: "" }), null]), ...both.turns];
  const rows = rowsOf(both).trim().split("\n").map((row) => (JSON.parse(row) as { messages: object[] }).messages); // prettier-ignore
  expect(rows).toEqual(["A", "B"].map((content) => [{ role: "user", content: "Hi" }, { role: "assistant", content }])); // prettier-ignore
  expect(rowsOf(talk("Hi", reply({ state: "failed" })))).toBe("");
});

test("rows that cannot be read are named", () => {
  const { rows, errors } = readRows(
    [
      '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}',
      "{,}",
      "[]",
      '{"messages": [{"role": "assistant", "content": "Hi"}]}',
      '{"messages": [{"role": "user", "content": 1}]}',
      '{"messages": [{"role": "boss", "content": "x"}]}',
      '{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]}',
      '{"messages": [null]}',
    ].join("\n"),
  );
  expect(rows.map(({ line, conversation }) => [line, conversation.name])).toEqual([[1, "Hi"]]);
  expect(errors).toEqual([
    "Line 2: line 1, column 2: expected a name in quotes or }",
    "Line 3: a row is an object with a list of `messages`",
    "Line 4: messages[0]: the first turn must be the user's, not the assistant's",
    "Line 5: messages[0]: `content` must be text",
    "Line 6: messages[0]: `role` must be system, user, assistant or tool",
    "Line 7: messages[1]: no call before it has this `tool_call_id`",
    "Line 8: messages[0]: `role` must be system, user, assistant or tool",
  ]);
});
