/** Unpacks the Chromium of the npm package, with the libraries beside it, and prints its path. */
import { mkdirSync } from "node:fs";
import chromium, { inflate } from "@sparticuz/chromium";
console.log(await chromium.executablePath());
