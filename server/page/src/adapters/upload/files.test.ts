import { expect, it } from "vitest";
import { formOf, nameFor, planOf } from "./files";

function chosen(...paths: string[]) {
  return paths.map((path) => ({ path, file: new File(["1234"], path.split("/").at(-1)!) }));
}
const whole = (...paths: string[]): string[] =>
  planOf(chosen(...paths))
    .files.filter((file) => file.whole)
    .map(({ path }) => path);

it("sends the adapter's own files whole, and checkpoints and the like by their path only", () => {
  expect(
    whole(
      "out/adapter_config.json",
      "out/adapter_model.safetensors",
      "out/optimizer.pt",
      "out/checkpoint-10/adapter_model.safetensors",
      "out/checkpoint-10/adapter_config.json",
      "out/README.md",
      "out/checkpoint-10/README.md",
    ),
  ).toEqual(["out/adapter_config.json", "out/adapter_model.safetensors", "out/README.md"]);
});

it("takes the adapter nearest the top", () => {
  expect(
    whole("run/a/adapter_model.safetensors", "run/a/b/adapter_model.safetensors", "run/optimizer.pt"),
  ).toEqual(["run/a/adapter_model.safetensors"]);
});

it("sends an archive whole, and a lone file, about which the server says what it is", () => {
  expect(whole("legal.tar.gz")).toEqual(["legal.tar.gz"]);
  expect(whole("model.gguf")).toEqual(["model.gguf"]);
});

it("sends no bytes of a folder without an adapter, but its config: the server says what is missing", () => {
  expect(whole("x/pytorch_model.bin", "x/adapter_config.json")).toEqual(["x/adapter_config.json"]);
  expect(planOf(chosen("x/pytorch_model.bin", "x/adapter_config.json")).bytes).toBe(4);
});

it("makes a form with all paths", async () => {
  const form = formOf(planOf(chosen("o/adapter_model.safetensors", "o/optimizer.pt")), { name: "legal" });
  const files = form.getAll("file") as File[];
  expect(files.map(({ name, size }) => [name, size])).toEqual([
    ["o/adapter_model.safetensors", 4],
    ["o/optimizer.pt", 0],
  ]);
  expect(form.get("name")).toBe("legal");
});

it("names the first of very many other files, those first that tell of other adapters, and counts the rest", () => {
  const checkpoints = Array.from({ length: 10_000 }, (_, step) => `o/checkpoint-${step}/optimizer.pkl`);
  const own = ["o/adapter_config.json", "o/adapter_model.safetensors"];
  const plan = planOf(chosen(...checkpoints, "o/checkpoint-1/adapter_model.safetensors", ...own));
  const form = formOf(plan, { name: "legal" });
  const sent = (form.getAll("file") as File[]).map(({ name }) => name);
  expect(sent).toHaveLength(102);
  expect(sent).toEqual(expect.arrayContaining([...own, "o/checkpoint-1/adapter_model.safetensors"]));
  expect(JSON.parse(form.get("left_out") as string)).toEqual({ count: 9901 });
  expect(plan.bytes).toBe(8);
  expect(formOf(planOf(chosen(...own)), {}).has("left_out")).toBe(false);
});

it("does not exceed what a form may have with many adapters, or with files that are no adapter's", () => {
  const many = Array.from({ length: 5000 }, (_, place) => `o/${place}/README.md`);
  const weights = many.map((path) => path.replace("README.md", "adapter_model.safetensors"));
  for (const paths of [many, weights]) {
    const { files, untold } = planOf(chosen(...paths));
    expect([files.length, untold]).toEqual([1000, 4000]);
  }
});

it("proposes a name", () => {
  expect(nameFor(chosen("legal-v2/adapter_config.json", "legal-v2/x"))).toBe("legal-v2");
  expect(nameFor(chosen("legal.tar.gz"))).toBe("legal");
  expect(nameFor(chosen("adapter_config.json", "adapter_model.safetensors"))).toBe("");
  expect(nameFor(chosen("my adapter/adapter_config.json"))).toBe("");
  expect(nameFor([])).toBe("");
});
