/** Who uses the page: the API key, kept for this tab's session, and what it may do. */

import { clear, keep, kept } from "./storage";

export type Scope = "infer" | "adapters" | "train" | "metrics" | "admin";

/** What `GET /v1/whoami` says: the key, and the server that it is for. */
export interface Whoami {
  /** Whether the server asks for keys. */
  keys: boolean;
  name: string;
  scopes: Scope[];
  /** Names and prefixes of the adapters that the key sees; null: all. */
  adapters: string[] | null;
  server: {
    version: string;
    base: string;
    base_fingerprint: string;
    max_model_len: number;
    max_rank: number;
    max_device_adapters: number;
    max_upload_bytes: number;
    max_data_bytes: number;
    /** How the server was started, for keys with the scope admin; null for others. */
    model: string | null;
    data_dir: string | null;
  };
  features: string[];
}

const STORED = "manylora.key";

class Session {
  /** The API key that requests carry; null without one. */
  key = $state<string | null>(kept("sessionStorage", STORED));
  /** Why a key is asked for; null while none is needed. */
  asking = $state<string | null>(null);
  whoami = $state<Whoami | null>(null);

  /** Whether the key may do what `scope` stands for. */
  may(scope: Scope): boolean {
    const scopes = this.whoami?.scopes ?? [];
    return scopes.includes(scope) || scopes.includes("admin");
  }

  /** Use a key from now on, until the tab is closed. */
  use(key: string): void {
    const other = this.whoami !== null && key !== this.key;
    this.key = key;
    this.asking = null;
    keep("sessionStorage", STORED, key);
    if (other) location.reload(); // what the page has in memory is what the former key saw
  }

  /** Forget the key and what this tab keeps for it. Who calls this reloads the page, which forgets what the key saw. */
  forget(): void {
    this.key = null;
    this.whoami = null;
    this.asking = "";
    clear("sessionStorage");
  }
}

export const session = new Session();
