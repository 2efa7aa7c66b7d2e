"""The process that renders chat templates of uploads: no files, little memory, and half a second of CPU time for each.

Imports the standard library and jinja2 only.
"""

import resource
from typing import Any

import jinja2.debug  # noqa: F401 - jinja imports it with the first error, when files can no longer be opened

from server.text.template_environment import TemplateFailure, render
from server.workers.worker import Answer, limit, serve

CPU_SECONDS = 0.5
"""CPU time for one template."""
MEMORY_BYTES = 256 << 20
"""Address space that the process may take beyond what it has when it starts."""
OUT_OF_MEMORY = "it needs too much memory"

_WARM_UP = "{% for n in range(2) %}{{ strftime_now('%Y %b') ~ ([n]|tojson(indent=1)) ~ '%s'|format(n) }}{% endfor %}"
"""What a template may make Python import or open must be there before files can no longer be opened."""


def main() -> None:
    """Answer requests, ``{"template": ..., "variables": ...}``."""
    serve(_prepare, CPU_SECONDS)


def _prepare(setup: object) -> Answer:
    """Give up what rendering does not need: more memory, new files, larger files, other processes."""
    render(_WARM_UP, {})
    others = {resource.RLIMIT_NOFILE: 0, resource.RLIMIT_FSIZE: 0}
    if hasattr(resource, "RLIMIT_NPROC"):
        others[resource.RLIMIT_NPROC] = 0
    limit(MEMORY_BYTES, others)
    return _answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": render(request["template"], request["variables"])}
    except TemplateFailure as failure:
        return {"failure": str(failure), "fatal": failure.fatal}
    except MemoryError:
        return {"failure": OUT_OF_MEMORY, "fatal": True, "last": True}  # what is left of the memory may be in pieces
