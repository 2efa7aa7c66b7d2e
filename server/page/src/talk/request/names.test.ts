import { expect, test, vi } from "vitest";
import { NameSearch } from "./names";

const { signal } = new AbortController();

/** Return a server's pages over names, as it makes them: by ASCII, after a name. */
function server(names: string[], aliases: string[] = []) {
  const sorted = [...names, ...aliases].sort();
  return vi.fn((query: Record<string, string>) => {
    const after = query.after;
    const all = [...(after === undefined ? ["tiny"] : []), ...sorted.filter((name) => name > (after ?? ""))];
    const shown = all.filter((name) => query.versions || !name.includes("@"));
    const page = shown.slice(0, Number(query.limit));
    const data = page.map((id) => ({
      id,
      root: aliases.includes(id) ? "legal" : "a".repeat(64),
      parent: id === "tiny" ? null : "tiny",
    }));
    return Promise.resolve({ data, has_more: shown.length > page.length });
  });
}

test("a part of the name finds it among few", async () => {
  const read = server(["legal", "team/Blue"], ["prod"]);
  const search = new NameSearch(read);
  expect((await search.find("", signal)).names).toEqual([
    { id: "tiny", kind: "base" },
    { id: "legal", kind: "adapter" },
    { id: "prod", kind: "alias" },
    { id: "team/Blue", kind: "adapter" },
  ]);
  expect((await search.find("blue", signal)).names.map(({ id }) => id)).toEqual(["team/Blue"]);
  expect(read).toHaveBeenCalledTimes(1);
});

test("thousands are searched by the server, from the beginning", async () => {
  const names = Array.from({ length: 3000 }, (_, place) => `a-${place}`);
  const read = server([...names, "legal", "legal-2", "legam"]);
  const search = new NameSearch(read);
  expect(await search.find("legal", signal)).toMatchObject({
    names: [{ id: "legal" }, { id: "legal-2" }],
    more: false,
    beginnings: true,
  });
  expect(await search.find("a-", signal)).toMatchObject({ more: true });
  for (const [query] of read.mock.calls) expect(Number(query.limit)).toBeLessThanOrEqual(300);
});

test("versions come after an @", async () => {
  const search = new NameSearch(server(["legal", "legal@1", "legal@2", "legal2", "legal2@1"]));
  expect((await search.find("legal@", signal)).names).toEqual([
    { id: "legal@1", kind: "version" },
    { id: "legal@2", kind: "version" },
  ]);
});

test("an error is not remembered", async () => {
  const read = server(["legal"]);
  read.mockRejectedValueOnce(new Error("no"));
  const search = new NameSearch(read);
  await expect(search.find("", signal)).rejects.toThrow("no");
  expect((await search.find("legal", signal)).names).toHaveLength(1);
});
