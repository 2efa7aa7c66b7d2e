import { describe, expect, it } from "vitest";
import { inWords, resultOf, signTest, votesToDecide, wilson } from "./statistics";

describe("Wilson's interval", () => {
  it("has the values of R's prop.test(correct = FALSE)", () => {
    // prop.test(15, 148, correct = FALSE), and 81 of 263: R. Newcombe, Statistics in Medicine 17 (1998), table I
    for (const [wins, votes, low, high] of [
      [81, 263, 0.2553, 0.3662],
      [15, 148, 0.0624, 0.1605],
      [0, 20, 0, 0.1611],
      [1, 29, 0.0061, 0.1718],
    ] as const) {
      const [from, to] = wilson(wins, votes);
      expect(from).toBeCloseTo(low, 4);
      expect(to).toBeCloseTo(high, 4);
    }
  });
  it("mirrors", () => {
    const [low, high] = wilson(14, 18);
    const [mirrored, other] = wilson(4, 18);
    expect(low).toBeCloseTo(1 - other, 12);
    expect(high).toBeCloseTo(1 - mirrored, 12);
  });
});

describe("the sign test", () => {
  it("is exact", () => {
    expect(signTest(14, 4)).toBeCloseTo((2 * 4048) / 2 ** 18, 12);
    expect(signTest(4, 14)).toBeCloseTo(signTest(14, 4), 12);
    expect(signTest(5, 0)).toBeCloseTo(0.0625, 12);
    expect(signTest(6, 0)).toBeCloseTo(0.03125, 12);
    expect(signTest(9, 1)).toBeCloseTo(22 / 1024, 12);
  });
  it("says nothing of even votes or none", () => {
    expect(signTest(0, 0)).toBe(1);
    expect(signTest(7, 7)).toBe(1);
  });
  it("holds for thousands of votes", () => {
    expect(signTest(1000, 1000)).toBe(1);
    // The normal approximation with continuity correction: z = (1100 - 1000 - 0.5) / sqrt(500)
    expect(signTest(1100, 900)).toBeCloseTo(8.6e-6, 6);
  });
});

it("counts the votes that decide", () => {
  expect(votesToDecide(1)).toBe(6);
  expect(votesToDecide(0)).toBe(6);
  expect(votesToDecide(0.5)).toBeNull();
  const votes = votesToDecide(0.6)!;
  expect(signTest(Math.round(0.6 * votes), votes - Math.round(0.6 * votes))).toBeLessThan(0.05);
});

describe("words", () => {
  const names: [string, string] = ["A", "B"];
  it("name the better one, and how often chance does that", () => {
    expect(inWords(resultOf([4, 14], 2), names)).toBe(
      "B is better: 14 of 18 votes; by chance, this happens in 3 of 100 cases.",
    );
    expect(inWords(resultOf([30, 2], 0), names)).toContain("fewer than 1 of 1,000 cases");
  });
  it("say how many votes are missing", () => {
    expect(inWords(resultOf([5, 0], 0), names)).toContain("about 1 more votes are needed");
    expect(inWords(resultOf([0, 0], 3), names)).toBe("Not decided: there is no vote for either yet.");
    expect(inWords(resultOf([5, 5], 0), names)).toContain("60 of 100 cases");
    expect(inWords(resultOf([501, 499], 0), names)).toContain("about equally good");
  });
  it("leave ties out", () => {
    expect(resultOf([3, 1], 96).share).toEqual({ value: 0.75, low: wilson(3, 4)[0], high: wilson(3, 4)[1] });
  });
});
