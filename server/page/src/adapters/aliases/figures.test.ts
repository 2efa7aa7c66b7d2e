import { expect, it } from "vitest";
import { parseScrape } from "../../lib/scrape";
import { figuresOf, START } from "./figures";

function look(at: number, ok: number, errors: number, slow: number) {
  const all = ok + errors;
  return parseScrape(
    [
      `manylora_alias_requests_total{alias="prod",outcome="ok",version="a@1"} ${ok}`,
      `manylora_alias_requests_total{alias="prod",outcome="error",version="a@1"} ${errors}`,
      `manylora_alias_requests_total{alias="other",outcome="ok",version="a@1"} 99`,
      `manylora_alias_output_tokens_total{alias="prod",version="a@1"} ${10 * all}`,
      `manylora_alias_request_seconds_bucket{alias="prod",le="1.0",version="a@1"} ${all - slow}`,
      `manylora_alias_request_seconds_bucket{alias="prod",le="2.0",version="a@1"} ${all}`,
      `manylora_alias_request_seconds_bucket{alias="prod",le="+Inf",version="a@1"} ${all}`,
      `manylora_alias_request_seconds_bucket{alias="other",le="+Inf",version="a@1"} 99`,
    ].join("\n"),
    at,
  );
}

it("reads an alias's figures since the start", () => {
  const [a, b] = figuresOf(START, look(9, 8, 2, 0), "prod", ["a@1", "a@2"]);
  expect(a).toMatchObject({
    version: "a@1",
    requests: 10,
    errors: 2,
    cancelled: 0,
    tokens: 100,
    firstToken: null,
  });
  expect(a!.answer!.p50).toBeCloseTo(0.5);
  expect(b).toMatchObject({ version: "a@2", requests: 0, answer: null });
});

it("reads them since a look before", () => {
  const [a] = figuresOf(look(1, 8, 2, 0), look(9, 18, 2, 10), "prod", []);
  expect(a).toMatchObject({ requests: 10, errors: 0, tokens: 100 });
  expect(a!.answer!.p50).toBeCloseTo(1.5);
});
