import { expect, test } from "vitest";
import { hashOf, placeOf } from "./router.svelte";

test.each([
  ["", "", "", {}],
  ["#/talk", "talk", "", {}],
  ["#/adapters/acme/legal?version=2", "adapters", "acme/legal", { version: "2" }],
  ["#/adapters/100%25", "adapters", "100%", {}],
  ["#/adapters/100%", "adapters", "100%", {}],
])("the place of %s", (hash, view, name, query) => {
  const place = placeOf(hash);
  expect([place.view, place.name, Object.fromEntries(place.query)]).toEqual([view, name, query]);
});

test("any name comes back", () => {
  for (const name of ["acme/legal", "a b", "100%", "what?", "#1", "ü"]) {
    expect(placeOf(hashOf("adapters", name, { prompt: "1+1=2 & more" }))).toMatchObject({
      view: "adapters",
      name,
    });
    expect(placeOf(hashOf("adapters", name, { prompt: "1+1=2 & more" })).query.get("prompt")).toBe(
      "1+1=2 & more",
    );
  }
});
