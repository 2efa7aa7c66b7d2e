"""The model card (README.md), its plot, and what else goes into an adapter's folder for people to read."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from training.judge import Judgement, percent
from training.manifest import write_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD = "README.md"
PLOT = "loss.png"
CHAT_TEMPLATE = "chat_template.jinja"
"""Travels with the adapter where it was not trained with the base's own."""

History = Sequence[Mapping[str, Any]]
"""Lines of transformers' log: ``step``, with ``loss`` and ``learning_rate`` or with ``eval_loss``."""


def write_card(
    folder: Path, name: str, manifest: Mapping[str, Any], judgement: Judgement, history: History, template: str | None
) -> None:
    """Everything beside PEFT's own files; the manifest last, so that where it is, all is."""
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    # Without the version of the library that drew it.
    plot(history).savefig(folder / PLOT, dpi=100, metadata={"Software": None})
    (folder / CARD).write_text(card(name, manifest, judgement), encoding="utf-8")
    write_manifest(dict(manifest), folder)


def card(name: str, manifest: Mapping[str, Any], judgement: Judgement, today: str | None = None) -> str:
    """The model card in Markdown, with the front matter that model hubs read. ``today`` is UTC's date by default."""
    today = today or datetime.now(UTC).date().isoformat()
    header = yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header}---",
        f"# {name}",
        f"A LoRA adapter for `{manifest['base']['name']}`, trained with manylora on {today}.",
        "## Judgement",
        *_judgement(judgement),
        "## Data",
        *_data(manifest["data"]),
        "## Training",
        _training(manifest),
        f"![training and validation loss]({PLOT})",
        "## Use",
        "A server of the same base (`base_fingerprint` in `manylora.json`) takes this folder and answers with it:",
        f"```sh\nmanylora adapters push . --name {name}\n{curl('http://127.0.0.1:8000', name)}\n```",
        "PEFT loads it onto the base with `PeftModel.from_pretrained(base, folder)`.",
    ]
    return "\n\n".join(parts) + "\n"


def curl(url: str, name: str) -> str:
    """A call of the adapter that works in a shell."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]}}'
    return f"curl {shlex.quote(f'{url}/v1/chat/completions')} -H 'content-type: application/json' -d '{body}'"


def comparison(judgement: Judgement) -> list[tuple[str, str, str]]:
    """(what, base, adapter) of everything that was measured, for people."""
    rows = [("held-out loss", _number(judgement.base.loss), _number(judgement.adapter.loss))]
    for what, field in (
        ("exact match", "exact_match"),
        ("ends by itself", "stop_share"),
        ("JSON that parses", "json_validity"),
        ("JSON that is equal", "json_equality"),
    ):
        found = [getattr(scores, field) for scores in (judgement.base, judgement.adapter)]
        if found != [None, None]:
            rows.append((what, percent(found[0]), percent(found[1])))
    rows.append(("KL from the base, general prompts", "0", _number(judgement.divergence)))
    return rows


def plot(history: History) -> "Figure":
    """The loss on training and, where there are any, held-out rows, and the learning rate, by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for key, label in (("loss", "training, each step"), ("eval_loss", "held-out rows")):
        steps, values = _curve(history, key)
        if steps:
            losses.plot(steps, values, label=label, marker="o" if len(steps) < 20 else None)
    rates.plot(*_curve(history, "learning_rate"), color="tab:gray")
    losses.set_ylabel("loss, nats a token")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Above the plot: inside, it lies over curves.
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _curve(history: History, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in history if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _front_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = manifest["evaluation"]
    measured = {name: round(value, 4) for name, value in evaluation["adapter"].items() if value is not None}
    divergence = evaluation["divergence"]
    return {
        "base_model": manifest["base"]["model"] or manifest["base"]["name"],
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


def _judgement(judgement: Judgement) -> Iterator[str]:
    yield (
        f"On {judgement.rows} held-out rows, {judgement.answered} of them answered greedily; forgetting on "
        f"{judgement.general} general prompts."
    )
    yield _table(("", "base", "adapter"), comparison(judgement))
    if judgement.passed:
        yield "It reaches every threshold that was set."
    else:
        yield "**It was not good enough:**\n\n" + "\n".join(f"- {failure}" for failure in judgement.failures)


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{data['train']:,} rows to train on, {data['evaluation']:,} held out; {data['tokens']:,} tokens, "
        f"{data['trained_tokens']:,} of them trained; the longest row has {data['longest']:,}. SHA-256 of the rows as "
        f"tokens: `{data['sha256']}`."
    )
    files = [(row["file"], row["format"], f"{row['rows']:,}") for row in data["files"]]
    yield _table(("file", "format", "rows"), files)
    if data["left_out"]:
        yield "Left out: " + ", ".join(f"{count:,} {reason}" for reason, count in data["left_out"].items()) + "."


def _training(manifest: Mapping[str, Any]) -> str:
    """Every setting, so that it can be done again."""
    settings = {key: value for key, value in manifest["settings"].items() if value is not None}
    quantization = ", ".join(f"{key} {value}" for key, value in manifest["quantization"].items())
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items() if number)
    return f"Base: {quantization}. With {versions}.\n\n```yaml\n{yaml.safe_dump(settings, allow_unicode=True)}```"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
