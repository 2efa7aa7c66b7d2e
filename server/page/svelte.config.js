import { vitePreprocess } from "@sveltejs/vite-plugin-svelte";

export default {
  preprocess: vitePreprocess(),
  // Svelte's own names of scopes begin with "svelte-", in every element and rule: bytes that nobody reads.
  compilerOptions: { cssHash: ({ hash, filename }) => `s${hash(filename)}` },
};
