"""Keys without the database: from a file, such as a mounted secret of Kubernetes, or from the environment.

Either one key a line, ``SECRET`` or ``NAME SECRET``, each with all scopes; or YAML (so JSON, too), which says more::

    keys:
      - name: acme
        secret: sk-...        # or sha256: its digest, so that the secret is not in the file
        scopes: [infer]
        adapters: [acme/*]
        limits: {requests_per_minute: 60}
        expires: 2027-01-31
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from bases.errors import ConfigError
from bases.pydantic_errors import message, path
from server.access.credentials import Credential, CredentialIndex, digest_of
from server.access.key import ALL_SCOPES
from server.access.key_spec import KeySpec

_log = logging.getLogger(__name__)

VARIABLE = "MANYLORA_API_KEYS"
"""Keys in the environment. There is no option of this name: every user of a machine sees the options of a process."""
MIN_SECRET = 16
"""Minimum number of characters of a secret: shorter ones can be guessed."""
MAX_FILE_BYTES = 1 << 20
_YAML = re.compile(r"-\s|-$|\{|\[|keys:|---")
"""How the first line of YAML begins."""


class _Entry(KeySpec):
    """A key in YAML."""

    model_config = ConfigDict(hide_input_in_errors=True)

    secret: Annotated[str | None, Field(repr=False)] = None
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.secret is None) == (self.sha256 is None):
            raise ValueError("give one of secret and sha256")
        if self.secret is not None:
            _check_secret(self.secret)
        return self

    def credential(self, source: str) -> Credential:
        """Return what shows that a caller has this key."""
        digest = self.sha256 if self.secret is None else digest_of(self.secret)
        assert digest is not None
        until = None if self.expires is None else self.expires.timestamp()
        return Credential(digest, self.key(f"{source}:{self.name}"), until)


class GivenKeys:
    """The keys that :func:`read_keys` returns. A file that changes, as a mounted secret does, is read again."""

    def __init__(self, file: Path | None, environment: Mapping[str, str]) -> None:
        """Read them. Raises ConfigError."""
        self._file = file
        self._environment = environment
        self._state = self._look()
        found = read_keys(file, environment)
        self.index = CredentialIndex(found)
        self.any = bool(found)
        """Whether there are any."""

    def refresh(self) -> None:
        """Read the file again if it has changed. If it cannot be used, log why, and keep the keys that it had."""
        state = self._look()
        if state == self._state:
            return
        self._state = state
        try:
            self.index = CredentialIndex(read_keys(self._file, self._environment))
        except ConfigError as error:
            _log.error("The keys that were given before stay valid: %s", error)
        else:
            _log.info("%s was read again", self._file)

    def _look(self) -> object:
        """Return what changes with the file."""
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError as error:
            return error.errno
        return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(file: Path | None, environment: Mapping[str, str]) -> list[Credential]:
    """Return the keys of a file and of :data:`VARIABLE`. Raises ConfigError, which names the line but no secret."""
    found: list[tuple[str, Credential]] = []
    if file is not None:
        found += _parse(_read(file), f"--api-key-file: {file}", "file")
    if variable := environment.get(VARIABLE):
        text = variable if _is_yaml(variable) else variable.replace(",", "\n")
        found += _parse(text, VARIABLE, "env")
    elif VARIABLE in environment:
        # An unset variable of a script would otherwise leave the server open.
        raise ConfigError(f"{VARIABLE}: is empty; unset it, or give keys in it")
    _check_distinct(found)
    return [credential for _, credential in found]


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--api-key-file: {file} cannot be read: {reason}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"--api-key-file: {file} is larger than {MAX_FILE_BYTES} bytes")
    return text


def _parse(text: str, place: str, source: str) -> list[tuple[str, Credential]]:
    """Return the keys in a text, each with its place for messages. Raises ConfigError if there are none."""
    entries = _yaml_entries(text, place) if _is_yaml(text) else _line_entries(text)
    found = []
    for line, fields in entries:
        at = f"{place}, line {line}"
        if not isinstance(fields, dict):
            raise ConfigError(f"{at}: must be a key, with the fields name and secret")
        try:
            found.append((at, _Entry(**{str(name): value for name, value in fields.items()}).credential(source)))
        except ValidationError as error:
            first = error.errors()[0]
            field = path(first)
            raise ConfigError(f"{at}: {field}{': ' if field else ''}{_reason(first)}") from None
    if not found:
        raise ConfigError(f"{place}: has no keys")
    return found


def _reason(first: Any) -> str:
    match first["type"]:
        case "extra_forbidden":
            return "there is no such field"
        case "string_pattern_mismatch" if first["loc"] == ("name",):
            return "must be 1 to 64 letters, digits and . _ @ -, and begin with a letter or a digit"
        case kind if kind.startswith("datetime"):
            return "must be a date, as 2027-01-31, or a time, as 2027-01-31T12:00:00Z"
    return message(first)


def _is_yaml(text: str) -> bool:
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return _YAML.match(next(lines, "").strip()) is not None


def _line_entries(text: str) -> Iterator[tuple[int, object]]:
    """Yield (line, fields of a key)."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0] if len(words) > 1 else f"key-{number}"
        yield number, {"name": name, "secret": " ".join(words[1:] or words), "scopes": sorted(ALL_SCOPES)}


def _yaml_entries(text: str, place: str) -> Iterable[tuple[int, object]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        at = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{place}{at}: is not valid YAML{f': {problem}' if problem else ''}") from None
    except ValueError as error:  # a date that does not exist
        raise ConfigError(f"{place}: is not valid YAML: {error}") from None
    if isinstance(value, dict) and value.keys() == {"keys"}:
        node, value = node.value[0][1], value["keys"]
    if not isinstance(value, list):
        raise ConfigError(f"{place}: must be a list of keys, or `keys:` with one")
    return zip((item.start_mark.line + 1 for item in node.value), value, strict=True)


def _check_secret(secret: str) -> None:
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ValueError("the secret has characters that no header can carry; a line is SECRET or NAME SECRET")
    if len(secret) < MIN_SECRET:
        raise ValueError(f"the secret has fewer than {MIN_SECRET} characters; make one with: openssl rand -hex 32")


def _check_distinct(found: Sequence[tuple[str, Credential]]) -> None:
    names: dict[str, str] = {}
    digests: dict[str, str] = {}
    for place, credential in found:
        if other := names.get(credential.key.name):
            raise ConfigError(f"{place}: the name {credential.key.name} is given twice, before in {other}")
        if other := digests.get(credential.digest):
            raise ConfigError(f"{place}: has the secret of another key, that in {other}")
        names[credential.key.name] = digests[credential.digest] = place
