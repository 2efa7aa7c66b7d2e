import { execFileSync } from "node:child_process";
import { expect, test } from "vitest";
import { command, nameFor, nameTrouble, quoted, type Choices } from "./command";

const CHOICES: Choices = {
  name: "legal", model: "", dataDir: "", format: "auto", maxLength: "", evalShare: "", rank: "", epochs: "", learningRate: "",
  skipBad: false, publish: null, alias: "",
}; // prettier-ignore

test("a command without options", () => {
  expect(command("rows.jsonl", CHOICES)).toBe("manylora train rows.jsonl --name legal");
});

test("a command with all of them", () => {
  const all: Choices = {
    ...CHOICES, model: "/models/base", dataDir: "/data", format: "chat", maxLength: "512", evalShare: "0.2", rank: "8", epochs: "2",
    learningRate: "5e-4", skipBad: true, publish: "http://127.0.0.1:8000", alias: "prod",
  }; // prettier-ignore
  expect(command("rows.jsonl", all)).toBe(
    "manylora train rows.jsonl --name legal --model /models/base --data-dir /data --format chat --max-length 512 --eval-share 0.2 " +
      "--skip-bad -r 8 --epochs 2 --learning-rate 5e-4 --publish http://127.0.0.1:8000 --alias prod",
  );
});

test("an alias needs a server", () => {
  expect(command("rows.jsonl", { ...CHOICES, alias: "prod" })).not.toContain("prod");
});

test("a shell reads every file name back", () => {
  for (const name of [
    "my rows.jsonl",
    "it's.csv",
    "$(rm -rf x).json",
    'a"b`c\\d.csv',
    "ü.csv",
    "*.csv",
    "a\nb",
    "x=2",
    "~",
  ]) {
    expect(execFileSync("sh", ["-c", `printf %s ${quoted(name)}`]).toString()).toBe(name);
  }
  expect(command("-r.csv", CHOICES)).toContain(" ./-r.csv ");
});

test.each([
  ["rows.jsonl", "rows"],
  ["Legal rows (2).JSONL", "Legal-rows-2"],
  ["_x.y.csv", "x.y"],
  ["ü.csv", ""],
])("a name for %s", (file, name) => {
  expect(nameFor(file)).toBe(name);
  if (name) expect(nameTrouble(name)).toBe("");
});

test.each(["", "a b", ".a", "ü", "a".repeat(129), "a@2"])("%s is no name", (name) => {
  expect(nameTrouble(name)).not.toBe("");
});
