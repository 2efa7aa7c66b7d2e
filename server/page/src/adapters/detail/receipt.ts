/** What a receipt says, in words. */

import { bytes, duration } from "../../lib/format";
import type { Receipt, Version } from "../registry";

export interface Fact {
  label: string;
  text: string;
  /** Whether somebody should look twice. */
  warn?: boolean;
  /** More that the text stands for, as names of files. */
  list?: string[];
}

/** Return the facts of a version and its receipt. `base` is this server's fingerprint. */
export function factsOf(version: Version, receipt: Receipt | null, base: string): Fact[] {
  const facts: Fact[] = [
    { label: "Content", text: version.content ?? "none" },
    {
      label: "Size",
      text: `${bytes(version.size_bytes ?? 0)}, rank ${version.rank ?? "–"}, ${version.targets ?? 0} layers changed`,
    },
    { label: "Registered", text: dateOf(version.created) },
  ];
  if (version.status === "refused")
    facts.push({ label: "Refused", text: version.reason ?? "without a reason", warn: true });
  if (receipt === null) {
    facts.push({ label: "Receipt", text: "none: this base has not checked it yet", warn: true });
    return facts;
  }
  facts.push(
    { label: "Checked", text: dateOf(receipt.checked) },
    baseFact(receipt, base),
    trainedFact(receipt),
  );
  facts.push(...probeFacts(receipt), ...originFacts(receipt));
  return facts;
}

function baseFact(receipt: Receipt, base: string): Fact {
  const here = receipt.base_fingerprint === base;
  const text = `${here ? "this server's base" : "another base"} (${short(receipt.base_fingerprint)})`;
  return { label: "Proved on", text, warn: !here };
}

function trainedFact(receipt: Receipt): Fact {
  const label = "Trained on";
  if (!receipt.trained_on) return { label, text: "it does not say which base" };
  if (receipt.trained_on === receipt.base_fingerprint) return { label, text: "the same base" };
  const allowed = receipt.base_mismatch_allowed ? ", which was allowed" : "";
  return { label, text: `another base (${short(receipt.trained_on)})${allowed}`, warn: true };
}

function probeFacts(receipt: Receipt): Fact[] {
  const { probe } = receipt;
  if (!probe) return [];
  const top = probe.top_token_changed ? "another likeliest token" : "the same likeliest token";
  return [
    {
      label: "Proved",
      text:
        "Header, config, tensors and values passed. Loaded and run on a prompt of " +
        `${probe.prompt_tokens} tokens in ${duration(probe.seconds)}: all logits finite, changed by up to ` +
        `${probe.max_logit_change.toPrecision(3)} (KL ${probe.kl.toPrecision(3)}), ${top}`,
    },
  ];
}

function originFacts(receipt: Receipt): Fact[] {
  const facts: Fact[] = [{ label: "Came from", text: receipt.source }];
  const { taken_from = ".", other_adapters = [], ignored_files = [], unknown_fields_allowed = [] } = receipt;
  const ignored = receipt.ignored_count ?? ignored_files.length;
  if (taken_from !== ".") facts.push({ label: "Folder in it", text: taken_from });
  if (ignored) {
    const more = ignored - ignored_files.length;
    const list = more > 0 ? [...ignored_files, `and ${more} more`] : ignored_files;
    facts.push({ label: "Skipped", text: `${ignored} ${ignored === 1 ? "file" : "files"}`, list });
  }
  if (other_adapters.length) {
    facts.push({ label: "Not taken", text: "other adapters in it", list: other_adapters, warn: true });
  }
  if (unknown_fields_allowed.length) {
    const text = "fields of its config that this server does not know, which was allowed";
    facts.push({ label: "Ignored fields", text, list: unknown_fields_allowed, warn: true });
  }
  return facts;
}

/** A row of two versions side by side. */
export interface Row {
  label: string;
  texts: [string, string];
  differs: boolean;
}

/** Return the facts of two versions beside each other, in the order in which they come. */
export function sideBySide(one: Fact[], other: Fact[]): Row[] {
  const labels = [...new Set([...one, ...other].map(({ label }) => label))];
  return labels.map((label) => {
    const texts = [one, other].map((facts) => {
      const fact = facts.find((each) => each.label === label);
      return fact ? [fact.text, ...(fact.list ?? [])].join("\n") : "–";
    }) as [string, string];
    return { label, texts, differs: texts[0] !== texts[1] };
  });
}

/** Return the settings in a manifest as facts, each with the path of its field: `settings.rank`. */
export function settingsOf(manifest: Record<string, unknown> | null | undefined): Fact[] {
  if (!manifest) return [];
  const facts: Fact[] = [];
  const walk = (value: unknown, path: string): void => {
    if (typeof value === "object" && value !== null && !Array.isArray(value))
      for (const [name, inner] of Object.entries(value)) walk(inner, path ? `${path}.${name}` : name);
    else facts.push({ label: path, text: typeof value === "string" ? value : JSON.stringify(value) });
  };
  walk(manifest, "");
  return facts;
}

export function short(digest: string): string {
  return digest.slice(0, 12);
}

export function dateOf(unix: number): string {
  return new Date(unix * 1000).toLocaleString();
}
