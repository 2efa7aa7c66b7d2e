/** The targets of a comparison, as versions. */

import { ApiError, call } from "../../lib/api";
import { adapterPath, type Adapter } from "../registry";

type Targets = [string, string];

/**
 * Return both targets as versions, so that the comparison means the same if another one is activated meanwhile. Throws
 * ApiError, also if both are one version.
 */
export async function resolved(targets: Targets, base: string): Promise<Targets> {
  const [one, other] = await Promise.all([
    version(targets[0].trim(), base),
    version(targets[1].trim(), base),
  ]);
  // Names of adapters that differ in case only are the same name.
  if (one.toLowerCase() === other.toLowerCase()) {
    throw new ApiError(409, `The targets are the same version, ${one}: nothing is to be compared.`);
  }
  return [one, other];
}

async function version(target: string, base: string): Promise<string> {
  if (target === base || /@\d+$/.test(target)) return target;
  const { id, active } = await call<Adapter>("GET", adapterPath(target));
  if (active === null) throw new ApiError(409, `${target} has no active version: name one.`);
  return `${id}@${active}`;
}
