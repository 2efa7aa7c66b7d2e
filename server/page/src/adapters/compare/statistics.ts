/**
 * What votes between two say, and how sure that is. Ties are left out of both figures, as the sign test does
 * (W. J. Dixon and A. M. Mood, "The statistical sign test", 1946).
 */

/** The normal distribution's quantile of 97.5%. */
const Z = 1.959963984540054;
/** More votes than that are not counted out. */
export const MOST_VOTES = 2000;
const ALPHA = 0.05;

/**
 * Return the 95% interval of a share of `wins` in `votes` > 0: the score interval of E. B. Wilson, "Probable inference,
 * the law of succession, and statistical inference", 1927, without a continuity correction.
 */
export function wilson(wins: number, votes: number, z: number = Z): [low: number, high: number] {
  const share = wins / votes;
  const middle = (share + (z * z) / (2 * votes)) / (1 + (z * z) / votes);
  const half =
    (z / (1 + (z * z) / votes)) * Math.sqrt((share * (1 - share)) / votes + (z * z) / (4 * votes * votes));
  return [Math.max(middle - half, 0), Math.min(middle + half, 1)];
}

/**
 * Return the exact two-sided p of the sign test: how often votes that are coin flips are at least as far from even as
 * `wins` and `losses`.
 */
export function signTest(wins: number, losses: number): number {
  const votes = wins + losses;
  let logTerm = -votes * Math.LN2; // of (votes choose 0) / 2^votes: logarithms, because 2^-1100 is 0
  let tail = 0;
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    tail += Math.exp(logTerm);
    logTerm += Math.log((votes - k) / (k + 1));
  }
  return Math.min(2 * tail, 1);
}

/** Return how many votes decide at p < 5% if the winner's share is `share`; null if more than MOST_VOTES. */
export function votesToDecide(share: number): number | null {
  const winner = Math.max(share, 1 - share);
  for (let votes = 1; votes <= MOST_VOTES; votes++) {
    const wins = Math.round(winner * votes);
    if (signTest(wins, votes - wins) < ALPHA) return votes;
  }
  return null;
}

/** What the votes of a comparison come to. */
export interface Result {
  wins: [number, number];
  ties: number;
  /** Share of wins of the first target with its interval; null without a vote for either. */
  share: { value: number; low: number; high: number } | null;
  p: number;
  /** 0 or 1 if that target is better at p < 5%; null if that is open. */
  better: 0 | 1 | null;
}

export function resultOf(wins: [number, number], ties: number): Result {
  const votes = wins[0] + wins[1];
  const p = signTest(wins[0], wins[1]);
  const interval = votes ? wilson(wins[0], votes) : null;
  return {
    wins,
    ties,
    share: interval && { value: wins[0] / votes, low: interval[0], high: interval[1] },
    p,
    better: p < ALPHA ? (wins[0] > wins[1] ? 0 : 1) : null,
  };
}

/** Return a result in words; `names` are those of the two targets. */
export function inWords(result: Result, names: [string, string]): string {
  const { wins, better } = result;
  const votes = wins[0] + wins[1];
  if (better !== null) {
    return `${names[better]} is better: ${wins[better]} of ${votes} votes; ${chance(result.p)}.`;
  }
  if (!votes) return "Not decided: there is no vote for either yet.";
  const so = `Not decided: ${wins[0]} votes for ${names[0]}, ${wins[1]} for ${names[1]}; ${chance(result.p)}.`;
  if (wins[0] === wins[1]) {
    return `${so} If one of them is better in 60 of 100 cases, it takes about ${votesToDecide(0.6)} votes to see that.`;
  }
  const needed = votesToDecide(wins[0] / votes);
  return needed === null
    ? `${so} If the shares stay so, even ${MOST_VOTES} votes do not decide: the two are about equally good.`
    : `${so} If the shares stay so, about ${Math.max(needed - votes, 1)} more votes are needed.`;
}

function chance(p: number): string {
  if (p < 0.001) return "by chance, this happens in fewer than 1 of 1,000 cases";
  if (p < 0.01) return `by chance, this happens in ${Math.round(p * 1000)} of 1,000 cases`;
  return `by chance, this happens in ${Math.round(p * 100)} of 100 cases`;
}
