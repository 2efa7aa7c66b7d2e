"""When the C kernels are compiled, and what is compared before they are called."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bases import machine
from bases.errors import ConfigError
from server.compute.cpu import build, selection
from server.compute.cpu.kernels import NotPermittedError
from server.compute.cpu.variants import AVX512BF16, NAMES, VARIANTS, Variant
from server.config import Settings

select = selection.select_kernels.__wrapped__


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that fails and leaves a file behind when it is called."""
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        (set(), "portable"),
        ({"avx2"}, "portable"),
        ({"avx2", "fma"}, "avx2"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}, "avx512"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"}, "avx512bf16"),
        ({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"}, "amx"),
    ],
)
def test_the_best_variant_that_the_processor_runs_is_taken(
    has: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: has)
    monkeypatch.setattr(machine, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(selection, "compiled", lambda variant: SimpleNamespace(variant=variant))
    assert select("auto").kernels.variant.name == chosen
    assert list(select("auto").reasons) == list(NAMES[: NAMES.index(chosen)])
    assert select(chosen).kernels.variant.name == chosen
    assert select("torch").kernels is None
    for better in NAMES[: NAMES.index(chosen)]:
        with pytest.raises(ConfigError, match=f"--cpu {better}: this processor has no "):
            select(better)


def test_intel_processors_take_multiply_adds_rather_than_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: set(AVX512BF16.instructions))
    monkeypatch.setattr(machine, "vendor", lambda: "GenuineIntel")
    monkeypatch.setattr(selection, "compiled", lambda variant: SimpleNamespace(variant=variant))
    found = select("auto")
    assert found.kernels.variant.name == "avx512"
    assert found.reasons["avx512bf16"] == "slower on this vendor's processors than the next one"
    assert select("avx512bf16").kernels.variant.name == "avx512bf16"


def test_a_processor_is_asked_before_a_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instructions", set)
    with pytest.raises(ConfigError, match=r"this processor has no avx512f, .*amx_tile"):
        select("amx")
    assert not compiler.exists()


def test_without_a_compiler_auto_warns_and_a_named_variant_is_refused(
    compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert select("auto").kernels is None
    assert compiler.exists()
    assert "many times slower" in caplog.text
    with pytest.raises(ConfigError, match="--cpu portable"):
        select("portable")


def test_tiles_that_linux_does_not_give_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some virtual machines show AMX and do not let processes use it."""

    def refuse_amx(variant: Variant) -> SimpleNamespace:
        if variant.name == "amx":
            raise NotPermittedError("Linux does not let this process use the tile registers")
        return SimpleNamespace(variant=variant)

    monkeypatch.setattr(machine, "instructions", lambda: set(VARIANTS[0].instructions))
    monkeypatch.setattr(machine, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(selection, "compiled", refuse_amx)
    assert str(select("auto")) == "avx512bf16; not amx: Linux does not let this process use the tile registers"
    with pytest.raises(ConfigError, match="--cpu amx: Linux does not let"):
        select("amx")


def test_a_compiler_that_is_too_old_for_the_best_variant_compiles_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """gcc 10 knows AVX512-BF16 and no AMX."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    old = tmp_path / "old-cc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-mfma*) echo "unknown option -mfma" >&2; exit 1;; esac\nexec cc -O0 "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "instructions", lambda: {"avx2", "fma"})
    found = select("auto")
    assert found.kernels.variant.name == "portable"
    assert "unknown option -mfma" in found.reasons["avx2"]
    assert "for avx2 cannot be compiled" in caplog.text


def test_the_option_names_all_variants() -> None:
    for name in ("auto", *NAMES, "torch"):
        assert Settings(cpu=name).cpu == name


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("int64_t rows, chunks, sampled, context;", "int64_t chunks, rows, sampled, context;", "Step.rows is 0 in"),
        ("float scale, softcap;\n} Layer;", "double scale, softcap;\n} Layer;", "the size of Layer is"),
        ("#define MEMBERS 3", "#define MEMBERS 4", "MEMBERS is 3 in"),
        ("#define LORA_PAGE 8 ", "#define LORA_PAGE 16 ", "LORA_PAGE is 8 in"),
        ("#define KEY_STEP 32", "#define KEY_STEP 64", "KEY_STEP is 32 in"),
    ],
)
def test_what_was_changed_in_c_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, said: str
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    sources = Path(shutil.copytree(build.SOURCES, tmp_path / "native"))
    header = sources / "kernels.h"
    assert before in header.read_text()
    header.write_text(header.read_text().replace(before, after))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=said):
        selection.compiled(VARIANTS[-1])


def test_the_kernels_run_on_torchs_openmp() -> None:
    """A second OpenMP library would start threads of its own, which spin beside torch's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    assert selection.compiled(VARIANTS[-1])
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert [Path(path).resolve().parent for path in mapped] == [Path(torch.__file__).resolve().parent / "lib"]
