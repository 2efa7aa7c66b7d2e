import { expect, test } from "vitest";
import { eventsOf } from "./events";

async function read(...chunks: string[]): Promise<string[]> {
  const encoder = new TextEncoder();
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(encoder.encode(chunk));
      controller.close();
    },
  });
  return Array.fromAsync(eventsOf(new Response(body)));
}

test("events may be cut anywhere", async () => {
  const text = 'data: {"a": 1}\n\ndata: two\ndata: lines\n\n';
  for (let cut = 0; cut <= text.length; cut++) {
    expect(await read(text.slice(0, cut), text.slice(cut))).toEqual(['{"a": 1}', "two\nlines"]);
  }
});

test("comments and other fields are skipped", async () => {
  expect(await read(": keep-alive\n\nevent: ping\nid: 3\ndata:x\n\n")).toEqual(["x"]);
});

test("lines may end in CR LF, cut between the two", async () => {
  expect(await read("data: a\r", "\n\r", "\ndata: b\r\n\r\n")).toEqual(["a", "b"]);
});

test("an event that is not complete is not given", async () => {
  expect(await read("data: a\n\ndata: b\n")).toEqual(["a"]);
});
