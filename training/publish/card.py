"""Writes the model card (README.md) of an adapter, and the plot of its losses."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adapters.format.training_record import CARD, SAMPLES
from bases.model_source import DEMO, DEMO_ORIGIN
from training.data.data_report import printable
from training.data.rendering import Example
from training.judge.judge import Judgement, SampleAnswers, percent
from training.publish.manifest import write_manifest
from training.publish.python_example import python_example
from training.publish.sample_request import SampleRequest, curl_command, shortest_prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT = "loss.png"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""File with the chat template, saved with the adapter if it is not the base's own."""

ADDRESS = '"${MANYLORA_URL:-http://127.0.0.1:8000}"'
"""The server's address in the card's commands, as ``manylora adapters`` uses it."""
TWO_LOSSES = (
    "This held-out loss was measured with the saved adapter, loaded as a server loads it. The held-out losses during "
    "training are of the same rows, at the given step, computed by the trainer's own kernels. The last of them may "
    "differ by rounding, or because --early-stopping kept the weights of an earlier step."
)
"""Explains the judgement's loss wherever it is shown."""
THRESHOLDS = ("max_loss_ratio", "min_exact_match", "min_stop_share", "min_json_validity", "max_divergence")
"""Names of the threshold settings."""

History = Sequence[Mapping[str, Any]]
"""Entries of transformers' log: ``step``, with ``loss`` and ``learning_rate``, or with ``eval_loss``."""


@dataclass(frozen=True, slots=True)
class UsageExample:
    """What the usage section of the card shows."""

    model: str
    """The value of ``--model`` in training."""
    eos_token_ids: list[int]
    """Token ids that end an answer."""
    request: SampleRequest
    """A request for one of its rows."""


def write_card(
    folder: Path,
    name: str,
    manifest: Mapping[str, Any],
    judgement: Judgement,
    history: History,
    template: str | None,
    use: UsageExample,
) -> None:
    """Write all files besides PEFT's; the manifest last, so that if it exists, all do."""
    if template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    # Leaves out the version of matplotlib.
    plot(history).savefig(folder / PLOT, dpi=100, metadata={"Software": None})
    (folder / CARD).write_text(card(name, manifest, judgement, use), encoding="utf-8")
    samples = [_sample(sample) for sample in judgement.samples]
    (folder / SAMPLES).write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    write_manifest(dict(manifest), folder)


def _sample(sample: SampleAnswers) -> dict[str, Any]:
    """Return a held-out row, what it asks for and what was answered, as JSON values."""
    row, example = sample.example.row, sample.example
    return {
        "source": Path(example.source).name,
        "messages": [turn.message() for turn in row.turns[:-1]] if row is not None else [],
        "prompt": row.prompt if row is not None else None,
        "wanted": example.answer,
        "base": sample.base,
        "adapter": sample.adapter,
    }


def card(
    name: str, manifest: Mapping[str, Any], judgement: Judgement, use: UsageExample, today: str | None = None
) -> str:
    """Return the model card in Markdown, with front matter for model hubs. ``today`` defaults to the date in UTC."""
    today = today or datetime.now(UTC).date().isoformat()
    header = yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True)
    sample = shown_sample(judgement)
    parts = [
        f"---\n{header}---",
        f"# {name}",
        f"A LoRA adapter for `{manifest['base']['name']}`, trained with manylora on {today}.",
        "## Judgement",
        *_judgement(judgement, manifest["settings"]),
        *(["## A held-out row", _fenced("text", "\n".join(transcript(sample)))] if sample else []),
        "## Use",
        *_use(name, manifest, use),
        "## Data",
        *_data(manifest["data"]),
        "## Training",
        _training(manifest),
        f"![training and validation loss]({PLOT})",
    ]
    return "\n\n".join(parts) + "\n"


def shown_sample(judgement: Judgement) -> SampleAnswers | None:
    """Return the held-out row to show: the one with the shortest prompt; None if none was answered."""
    example = shortest_prompt(sample.example for sample in judgement.samples)
    return next((sample for sample in judgement.samples if sample.example is example), None)


def transcript(sample: SampleAnswers) -> list[str]:
    """Return the lines of a row: prompt, right answer, and the answers of base and adapter."""
    said = [*_asked(sample.example), ("wanted", sample.example.answer), ("base", sample.base)]
    lines = [f"{Path(sample.example.source).name}"]
    for who, text in [*said, ("adapter", sample.adapter)]:
        first, *more = printable(text).split("\n")
        lines += [f"  {who:10}{first}".rstrip(), *(f"  {'':10}{line}".rstrip() for line in more)]
    return lines


def _asked(example: Example) -> Iterator[tuple[str, str]]:
    row = example.row
    if row is None or not row.turns:
        yield "prompt", (row and row.prompt) or ""
        return
    if row.tools:
        yield "tools", ", ".join(str(tool.get("function", tool).get("name")) for tool in row.tools)
    for turn in row.turns[:-1]:
        calls = f"{turn.content} {turn.more['tool_calls']}" if "tool_calls" in turn.more else turn.content
        yield turn.role, calls.strip()


def comparison(judgement: Judgement) -> list[tuple[str, str, str]]:
    """Return a table of (score, base, adapter) for everything that was measured."""
    rows = [("held-out loss, as saved", _number(judgement.base.loss), _number(judgement.adapter.loss))]
    for what, field in (
        ("exact match", "exact_match"),
        ("ends with an EOS token", "stop_share"),
        ("JSON that parses", "json_validity"),
        ("JSON that is equal", "json_equality"),
    ):
        found = [getattr(scores, field) for scores in (judgement.base, judgement.adapter)]
        if found != [None, None]:
            rows.append((what, percent(found[0]), percent(found[1])))
    rows.append(("KL from the base, general prompts", "0", _number(judgement.divergence)))
    return rows


def plot(history: History) -> "Figure":
    """Plot the training loss, the held-out loss if there is one, and the learning rate, by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for key, label in (("loss", "training, each step"), ("eval_loss", "held-out rows")):
        steps, values = _curve(history, key)
        if steps:
            losses.plot(steps, values, label=label, marker="o" if len(steps) < 20 else None)
    rates.plot(*_curve(history, "learning_rate"), color="tab:gray")
    losses.set_ylabel("loss, nats per token")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Above the plot, because inside it would cover curves.
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _curve(history: History, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in history if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _front_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = manifest["evaluation"]
    measured = {name: round(value, 4) for name, value in evaluation["adapter"].items() if value is not None}
    divergence = evaluation["divergence"]
    model = manifest["base"]["model"]
    return {
        # A hub turns this into a link, so a path on the training machine is left out.
        **({"base_model": DEMO_ORIGIN if model == DEMO else model} if model else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "manylora"],
        "metrics": sorted(measured),
        "manylora": {
            "base_fingerprint": manifest["base_fingerprint"],
            "data_sha256": manifest["data"]["sha256"],
            "results": measured | {"divergence": divergence and round(divergence, 6), "passed": evaluation["passed"]},
        },
    }


def _judgement(judgement: Judgement, settings: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Measured on {judgement.rows} held-out rows, {judgement.answered} of which were answered greedily, and for "
        f"forgetting on {judgement.general} general prompts."
    )
    yield _table(("", "base", "adapter"), comparison(judgement))
    yield f"{TWO_LOSSES} KL is the divergence from the base on general prompts: near 0, little was forgotten."
    if judgement.passed:
        asked = [f"`{key}` {settings[key]:g}" for key in THRESHOLDS if settings.get(key) is not None]
        yield f"It passed every threshold that was set: {', '.join(asked)}." if asked else "No threshold was set."
    else:
        yield "**It failed the judgement:**\n\n" + "\n".join(f"- {failure}" for failure in judgement.failures)


def _use(name: str, manifest: Mapping[str, Any], use: UsageExample) -> Iterator[str]:
    why = f" The prompt is sent as token ids, because {use.request.reason}." if use.request.reason else ""
    yield (
        "Use the system prompt that the adapter was trained with, if there is one. These commands upload this folder "
        "to a server with the same base (`base_fingerprint` in `manylora.json`) and send it a row of the data as an "
        f"example.{why}"
    )
    yield _fenced("sh", f"manylora adapters push . --name {name}\n{curl_command(ADDRESS, name, use.request)}")
    on_disk = (
        "" if manifest["base"]["model"] else " (replace the path of the base, which is that on the training machine)"
    )
    yield (
        f"Without a server, run this in this folder, with transformers and PEFT{on_disk}. Results are rounded "
        "differently from a server's, so an answer may differ where two tokens are almost equally likely:"
    )
    yield _fenced("python", python_example(use.model, manifest["quantization"], use.eos_token_ids, use.request))


def _fenced(language: str, text: str) -> str:
    """Return a fenced code block, with a fence longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{data['train']:,} rows to train on, {data['evaluation']:,} held out; {data['tokens']:,} tokens, "
        f"{data['trained_tokens']:,} of them trained; the longest row has {data['longest']:,} tokens. SHA-256 of the "
        f"tokenized rows: `{data['sha256']}`."
    )
    files = [(row["file"], row["format"], f"{row['rows']:,}") for row in data["files"]]
    yield _table(("file", "format", "rows"), files)
    if data["left_out"]:
        yield "Left out: " + ", ".join(f"{count:,} {reason}" for reason, count in data["left_out"].items()) + "."


def _training(manifest: Mapping[str, Any]) -> str:
    """Return every setting, so that the training can be repeated."""
    settings = {key: value for key, value in manifest["settings"].items() if value is not None}
    quantization = ", ".join(f"{key} {value}" for key, value in manifest["quantization"].items())
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items() if number)
    return f"Base: {quantization}. With {versions}.\n\n```yaml\n{yaml.safe_dump(settings, allow_unicode=True)}```"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
