/** Which of the files that somebody chose are sent whole: docs/registry.md, "Ways to register". */

/** A file with its path below what was chosen or dropped, as `out/adapter_config.json`. */
export interface Chosen {
  path: string;
  file: File;
}

const WEIGHTS = "adapter_model.safetensors";
/** The files of an adapter, and those that the server keeps to show them. */
const OWN = [
  WEIGHTS,
  "adapter_config.json",
  "manylora.json",
  "chat_template.jinja",
  "tokenizer_config.json",
  "README.md",
  "training.jsonl",
  "samples.json",
];
/** How many files without bytes a form has: a receipt names a hundred, and a form with too many is refused. */
const PATHS = 100;
/** How many whole files a form has. Only what the server refuses has more: many adapters, or folders without any. */
const WHOLE = 1000;
/** Files by which the server says what an adapter lacks, or that there are several, or that it is in another format. */
const TELLING = /\.(safetensors|bin|gguf|npz)$|(^|\/)adapter_[^/]*$/i;
const ARCHIVE = /\.(tar\.gz|tgz|tar|zip)$/i;

export interface Plan {
  files: { path: string; file: File; whole: boolean }[];
  /** Bytes that are sent. */
  bytes: number;
  /** Number of other files that are not sent at all, not even as a path. */
  untold: number;
}

/**
 * Return what to send. The server takes the adapter nearest the top, its own files and the record of its
 * training, and decides by the paths. All other files, as checkpoints and optimizers, go as a path without bytes: the receipt names them, nobody waits for them.
 * Of very many, only the first go, and the number of the rest.
 */
export function planOf(chosen: readonly Chosen[]): Plan {
  const adapters = chosen.filter(({ path }) => nameOf(path) === WEIGHTS).map(({ path }) => folderOf(path));
  const nearest = adapters.reduce((least, folder) => Math.min(least, depth(folder)), Infinity);
  const folders = new Set(adapters);
  const all = chosen.map(({ path, file }) => ({
    path,
    file,
    // A lone file is an archive, or something that the server has a word on.
    whole: chosen.length === 1 || isWhole(path, folders, nearest),
  }));
  const others = all.filter(({ whole }) => !whole);
  const telling = others.filter(({ path }) => TELLING.test(path));
  const sent = new Set(all.filter(({ whole }) => whole).slice(0, WHOLE));
  const named = new Set([...telling, ...others].slice(0, PATHS));
  const files = all.filter((file) => sent.has(file) || named.has(file));
  const bytes = files.reduce((sum, { file, whole }) => sum + (whole ? file.size : 0), 0);
  return { files, bytes, untold: all.length - files.length };
}

function isWhole(path: string, folders: Set<string>, nearest: number): boolean {
  if (ARCHIVE.test(path)) return true;
  const folder = folderOf(path);
  return (
    OWN.includes(nameOf(path)) && (folders.size === 0 || (folders.has(folder) && depth(folder) === nearest))
  );
}

/** Return a name for what was chosen: that of the archive or of the folder; "" if that is no valid name. */
export function nameFor(chosen: readonly Chosen[]): string {
  const first = chosen[0]?.path ?? "";
  const name =
    chosen.length === 1 && ARCHIVE.test(first)
      ? first.replace(ARCHIVE, "")
      : first.split("/").slice(0, -1)[0];
  return name && /^[A-Za-z0-9][\w.-]*$/.test(name) ? name.slice(0, 128) : "";
}

/** Return the form that uploads them with these fields. */
export function formOf(plan: Plan, fields: Record<string, string>): FormData {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  if (plan.untold) form.append("left_out", JSON.stringify({ count: plan.untold }));
  for (const { path, file, whole } of plan.files) form.append("file", whole ? file : new Blob([]), path);
  return form;
}

function nameOf(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

function folderOf(path: string): string {
  return path.slice(0, Math.max(path.lastIndexOf("/"), 0));
}

function depth(folder: string): number {
  return folder ? folder.split("/").length : 0;
}
