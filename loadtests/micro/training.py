"""Measures training: ``python -m loadtests.micro.training [--steps 24] [--threads 1] [--device cuda]``.

Compares our trainer with PEFT and transformers' Trainer as a user would combine them: the same NF4 base, the same LoRA
settings and initial weights, bf16 mixed precision, Trainer's own batches and a collator that pads. Both see the same
examples equally often, in batches of the same size. Runs alternate, each in its own process, so that other load on the
machine affects both. The first steps are warm-up; the median of the others is compared. On a busy machine the CPU time
is reliable, the wall-clock time is not.

Unlike the other load tests this one imports the trainer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bases.openmp import set_spin_count

set_spin_count()

import psutil  # noqa: E402 - OpenMP reads what was just set
import torch  # noqa: E402

from loadtests.machine import client_machine  # noqa: E402
from training.data.dataset import Dataset, build_dataset  # noqa: E402
from training.model.base import open_base  # noqa: E402
from training.model.lora import new_peft_model  # noqa: E402
from training.run.library_logging import quiet_libraries  # noqa: E402
from training.run.plan import learning_rate, make_plan  # noqa: E402
from training.run.run import train  # noqa: E402
from training.run.run_folder import open_run_folder, run_request  # noqa: E402
from training.run.trainer import AdapterTrainer  # noqa: E402
from training.settings import TrainSettings  # noqa: E402

DATA = Path(__file__).parents[2] / "examples" / "support-json.jsonl"
WARM_UP = 3
"""Steps at the start that are not counted."""
WAYS = ("peft", "ours")


@dataclass(frozen=True)
class TrainingSpeed:
    """The results of one run."""

    way: str
    step: float
    """Wall-clock seconds per step, median."""
    processor: float
    """CPU seconds per step, all threads, median."""
    tokens: float
    """Tokens per step without padding, mean."""
    memory: int
    """Peak memory in bytes above that of the process with its base loaded; on CUDA what torch allocated."""
    loss: float
    """Mean loss of the last five steps, to check that both learned the same."""

    @property
    def rate(self) -> float:
        """Tokens per wall-clock second."""
        return self.tokens / self.step


class StepTimer:
    """Records time, tokens and loss at the end of each step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.marks: list[tuple[float, float]] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def mark(self, loss: float, tokens: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))
        self.losses.append(loss)
        self.tokens.append(tokens)

    def speed(self, way: str, memory: int) -> TrainingSpeed:
        counted = self.marks[WARM_UP:]
        wall, processor = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counted)), strict=True)
        tokens = statistics.fmean(self.tokens[WARM_UP + 1 :])
        loss = statistics.fmean(self.losses[-5:])
        return TrainingSpeed(way, statistics.median(wall), statistics.median(processor), tokens, memory, loss)


def main() -> int:
    """Run both ways alternately and print the results; with ``--way``, run one of them and print JSON."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(asdict(_run(args))))
        return 0
    speeds: dict[str, list[TrainingSpeed]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        data = args.data_dir or Path(folder)
        open_base(_settings(args, data))  # quantises here, so that it is not part of a run's memory
        for repeat in range(args.repeats):
            for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                speeds[way].append(_in_a_process(way, data))
                _print(speeds[way][-1])
    return _conclude(args, speeds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.micro.training",
        description="Measure how fast an adapter is trained, beside PEFT and transformers' Trainer.",
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the quantised base (default: a temporary one)")
    parser.add_argument("--rows", type=Path, default=DATA, help="examples to train on")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each of the two")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(args: argparse.Namespace, data: Path) -> TrainSettings:
    return TrainSettings(
        data=(str(args.rows),), name="speed", data_dir=data, model=args.model, device=args.device, report_to="none",
        eval_share=0, max_steps=args.steps, save_steps=10 * args.steps, batch_size=args.batch_size, optimizer="adamw",
        gradient_checkpointing=False,
    )  # fmt: skip


def _in_a_process(way: str, data: Path) -> TrainingSpeed:
    """Run one of the two ways in a process of its own, with the options of this command line."""
    command = [sys.executable, "-W", "ignore", "-m", "loadtests.micro.training", *sys.argv[1:], "--way", way]
    done = subprocess.run([*command, "--data-dir", str(data)], stdout=subprocess.PIPE, text=True, check=True)
    return TrainingSpeed(**json.loads(done.stdout.splitlines()[-1]))


def _run(args: argparse.Namespace) -> TrainingSpeed:
    settings = _settings(args, args.data_dir)
    base = open_base(settings)
    dataset = build_dataset(settings, base.tokenizer, base.max_model_len)
    timer = StepTimer(base.device)
    work: Callable[..., None] = _ours if args.way == "ours" else _peft
    with _peak(base.device) as memory, tempfile.TemporaryDirectory() as folder:
        work(settings.model_copy(update={"out": Path(folder) / "adapter"}), base, dataset, timer)
    return timer.speed(args.way, memory())


def _ours(settings: TrainSettings, base: Any, dataset: Dataset, timer: StepTimer) -> None:
    step = AdapterTrainer.training_step

    def timed(trainer: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        before = trainer.tokens_seen
        loss = step(trainer, *args, **kwargs)
        timer.mark(float(loss), trainer.tokens_seen - before)
        return loss

    AdapterTrainer.training_step = timed  # type: ignore[method-assign, assignment]  # this process does nothing else
    with open_run_folder(settings.folder, run_request(settings, base, dataset), resume=False) as run_folder:
        train(settings, base, make_plan(settings, base, dataset), run_folder)


def _peft(settings: TrainSettings, base: Any, dataset: Dataset, timer: StepTimer) -> None:
    """Train with get_peft_model and Trainer, with their defaults for what our settings do not have."""
    from torch import nn
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    class Timed(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            tokens = int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            timer.mark(float(loss), tokens)
            return loss

    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in dataset.train]
    arguments = TrainingArguments(
        output_dir=str(settings.folder),
        use_cpu=base.device.type == "cpu",
        bf16=True,
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.max_steps or 1,
        learning_rate=learning_rate(settings, base),
        lr_scheduler_type="cosine",
        warmup_steps=5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    with quiet_libraries(), new_peft_model(settings, base) as model:
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "Dropout" and ".lora_dropout." in name:
                model.set_submodule(name, nn.Dropout(module.p))  # PEFT's own, not our faster one
        collator = DataCollatorForSeq2Seq(base.tokenizer, padding=True)
        Timed(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure peak memory. Gives a function that returns the peak above the start, in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        done.set()
        thread.join()


def _print(speed: TrainingSpeed) -> None:
    print(
        f"{speed.way:5} {speed.step:6.3f} s per step, {speed.processor:6.3f} s of CPU, {speed.rate:6.0f} tokens/s, "
        f"{speed.memory / 2**20:5.0f} MiB above the base, loss {speed.loss:.3f}",
        flush=True,
    )


def _conclude(args: argparse.Namespace, speeds: dict[str, list[TrainingSpeed]]) -> int:
    """Print and save the medians of the runs and their ratios. Returns the exit status."""
    median = {
        way: {name: statistics.median(getattr(run, name) for run in runs) for name in ("rate", "processor", "memory")}
        for way, runs in speeds.items()
    }
    per_token = {way: statistics.median(run.processor / run.tokens for run in runs) for way, runs in speeds.items()}
    ratios = {
        "tokens/s": median["ours"]["rate"] / median["peft"]["rate"],
        "tokens per second of processor": per_token["peft"] / per_token["ours"],
        "memory": median["ours"]["memory"] / median["peft"]["memory"],
    }
    print("ours / peft: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    if args.json:
        runs = {way: [asdict(run) | {"tokens_per_second": run.rate} for run in found] for way, found in speeds.items()}
        work = {"steps": args.steps, "batch_size": args.batch_size, "threads": args.threads, "device": args.device}
        figures = {"machine": client_machine(), "work": work, "runs": runs, "ratios": ratios}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
