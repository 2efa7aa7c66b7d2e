import { afterEach, expect, it, vi } from "vitest";
import { askAll, inOneTab } from "./ask";
import { compare, missing } from "./comparison";
import { resolved } from "./targets";

// Node has no storage, which the session looks for its key in.
vi.hoisted(() => {
  const none = { getItem: () => null, setItem: () => {}, removeItem: () => {} };
  Object.assign(globalThis, { sessionStorage: none, localStorage: none });
});

const SAMPLING = { system: "", temperature: 0, max_tokens: 5, seed: 1 };
const GOOD = { choices: [{ text: "yes" }], usage: { completion_tokens: 1 }, model: "tiny", adapter: [] };
const never = new AbortController().signal;

afterEach(() => vi.unstubAllGlobals());

/** Let the server answer so, by the path and the body. */
function server(answer: (path: string, body: { model?: string }) => string): void {
  vi.stubGlobal("fetch", (path: string, { body }: RequestInit) =>
    Promise.resolve(new Response(answer(path, JSON.parse((body as string) ?? "{}")))),
  );
}

it.each([
  ["a proxy's page", "<html>502</html>"],
  ["null", "null"],
  ["another object", "{}"],
])("takes an answer that is %s for one that failed, asks for the others, and asks again", async (_, odd) => {
  const comparison = compare(["legal@1", "tiny"], ["a", "b"].map((content) => [{ role: "user", content }]), SAMPLING); // prettier-ignore
  server((_, { model }) => (model === "tiny" ? JSON.stringify(GOOD) : odd));
  let told = 0;
  await askAll(comparison, true, () => told++, never);
  expect(told).toBe(4);
  for (const { answers } of comparison.pairs) {
    expect(answers[0]?.error).toMatch(/^The (answer is no JSON|server's answer cannot be read)/);
    expect(answers[1]).toEqual({ text: "yes", served: "tiny", tokens: 1 });
  }
  server(() => JSON.stringify(GOOD));
  await askAll(comparison, true, () => told++, never);
  expect([missing(comparison), told]).toEqual([[], 6]);
});

it("resolves targets, and refuses two that are one version", async () => {
  server(() => JSON.stringify({ id: "legal", active: 1 }));
  expect(await resolved([" legal ", "legal@2"], "tiny")).toEqual(["legal@1", "legal@2"]);
  expect(await resolved(["legal", "tiny"], "tiny")).toEqual(["legal@1", "tiny"]);
  for (const other of ["legal@1", "Legal@1", "other-name"]) {
    await expect(resolved(["legal", other], "tiny")).rejects.toThrow(
      "The targets are the same version, legal@1",
    );
  }
});

it("says that a target has no active version", async () => {
  server(() => JSON.stringify({ id: "legal", active: null }));
  await expect(resolved(["legal", "tiny"], "tiny")).rejects.toThrow("legal has no active version: name one.");
});

it("asks in one tab: another waits until it ends, or until it is stopped itself", async () => {
  const said: string[] = [];
  let end = (): void => {};
  const work = () => new Promise<void>((resolve) => (said.push("asked"), (end = resolve)));
  const other = () => Promise.reject(new Error("asked twice"));
  const first = inOneTab("a", work, () => said.push("first waits"), never);
  await vi.waitFor(() => expect(said).toEqual(["asked"]));
  const second = inOneTab("a", other, () => said.push("second waits"), never);
  const stopped = new AbortController();
  const third = inOneTab("a", other, () => stopped.abort(new Error("stopped")), stopped.signal);
  await expect(third).rejects.toThrow("stopped");
  await inOneTab("b", () => Promise.resolve(void said.push("b asked")), () => {}, never); // prettier-ignore
  expect(said).toEqual(["asked", "second waits", "b asked"]);
  end();
  expect(await Promise.all([first, second])).toEqual([true, false]);
});
