"""One training from its settings to a published adapter: check, train, judge, describe, publish."""

import gc
import shlex
from pathlib import Path

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.cli.upload_bar import upload_bar
from adapters.errors import AdapterNameError
from adapters.registry.names import check_name, fold
from bases.base import Base
from bases.errors import ConfigError
from training.data import report
from training.data.dataset import Dataset, build, check_files
from training.judge.judge import Judgement, check_thresholds, judge
from training.model.base import open_base
from training.model.lora import check_findings, lint
from training.model.memory import check_memory, estimate
from training.publish.call import Call, call_for, curl, typical
from training.publish.card import TWO_LOSSES, Use, comparison, shown, transcript, write_card
from training.publish.manifest import manifest
from training.publish.publish import Server, check_base, check_names, publish, served_base
from training.run.run import Trained, check_beginning, checked_plan, train
from training.run.run_folder import check_left, requested, working
from training.settings import API_KEY, TrainSettings


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
        self._check_beginning()
        served = self._check_server()
        kept = self._bases()
        base = open_base(settings, self._say)
        if settings.publish is not None:
            check_base(self._server(settings.publish), served, base.layout)
        dataset = build(settings, base.tokenizer, base.max_model_len, self._say)
        self._check(base, dataset)
        if settings.dry_run:
            new = ", ".join(map(str, sorted(self._bases() - kept)))
            self._say(f"a dry run: nothing was trained{f'; the base is kept in {new}' if new else ' or written'}")
            return 0
        with working(settings.folder, requested(settings, base, dataset), resume=settings.resume) as place:
            trained = train(settings, base, dataset, place, self._say)
            # The processes of one run share its work; what follows is one's.
            if not PartialState().is_main_process:
                return 0
            del base
            gc.collect()
            try:
                judgement = self._judge(trained, dataset)
            except KeyboardInterrupt:
                self._say("stopped; --resume goes on with judging")
                raise
            place.publish()
        self._say(f"the adapter is in {place.out}, and what there is to say of it in its README.md")
        return self._publish(place.out, judgement, self._call(judgement, dataset))

    def _bases(self) -> set[Path]:
        """The bases that are kept on disk, so that they need not be quantised again."""
        return {path for path in (self._settings.data_dir / "bases").glob("*") if path.is_dir()}

    def _check_beginning(self) -> None:
        """What needs no base, which may take minutes to open."""
        settings = self._settings
        check_beginning(settings)
        check_left(settings.folder, resume=settings.resume)
        check_files(settings)
        if settings.alias is None:
            return
        try:
            check_name(settings.alias)
        except AdapterNameError as error:
            raise ConfigError(f"--alias: {error}") from None
        if fold(settings.alias) == fold(settings.name):
            raise ConfigError(f"--alias: {settings.alias} is the adapter's own name")

    def _check_server(self) -> str | None:
        """Whether the adapter can be published later on; the fingerprint of the base that is served there."""
        settings = self._settings
        if settings.publish is None:
            return None
        server = self._server(settings.publish)
        served = served_base(server, self._say)
        check_names(server, settings.name, settings.alias)
        return served

    def _check(self, base: Base, dataset: Dataset) -> None:
        """All that can be told before training."""
        settings = self._settings
        self._console.print(report.render(dataset.report))
        if dataset.report.bad:
            self._say("bad rows that are left out:")
        for line in dataset.report.bad:
            self._say(f"  {report.printable(line)}")
        if settings.show:
            report.show(dataset.train[: settings.show], base.tokenizer, self._console)
        check_thresholds(settings, dataset, self._warn)
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

    def _server(self, url: str) -> Server:
        key = self._settings.api_key
        return Server(url, key.get_secret_value() or None if key else None)

    def _judge(self, trained: Trained, dataset: Dataset) -> Judgement:
        """The judgement, which then lies with the adapter."""
        settings = self._settings
        base = open_base(settings)
        judgement = judge(settings, base, trained.folder, dataset, self._say)
        contents = manifest(settings, base, dataset, judgement, trained.folder)
        use = Use(settings.model, sorted(base.eos_token_ids), self._call(judgement, dataset))
        write_card(trained.folder, settings.name, contents, judgement, trained.history, dataset.chat_template, use)
        self._console.print(_comparison(judgement))
        if judgement.adapter.loss is not None:
            self._say(TWO_LOSSES)
        if (sample := shown(judgement)) is not None:
            for line in ("a held-out row:", *transcript(sample)):
                self._say(line)
        for failure in judgement.failures:
            self._warn(f"not good enough: {failure}")
        return judgement

    def _call(self, judgement: Judgement, dataset: Dataset) -> Call:
        """Asks the held-out row that is shown, or where there is none, one that was trained."""
        sample = shown(judgement)
        example = sample.example if sample else typical(dataset.train) or dataset.train[0]
        return call_for(example, self._settings.judge_tokens, own_template=dataset.chat_template is not None)

    def _publish(self, folder: Path, judgement: Judgement, call: Call) -> int:
        settings = self._settings
        url = settings.publish
        if not judgement.passed and not settings.publish_anyway:
            self._warn("it was not published" if url else "the judgement failed")
            return 3
        if url is None:
            self._say(f"publish it with: manylora adapters push {shlex.quote(str(folder))} --name {settings.name}")
            self._say("and ask it with the call in its README.md")
            return 0
        with upload_bar(settings.name) as progress:
            publish(self._server(url), folder, settings.name, settings.alias, self._say, progress)
        key = f' -H "authorization: Bearer ${API_KEY}"' if settings.api_key else ""
        answered = "" if (sample := shown(judgement)) is None else ", a held-out row"
        why = f"; by token ids, for {call.reason}" if call.reason else ""
        command = curl(shlex.quote(url.rstrip("/")), settings.alias or settings.name, call)
        self._say(f"ask it what it was trained for{answered}{why}:\n{command}{key}")
        if sample is not None:
            self._say(f"when it was judged, it answered:\n{report.printable(sample.adapter)}")
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
