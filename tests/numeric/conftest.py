"""Fixtures: labs of the tiny models, made once per session, and numbers of threads."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from server.compute.cpu.kernels import Kernels
from server.compute.cpu.variants import EMULATED_AMX, VARIANTS
from tests.numeric.kernels import kernels_of, tile_faults
from tests.numeric.lab import Lab, make_lab


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lab]:
    """Architecture -> its lab."""
    return functools.cache(lambda architecture: make_lab(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(autouse=True)
def no_tile_faults() -> Iterator[None]:
    """Where AMX is emulated: a processor would have taken every tile instruction."""
    before = tile_faults()
    yield
    assert tile_faults() == before, "AMX would have raised a fault: a tile has a shape that does not fit"


@pytest.fixture
def llama(labs: Callable[[str], Lab]) -> Lab:
    """The lab for tests that need only one architecture."""
    return labs("llama")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: such small matrix products take several times longer on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use two threads: kernels that share scratch memory by mistake are correct on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*VARIANTS, EMULATED_AMX], ids=lambda variant: variant.name)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The C kernels, for each kind of processor that this one can stand in for."""
    return kernels_of(request.param)
