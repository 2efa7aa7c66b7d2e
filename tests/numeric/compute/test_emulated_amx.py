"""The emulated tile instructions count what AMX refuses, so that a test sees what would end a process elsewhere."""

import subprocess
from pathlib import Path

import pytest

from server.compute.cpu.build import FLAGS, SOURCES
from server.compute.cpu.variants import EMULATED_AMX
from tests.numeric.kernels import require_compiler

PROGRAM = """
#include "tiles.h"
#include <stdio.h>
int64_t tile_faults;
#define CASE(name, ...) { TileConfig config = {0}; shape_tiles(&config, 0, 8, 16, 64); tile_faults = 0; \\
    __VA_ARGS__ tiles_end(); printf("%d %s\\n", (int)tile_faults, name); }
#define MULTIPLY load_shapes(&config); _tile_zero(0); _tile_loadd(1, memory, 64); _tile_dpbf16ps(0, 1, 2);
int main(void) {
    static char memory[16 * 64];
    CASE("tiles of one shape", MULTIPLY)
    CASE("fewer rows", shape_tiles(&config, 0, 2, 3, 64); MULTIPLY)
    CASE("too many rows", shape_tiles(&config, 0, 1, 17, 64); load_shapes(&config);)
    CASE("too long rows", shape_tiles(&config, 0, 1, 16, 68); load_shapes(&config);)
    CASE("rows without bytes", shape_tiles(&config, 0, 1, 16, 0); load_shapes(&config);)
    CASE("nothing configured", _tile_loadd(0, memory, 64);)
    CASE("released", load_shapes(&config); tiles_end(); _tile_stored(0, memory, 64);)
    CASE("rows that differ", shape_tiles(&config, 1, 2, 8, 64); MULTIPLY)
    CASE("inputs that differ", shape_tiles(&config, 1, 2, 16, 32); MULTIPLY)
    CASE("columns that differ", shape_tiles(&config, 2, 3, 16, 32); MULTIPLY)
    CASE("one tile twice", load_shapes(&config); _tile_dpbf16ps(0, 1, 1);)
}
"""


def test_what_a_processor_refuses_is_counted(tmp_path: Path) -> None:
    require_compiler()
    if missing := EMULATED_AMX.lacking():
        pytest.skip(f"this processor has no {', '.join(missing)}")
    source, program = tmp_path / "faults.c", tmp_path / "faults"
    source.write_text(PROGRAM)
    command = ("cc", *FLAGS, *EMULATED_AMX.flags, f"-I{SOURCES}", str(source), "-o", str(program), "-lm")
    subprocess.run(command, check=True, capture_output=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    faults = {name: int(count) for count, name in (line.split(maxsplit=1) for line in lines)}
    assert len(faults) == 11
    assert [name for name, count in faults.items() if not count] == ["tiles of one shape", "fewer rows"]
    assert max(faults.values()) == 1
