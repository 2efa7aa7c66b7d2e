"""One training from its settings to a published adapter: check, train, judge, describe, publish."""

import gc
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from adapters.errors import AdapterNameError
from adapters.names import check_name, fold
from bases.base import Base
from bases.errors import ConfigError
from training import report
from training.base import open_base
from training.card import comparison, curl, write_card
from training.dataset import Dataset, build
from training.judge import Judgement, Sample, check_thresholds, judge
from training.lora import check_findings, lint
from training.manifest import manifest
from training.memory import check_memory, estimate
from training.publish import check_server, publish
from training.run import Trained, checked_plan, train
from training.settings import TrainSettings

SHOWN = 160
"""Characters of an answer that is shown."""


class Job:
    """What ``manylora train`` does, telling ``console`` about it.

    Raises ConfigError and DataError before anything is trained, TrainingError while it is, PublishFailed after it.
    """

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self._settings = settings
        self._console = console

    def run(self) -> int:
        """The exit status: 0, or 3 where the adapter is kept but the judgement failed and it was not published."""
        settings = self._settings
        base = open_base(settings, self._say)
        dataset = build(settings, base.tokenizer, base.max_model_len, self._say)
        self._check(base, dataset)
        if settings.dry_run:
            self._say("a dry run: nothing was trained or written")
            return 0
        trained = train(settings, base, dataset, self._say)
        # The processes of one run share its work; what follows is one's.
        if not PartialState().is_main_process:
            return 0
        del base
        gc.collect()
        judgement = self._judge(trained, dataset)
        return self._publish(trained, judgement)

    def _check(self, base: Base, dataset: Dataset) -> None:
        """All that can be told before training."""
        settings = self._settings
        self._console.print(report.render(dataset.report))
        if settings.show:
            report.show(dataset.train[: settings.show], base.tokenizer, self._console)
        check_thresholds(settings, dataset)
        if dataset.end_of_turn is not None and dataset.end_of_turn not in base.eos_token_ids:
            self._warn("the chat template ends an answer with a token at which a server of this base does not stop")
        findings = lint(settings, base)
        for finding in findings:
            verb = "will refuse this adapter" if finding.level == "refused" else "is all right with this adapter"
            self._warn(f"{finding.server} {verb}: {finding.message}")
        check_findings(settings, findings)
        checked_plan(settings, base, dataset)
        need = estimate(settings, base, dataset)
        self._say(str(need))
        check_memory(need, base.device)
        if settings.publish is not None:
            self._check_publishing(settings.publish, base)

    def _check_publishing(self, url: str, base: Base) -> None:
        alias = self._settings.alias
        if alias is not None:
            try:
                check_name(alias)
            except AdapterNameError as error:
                raise ConfigError(f"--alias: {error}") from None
            if fold(alias) == fold(self._settings.name):
                raise ConfigError(f"--alias: {alias} is the adapter's own name")
        check_server(url, base.layout.fingerprint)

    def _judge(self, trained: Trained, dataset: Dataset) -> Judgement:
        """The judgement, which then lies with the adapter."""
        settings = self._settings
        base = open_base(settings)
        judgement = judge(settings, base, trained.folder, dataset, self._say)
        contents = manifest(settings, base, dataset, judgement, trained.folder)
        write_card(trained.folder, settings.name, contents, judgement, trained.history, dataset.chat_template)
        self._console.print(_comparison(judgement))
        for sample in judgement.samples[:1]:
            self._console.print(_sample(sample), soft_wrap=True)
        for failure in judgement.failures:
            self._warn(f"not good enough: {failure}")
        self._say(f"the adapter is in {trained.folder}")
        return judgement

    def _publish(self, trained: Trained, judgement: Judgement) -> int:
        settings = self._settings
        url = settings.publish
        if not judgement.passed and not settings.publish_anyway:
            self._warn("it was not published" if url else "the judgement failed")
            return 3
        if url is None:
            folder = shlex.quote(str(trained.folder))
            self._say(f"publish it with: manylora adapters push {folder} --name {settings.name}")
            return 0
        with _upload_bar(settings.name) as progress:
            publish(url, trained.folder, settings.name, settings.alias, self._say, progress)
        self._say(f"ask it with:\n{curl(url.rstrip('/'), settings.alias or settings.name)}")
        return 0

    def _say(self, line: str) -> None:
        # Text: what looks like markup in a path or a message is none.
        self._console.print(Text(line), soft_wrap=True)

    def _warn(self, line: str) -> None:
        self._console.print(Text(f"! {line}", style="yellow"), soft_wrap=True)


def _comparison(judgement: Judgement) -> Table:
    table = Table("", "base", "adapter", box=SIMPLE_HEAD)
    for row in comparison(judgement):
        table.add_row(*row)
    return table


def _sample(sample: Sample) -> Text:
    """One held-out row, both answers side by side."""
    said = (("wanted", sample.reference), ("base", sample.base), ("adapter", sample.adapter))
    lines = [f"{sample.source}", *(f"  {who:8}{_line(text)}" for who, text in said)]
    return Text("\n".join(lines))


def _line(text: str) -> str:
    """One line of bounded length, without what would steer a terminal."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= SHOWN else f"{plain[:SHOWN]}..."


@contextmanager
def _upload_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr for an upload, and for the server's checks after it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"uploading {name}", total=None)

        def advance(sent: int, total: int) -> None:
            bars.update(task, completed=sent, total=total)
            if sent == total:
                bars.update(task, description="checking on the server ...")

        yield advance
