/** Ids that nothing else has. */

/** Return a new one. `crypto.randomUUID` is not there for a page that came over plain HTTP from another machine. */
export function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
