/** Files that the page makes for somebody to save. */

/** How long a browser may take to begin with a file. */
const SECONDS = 10;

/** Save rows of JSON under a name. */
export function download(name: string, rows: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows], { type: "application/jsonl" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), SECONDS * 1000);
}
