/** The server's list of what requests may name. */

import { call } from "../../lib/api";
import type { ReadPage } from "./names";

/** Read a page of it. */
export const readModels: ReadPage = (query, signal) =>
  call("GET", `/v1/models?${new URLSearchParams(query).toString()}`, { signal });
