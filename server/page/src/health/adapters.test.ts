import { expect, test } from "vitest";
import { adapterRows, clicked, sorted, type Sort } from "./adapters";
import { Change, parseScrape } from "../lib/scrape";

const NOW = `
manylora_adapter_requests_total{adapter="legal",route="/v1/completions",status="200"} 20
manylora_adapter_requests_total{adapter="legal",route="/v1/completions",status="404"} 10
manylora_adapter_requests_total{adapter="acme/de",route="/v1/completions",status="200"} 40
manylora_adapter_output_tokens_total{adapter="legal"} 500
manylora_adapter_prompt_tokens_total{adapter="legal"} 100
manylora_adapter_cached_tokens_total{adapter="legal"} 25
manylora_adapter_time_to_first_token_seconds_sum{adapter="legal"} 3
manylora_adapter_time_to_first_token_seconds_count{adapter="legal"} 20
manylora_adapter_request_seconds_sum{adapter="legal"} 40
manylora_adapter_request_seconds_count{adapter="legal"} 20
vllm:lora_requests_info{max_lora="4",running_lora_adapters="acme/de@2,x@1",waiting_lora_adapters=""} 1
`;
const BEFORE = `manylora_adapter_requests_total{adapter="acme/de",route="/v1/completions",status="200"} 35`;
const rows = adapterRows(new Change(parseScrape(BEFORE, 0), parseScrape(NOW, 10)));

test("a row has an adapter's rates, means and place", () => {
  expect(rows.find((row) => row.name === "legal")).toEqual({
    name: "legal",
    requests: 3,
    failed: 1,
    output: 50,
    prompt: 10,
    cached: 0.25,
    firstText: 0.15,
    endToEnd: 2,
    inAll: 30,
    onDevice: false,
  });
  expect(rows.find((row) => row.name === "acme/de")).toMatchObject({
    requests: 0.5,
    failed: 0,
    cached: null,
    firstText: null,
    inAll: 40,
    onDevice: true,
  });
});

test.each([
  [{ column: "requests", descending: true }, ["legal", "acme/de"]],
  [{ column: "requests", descending: false }, ["acme/de", "legal"]],
  [{ column: "name", descending: false }, ["acme/de", "legal"]],
  [{ column: "name", descending: true }, ["legal", "acme/de"]],
  [{ column: "onDevice", descending: true }, ["acme/de", "legal"]],
  // An adapter without a latency is the slowest in no order.
  [{ column: "firstText", descending: false }, ["legal", "acme/de"]],
  [{ column: "firstText", descending: true }, ["legal", "acme/de"]],
] as [Sort, string[]][])("sorted by %o", (sort, names) => {
  expect(sorted(rows, sort).map((row) => row.name)).toEqual(names);
});

test("a click on a head sorts by it, another one turns the order", () => {
  const first = clicked({ column: "requests", descending: true }, "name");
  expect(first).toEqual({ column: "name", descending: false });
  expect(clicked(first, "name")).toEqual({ column: "name", descending: true });
  expect(clicked(first, "output")).toEqual({ column: "output", descending: true });
});
