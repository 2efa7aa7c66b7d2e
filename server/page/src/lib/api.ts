/** Requests to the server: the key, errors in OpenAI's shape, and streams of server-sent events. */

import { eventsOf } from "./events";
import { session } from "./session.svelte";

/** An answer that is an error, or no answer at all (status 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly param: string | null = null,
    /** Seconds after which the server asks to try again; null if it does not say. */
    readonly retryAfter: number | null = null,
    /** The file and the tensor for which an adapter was refused. */
    readonly file: string | null = null,
    readonly tensor: string | null = null,
  ) {
    super(message);
  }
}

export interface RequestOptions {
  /** Sent as JSON, or as a form if it is one. */
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal | undefined;
}

/** Send a request; return the response if its status is a success. Throws ApiError, or the abort's reason. */
export async function send(method: string, path: string, options: RequestOptions = {}): Promise<Response> {
  const { body, signal } = options;
  // The browser would resolve them, and ask another route than the one that is meant.
  if (/\/\.{1,2}(?:[/?]|$)/.test(path)) throw new ApiError(0, 'A name has no parts "." or "..".');
  const form = body instanceof FormData;
  const headers = new Headers(options.headers);
  if (session.key !== null) headers.set("authorization", `Bearer ${session.key}`);
  if (body !== undefined && !form) headers.set("content-type", "application/json");
  const init: RequestInit = { method, headers, cache: "no-store" };
  if (body !== undefined) init.body = form ? body : JSON.stringify(body);
  if (signal) init.signal = signal;
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  throw await failure(response);
}

/** Return what the server answers as JSON. */
export async function call<T>(method: string, path: string, options: RequestOptions = {}): Promise<T> {
  return parsed<T>(await (await send(method, path, options)).text());
}

/** Return the JSON objects of a stream, as they come, until `[DONE]`. Throws ApiError for an error inside it. */
export async function* stream<T extends object>(
  path: string,
  options: RequestOptions,
): AsyncGenerator<T, void> {
  const response = await send("POST", path, options);
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const event = parsed<T | { error: { message: string; code?: string } }>(data);
    if ("error" in event) throw new ApiError(response.status, event.error.message, event.error.code ?? null);
    yield event as Awaited<T>;
  }
  throw new ApiError(0, "The answer ended before it was complete.");
}

function parsed<T>(text: string): T {
  try {
    return JSON.parse(text) as T;
  } catch {
    throw new ApiError(
      0,
      "The answer is no JSON. Something between this page and the server may have written it.",
    );
  }
}

/** Return a name as a part of a path. Its slashes stay: adapters have names such as `acme/legal`. */
export function pathOf(name: string): string {
  return name.split("/").map(encodeURIComponent).join("/");
}

/** Return the error that an answer says. `body` is its JSON; null if it has none, as a proxy's error page. */
export function errorOf(status: number, retryAfter: string | null, body: unknown): ApiError {
  const after = Number(retryAfter);
  const said = (body as { error?: Record<string, string | null> } | null)?.error ?? {};
  const message = said.message ?? `The server answered with status ${status}.`;
  if (status === 401) session.asking = session.key === null ? "" : message;
  return new ApiError(
    status,
    message,
    said.code ?? null,
    said.param ?? null,
    Number.isFinite(after) && after > 0 ? after : null,
    said.file ?? null,
    said.tensor ?? null,
  );
}

async function failure(response: Response): Promise<ApiError> {
  const body: unknown = await response.json().catch(() => null);
  return errorOf(response.status, response.headers.get("retry-after"), body);
}
