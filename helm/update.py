"""Write the generated parts of the chart: the table of values in its README, and the options in values.schema.json.

Run it after a change of values.yaml, or of an option of ``manylora serve`` or ``manylora train``:
``PYTHONPATH=. .venv/bin/python helm/update.py``. A test compares what it would write with what is there.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from bases.command_line import Options
from server.config import Settings
from training.settings import TrainSettings

CHART = Path(__file__).parent / "manylora"
TABLE = re.compile(r"(<!-- values:[^\n]*-->\n).*(<!-- end of values -->)", re.DOTALL)
SERVER_SET = {
    *("host", "port", "data_dir", "model", "adapter", "device", "api_key_file", "database_url", "store_url"),
    *("tls_cert", "tls_key"),
}
"""Options of the server that the templates set from other values."""
TRAINING_SET = {"data", "name", "model", "data_dir", "publish", "api_key", "out"}
"""Likewise of a training job."""
_LINE = re.compile(r"( *)([A-Za-z]+):(.*)")


def generated() -> dict[Path, str]:
    """Return file -> what it should contain."""
    readme, schema = CHART / "README.md", CHART / "values.schema.json"
    table = value_table((CHART / "values.yaml").read_text())
    document = json.loads(schema.read_text())
    document["definitions"]["settings"] = option_schema(Settings, SERVER_SET)
    document["definitions"]["trainingOptions"] = option_schema(TrainSettings, TRAINING_SET)
    return {
        readme: TABLE.sub(lambda found: found[1] + table + found[2], readme.read_text()),
        schema: json.dumps(document, indent=2) + "\n",
    }


def value_table(text: str) -> str:
    """Return a Markdown table of values.yaml: path, default and comment of each value that has a comment."""
    values = yaml.safe_load(text)
    rows = ["| value | default | |", "|---|---|---|"]
    comment: list[str] = []
    parents: list[str] = []
    for line in text.partition("\n\n")[2].splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
        elif found := _LINE.fullmatch(line):
            parents = [*parents[: len(found[1]) // 2], found[2]]
            if comment:
                default = values
                for name in parents:
                    default = default[name]
                rows.append(f"| `{'.'.join(parents)}` | `{json.dumps(default)}` | {' '.join(comment)} |")
            comment = []
    return "\n".join(rows) + "\n"


def option_schema(options: type[Options], left_out: set[str]) -> dict[str, Any]:
    """Return a JSON schema of the options of a command, without those in ``left_out`` and without defaults."""
    found = options.model_json_schema(by_alias=False)["properties"]
    properties = {name: _value_schema(found[name]) for name in sorted(found) if name not in left_out}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value_schema(field: dict[str, Any]) -> dict[str, Any]:
    (chosen, *_) = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    kept = ("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength")
    schema = {key: chosen[key] for key in kept if key in chosen}
    if schema["type"] == "array":
        schema["items"] = {"type": "string", "pattern": "^[^,]+$"}  # they are joined by commas
    return {"description": field["description"], **schema}


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content)
