/** Sends a form and tells how far it is. XMLHttpRequest, because fetch does not say what has been sent. */

import { ApiError, errorOf } from "../../lib/api";
import { session } from "../../lib/session.svelte";

export interface Sent {
  sent: number;
  total: number;
}

/** Return the answer's status and JSON. Throws ApiError, or the abort's reason. */
export function upload<T>(
  path: string,
  form: FormData,
  onprogress: (sent: Sent) => void,
  signal: AbortSignal,
): Promise<{ status: number; value: T }> {
  const request = new XMLHttpRequest();
  request.open("POST", path);
  request.responseType = "json";
  if (session.key !== null) request.setRequestHeader("authorization", `Bearer ${session.key}`);
  return new Promise((resolve, reject) => {
    request.upload.onprogress = ({ loaded, total }) => onprogress({ sent: loaded, total });
    request.onload = () => {
      const { status, response } = request;
      if (status >= 200 && status < 300) resolve({ status, value: response as T });
      else reject(errorOf(status, request.getResponseHeader("retry-after"), response));
    };
    request.onerror = () =>
      reject(new ApiError(0, "The connection to the server broke off; nothing is registered."));
    request.onabort = () => reject(signal.reason);
    signal.addEventListener("abort", () => request.abort(), { once: true });
    request.send(form);
  });
}
