"""Judges an adapter before it is published, by comparing base and adapter on held-out rows.

The saved folder is loaded onto a newly loaded base, so the result does not depend on the state of the training run.
Answers are what a server would give: greedy, ending at the base's EOS tokens.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from peft import PeftModel

from bases.base import Base
from bases.errors import ConfigError
from training.data.conversation import Conversation, Turn
from training.data.dataset import Dataset
from training.data.files import read_rows
from training.data.rendering import Example, Renderer
from training.judge.generate import Answer, generate
from training.judge.scores import Scores, mean_kl, mean_loss, parse_json, score_answers
from training.progress_bar import Say, progress_bar
from training.run.library_logging import quiet_libraries
from training.settings import TrainSettings, flag

GENERAL = "general.jsonl"
"""General questions and answers, which measure forgetting if no ``--mix-general`` file is given."""


@dataclass(frozen=True, slots=True)
class SampleAnswers:
    """One held-out row with the answers of base and adapter."""

    example: Example
    base: str
    adapter: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """The scores of base and adapter, and the thresholds that were missed."""

    base: Scores
    adapter: Scores
    divergence: float
    """KL(adapter || base) in nats, the mean over the tokens of general answers."""
    rows: int
    """Number of held-out rows that the loss was measured on."""
    answered: int
    """Number of held-out rows that were answered."""
    general: int
    """Number of general rows."""
    failures: tuple[str, ...]
    """One sentence for each missed threshold."""
    samples: tuple[SampleAnswers, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold is reached."""
        return not self.failures


def judge(settings: TrainSettings, base: Base, folder: Path, dataset: Dataset, say: Say = lambda _: None) -> Judgement:
    """Score the PEFT folder and ``base`` on the held-out rows, and check the thresholds.

    ``base`` must not be trained on afterwards.
    """
    model = _adapted(base, folder)
    answered = answerable(settings, dataset)
    general = dataset.general or general_examples(base, dataset.chat_template)
    say(f"judging: loss on {len(dataset.evaluation)} held-out rows, answers to {len(answered)}")
    adapter, said = _scores(settings, base, model, dataset.evaluation, answered, "answers of the adapter", say)
    with model.disable_adapter():
        plain, base_said = _scores(settings, base, model, dataset.evaluation, answered, "answers of the base", say)
    say(f"judging: divergence from the base on {len(general)} general prompts")
    divergence = mean_kl(model, general)
    model.unload()
    samples = [SampleAnswers(example, *texts) for example, *texts in zip(answered, base_said, said, strict=True)]
    return Judgement(
        base=plain,
        adapter=adapter,
        divergence=divergence,
        rows=len(dataset.evaluation),
        answered=len(answered),
        general=len(general),
        failures=tuple(_failures(settings, plain, adapter, divergence)),
        samples=tuple(samples),
    )


def check_thresholds(settings: TrainSettings, dataset: Dataset, warn: Say = lambda _: None) -> None:
    """Raise ConfigError, before training, if the held-out rows cannot show whether a threshold is met.

    If that is only the default threshold, and the adapter is not to be published, call ``warn`` instead.
    """
    answered = answerable(settings, dataset)
    for name in ("min_exact_match", "min_stop_share", "min_json_validity"):
        if getattr(settings, name) is not None and not answered:
            fits = f"is trained and fits in {settings.judge_tokens} tokens"
            raise ConfigError(f"{flag(name)}: no row is held out whose last answer {fits}")
    if settings.min_json_validity is not None and not any(parse_json(example.answer) for example in answered):
        raise ConfigError(f"{flag('min_json_validity')}: no held-out answer is a JSON object or array")
    if settings.max_loss_ratio is not None and not dataset.evaluation:
        reason = "no row is held out, so it cannot be measured whether the adapter learned"
        instead = "give more rows or --eval-file, or turn the check off with --max-loss-ratio off"
        if settings.publish is not None and not settings.publish_anyway:
            raise ConfigError(f"--publish: {reason}, and the adapter would not be published; {instead}")
        warn(f"{reason}: the judgement will fail; {instead}")


def answerable(settings: TrainSettings, dataset: Dataset) -> list[Example]:
    """Return the held-out rows to answer: at most ``judge_rows``, drawn with the seed.

    Only rows with a prompt and a trained answer of at most ``judge_tokens`` tokens qualify.
    """
    fitting = [
        example
        for example in dataset.evaluation
        if example.prompt_length > 0 and len(example.input_ids) - example.prompt_length <= settings.judge_tokens
    ]
    wanted = min(settings.judge_rows, len(fitting))
    places = random.Random(f"{settings.seed}-judge").sample(range(len(fitting)), wanted)
    return [fitting[place] for place in sorted(places)]


def general_examples(base: Base, chat_template: str | None) -> list[Example]:
    """Return our own general questions and answers, rendered for this base."""
    renderer = Renderer(base.tokenizer, chat_template)
    rows = []
    for number, row in read_rows(Path(str(files("training.judge") / GENERAL))):
        source, asked, answer = f"{GENERAL}:{number}", row["prompt"], row["completion"]
        if renderer.end_of_turn is None:
            rows.append(Conversation(source, prompt=f"{asked}\n", text=answer))
        else:
            rows.append(Conversation(source, (Turn("user", asked), Turn("assistant", answer, trained=True))))
    examples = [example.cut(base.max_model_len) for example in renderer.render_all(rows)]
    return [example for example in examples if example.trained]


def _adapted(base: Base, folder: Path) -> Any:
    """Return the PEFT model, in eval mode."""
    with quiet_libraries():
        return PeftModel.from_pretrained(base.model, folder).eval()


def _scores(
    settings: TrainSettings,
    base: Base,
    model: Any,
    held_out: Sequence[Example],
    answered: Sequence[Example],
    title: str,
    say: Say,
) -> tuple[Scores, list[str]]:
    """Return the model's scores, and its answers to ``answered``; ``title`` labels the progress bar."""
    loss = mean_loss(model, held_out) if held_out else None
    if not answered:
        return Scores(loss), []
    prompts = [example.prompt for example in answered]
    with progress_bar(title, len(prompts), say) as advance:
        answers = generate(
            model, prompts, base.eos_token_ids, settings.judge_tokens, base.max_model_len, advance=advance
        )
    texts = _decode(base, answers)
    return replace(score_answers(answered, answers, texts), loss=loss), texts


def _decode(base: Base, answers: Sequence[Answer]) -> list[str]:
    """Return the answers as text, without special tokens, as the server and the right answers have it."""
    tokenizer: Any = base.tokenizer
    return list(tokenizer.backend_tokenizer.decode_batch([answer.tokens for answer in answers]))


def _failures(settings: TrainSettings, base: Scores, adapter: Scores, divergence: float) -> Iterator[str]:
    """Yield a sentence for each missed threshold. NaN, or a score that could not be measured, misses it."""
    if (failure := _loss_failure(settings.max_loss_ratio, base.loss, adapter.loss)) is not None:
        yield failure
    for name, what, found in (
        ("min_exact_match", "exact match", adapter.exact_match),
        ("min_stop_share", "answers that end", adapter.stop_share),
        ("min_json_validity", "JSON validity", adapter.json_validity),
    ):
        least: float | None = getattr(settings, name)
        if least is not None and not (found is not None and found >= least):
            yield f"{what} is {percent(found)}, less than {flag(name)} {least:g}"
    most = settings.max_divergence
    if most is not None and not divergence <= most:
        yield f"divergence from the base is {divergence:.3g}, more than {flag('max_divergence')} {most:g}"
    if math.isnan(divergence):
        yield "the adapter's logits are NaN on general prompts"


def _loss_failure(most: float | None, base: float | None, adapter: float | None) -> str | None:
    if most is None:
        return None
    if base is None or adapter is None:
        asked = flag("max_loss_ratio")
        return (
            f"no row is held out, so it was not measured whether the adapter learned; {asked} off turns the check off"
        )
    if adapter <= most * base:
        return None
    return f"held-out loss is {adapter:.3g}, more than {flag('max_loss_ratio')} {most:g} times the base's {base:.3g}"


def percent(share: float | None) -> str:
    """``0.953`` -> ``95.3%``, None -> ``-``."""
    return "-" if share is None else f"{share:.1%}"
