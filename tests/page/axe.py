"""What axe-core says of the page as it is drawn."""

from pathlib import Path

import pytest
from playwright.sync_api import Page

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
GRAVE = {"serious", "critical"}


def grave(page: Page) -> list[str]:
    """Return what axe finds grave, in light and in dark colours. Skips the test where axe is not there.

    The page follows the browser's colours as long as nobody has chosen a theme.
    """
    if not AXE.is_file():
        pytest.skip("axe-core is not there: `make test` gets it from npm")
    page.evaluate(AXE.read_text())
    found: list[str] = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for violation in page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]:
            if violation["impact"] in GRAVE:
                where = [node["html"][:200] for node in violation["nodes"][:3]]
                found.append(f"{scheme}: {violation['id']} ({violation['impact']}): {violation['help']}: {where}")
    return found
