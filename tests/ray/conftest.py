"""Fixtures: one PostgreSQL with 40 adapters, and a cluster of two replicas that most tests share."""

from collections.abc import Iterator

import pytest

from tests.postgres import postgres
from tests.ray.cluster import Cluster, World, cluster, make_world

NAMES = [f"a{number:02}" for number in range(40)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with postgres() as server:
        yield make_world(tmp_path_factory.mktemp("world"), server.fresh(), NAMES)


@pytest.fixture(scope="module")
def two(world: World) -> Iterator[Cluster]:
    with cluster(world, 2) as running:
        yield running
