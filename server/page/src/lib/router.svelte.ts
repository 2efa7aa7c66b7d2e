/** The place in the page, kept in the address after `#`: `#/adapters/acme/legal?version=2`. */

export interface Place {
  /** The view: the first part of the path. */
  view: string;
  /** The rest of the path, decoded; "" if there is none. */
  name: string;
  query: URLSearchParams;
}

/** Return the place that an address's hash names. */
export function placeOf(hash: string): Place {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s, 2);
  const [view = "", ...rest] = path.split("/");
  return { view: decoded(view), name: rest.map(decoded).join("/"), query: new URLSearchParams(query) };
}

/** Return the hash of a place. */
export function hashOf(view: string, name = "", query: Record<string, string> = {}): string {
  const path = [view, ...(name ? name.split("/") : [])].map(encodeURIComponent).join("/");
  const words = new URLSearchParams(query).toString();
  return `#/${path}${words ? `?${words}` : ""}`;
}

class Router {
  place = $state.raw<Place>(placeOf(location.hash));

  constructor() {
    addEventListener("hashchange", () => {
      this.place = placeOf(location.hash);
    });
  }

  /** Go to a place. */
  go(view: string, name = "", query: Record<string, string> = {}): void {
    location.hash = hashOf(view, name, query);
  }
}

let router: Router | undefined;

/** Return the page's router. Made at first use, so that the functions above need no browser. */
export function useRouter(): Router {
  router ??= new Router();
  return router;
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a % that somebody typed
  }
}
