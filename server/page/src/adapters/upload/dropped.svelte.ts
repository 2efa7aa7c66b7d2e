/** What somebody has dropped on the view or chosen, until it is registered. */

import type { Chosen } from "./files";

class Dropped {
  chosen = $state.raw<Chosen[]>([]);

  /** Take what was dropped: files, and folders with all that is in them. */
  async take(transfer: DataTransfer): Promise<void> {
    // The list is empty after the event: take everything from it before the first wait.
    const entries = [...transfer.items].flatMap((item) => item.webkitGetAsEntry() ?? []);
    const files = [...transfer.files].map((file) => ({ path: file.name, file }));
    this.chosen = entries.length ? (await Promise.all(entries.map(filesIn))).flat() : files;
  }

  /** Take what was chosen in a field. */
  choose(files: FileList | null): void {
    this.chosen = [...(files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
  }

  clear(): void {
    this.chosen = [];
  }
}

export const dropped = new Dropped();

async function filesIn(entry: FileSystemEntry): Promise<Chosen[]> {
  const path = entry.fullPath.replace(/^\//, "");
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) =>
      (entry as FileSystemFileEntry).file(resolve, reject),
    );
    return [{ path, file }];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const found: FileSystemEntry[] = [];
  while (true) {
    // Browsers return a hundred at a time, and none at the end.
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) =>
      reader.readEntries(resolve, reject),
    );
    if (!some.length) return (await Promise.all(found.map(filesIn))).flat();
    found.push(...some);
  }
}
