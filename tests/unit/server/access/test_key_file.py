"""Keys of files and of the environment; what is wrong with them is said with its line, and without secrets."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bases.errors import ConfigError
from server.access.credentials import CredentialIndex, digest_of
from server.access.key import ALL_SCOPES, ApiKey, KeyLimits
from server.access.key_file import VARIABLE, GivenKeys, read_keys

SECRET, OTHER = "0123456789abcdef", "fedcba9876543210"


def keys_of(tmp_path: Path, text: str, variable: str | None = None) -> dict[str, ApiKey]:
    """Return the keys of a file with this text by their secrets."""
    file = tmp_path / "keys"
    file.write_text(text)
    index = CredentialIndex(read_keys(file, {} if variable is None else {VARIABLE: variable}))
    found = {secret: index.find(digest_of(secret), 0.0) for secret in (SECRET, OTHER, "x" * 16, "y" * 40)}
    return {secret: key for secret, key in found.items() if key is not None}


def test_lines(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, f"# of the team\n{SECRET}\n\nci   {OTHER}\r\n")
    assert {secret: key.name for secret, key in keys.items()} == {SECRET: "key-2", OTHER: "ci"}
    assert all(key.scopes == ALL_SCOPES and key.adapters is None for key in keys.values())
    assert keys[OTHER].id == "file:ci"
    assert keys_of(tmp_path, SECRET).keys() == {SECRET}, "a mounted secret has no line break"


YAML = f"""\
keys:
  - name: acme
    secret: {SECRET}
    adapters: [acme/*, prod]
    limits: {{requests_per_minute: 60}}
    weight: 2
    expires: 2100-01-31
  # not in the file itself
  - name: ci
    sha256: {digest_of(OTHER)}
    scopes: [adapters, metrics]
"""


def test_yaml_and_json(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, YAML)
    acme, ci = keys[SECRET], keys[OTHER]
    assert (acme.name, acme.scopes, acme.adapters, acme.weight) == ("acme", {"infer"}, ("acme/*", "prod"), 2.0)
    assert acme.limits == KeyLimits(requests_per_minute=60)
    assert acme.expires == datetime(2100, 1, 31, tzinfo=UTC)
    assert (ci.name, ci.scopes, ci.adapters) == ("ci", {"adapters", "metrics"}, None)
    assert keys_of(tmp_path, YAML.removeprefix("keys:\n")) == keys
    as_json = json.dumps([{"name": "acme", "secret": SECRET, "expires": "2100-01-31T00:00:00+00:00"}])
    assert keys_of(tmp_path, as_json)[SECRET].expires == acme.expires


def test_an_expired_key_of_a_file_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"- {{name: a, secret: {SECRET}, expires: 2020-01-01}}")
    index = CredentialIndex(read_keys(file, {}))
    assert index.find(digest_of(SECRET), datetime(2019, 12, 31, tzinfo=UTC).timestamp())
    assert index.find(digest_of(SECRET), datetime(2020, 1, 1, tzinfo=UTC).timestamp()) is None


def test_the_environment(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, SECRET, f"ci {OTHER}, {'x' * 16}")
    assert {secret: key.id for secret, key in keys.items()} == {
        SECRET: "file:key-1",
        OTHER: "env:ci",
        "x" * 16: "env:key-2",
    }
    assert keys_of(tmp_path, SECRET, f'[{{"name": "a", "secret": "{OTHER}"}}]')[OTHER].scopes == {"infer"}
    assert read_keys(None, {}) == []


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", None, "has no keys"),
        ("# none\n", None, "has no keys"),
        ("keys: []", None, "has no keys"),
        ("short", 1, "the secret has fewer than 16 characters; make one with: openssl rand -hex 32"),
        (f"{SECRET}\nmy other {OTHER}", 2, "the secret has characters that no header can carry"),
        (f"{SECRET}\n0123456789abcdefü", 2, "the secret has characters that no header can carry"),
        (f"\n{SECRET}\na/b {OTHER}", 3, "name: must be 1 to 64 letters"),
        (f"a {SECRET}\na {OTHER}", 2, "the name a is given twice, before in --api-key-file: FILE, line 1"),
        (f"{SECRET}\n{SECRET}", 2, "has the secret of another key, that in --api-key-file: FILE, line 1"),
        ("keys:\n  - name: [a\n", 3, "is not valid YAML: "),
        ("keys:\n  - nix\n", 2, "must be a key, with the fields name and secret"),
        ("{a: 1}", None, "must be a list of keys, or `keys:` with one"),
        (f"keys:\n  - secret: {SECRET}\n", 2, "name: is missing"),
        ("keys:\n  - name: a\n", 2, "give one of secret and sha256"),
        (
            f"- name: a\n  secret: {SECRET}\n- name: b\n  secret: {OTHER}\n  scops: [infer]",
            3,
            "scops: there is no such",
        ),
        (f"- name: a\n  secret: {SECRET}\n- name: b\n  secret: short", 3, "the secret has fewer than 16 characters"),
        ("- name: a\n  secret: 1234567890123456\n", 1, "secret: must be a string"),
        (f"- {{name: a, secret: {SECRET}, scopes: [root]}}", 1, "scopes.0: must be 'infer', 'adapters', 'train'"),
        (f"- {{name: a, secret: {SECRET}, scopes: []}}", 1, "scopes: must not be empty"),
        (f"- {{name: a, secret: {SECRET}, adapters: ['*x']}}", 1, "adapters.0: must be the name of an adapter"),
        (f"- {{name: a, secret: {SECRET}, scopes: [admin], adapters: [x]}}", 1, "a key with the scope admin sees all"),
        (f"- {{name: a, secret: {SECRET}, weight: 0}}", 1, "weight: must be more than 0"),
        (f"- {{name: a, secret: {SECRET}, limits: {{rpm: 1}}}}", 1, "limits.rpm: there is no such field"),
        (f"- {{name: a, secret: {SECRET}, expires: 2027-02-31}}", None, "is not valid YAML: day is out of range"),
        (f"- {{name: a, secret: {SECRET}, expires: tomorrow}}", 1, "expires: must be a date, as 2027-01-31"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, line: int | None, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_keys(file, {})
    place = f"--api-key-file: {file}" + (f", line {line}" if line else "")
    assert str(raised.value).startswith(f"{place}: {reason.replace('FILE', str(file))}"), raised.value
    for secret in (SECRET, OTHER, "short"):
        assert secret not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file: /no/such cannot be read: No such file"):
        read_keys(Path("/no/such"), {})
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read: it is not UTF-8"):
        read_keys(tmp_path / "keys", {})
    (tmp_path / "keys").write_text("x" * (2 << 20))
    with pytest.raises(ConfigError, match="is larger than"):
        read_keys(tmp_path / "keys", {})


def test_a_variable_that_is_empty_or_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^MANYLORA_API_KEYS: is empty; unset it, or give keys in it$"):
        read_keys(None, {VARIABLE: ""})
    with pytest.raises(ConfigError, match=r"^MANYLORA_API_KEYS, line 2: the secret has fewer than 16"):
        read_keys(None, {VARIABLE: f"{SECRET},short"})


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a secret of Kubernetes: a link is replaced."""
    for name, text in (("one", SECRET), ("bad", "short"), ("two", OTHER)):
        (tmp_path / name).write_text(text)
    file = tmp_path / "keys"
    file.symlink_to("one")
    given = GivenKeys(file, {})
    for target, valid in (("one", SECRET), ("bad", SECRET), ("two", OTHER), ("gone", OTHER)):
        (tmp_path / "link").symlink_to(target)
        (tmp_path / "link").rename(file)
        given.refresh()
        found = {secret: given.index.find(digest_of(secret), 0.0) for secret in (SECRET, OTHER)}
        assert {secret for secret, key in found.items() if key} == {valid}, target
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert [f"{file}{end}" in error for error, end in zip(errors, (", line 1", " cannot be read"), strict=True)] == [
        True,
        True,
    ]
    assert given.any
