"""Templates of uploads: whatever is in them, they run no code, read no files, and end within about a second."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.text.template_environment import MAX_RENDERED, MAX_TEMPLATE, TemplateFailure, render
from server.text.template_process import TemplateProcess

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    """One process for all tests; it is started again after a template has ended it."""
    process = TemplateProcess()
    yield process
    process.close()


ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "index": "{{ ''['__class__'] }}",
    "map attribute": "{{ [messages]|map(attribute='__class__')|list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "stored format": "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a method": "{{ range.__self__ }}{{ strftime_now.__globals__['__builtins__'] }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "namespace": "{% set n = namespace(__class__='x') %}{{ n.__init__ }}",
    "namespace, assigned": "{% set n = namespace() %}{% set n.__class__ = 'x' %}{{ n }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self, private": "{{ self._TemplateReference__context.environment.globals }}",
    "dict": "{{ dict.__call__.__globals__ }}{{ dict.mro() }}",
    "loop": "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._environment }}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a dict": "{{ messages[0].update(role='system') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_from_the_sandbox_give_nothing(process: TemplateProcess, name: str) -> None:
    for rendering in (process.render, render):
        try:
            text = rendering(ESCAPES[name], {"messages": MESSAGES})
        except TemplateFailure:
            continue
        assert text.strip() in ("", "[Undefined]", "[]"), text


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge text": "{{ 'a' * 10**9 }}",
    "huge text, padded": "{{ 'a'.center(10**10) }}{{ 'a'|center(10**9) }}",
    "huge text, formatted": "{{ '%01000000000d' % 1 }}",
    "huge text, by format": "{{ '{:>1000000000}'.format('a') }}",
    "huge list": "{{ [0] * 10**9 }}",
    "doubled": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "replaced": "{{ ('a' * 10**5).replace('a', 'a' * 10**5) }}",
    "joined": "{{ range(99999)|join('a' * 10**5) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "power": "{{ 7 ** (7 ** 12) % 2 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "indent": "{{ messages|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "wordwrap": "{{ ('a ' * 10**6)|wordwrap(1, wrapstring='a' * 10**6) }}",
    "urlize": "{{ ('http://a.' * 10**6)|urlize }}",
    "nested brackets": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long sum": "{{ " + "1+" * 50000 + "1 }}",
    "too long": "a" * (MAX_TEMPLATE + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_within_about_a_second(process: TemplateProcess, name: str) -> None:
    process.render("{{ 1 }}", {})
    begin = time.monotonic()
    with pytest.raises(TemplateFailure) as caught:
        process.render(HOSTILE[name], {"messages": MESSAGES})
    seconds = time.monotonic() - begin
    assert str(caught.value)
    assert len(str(caught.value)) < 1000
    assert seconds < 20, "on a busy machine"
    assert process.render("{{ messages[0].content }}", {"messages": MESSAGES}) == "hi"


def test_a_template_that_took_too_long_is_not_tried_again(process: TemplateProcess) -> None:
    source = HOSTILE["nested loops"] + "{# again #}"
    for limit in (20.0, 0.1):
        begin = time.monotonic()
        with pytest.raises(TemplateFailure, match=r"longer than 0\.5 s"):
            process.render(source, {})
        assert time.monotonic() - begin < limit


def test_the_process_has_no_files_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = TemplateProcess()
    try:
        process.render("", {})
        pid = process._worker.start().pid
        own = Path(f"/proc/{pid}")
        assert "secret" not in (own / "environ").read_text()
        lines = (own / "limits").read_text().splitlines()
        limits = {line[:25].strip(): line[25:].split()[0] for line in lines}
        assert limits["Max open files"] == limits["Max file size"] == "0"
    finally:
        process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_starts_again_after_it_was_killed(process: TemplateProcess) -> None:
    process.render("", {})
    running = process._worker.start()
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert process.render("{{ 1 }}", {}) == "1"


def test_output_up_to_the_limit(process: TemplateProcess) -> None:
    source = "{{ 'é' * (n // 2) }}{{ 'a' * (n // 2) }}"
    assert len(process.render(source, {"n": MAX_RENDERED})) == MAX_RENDERED
    with pytest.raises(TemplateFailure, match="writes more than"):
        process.render(source, {"n": MAX_RENDERED + 2})
