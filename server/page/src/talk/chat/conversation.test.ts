import { expect, test } from "vitest";
import { newAnswer, type Answer } from "./answer";
import { Conversation, messagesOf, Reply, Step, Turn } from "./conversation.svelte";
import { requestFor } from "../request/request";
import { targetFields, targetLabel } from "../request/target";

function said(content: string, more: Partial<Answer> = {}): Reply {
  const reply = new Reply();
  const step = new Step();
  step.answer = { ...newAnswer(), state: "done", content, ...more };
  reply.steps = [step];
  return reply;
}

test("each column has its own history; another's answer stands in where it was not asked", () => {
  const conversation = new Conversation();
  const now = new Turn("3", [null, null]);
  conversation.turns = [
    new Turn("1", [said("a"), null]),
    new Turn("2", [said("b"), said("B")]),
    now,
    new Turn("4"),
  ];
  const contents = (column: number) => messagesOf(conversation, column, now).map(({ content }) => content);
  expect(contents(0)).toEqual(["1", "a", "2", "b", "3"]);
  expect(contents(1)).toEqual(["1", "a", "2", "B", "3"]);
});

test("a part of an answer counts, a failure without text does not", () => {
  const conversation = new Conversation();
  const now = new Turn("3", [null]);
  const stopped = said("par", { state: "stopped" });
  conversation.turns = [new Turn("1", [stopped]), new Turn("2", [said("", { state: "failed" })]), now];
  expect(messagesOf(conversation, 0, now).map(({ content }) => content)).toEqual(["1", "par", "3"]);
});

test("results that nobody gave are not sent", () => {
  const calls = ["a", "b"].map((id) => ({ id, name: "f", arguments: "{}" }));
  const turn = new Turn("1", [said("", { calls })]);
  turn.replies[0]!.steps[0]!.results.b = "2";
  const conversation = new Conversation();
  conversation.turns = [turn];
  expect(messagesOf(conversation, 0, turn, 1).slice(2)).toEqual([
    { role: "tool", tool_call_id: "b", content: "2" },
  ]);
  expect(messagesOf(conversation, 0, turn, 0)).toHaveLength(1);
});

test("targets: the base, a name, a weight, a mix", () => {
  const legal = { name: " legal ", weight: 1 };
  expect(targetFields([], "tiny")).toEqual({ model: "tiny" });
  expect(targetFields([{ name: "tiny", weight: 1 }], "tiny")).toEqual({ model: "tiny" });
  expect(targetFields([legal], "tiny")).toEqual({ model: "legal" });
  expect(targetFields([{ ...legal, weight: 0.5 }], "tiny")).toEqual({
    model: "tiny",
    adapter: [{ name: "legal", weight: 0.5 }],
  });
  const mix = [legal, { name: "", weight: 1 }, { name: "german@2", weight: -0.5 }];
  expect(targetFields(mix, "tiny").adapter).toEqual([
    { name: "legal", weight: 1 },
    { name: "german@2", weight: -0.5 },
  ]);
  expect(targetLabel(mix, "tiny")).toBe("1 legal + -0.5 german@2");
});

test("a request streams, with its usage and where the time went", () => {
  const request = requestFor(new Conversation(), 0, new Turn("Hi"), "tiny");
  expect(request).toEqual({
    model: "tiny",
    messages: [{ role: "user", content: "Hi" }],
    stream: true,
    stream_options: { include_usage: true },
    explain: true,
  });
});
