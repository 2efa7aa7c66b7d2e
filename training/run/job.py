"""Job: one ``manylora train``, from its settings to the published adapter."""

import gc
import shlex
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.cli.upload_bar import upload_bar
from adapters.errors import AdapterNameError
from adapters.registry.names import case_folded, check_name
from bases.base import Base
from bases.errors import ConfigError
from training.data import data_report
from training.data.dataset import Dataset, build_dataset, check_files
from training.judge.judge import Judgement, check_thresholds, judge
from training.model.base import open_base
from training.model.lora import check_findings, lint
from training.model.memory import check_memory
from training.publish.card import TWO_LOSSES, UsageExample, comparison, shown_sample, transcript, write_card
from training.publish.manifest import manifest, recorded_settings
from training.publish.publish import PublishTarget, check_base, check_names, publish, served_base
from training.publish.sample_request import SampleRequest, curl_command, sample_request, shortest_prompt
from training.run.plan import TrainingPlan, check_before_base, make_plan
from training.run.run import TrainResult, train
from training.run.run_folder import RunFolder, check_no_unfinished_run, open_run_folder, run_request
from training.settings import API_KEY, TrainSettings


class Job:
    """One ``manylora train``: checks, trains, judges, describes and publishes, printing its progress to ``console``.

    Raises ConfigError or DataError before training, TrainingError during it, PublishFailed after it.
    """

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self._settings = settings
        self._console = console

    def run(self) -> int:
        """Return the exit status: 0, or 3 if the judgement failed (the adapter is kept, but not published)."""
        settings = self._settings
        self._check_before_base()
        served = self._check_server()
        kept = self._bases()
        base = open_base(settings, self._say)
        if settings.publish is not None:
            check_base(self._server(settings.publish), served, base.layout)
        dataset = build_dataset(settings, base.tokenizer, base.max_model_len, self._say)
        plan = self._check(base, dataset)
        if settings.dry_run:
            new = ", ".join(map(str, sorted(self._bases() - kept)))
            self._say(
                f"dry run: nothing was trained{f'; the quantised base was saved in {new}' if new else ' or written'}"
            )
            return 0
        with open_run_folder(
            settings.folder, run_request(settings, base, dataset), resume=settings.resume
        ) as run_folder:
            with run_folder.log.recording(**self._described(base, dataset, plan, run_folder)):
                trained = train(settings, base, plan, run_folder, self._say)
                # All processes train; only the main process judges and publishes.
                if not PartialState().is_main_process:
                    return 0
                del base
                gc.collect()
                run_folder.log.write(event="judging")
                try:
                    judgement = self._judge(trained, dataset)
                except KeyboardInterrupt:
                    self._say("stopped; continue with judging by running the same command with --resume")
                    raise
                run_folder.log.write(event="finished")
            run_folder.move_to_out()
        self._say(f"the adapter is in {run_folder.out}; its README.md describes it")
        return self._publish(run_folder.out, judgement, self._sample_request(judgement, dataset))

    def _bases(self) -> set[Path]:
        """Return the folders of the quantised bases that are cached on disk."""
        return {path for path in (self._settings.data_dir / "bases").glob("*") if path.is_dir()}

    def _check_before_base(self) -> None:
        """Check everything that does not need the base, which may take minutes to load."""
        settings = self._settings
        check_before_base(settings)
        check_no_unfinished_run(settings.folder, resume=settings.resume)
        check_files(settings)
        if settings.alias is None:
            return
        try:
            check_name(settings.alias)
        except AdapterNameError as error:
            raise ConfigError(f"--alias: {error}") from None
        if case_folded(settings.alias) == case_folded(settings.name):
            raise ConfigError(f"--alias: must differ from the adapter's --name, {settings.name}")

    def _check_server(self) -> str | None:
        """Check that the adapter could be published; return the fingerprint of the server's base, if it gives one."""
        settings = self._settings
        if settings.publish is None:
            return None
        server = self._server(settings.publish)
        served = served_base(server, self._say)
        check_names(server, settings.name, settings.alias)
        return served

    def _check(self, base: Base, dataset: Dataset) -> TrainingPlan:
        """Print the data report and the memory estimate, check them, and return the plan."""
        settings = self._settings
        self._console.print(data_report.render(dataset.report))
        if dataset.report.bad:
            self._say("invalid rows, which are left out:")
        for line in dataset.report.bad:
            self._say(f"  {data_report.printable(line)}")
        if settings.show:
            data_report.show(dataset.train[: settings.show], base.tokenizer, self._console)
        check_thresholds(settings, dataset, self._warn)
        if dataset.end_of_turn is not None and dataset.end_of_turn not in base.eos_token_ids:
            self._warn(
                "the chat template ends answers with a token that is not one of the base's EOS tokens: servers will "
                "not stop there"
            )
        findings = lint(settings, base)
        for finding in findings:
            verb = "will refuse this adapter" if finding.level == "refused" else "can serve this adapter"
            self._warn(f"{finding.server} {verb}: {finding.message}")
        check_findings(settings, findings)
        plan = make_plan(settings, base, dataset)
        self._say(str(plan.memory))
        check_memory(plan.memory, base.device)
        return plan

    def _server(self, url: str) -> PublishTarget:
        key = self._settings.api_key
        return PublishTarget(url, key.get_secret_value() or None if key else None)

    def _described(self, base: Base, dataset: Dataset, plan: TrainingPlan, run_folder: RunFolder) -> dict[str, Any]:
        """Return what the run's log says first."""
        return {
            "name": self._settings.name,
            "step": run_folder.last_step,
            "steps": plan.steps,
            "base": base.name,
            "base_fingerprint": base.layout.fingerprint,
            "settings": recorded_settings(self._settings),
            "data": dataset.report.counts(),
        }

    def _judge(self, trained: TrainResult, dataset: Dataset) -> Judgement:
        """Judge the adapter, write its model card and manifest, and print the result."""
        settings = self._settings
        base = open_base(settings)
        judgement = judge(settings, base, trained.folder, dataset, self._say)
        contents = manifest(settings, base, dataset, judgement, trained.folder)
        use = UsageExample(settings.model, sorted(base.eos_token_ids), self._sample_request(judgement, dataset))
        write_card(trained.folder, settings.name, contents, judgement, trained.history, dataset.chat_template, use)
        self._console.print(_comparison(judgement))
        if judgement.adapter.loss is not None:
            self._say(TWO_LOSSES)
        if (sample := shown_sample(judgement)) is not None:
            for line in ("a held-out row:", *transcript(sample)):
                self._say(line)
        for failure in judgement.failures:
            self._warn(f"judgement failed: {failure}")
        return judgement

    def _sample_request(self, judgement: Judgement, dataset: Dataset) -> SampleRequest:
        """Return a request for the held-out row that is shown, or for a training row if none is."""
        sample = shown_sample(judgement)
        example = sample.example if sample else shortest_prompt(dataset.train) or dataset.train[0]
        return sample_request(example, self._settings.judge_tokens, own_template=dataset.chat_template is not None)

    def _publish(self, folder: Path, judgement: Judgement, request: SampleRequest) -> int:
        settings = self._settings
        url = settings.publish
        if not judgement.passed and not settings.publish_anyway:
            self._warn("the adapter was not published" if url else "the judgement failed")
            return 3
        if url is None:
            self._say(f"publish it with: manylora adapters push {shlex.quote(str(folder))} --name {settings.name}")
            self._say("its README.md has an example request")
            return 0
        with upload_bar(settings.name) as progress:
            publish(self._server(url), folder, settings.name, settings.alias, self._say, progress)
        key = f' -H "authorization: Bearer ${API_KEY}"' if settings.api_key else ""
        question = "a row of its data" if (sample := shown_sample(judgement)) is None else "a held-out row"
        why = f" (as token ids, because {request.reason})" if request.reason else ""
        command = curl_command(shlex.quote(url.rstrip("/")), settings.alias or settings.name, request)
        self._say(f"try it on {question}{why}:\n{command}{key}")
        if sample is not None:
            self._say(f"its answer during judging was:\n{data_report.printable(sample.adapter)}")
        return 0

    def _say(self, line: str) -> None:
        # As Text: rich would interpret square brackets in a string as markup.
        self._console.print(Text(line), soft_wrap=True)

    def _warn(self, line: str) -> None:
        self._console.print(Text(f"! {line}", style="yellow"), soft_wrap=True)


def _comparison(judgement: Judgement) -> Table:
    table = Table("", "base", "adapter", box=SIMPLE_HEAD)
    for row in comparison(judgement):
        table.add_row(*row)
    return table
