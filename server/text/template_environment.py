"""The jinja environment that chat templates are rendered in: transformers' own, with all that templates may call.

Imports the standard library and jinja2 only, so that the process that renders templates of uploads starts quickly.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateNotFound, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEMPLATE = 256 << 10
"""Maximum number of characters of a chat template."""
MAX_RENDERED = 8 << 20
"""Maximum number of characters that a template may write."""
MAX_REASON = 500
"""Characters of a template's own error message that are shown."""


class TemplateFailure(Exception):
    """A template cannot be compiled, or refuses or fails to render a conversation. The message says why."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        """``fatal``: it is the template's fault, not that of the conversation."""
        self.fatal = fatal
        super().__init__(message)


class _Generation(Extension):
    """``{% generation %}``, with which trainers mark the assistant's text. It has no effect here."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body of the block as a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *arguments: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*arguments, **fields)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Return ``dict.fromkeys``."""
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """jinja's ``namespace`` without underscored names, which could reach into the interpreter."""

    def __init__(*arguments: Any, **fields: Any) -> None:
        namespace, *values = arguments
        given = dict(*values, **fields)
        for name in given:
            _check_public(name)
        Namespace.__init__(namespace, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not have the name {name[:80]!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON that is not escaped for HTML, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


_ENVIRONMENT = _make_environment()


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Return what the template ``source`` writes for ``variables``, which are JSON values.

    Raises TemplateFailure with the reason for whatever goes wrong in the template, its own refusals included.
    """
    if len(source) > MAX_TEMPLATE:
        raise TemplateFailure(f"it has {len(source)} characters; at most {MAX_TEMPLATE} are rendered", fatal=True)
    pieces: list[str] = []
    size = 0
    try:
        for piece in _compiled(source).generate(variables):
            size += len(piece)
            if size > MAX_RENDERED:
                raise TemplateFailure(f"it writes more than {MAX_RENDERED} characters", fatal=True)
            pieces.append(piece)
    except (MemoryError, TemplateFailure):
        raise
    except TemplateError as error:
        fatal = isinstance(error, TemplateSyntaxError | SecurityError | TemplateNotFound)
        raise TemplateFailure(_shortened(str(error)), fatal=fatal) from error
    except Exception as error:  # a template can raise whatever Python's operators and methods raise
        raise TemplateFailure(_shortened(f"{type(error).__name__}: {error}")) from error
    return "".join(pieces)


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_REASON else f"{message[:MAX_REASON]}..."
