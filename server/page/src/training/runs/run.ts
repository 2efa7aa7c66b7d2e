/** Training runs as `GET /v1/training/runs` has them. */

export interface Run {
  id: string;
  state: "running" | "interrupted" | "finished" | "failed";
  /** Running, and past its last step. */
  judging: boolean;
  base: string | null;
  step: number;
  steps: number | null;
  loss: number | null;
  best_evaluation: { step: number; loss: number } | null;
  started: number | null;
  ended: number | null;
  updated: number;
  passed: boolean | null;
  reason: string | null;
}

export type Curve = [step: number, value: number][];
export interface Curves {
  loss: Curve;
  evaluation: Curve;
  learning_rate: Curve;
}

/** What one model's answers are worth; null where it was not measured. */
export interface Scores {
  loss: number | null;
  exact_match: number | null;
  stop_share: number | null;
  json_validity: number | null;
  json_equality: number | null;
}

export interface Evaluation {
  rows: number;
  answered: number;
  general: number;
  base: Scores;
  adapter: Scores;
  divergence: number | null;
  failures: string[];
  passed: boolean;
}

export interface Sample {
  source: string;
  messages: { role: string; content?: string | null }[];
  prompt: string | null;
  wanted: string;
  base: string;
  adapter: string;
}

export type Settings = Record<string, unknown>;

export interface RunData {
  files: { file: string; format: string; rows: number }[];
  train: number;
  evaluation: number;
  general: number;
  mixed: number;
  tokens: number;
  trained_tokens: number;
  longest: number;
  max_length: number;
  truncated: number;
  left_out: Record<string, number>;
}

export interface RunDetails extends Run {
  settings: Settings | null;
  data: Partial<RunData> | null;
  curves: Curves;
  samples: Sample[];
  evaluation: Evaluation | null;
  published: string[];
}

export interface RunList {
  data: Run[];
  has_more: boolean;
}
