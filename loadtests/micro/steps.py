"""Measures the phases of a step on a CPU: ``python -m loadtests.micro.steps [--threads 2] [--cpu avx2]``.

Runs the demo model in NF4 with random adapters of rank 16 on all its layers and a context of 160 tokens. The time of a
phase is its minimum over the repeats, to exclude other load on the machine. Compares the native decoder with the
reference, the model's own modules, and sampling by the kernels with sampling by torch.

Unlike the other load tests this one imports the server: it measures the runner alone.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bases.openmp import set_spin_count

set_spin_count()

import torch  # noqa: E402 - OpenMP reads what was just set
from torch import Tensor  # noqa: E402

from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget  # noqa: E402
from adapters.format.weights import AdapterWeights  # noqa: E402
from bases.base import load_base  # noqa: E402
from server.compute.backend import SamplingOps  # noqa: E402
from server.compute.cpu.decoder import Decoder  # noqa: E402
from server.compute.cpu.structures import PHASES  # noqa: E402
from server.compute.model_inputs import transformers_forward  # noqa: E402
from server.compute.reference.backend import EagerForward  # noqa: E402
from server.compute.reference.sampling import TorchSampling  # noqa: E402
from server.config import Settings  # noqa: E402
from server.engine.runner import Runner  # noqa: E402
from server.engine.sampling.sampler import sample  # noqa: E402
from server.engine.sequence import Batch, Chunk, SampledRow, SamplingParams, Sequence, WeightedAdapter  # noqa: E402

CONTEXT = 160
RANK = 16
CASES = (("decode", 1, 0), ("decode", 1, 1), ("decode", 16, 0), ("decode", 16, 1), ("decode", 16, 16))
PROMPTS = (("prefill", 256, 0), ("prefill", 256, 1))
SAMPLING = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.7, seed=0),
    "top-k 40": SamplingParams(temperature=0.7, top_k=40, seed=0),
    "top-p 0.95": SamplingParams(temperature=0.7, top_p=0.95, seed=0),
    "min-p 0.05": SamplingParams(temperature=0.7, min_p=0.05, seed=0),
}


@dataclass(frozen=True)
class StepBreakdown:
    """The times of one kind of step, in milliseconds."""

    work: str
    rows: int
    adapters: int
    phases: dict[str, float]
    """Phase -> time; the rest is that of Python and sampling."""
    step: float
    """Minimum time of a whole step, sampling included."""
    modules: float
    """The same with the model's own modules."""

    @property
    def of_floor(self) -> float | None:
        """Time of the step divided by that of its NF4 products and output layer."""
        floor = self.phases.get("NF4 products", 0) + self.phases.get("output layer", 0)
        return self.step / floor if floor else None


@dataclass(frozen=True)
class SamplingTiming:
    """The time of sampling the tokens of 16 sequences, in milliseconds."""

    how: str
    kernels: float
    torch: float


def main() -> int:
    """Measure and print. Returns exit status 1 if there is no native decoder."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.micro.steps", description="Measure the phases of a step on a CPU."
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the quantised base (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", default="auto", help="which kernels to measure, as for manylora serve")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = args.data_dir or Path(folder)
        settings = Settings(data_dir=data_dir, device="cpu", cpu=args.cpu, max_model_len=2048, kv_memory_gib=0.5)
        runner = _runner(settings)
    decoder = runner.forward
    if not isinstance(decoder, Decoder):
        print("there is no native decoder on this machine; manylora doctor says why", file=sys.stderr)
        return 1
    lines = []
    for work, rows, adapters in (*CASES, *PROMPTS):
        lines.append(_measure(runner, decoder, _batch(work, rows, adapters), work, adapters, args.repeats))
        _print(lines[-1])
    draws = list(_draws(decoder, args.repeats))
    logprobs = _time_logprobs(runner, args.repeats)
    if args.json:
        table = [asdict(line) | {"of_floor": line.of_floor} for line in lines]
        figures = {
            "threads": args.threads,
            "cpu": args.cpu,
            "lines": table,
            "sampling": [asdict(draw) for draw in draws],
        }
        figures["logprobs"] = logprobs
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _runner(settings: Settings) -> Runner:
    base = load_base(settings.base, lambda line: print(line, file=sys.stderr))
    runner = Runner(base, settings)
    for number in range(16):
        weights = _adapter(base.layout, number)
        runner.place(weights.spec.id, (2 * number, 2 * number + 1), runner.pool.pack(weights))
    return runner


def _adapter(layout: BaseLayout, number: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        name: (
            torch.randn(RANK, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, RANK, generator=generator) * 0.02,
        )
        for name, (inputs, outputs) in layout.linears.items()
    }
    spec = AdapterSpec(AdapterId(str(number)), {name: LoraTarget(RANK, 1.0) for name in tensors}, 0)
    return AdapterWeights(spec, tensors)


def _batch(work: str, rows: int, adapters: int, sampling: SamplingParams = SAMPLING["greedy"]) -> Batch:
    """Return a decode batch of ``rows`` sequences, or a prefill batch of two prompts with ``rows`` tokens together."""
    return Batch(tuple(_chunks(work, rows, adapters, sampling)))


def _chunks(work: str, rows: int, adapters: int, sampling: SamplingParams) -> Iterator[Chunk]:
    rng = random.Random(0)
    count, length = (rows, CONTEXT) if work == "decode" else (2, rows // 2)
    for number in range(count):
        adaptation = (WeightedAdapter(AdapterId(str(number % adapters)), 1.0, RANK),) if adapters else ()
        tokens = [rng.randrange(3, 49000) for _ in range(length)]
        sequence = Sequence(str(number), tokens, sampling, adaptation)
        sequence.blocks = list(range(number * 20, number * 20 + 20))
        yield Chunk(sequence, length - 1, 1) if work == "decode" else Chunk(sequence, 0, length)


def _measure(runner: Runner, decoder: Decoder, batch: Batch, work: str, adapters: int, repeats: int) -> StepBreakdown:
    phases: list[list[float]] = []
    for _ in range(repeats):
        decoder.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
        whole = _time(runner, batch)
        native = (decoder.seconds * 1e3).tolist()
        phases.append([*native, whole - sum(native)])
    decoder.seconds = None
    step = min(_time(runner, batch) for _ in range(repeats))
    runner.forward = EagerForward(runner.model, transformers_forward(runner.base.model))
    modules = min(_time(runner, batch) for _ in range(repeats))
    runner.forward = decoder
    least = dict(zip((*PHASES, "Python and sampling"), map(min, zip(*phases, strict=True)), strict=True))
    return StepBreakdown(work, batch.tokens, adapters, least, step, modules)


def _draws(decoder: Decoder, repeats: int) -> Iterator[SamplingTiming]:
    """Time sampling from logits in which 30 tokens are likely, as with a real model."""
    logits = 2 * torch.randn(16, decoder.vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, :30] += torch.linspace(16, 8, 30)
    for how, params in SAMPLING.items():
        both = (decoder.kernels, TorchSampling())
        times = [min(_draw(logits, params, ops) for _ in range(repeats)) for ops in both]
        yield SamplingTiming(how, *times)
        print(f"sampling, 16 rows, {how}: {times[0]:.2f} ms (torch {times[1]:.2f})", flush=True)


def _draw(logits: Tensor, params: SamplingParams, ops: SamplingOps) -> float:
    """Return the time of sampling once, in milliseconds."""
    rows = [SampledRow(Sequence(str(row), [1], params, ())) for row in range(len(logits))]
    copy = logits.clone()  # sample() changes its input
    start = time.perf_counter()
    sample(copy, rows, ops)
    return (time.perf_counter() - start) * 1e3


def _time_logprobs(runner: Runner, repeats: int) -> dict[str, float]:
    """Return the milliseconds of steps of 16 rows of as many adapters, all or none with log probabilities."""
    counts = (None, 0, 5, 20)
    batches = [_batch("decode", 16, 16, replace(SAMPLING["greedy"], logprobs=count)) for count in counts]
    times = [[_time(runner, batch) for batch in batches] for _ in range(repeats)]  # by turns, under the same load
    least = {str(count): min(column) for count, column in zip(counts, zip(*times, strict=True), strict=True)}
    print("16 rows with log probabilities:", ", ".join(f"{count} {ms:.2f} ms" for count, ms in least.items()))
    return least


def _time(runner: Runner, batch: Batch) -> float:
    """Return the time of a step, in milliseconds."""
    start = time.perf_counter()
    runner.run(batch)
    return (time.perf_counter() - start) * 1e3


def _print(line: StepBreakdown) -> None:
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in line.phases.items())
    print(f"{line.work}, {line.rows} rows, {line.adapters} adapters: {line.step:.1f} ms (modules {line.modules:.1f})")
    print(f"    {parts}; {line.of_floor:.2f} times the floor", flush=True)


if __name__ == "__main__":
    sys.exit(main())
