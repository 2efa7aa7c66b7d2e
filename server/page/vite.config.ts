import { svelte } from "@sveltejs/vite-plugin-svelte";
import { compression } from "vite-plugin-compression2";
import { defineConfig } from "vitest/config";

/** Where `npm run dev` finds a server of manylora. */
const SERVER = process.env.MANYLORA_URL ?? "http://127.0.0.1:8000";

export default defineConfig({
  // The server sends the .br or .gz beside a file to browsers that accept it. Below 128 bytes it gains nothing.
  plugins: [svelte(), compression({ algorithms: ["brotliCompress", "gzip"], threshold: 128 })],
  build: { target: "es2023", assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  server: { proxy: { "^/(v1|metrics|version|readyz|tokenize|detokenize)": SERVER } },
  test: { environment: "node", include: ["src/**/*.test.ts"] },
});
