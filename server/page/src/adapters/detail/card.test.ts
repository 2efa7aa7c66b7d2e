import { expect, it } from "vitest";
import { cardText, lossLines } from "./card";

it("leaves out the YAML for hubs, and nothing else", () => {
  expect(cardText("---\nlibrary_name: peft\ntags: [a]\n---\n\n# legal\n\n---\n\nText")).toBe(
    "# legal\n\n---\n\nText",
  );
  expect(cardText("# legal\n---\na\n---\n")).toBe("# legal\n---\na\n---");
  expect(cardText("---\nnever closed")).toBe("---\nnever closed");
});

it("lays curves over the same steps", () => {
  const curves = { loss: [[1, 3], [2, 2]], evaluation: [[2, 2.5], [4, 1]], learning_rate: [] } as never; // prettier-ignore
  expect(lossLines(curves)).toEqual({
    steps: [1, 2, 4],
    lines: [
      { label: "training", values: [3, 2, null] },
      { label: "evaluation", values: [null, 2.5, 1] },
    ],
  });
  expect(lossLines(null)).toEqual({ steps: [], lines: [] });
});
