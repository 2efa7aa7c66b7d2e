import { describe, expect, it } from "vitest";
import type { Receipt, Version } from "../registry";
import { factsOf, settingsOf, sideBySide } from "./receipt";

const version: Version = {
  version: 1,
  created: 1,
  content: "c".repeat(64),
  rank: 8,
  targets: 4,
  size_bytes: 2048,
  residency: "disk",
  status: "ready",
};
const receipt: Receipt = {
  checked: 2,
  base_fingerprint: "b",
  trained_on: "b",
  base_mismatch_allowed: false,
  unknown_fields_allowed: [],
  probe: { prompt_tokens: 16, max_logit_change: 5.1366, kl: 1.5, top_token_changed: true, seconds: 0.03 },
  source: "upload",
  taken_from: ".",
  other_adapters: [],
  ignored_files: ["README.md"],
  ignored_count: 3,
};

function facts(
  change: Partial<Receipt> = {},
  base = "b",
): Record<string, { text: string; warn?: boolean; list?: string[] }> {
  return Object.fromEntries(
    factsOf(version, { ...receipt, ...change }, base).map((fact) => [fact.label, fact]),
  );
}

describe("a receipt in words", () => {
  it("says what was proved, on which base, and what was skipped", () => {
    const said = facts();
    expect(said["Proved"]!.text).toContain("changed by up to 5.14 (KL 1.50), another likeliest token");
    expect(said["Proved on"]).toMatchObject({ text: "this server's base (b)", warn: false });
    expect(said["Trained on"]!.text).toBe("the same base");
    expect(said["Skipped"]).toMatchObject({ text: "3 files", list: ["README.md", "and 2 more"] });
    expect(Object.values(said).some(({ warn }) => warn)).toBe(false);
  });

  it("warns of what was allowed", () => {
    const said = facts({ trained_on: "x", base_mismatch_allowed: true, unknown_fields_allowed: ["flavour"] });
    expect(said["Trained on"]).toMatchObject({ text: "another base (x), which was allowed", warn: true });
    expect(said["Ignored fields"]!.list).toEqual(["flavour"]);
  });

  it("warns of a receipt of another base, of a refusal and of a missing receipt", () => {
    expect(facts({}, "other")["Proved on"]!.warn).toBe(true);
    const refused = { ...version, status: "refused" as const, reason: "rank 64 is above 16" };
    const said = factsOf(refused, null, "b").filter(({ warn }) => warn);
    expect(said.map(({ text }) => text)).toEqual([
      "rank 64 is above 16",
      "none: this base has not checked it yet",
    ]);
  });
});

it("lays two beside each other, and says where they differ", () => {
  const other = factsOf({ ...version, rank: 16 }, { ...receipt, taken_from: "out" }, "b");
  const rows = sideBySide(factsOf(version, receipt, "b"), other);
  const differing = rows.filter(({ differs }) => differs);
  expect(differing.map(({ label }) => label)).toEqual(["Size", "Folder in it"]);
  expect(differing[1]!.texts).toEqual(["–", "out"]);
});

it("flattens a manifest's settings", () => {
  expect(settingsOf({ seed: 1, settings: { rank: 8, targets: ["q", "v"] }, base: { name: "b" } })).toEqual([
    { label: "seed", text: "1" },
    { label: "settings.rank", text: "8" },
    { label: "settings.targets", text: '["q","v"]' },
    { label: "base.name", text: "b" },
  ]);
  expect(settingsOf(null)).toEqual([]);
});
