/** Names that a request may have: the base, adapters, versions and aliases. Thousands may be registered. */

export interface Name {
  id: string;
  kind: "base" | "adapter" | "version" | "alias";
}

export interface Names {
  names: Name[];
  /** Whether there may be more that match than are shown. */
  more: boolean;
  /** Whether only the beginnings of names were searched: there are too many to look at all. */
  beginnings: boolean;
}

interface Model {
  id: string;
  root: string;
  parent: string | null;
}

interface Page {
  data: Model[];
  has_more: boolean;
}

export type ReadPage = (query: Record<string, string>, signal: AbortSignal) => Promise<Page>;

/** As many names as are looked at here, rather than by the server. */
const FEW = 300;
const SHOWN = 30;
const FRESH_MS = 10_000;

/** Looks for names as somebody types. What it read is used for a moment. */
export class NameSearch {
  private first: Promise<Page> | undefined;
  private read = -Infinity;

  constructor(private readonly readPage: ReadPage) {}

  /** Return names that have `text` in them, or begin with it. */
  async find(text: string, signal: AbortSignal): Promise<Names> {
    const words = text.trim();
    const at = words.indexOf("@");
    if (at >= 0) return this.beginning(words, words.slice(0, at), signal, true);
    const page = await this.firstPage(signal);
    if (page.has_more && words) return this.beginning(words, before(words), signal, false);
    const lower = words.toLowerCase();
    const found = page.data.filter(({ id }) => id.toLowerCase().includes(lower));
    return {
      names: found.slice(0, SHOWN).map(nameOf),
      more: page.has_more || found.length > SHOWN,
      beginnings: false,
    };
  }

  private async beginning(
    words: string,
    after: string,
    signal: AbortSignal,
    versions: boolean,
  ): Promise<Names> {
    const query = { after, limit: String(SHOWN), ...(versions ? { versions: "true" } : {}) };
    const page = await this.readPage(query, signal);
    const found = page.data.filter(({ id }) => id.startsWith(words));
    const more = page.has_more && found.length === page.data.length;
    return { names: found.map(nameOf), more, beginnings: !versions };
  }

  private firstPage(signal: AbortSignal): Promise<Page> {
    if (!this.first || Date.now() - this.read > FRESH_MS) {
      this.read = Date.now();
      this.first = this.readPage({ limit: String(FEW) }, signal);
      this.first.catch(() => (this.first = undefined));
    }
    return this.first;
  }
}

/** Return a text that comes just before all that begin with `words`, in the order of ASCII. */
function before(words: string): string {
  return `${words.slice(0, -1)}${String.fromCharCode(words.charCodeAt(words.length - 1) - 1)}~`;
}

function nameOf({ id, root, parent }: Model): Name {
  if (parent === null) return { id, kind: "base" };
  if (id.includes("@")) return { id, kind: "version" };
  return { id, kind: /^[0-9a-f]{64}$/.test(root) ? "adapter" : "alias" };
}
