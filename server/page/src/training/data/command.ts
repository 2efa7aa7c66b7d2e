/** The command that trains on a file. */

import type { DataOptions } from "./report";

/** What somebody chose for a run. Texts of fields; "" is the trainer's default. */
export interface Choices extends DataOptions {
  name: string;
  model: string;
  dataDir: string;
  rank: string;
  epochs: string;
  learningRate: string;
  skipBad: boolean;
  /** URL of the server to publish to; null to keep the adapter on disk. */
  publish: string | null;
  alias: string;
}

const NAME = /^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$/;
const PLAIN = /^[\w@%+:,./-]+$/;

/** Return why a name cannot be an adapter's; "" if it can. */
export function nameTrouble(name: string): string {
  if (!name) return "A name is needed.";
  return NAME.test(name)
    ? ""
    : "A name has up to 128 letters, digits, dots, dashes, underscores and slashes, and begins with a letter or digit.";
}

/** Return a name for the adapter that a file makes: `Legal rows (2).jsonl` -> `Legal-rows-2`. */
export function nameFor(file: string): string {
  const stem = file.replace(/\.(jsonl|json|csv|parquet)$/i, "");
  return stem.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+|-+$/g, "").slice(0, 128); // prettier-ignore
}

/** Return the command for a shell, with the options that are not the defaults. */
export function command(file: string, choices: Choices): string {
  const words = ["manylora", "train", path(file), "--name", choices.name];
  const add = (flag: string, value: string | null) => {
    if (value) words.push(flag, value);
  };
  add("--model", choices.model);
  add("--data-dir", choices.dataDir);
  add("--format", choices.format === "auto" ? null : choices.format);
  add("--max-length", choices.maxLength);
  add("--eval-share", choices.evalShare);
  if (choices.skipBad) words.push("--skip-bad");
  add("-r", choices.rank);
  add("--epochs", choices.epochs);
  add("--learning-rate", choices.learningRate);
  add("--publish", choices.publish);
  if (choices.publish) add("--alias", choices.alias);
  return words.map(quoted).join(" ");
}

/** Return a word as a POSIX shell reads it back. */
export function quoted(word: string): string {
  return PLAIN.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** Return a file's name as a path that no option or weight (`FILE=2`) is mistaken for. */
function path(file: string): string {
  return file.startsWith("-") ? `./${file}` : file;
}
