/** Light or dark: what the system says, unless somebody has chosen. */

import { keep, kept } from "./storage";

export type Theme = "system" | "light" | "dark";

const STORED = "manylora.theme";

/** Return the theme that was chosen. */
export function chosenTheme(): Theme {
  const stored = kept("localStorage", STORED);
  return stored === "light" || stored === "dark" ? stored : "system";
}

/** Use a theme, and remember it in this browser. */
export function chooseTheme(theme: Theme): void {
  keep("localStorage", STORED, theme);
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
