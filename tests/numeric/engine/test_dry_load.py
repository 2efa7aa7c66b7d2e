"""Dry loads through a running engine: what they accept and reject, and that other requests are not affected."""

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRejected
from server import dry_load as probe_module
from server.dry_load import DryLoad
from server.engine.event_router import EventRouter
from server.engine.sequence import Event, Failed, SamplingParams
from server.engine.sequence import Sequence as EngineSequence
from server.errors import Draining, EngineError, InvalidRequest, QueueFull
from server.text.codec import Codec
from tests.numeric.drive import DEADLINE, LONGEST, Drive, settings
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, Request, draw_requests, kl
from tests.tiny import VOCABULARY, save_adapter, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
PROMPT = tuple(range(50, 70))


class House:
    """An engine on its own thread, an event router and a dry load."""

    def __init__(self, drive: Drive, event_router: EventRouter) -> None:
        self.drive = drive
        self.engine = drive.engine
        self.event_router = event_router
        base = drive.engine.runner.base
        self.probe = DryLoad(base, Codec(base.tokenizer, VOCABULARY, LONGEST), drive.engine, event_router)

    def measure(self, name: str, *, keep: bool = False) -> dict[str, object]:
        return self.probe.measure(self.drive.specs[name], keep=keep)

    async def answer(self, mix: Mix, prompt: Sequence[int], length: int) -> tuple[int, ...]:
        """The events of a request on the event loop."""
        id_ = f"r{random.getrandbits(64):x}"
        inbox = self.event_router.open([id_])
        params = SamplingParams(temperature=0, max_tokens=length)
        self.engine.submit(EngineSequence(id_, list(prompt), params, self.drive.adaptation(mix)))
        events: list[Event] = []
        while not (events and events[-1].finish):
            events += await inbox.take()
            assert not any(isinstance(event, Failed) for event in events), events
        self.event_router.close(id_)
        return tuple(event.token for event in events)

    def quiet(self) -> bool:
        stats = self.engine.stats()
        return not (stats.running or stats.waiting or stats.blocks_used)


Open = Callable[..., House]


@pytest.fixture
def house(llama: Lab, tmp_path: Path) -> Iterator[Open]:
    """Opens an engine with the lab's adapters and others; keywords are settings. At the end nothing may have leaked."""
    opened: list[House] = []

    def open_house(more: dict[str, Path] | None = None, *, bf16: bool = False, **changes: object) -> House:
        event_router = EventRouter()
        config = settings(tmp_path, dtype="bf16" if bf16 else "fp32", **changes)
        model = tiny_model("llama").bfloat16() if bf16 else tiny_model("llama")
        made = House(Drive(model, {**llama.folders, **(more or {})}, config, event_router.deliver), event_router)
        made.engine.start()
        opened.append(made)
        return made

    yield open_house
    for made in opened:
        deadline = time.monotonic() + DEADLINE
        while not made.quiet():
            assert time.monotonic() < deadline, made.engine.stats()
            time.sleep(0.001)
        made.engine.stop()
        made.engine.check()
        assert not len(made.event_router)
        assert not made.event_router._futures


def scaled(folder: Path, part: str, size: float) -> Path:
    """A random adapter whose ``part`` (lora_A or lora_B) has values of this size."""
    save_adapter(tiny_model("llama"), folder, seed=5, **LORA)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {key: tensor.sign() * size if part in key else tensor for key, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def many(root: Path, count: int) -> dict[str, Path]:
    return {f"new{i}": save_adapter(tiny_model("llama"), root / f"new{i}", seed=i, **LORA) for i in range(count)}


def test_the_result_equals_what_peft_computes(llama: Lab, house: Open) -> None:
    """Before any event loop exists."""
    made = house()
    prompt = tiny_tokenizer().encode(probe_module.PROMPT)[:16]
    base = llama.oracle.logits((), prompt)[-1]
    for name in llama.folders:
        receipt = made.measure(name)
        logits = llama.oracle.logits(((name, 1.0),), prompt)[-1]
        assert receipt["prompt_tokens"] == 16
        assert receipt["kl"] == pytest.approx(kl(base, logits), rel=1e-3)
        assert receipt["max_logit_change"] == pytest.approx((logits - base).abs().max().item(), rel=1e-3)
        assert receipt["top_token_changed"] == bool(logits.argmax() != base.argmax())
        assert 0 <= receipt["seconds"] < DEADLINE


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_an_adapter_whose_changes_are_rounded_away_is_rejected(house: Open, tmp_path: Path, bf16: bool) -> None:
    """Also during traffic, whose rows would change roundings if a probe shared a step with them."""
    made = house({"nothing": scaled(tmp_path / "nothing", "lora_B", 1e-30)}, bf16=bf16)

    async def traffic() -> None:
        made.event_router.bind()
        streams = [made.answer(mix, PROMPT[: 5 + i], 60) for i, mix in enumerate([(), (("all", 1.0),), ()] * 2)]
        running = asyncio.gather(*streams)
        for _ in range(10):
            with pytest.raises(AdapterRejected, match=r"^changes nothing: "):
                await asyncio.to_thread(made.measure, "nothing")
        assert (await asyncio.to_thread(made.measure, "one"))["max_logit_change"] > 0
        assert not running.done(), "the traffic ended before the probes did"
        await running

    with pytest.raises(AdapterRejected, match=r"^changes nothing: the logits of a probe prompt are the base's"):
        made.measure("nothing")
    asyncio.run(traffic())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_logits_that_are_not_finite_are_rejected(house: Open, tmp_path: Path, part: str) -> None:
    made = house({"huge": scaled(tmp_path / "huge", part, 1e38)})
    with pytest.raises(AdapterRejected, match="not finite"):
        made.measure("huge")
    assert made.measure("all")["max_logit_change"] > 0


def test_only_faulty_content_is_rejected(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the device or the engine raises EngineError, and the next dry load succeeds."""
    made = house()
    shutil.rmtree(made.drive.store.path(made.drive.specs["odd"].id))
    with pytest.raises(AdapterRejected, match="could not be loaded"):
        made.measure("odd")

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    for owner, attribute in ((made.engine.runner.pool, "write"), (made.engine.runner, "compute")):
        with monkeypatch.context() as fault:
            fault.setattr(owner, attribute, broken)
            with pytest.raises(EngineError, match="dry load failed"):
                made.measure("all")
    assert made.measure("all")["kl"] > 0


def test_a_probe_while_all_slots_are_leased(llama: Lab, house: Open) -> None:
    """It gets the first slot whose leases end, and the running requests are not affected."""
    made = house(max_device_adapters=2)

    async def main() -> None:
        made.event_router.bind()
        mixes: list[Mix] = [(("all", 1.0),), (("rslora", 1.0),)]
        streams = asyncio.gather(*(made.answer(mix, PROMPT, 70) for mix in mixes))
        while made.engine.stats().running < 2:
            await asyncio.sleep(0)
        receipt = await asyncio.to_thread(made.measure, "odd")
        assert receipt["kl"] > 0
        assert await streams == [llama.oracle.solo(mix, PROMPT, 70).tokens for mix in mixes]

    asyncio.run(main())


def test_probes_do_not_evict_used_adapters(house: Open, tmp_path: Path) -> None:
    """Nor a preloaded one, nor one that was resident before it was probed again."""
    made = house(many(tmp_path, 30), max_device_adapters=5)

    async def warm() -> None:
        made.event_router.bind()
        for name in ("all", "odd", "one"):
            await made.answer(((name, 1.0),), PROMPT, 3)

    asyncio.run(warm())
    made.measure("last", keep=True)
    hot = {made.drive.specs[name].id for name in ("all", "odd", "one", "last")}
    for index in range(30):
        made.measure(f"new{index}")
        if index == 15:
            made.measure("one")
    assert made.drive.resident() >= hot
    assert made.engine.stats().adapter_evictions == 29


def test_others_get_the_same_answers_while_probes_run(llama: Lab, house: Open, tmp_path: Path) -> None:
    """Under pressure: few slots and few blocks, so that probes evict, preempt and wait."""
    blocks = Drive(tiny_model("llama"), {}, settings(tmp_path / "measure")).memory_for(30)
    made = house(many(tmp_path, 12), max_device_adapters=3, kv_memory_gib=blocks, max_wait_seconds=0.01)
    rng = random.Random(3)
    mixes: list[Mix] = [(), (("all", 1.0),), (("odd", 1.0),), (("one", 0.5), ("patterns", 0.5))]
    requests = draw_requests(llama.oracle, mixes * 12, rng)
    receipts: dict[str, dict[str, object]] = {}

    def register(names: list[str]) -> None:
        for name in names:
            receipts[name] = made.measure(name)

    async def client(mine: list[Request]) -> None:
        for request in mine:
            assert await made.answer(request.mix, request.prompt, len(request.answer)) == request.answer

    async def main() -> None:
        made.event_router.bind()
        names = [f"new{i}" for i in range(12)]
        probes = [asyncio.to_thread(register, names[start::3]) for start in range(3)]
        await asyncio.gather(*probes, *(client(requests[start::6]) for start in range(6)))

    asyncio.run(main())
    assert made.engine.stats().preemptions
    alone = house(many(tmp_path / "again", 12))
    for name, receipt in receipts.items():
        for figure in ("kl", "max_logit_change", "top_token_changed"):
            assert alone.measure(name)[figure] == receipt[figure], "a probe's bits depend on the traffic"


def test_threads_share_one_measurement_of_the_base(house: Open) -> None:
    made = house()
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(made.measure, ["all"] * 16))
    assert {receipt["kl"] for receipt in receipts} == {receipts[0]["kl"]}
    assert made.engine.stats().output_tokens == 17


def test_a_probe_without_a_slot_times_out(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    made = house()
    made.measure("all")
    monkeypatch.setattr(probe_module, "TIMEOUT", 0.05)
    stuck = threading.Event()
    read = made.engine.loader._load
    monkeypatch.setattr(made.engine.loader, "_load", lambda adapter: (stuck.wait(DEADLINE), read(adapter))[1])
    with pytest.raises(EngineError, match="no slot"):
        made.measure("odd")
    stuck.set()


def test_a_dry_load_runs_while_the_server_drains(house: Open) -> None:
    """It belongs to a registration that was accepted before."""
    made = house()
    made.event_router.draining = True
    assert made.measure("all")["max_logit_change"] > 0


def test_a_dry_load_fails_if_the_engine_has_stopped(house: Open) -> None:
    made = house()
    made.engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        made.measure("all")
    made.event_router.draining = True
    with pytest.raises(Draining):
        made.measure("all")


def test_an_adapter_that_can_never_fit_is_refused(house: Open) -> None:
    """The pinned adapters leave one page."""
    made = house(max_device_adapters=3, max_rank=24, device_ranks=24)
    made.engine.pin(made.drive.adaptation((("last", 1.0),)))
    while not made.engine.stats().pinned_adapters:
        time.sleep(0.001)
    assert made.measure("all")["kl"] > 0
    with pytest.raises(InvalidRequest, match="pinned adapters take 1 and 2"):
        made.measure("rslora")


def test_a_full_queue_accepts_probes(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_queue=1, max_batch_sequences=1)
    params = SamplingParams(temperature=0, max_tokens=2)
    for _ in range(2):
        drive.submit((), PROMPT, params)
    with pytest.raises(QueueFull):
        drive.submit((), PROMPT, params)
    drive.engine.submit(EngineSequence("p", list(PROMPT), SamplingParams(temperature=0, max_tokens=1), probe=True))
    (event,) = drive.engine.step()
    assert event.sequence_id == "p"
    logits = torch.frombuffer(bytearray(event.logits), dtype=torch.float32)
    assert event.token == logits.argmax()
    drive.run()
