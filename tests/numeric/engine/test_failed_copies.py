"""If the copy of an adapter to the device fails, its requests fail, and none runs with the old content of its pages."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from server.compute.cuda.copies import StreamCopy
from server.engine.sequence import SamplingParams
from tests.numeric.lab import Lab
from tests.numeric.oracle import draw_requests


class Arrived:
    """A copy that was made at once."""

    arrived, error = True, None

    def wait(self) -> None:
        pass


class HostCopier:
    """Replaces CUDA's copies on a stream: made at once, or failed a moment later."""

    def __init__(self) -> None:
        self.failing = False
        self.broken: list[Future[Any]] = []

    def start(self, write: Callable[[], None]) -> Arrived | StreamCopy:
        if not self.failing:
            write()
            return Arrived()
        self.broken.append(Future())
        return StreamCopy(self.broken[-1])


def test_a_failed_copy_fails_only_its_requests_and_leaves_no_adapter(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(3)
    drive = llama.drive(tmp_path, max_device_adapters=1)
    copies = drive.engine.runner._copier = HostCopier()
    drive.serve(draw_requests(llama.oracle, [(("odd", 1.0),)], rng), rng)  # in the pages that the next one gets
    copies.failing = True
    plain = drive.ask(draw_requests(llama.oracle, [()], rng)[0])
    hit = [drive.submit((("all", 1.0),), (1, 2, 3), SamplingParams(temperature=0, max_tokens=3)) for _ in range(2)]
    while not copies.broken:
        drive.step()
    copies.broken[0].set_exception(RuntimeError("the copy failed"))
    copies.failing = False
    drive.run()
    assert drive.failed == dict.fromkeys(hit, "The adapter could not be loaded.")
    assert drive.finish[plain]
    drive.serve(draw_requests(llama.oracle, [(("all", 1.0),), ()], rng), rng)
