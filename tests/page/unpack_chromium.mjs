/** Unpacks the Chromium of the npm package, its libraries and fonts, into the folder that is given. */
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { brotliDecompressSync } from "node:zlib";

const folder = process.argv[2];
const packed = join(import.meta.dirname, "node_modules/@sparticuz/chromium/bin");
const unpacked = (name) => brotliDecompressSync(readFileSync(join(packed, name)));

mkdirSync(folder, { recursive: true });
for (const name of ["al2023.tar.br", "fonts.tar.br"]) {
  execFileSync("tar", ["-x", "-C", folder], { input: unpacked(name) });
}
// The package's own says where AWS Lambda keeps fonts. Without any, Chromium ends at the first page.
writeFileSync(
  join(folder, "fonts.conf"),
  `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
`,
);
writeFileSync(join(folder, "chromium"), unpacked("chromium.br"), { mode: 0o755 }); // last: what has it is complete
