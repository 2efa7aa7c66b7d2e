"""Measures steps of the engine on a GPU: decode and prefill for the base and for 1, 16 and 64 adapters.

    python -m loadtests.micro.gpu --json gpu.json

makes a random model with the dimensions of Llama 3.1 8B in NF4 on the device. It prints the time of each step and
its lower bound (the bytes that it must read, at the measured bandwidth), the time of PEFT's mixed batch
(``adapter_names``), the time of steps while adapters are loaded, and which goals for one H100 are met.
``--tiny --device cpu`` checks that it runs.

Unlike the other load tests this one imports the server: it measures the runner only.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget
from adapters.format.weights import AdapterWeights
from bases.base import Base
from loadtests.machine import client_machine
from loadtests.micro.random_base import EIGHT_BILLION, TINY, random_base, step_bytes
from server.compute.pool import PackedAdapter
from server.config import Settings
from server.engine.runner import Runner
from server.engine.sequence import Batch, Chunk, SamplingParams, WeightedAdapter
from server.engine.sequence import Sequence as EngineSequence
from server.engine.slots import pages_for

RANK = 16
BLOCK = 16
SPARE = 2
"""Adapters that fit on the device besides those in use."""
ROWS = (1, 16, 32, 64)
ADAPTERS = (0, 1, 16, 64)


@dataclass(frozen=True)
class StepTiming:
    """One line of the table."""

    work: str
    rows: int
    adapters: int
    ms: float
    """Median of a step."""
    tokens_per_second: float
    of_base: float | None
    """Throughput divided by the base's with the same rows."""
    of_floor: float | None
    """Lower bound of the time divided by the time: 1 is as fast as the memory allows."""


class StepBenchmark:
    """A runner with a random model and its adapters on the device."""

    def __init__(self, model: LlamaForCausalLM, context: int, prefill: int, repeats: int) -> None:
        self.context, self.prefill, self.repeats = context, prefill, repeats
        self.device = model.device
        linears = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        weights = random_adapter(linears)
        self.bytes = step_bytes(model, sum(t.numel() * 2 for pair in weights.tensors.values() for t in pair))
        longest = max(context, prefill) + BLOCK
        settings = Settings(
            data_dir=Path(tempfile.gettempdir()),
            max_device_adapters=max(ADAPTERS) + SPARE,
            max_batch_sequences=max(ROWS),
            block_size=BLOCK,
            kv_memory_gib=(max(ROWS) * (context + BLOCK) + longest + BLOCK) * self.bytes.token / 2**30,
        )
        layout = BaseLayout("", linears, {})
        base = Base("random", model, cast("Any", None), layout, longest, frozenset(), self.device, model.dtype)
        self.runner = Runner(base, settings)
        self.packed = self.runner.pool.pack(weights)
        for number in range(max(ADAPTERS)):
            self.place(number, self.packed)

    def place(self, number: int, packed: PackedAdapter) -> None:
        """Load an adapter into the pages of that number."""
        size = pages_for(RANK)
        self.runner.place(AdapterId(str(number)), tuple(range(number * size, (number + 1) * size)), packed)

    def batch(self, rows: int, adapters: int, length: int, new: int) -> Batch:
        """Return a batch of ``rows`` sequences of ``length`` tokens, the last ``new`` to compute, adapters in turn."""
        blocks = -(-length // BLOCK)
        chunks = []
        for row in range(rows):
            adaptation = (WeightedAdapter(AdapterId(str(row % adapters)), 1.0, RANK),) if adapters else ()
            sampling = SamplingParams(temperature=0)
            sequence = EngineSequence(str(row), [7 + row] * length, sampling, adaptation)
            sequence.blocks = list(range(row * blocks, (row + 1) * blocks))
            chunks.append(Chunk(sequence, length - new, new))
        return Batch(tuple(chunks))

    def steps(self, batch: Batch) -> float:
        """Return the median seconds of a step, until its tokens are on the host."""
        return median(lambda: self.runner.run(batch), self.repeats)

    def decode(self, bandwidth: float) -> list[StepTiming]:
        """Measure decode steps: one token per row."""
        found: list[StepTiming] = []
        for rows in ROWS:
            base = 0.0
            for adapters in (n for n in ADAPTERS if n <= rows):
                seconds = self.steps(self.batch(rows, adapters, self.context, 1))
                base = base or seconds
                floor = self.bytes.floor(rows, self.context, adapters) / bandwidth
                found.append(_row("decode", rows, adapters, seconds, rows, base, floor))
        return found

    def prefills(self) -> list[StepTiming]:
        """Measure prefill steps of ``prefill`` tokens: one prompt, or one per adapter."""
        found: list[StepTiming] = []
        for prompts in (n for n in ADAPTERS if 0 < 2 * n <= self.prefill):
            length = self.prefill // prompts
            base, tokens = self.steps(self.batch(prompts, 0, length, length)), prompts * length
            adapted = self.steps(self.batch(prompts, prompts, length, length))
            found += [
                _row("prefill", tokens, adapters, seconds, tokens, base, None)
                for adapters, seconds in ((0, base), (prompts, adapted))
                if adapters or prompts == 1
            ]
        return found

    def disturbance(self) -> dict[str, float]:
        """Measure a step of 16 rows and adapters in ms, with and without loading an adapter before each step."""
        batch, numbers = self.batch(16, 16, self.context, 1), range(max(ADAPTERS), max(ADAPTERS) + SPARE)

        def loading() -> None:
            number = next(turns)
            if AdapterId(str(number)) in self.runner.resident:
                self.runner.evict(AdapterId(str(number)))
            self.place(number, self.packed)
            self.runner.run(batch)

        turns = itertools.cycle(numbers)
        quiet = [timed(lambda: self.runner.run(batch)) for _ in range(4 * self.repeats)]
        busy = [timed(loading) for _ in range(4 * self.repeats)]
        return {
            **{"quiet_p50_ms": _percentile(quiet, 50), "quiet_p95_ms": _percentile(quiet, 95)},
            **{"loading_p50_ms": _percentile(busy, 50), "loading_p95_ms": _percentile(busy, 95)},
            "slower_by": _percentile(busy, 50) / _percentile(quiet, 50) - 1,
        }


@dataclass(frozen=True)
class Goal:
    """A goal for one H100."""

    name: str
    found: float
    least: float | None = None
    below: float | None = None

    @property
    def met(self) -> bool:
        return (self.least is None or self.found >= self.least) and (self.below is None or self.found < self.below)


def goals(rows: Sequence[StepTiming], disturbance: Mapping[str, float]) -> list[Goal]:
    """Return the goals that were measured."""
    at = {(row.work, row.rows, row.adapters): row for row in rows}
    most, one = at["decode", 64, 64], at["decode", 1, 0]
    found = [
        Goal("decode of 64 rows with 64 adapters, share of the base's throughput", most.of_base or 0.0, least=0.85),
        Goal("decode of 1 row, share of the memory bandwidth", one.of_floor or 0.0, least=0.6),
        Goal("steps while adapters are loaded, slower by", disturbance["slower_by"], below=0.1),
    ]
    if ("peft decode", 64, 64) in at:
        times = most.tokens_per_second / at["peft decode", 64, 64].tokens_per_second
        found.append(Goal("decode of 64 rows with 64 adapters, throughput over PEFT's mixed batch", times, least=10))
    return found


def random_adapter(linears: dict[str, tuple[int, int]]) -> AdapterWeights:
    """Return a random adapter of rank RANK on all layers."""
    tensors = {n: (torch.randn(RANK, i) / i**0.5, torch.randn(o, RANK) * 0.01) for n, (i, o) in linears.items()}
    return AdapterWeights(AdapterSpec(AdapterId("0"), {n: LoraTarget(RANK, 1.0) for n in tensors}, 0), tensors)


def peft_decode(model: LlamaForCausalLM, context: int, repeats: int) -> list[StepTiming]:
    """Measure PEFT's mixed batch with as many adapters as rows. Changes ``model``."""
    from peft import LoraConfig, get_peft_model  # after bases.nf4: see there

    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear")
    names = [f"a{number}" for number in range(max(ROWS))]
    peft = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)  # PEFT creates them in float32, which would be slower
    peft.eval()
    return [_peft_row(peft, names[:rows], context, repeats) for rows in ROWS]


@torch.inference_mode()
def _peft_row(peft: Any, names: Sequence[str], context: int, repeats: int) -> StepTiming:
    config, rows = peft.config, len(names)
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    past = torch.zeros(shape, device=peft.device, dtype=torch.bfloat16)
    ids = torch.full((rows, 1), 7, device=peft.device)

    def step() -> None:
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            cache.update(past, past, layer)
        started.append(time.perf_counter())
        peft(input_ids=ids, past_key_values=cache, adapter_names=list(names)).logits.argmax(-1).tolist()
        taken.append(time.perf_counter() - started[-1])

    started: list[float] = []
    taken: list[float] = []
    for _ in range(repeats + 2):
        step()
    seconds = statistics.median(taken[2:])
    return _row("peft decode", rows, rows, seconds, rows, None, None)


def _row(
    work: str, rows: int, adapters: int, seconds: float, tokens: int, base: float | None, floor: float | None
) -> StepTiming:
    return StepTiming(
        *(work, rows, adapters, seconds * 1e3, tokens / seconds),
        of_base=base and base / seconds,
        of_floor=floor and floor / seconds,
    )


def bandwidth(device: torch.device, size: int) -> float:
    """Return the bytes per second that a copy of ``size`` bytes on the device reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        target[:1].tolist()  # waits for the copy

    return 2 * size / median(copy, 10)


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of ``repeats`` calls after three for warm-up."""
    for _ in range(3):
        run()
    return statistics.median(timed(run) for _ in range(repeats))


def _percentile(seconds: Sequence[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100)[percent - 1] * 1e3


def printed(rows: Sequence[StepTiming]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| work | rows | adapters | ms | tokens/s | of base | of floor |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        shares = (f"{share:.0%}" if share else "" for share in (row.of_base, row.of_floor))
        cells = (row.work, row.rows, row.adapters, f"{row.ms:.2f}", f"{row.tokens_per_second:,.0f}", *shares)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Run all measurements and return the content of the JSON file."""
    torch.manual_seed(0)
    device, config = torch.device(options.device), TINY if options.tiny else EIGHT_BILLION
    rate = bandwidth(device, 2**20 if options.tiny else 2**30)
    bench = StepBenchmark(random_base(config, device), options.context, options.prefill, options.repeats)
    rows = bench.decode(rate) + bench.prefills()
    disturbed, floor = bench.disturbance(), bench.bytes
    del bench
    if options.peft:
        rows += peft_decode(random_base(config, device), options.context, max(3, options.repeats // 4))
    return {
        "schema": 1,
        "machine": {**client_machine(), "device": _name(device), "torch": torch.__version__},
        "settings": vars(options) | {"json": None},
        **{"bandwidth": rate, "bytes": asdict(floor), "rows": [asdict(row) for row in rows]},
        "disturbance": disturbed,
        "goals": [asdict(goal) | {"met": goal.met} for goal in goals(rows, disturbed)],
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.micro.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check that it runs")
    parser.add_argument("--context", type=int, default=512, help="tokens of context in decode steps")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of prefill steps")
    parser.add_argument("--repeats", type=int, default=30, help="measured steps of each kind")
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="skip PEFT's mixed batch")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(words)
    result = measure(options)
    print(printed([StepTiming(**row) for row in cast("list[dict[str, Any]]", result["rows"])]))
    print(f"\nbandwidth {cast('float', result['bandwidth']) / 1e9:,.0f} GB/s; disturbance {result['disturbance']}")
    for goal in cast("list[dict[str, Any]]", result["goals"]):
        print(f"{'met' if goal['met'] else 'NOT met'}: {goal['name']} {goal['found']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
