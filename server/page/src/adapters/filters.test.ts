import { expect, it } from "vitest";
import { ALL, matching, ordered, originOf, stateOf } from "./filters";
import type { Adapter } from "./registry";

function adapter(id: string, fields: Partial<Adapter> = {}): Adapter {
  return {
    id,
    created: 1,
    active: 1,
    pinned: false,
    aliases: [],
    versions: [1],
    content: "c",
    rank: 8,
    targets: 4,
    size_bytes: 10,
    residency: "disk",
    status: "ready",
    ...fields,
  };
}

const adapters = [
  adapter("acme/legal", { aliases: ["prod"], residency: "device", source: "hf://org/legal" }),
  adapter("acme/Support", { pinned: true, status: "refused", rank: 16, source: "upload" }),
  adapter("german", { active: null, status: null, residency: null, rank: null, source: "folder german" }),
];
const ids = (filters: object): string[] => matching(adapters, { ...ALL, ...filters }).map(({ id }) => id);

it("searches for all words in names, aliases and sources, whatever their case", () => {
  expect(ids({ words: "ACME support" })).toEqual(["acme/Support"]);
  expect(ids({ words: "prod" })).toEqual(["acme/legal"]);
  expect(ids({ words: "hf://" })).toEqual(["acme/legal"]);
  expect(ids({ words: "acme german" })).toEqual([]);
});

it("filters", () => {
  expect(ids({})).toHaveLength(3);
  expect(ids({ state: "refused" })).toEqual(["acme/Support"]);
  expect(ids({ state: "inactive" })).toEqual(["german"]);
  expect(ids({ residency: "device" })).toEqual(["acme/legal"]);
  expect(ids({ pinned: true })).toEqual(["acme/Support"]);
  expect(ids({ aliased: true })).toEqual(["acme/legal"]);
  expect(ids({ origin: "folder" })).toEqual(["german"]);
  expect(adapters.map(stateOf)).toEqual(["ready", "refused", "inactive"]);
});

it("orders numbers downwards, and what has none last", () => {
  expect(ordered(adapters, "rank", new Map()).map(({ id }) => id)).toEqual([
    "acme/Support",
    "acme/legal",
    "german",
  ]);
  expect(ordered(adapters, "requests", new Map([["german", 3]]))[0]!.id).toBe("german");
});

it("names the kind of place that an adapter came from", () => {
  expect(["upload", "folder x", "hf://org/a@main", "s3://b/c", "", null].map(originOf)).toEqual([
    "upload", "folder", "hf", "s3", "", "",
  ]); // prettier-ignore
});
