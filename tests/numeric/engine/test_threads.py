"""The engine on its own thread, while other threads submit, abort and stop it."""

import random
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.engine.sequence import Batch, Event, Failed, SamplingParams, Sequence, StepResult, Token
from server.errors import EngineError
from tests.numeric.drive import Drive, settings
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, Request, draw_requests
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

DEADLINE = 60.0
PROMPT = tuple(range(40, 60))


class Post:
    """Where the engine delivers: the tokens and the ending of each sequence."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, Event] = {}
        self._news = threading.Condition()

    def deliver(self, events: list[Event]) -> None:
        with self._news:
            for event in events:
                assert event.sequence_id not in self.ends
                if isinstance(event, Token):
                    self.tokens[event.sequence_id].append(event.token)
                if isinstance(event, Failed) or event.finish:
                    self.ends[event.sequence_id] = event
            self._news.notify_all()

    def wait(self, ids: set[str]) -> None:
        """Until all of ``ids`` have ended."""
        with self._news:
            assert self._news.wait_for(lambda: ids <= self.ends.keys(), DEADLINE), ids - self.ends.keys()

    def wait_for_token(self, id_: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: bool(self.tokens[id_]), DEADLINE)


@pytest.fixture
def post() -> Post:
    return Post()


@pytest.fixture
def drive(llama: Lab, tmp_path: Path, post: Post) -> Drive:
    return Drive(tiny_model("llama"), llama.folders, settings(tmp_path, max_device_adapters=3), post.deliver)


def sequence(drive: Drive, id_: str, mix: Mix, prompt: tuple[int, ...], length: int) -> Sequence:
    return Sequence(id_, list(prompt), SamplingParams(temperature=0, max_tokens=length), drive.adaptation(mix))


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not (stats.running or stats.waiting or stats.blocks_used)


def test_many_threads_submit_and_abort(llama: Lab, drive: Drive, post: Post) -> None:
    mixes: list[Mix] = [(), *(((name, 1.0),) for name in llama.folders)]
    requests = {f"r{i}": r for i, r in enumerate(draw_requests(llama.oracle, mixes * 4, random.Random(1)))}
    keep = {id_ for index, id_ in enumerate(requests) if index % 4}

    def client(mine: dict[str, Request]) -> None:
        for id_, request in mine.items():
            drive.engine.submit(sequence(drive, id_, request.mix, request.prompt, len(request.answer)))
            if id_ not in keep:
                drive.engine.abort(id_)

    items = list(requests.items())
    threads = [threading.Thread(target=client, args=(dict(items[start::4]),)) for start in range(4)]
    drive.engine.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    post.wait(keep)
    drive.engine.stop()
    for id_ in keep:
        assert tuple(post.tokens[id_]) == requests[id_].answer
    assert idle(drive.engine)
    drive.engine.check()


def test_abort_while_running_frees_everything(drive: Drive, post: Post) -> None:
    drive.engine.start()
    drive.engine.submit(sequence(drive, "long", (("all", 1.0),), PROMPT, 70))
    post.wait_for_token("long")
    drive.engine.abort("long")
    deadline = time.monotonic() + DEADLINE
    while not idle(drive.engine):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "long" not in post.ends
    drive.engine.stop()


def test_stop_fails_unfinished_sequences_and_refuses_new_ones(drive: Drive, post: Post) -> None:
    drive.engine.start()
    for index in range(30):
        drive.engine.submit(sequence(drive, f"s{index}", (("odd", 1.0),), PROMPT, 70))
    post.wait_for_token("s0")
    drive.engine.stop()
    assert post.ends.keys() == {f"s{index}" for index in range(30)}
    assert any(isinstance(end, Failed) for end in post.ends.values())
    assert idle(drive.engine)
    with pytest.raises(EngineError):
        drive.engine.submit(sequence(drive, "late", (), PROMPT, 1))


def test_a_panic_in_a_library_leaves_no_client_waiting(
    drive: Drive, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(batch: Batch) -> StepResult:
        raise PanicException

    monkeypatch.setattr(drive.engine.runner, "run", panic)
    drive.engine.start()
    drive.engine.submit(sequence(drive, "s", (), PROMPT, 3))
    post.wait({"s"})
    assert not drive.engine.stats().healthy
    with pytest.raises(EngineError):
        drive.engine.submit(sequence(drive, "late", (), PROMPT, 1))
    drive.engine.stop()


def test_an_idle_engine_wakes_up(drive: Drive, post: Post) -> None:
    """Repeatedly, with an adapter to load each time."""
    drive.engine.start()
    for index, name in enumerate(["all", "one", "odd", "last", "all"]):
        drive.engine.submit(sequence(drive, f"s{index}", ((name, 1.0),), PROMPT, 3))
        post.wait({f"s{index}"})
    drive.engine.stop()
    assert not any(isinstance(end, Failed) for end in post.ends.values())
