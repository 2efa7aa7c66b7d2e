"""When the C kernels are compiled, and what is compared before they are called."""

import shutil
from pathlib import Path

import pytest

from server.compute.cpu import build, kernels


def test_a_processor_without_the_instructions_is_asked_before_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "INSTRUCTIONS", ("fpu", "no_such_instruction"))
    assert kernels.load.__wrapped__() is None
    assert not (tmp_path / "called").exists()
    assert kernels.absence() == "this processor has no no_such_instruction"
    monkeypatch.setattr(kernels, "INSTRUCTIONS", ())
    assert kernels.load.__wrapped__() is None
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("int64_t rows, runs, sampled, context;", "int64_t runs, rows, sampled, context;", "Step.rows is 0 in"),
        ("float scale;\n} Layer;", "double scale;\n    int64_t more;\n} Layer;", "the size of Layer is"),
        ("#define MEMBERS 3", "#define MEMBERS 4", "the size of Lora is"),
    ],
)
def test_a_structure_that_was_changed_in_c_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, said: str
) -> None:
    if kernels.load() is None:
        pytest.skip(kernels.absence())
    sources = Path(shutil.copytree(build.SOURCES, tmp_path / "native"))
    header = sources / "kernels.h"
    assert before in header.read_text()
    header.write_text(header.read_text().replace(before, after))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=said):
        kernels.Kernels(build.library())
