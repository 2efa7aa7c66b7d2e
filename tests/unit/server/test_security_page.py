"""``docs/security.md`` names a test for each threat, and each of them exists."""

import re

import pytest

from tests.openai_page import ROOT, is_test, table

PAGE = ROOT / "docs" / "security.md"
THREATS = ("Code", "Files and addresses", "Keys", "Connections and HTTP", "Requests")
ADVISORY = re.compile(r"(CVE-20[0-9]{2}-[0-9]{4,6}|GHSA(-[23456789cfghjmpqrvwx]{4}){3})")


@pytest.mark.parametrize("heading", THREATS)
def test_every_threat_names_its_tests(heading: str) -> None:
    rows = table(heading, PAGE)
    assert rows
    for threat, _, answer, tests in rows:
        assert threat
        assert answer
        named = [each.strip("` ") for each in tests.split(",")]
        assert [each for each in named if not is_test(each)] == [], threat


def test_advisories_have_the_form_of_their_ids() -> None:
    words = re.findall(r"(?:CVE|GHSA)-[\w-]+", PAGE.read_text())
    assert len(words) > 30
    assert [word for word in words if ADVISORY.fullmatch(word) is None] == []
