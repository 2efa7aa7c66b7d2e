"""Ray adds a replica while there is much to do, and removes it afterwards; no request fails meanwhile."""

import threading
from collections import Counter

import httpx

from tests.ray.cluster import World, cluster, wait_for
from tests.ray.conftest import NAMES

WORKERS = 8
OPTIONS = ("--max-replicas", "2", "--target-requests", "2", "--upscale-delay-seconds", "2")


def test_a_replica_comes_with_the_load_and_goes_after_it(world: World) -> None:
    with cluster(world, 1, *OPTIONS, "--downscale-delay-seconds", "5") as scaling:
        assert scaling.answering() == 1
        stop, calm, codes = threading.Event(), threading.Event(), Counter[int]()

        def ask(number: int) -> None:
            """Ask until there are two replicas; the first goes on alone, with fewer requests than one should have."""
            with httpx.Client(base_url=scaling.url, timeout=120) as http:
                while not stop.is_set() and (number == 0 or not calm.is_set()):
                    body = {"model": NAMES[number], "prompt": "hello", "max_tokens": 64, "ignore_eos": True}
                    codes[http.post("/v1/completions", json=body).status_code] += 1

        askers = [threading.Thread(target=ask, args=(number,)) for number in range(WORKERS)]
        for asker in askers:
            asker.start()
        try:
            scaling.wait_replicas(2)
            calm.set()
            scaling.wait_replicas(1)
        finally:
            calm.set()
            stop.set()
            for asker in askers:
                asker.join()
        wait_for(lambda: len(scaling.engines()) == 1)
        assert codes.keys() == {200}
        assert codes[200] > 2 * WORKERS
