/** The file that is being looked at. It stays while somebody goes to another view. */

import { call } from "../../lib/api";
import { session } from "../../lib/session.svelte";
import { whyNot } from "../runs/ask";
import { fileTrouble, formOf, type DataOptions, type TrainingData } from "./report";

const ROWS = 20;

class DataCheck {
  file = $state.raw<File | null>(null);
  options = $state<DataOptions>({ format: "auto", maxLength: "", evalShare: "" });
  answer = $state.raw<TrainingData | null>(null);
  trouble = $state("");
  busy = $state(false);
  private asking: AbortController | undefined;

  /** Look at a file, with the options as they are. */
  async look(file: File | null = this.file): Promise<void> {
    if (!file) return;
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    if (file !== this.file) this.answer = null;
    this.file = file;
    this.trouble = fileTrouble(file, session.whoami?.server.max_data_bytes);
    this.busy = !this.trouble;
    if (this.trouble) return;
    try {
      const body = formOf(file, this.options, ROWS);
      const answer = await call<TrainingData>("POST", "/v1/training/data", { body, signal: asking.signal });
      if (!asking.signal.aborted) this.answer = answer;
    } catch (error) {
      if (asking.signal.aborted) return;
      this.answer = null;
      this.trouble = whyNot(error);
    }
    if (asking === this.asking) this.busy = false;
  }

  /** Forget the file. */
  forget(): void {
    this.asking?.abort();
    this.file = this.answer = null;
    this.trouble = "";
    this.busy = false;
  }
}

export const check = new DataCheck();
