"""Schemas of ``/v1/training``, for the OpenAPI document."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.api.schemas.registry import RegistrySchema
from server.api.schemas.responses import Curves, Listing, ResponseModel


class Evaluation(ResponseModel):
    """The loss on held-out rows at a step."""

    step: int
    loss: float


class Run(ResponseModel):
    """A training run as the disk has it. What it has not written is null."""

    id: str
    """Name of the adapter that it makes."""
    object: Literal["training_run"]
    state: Literal["running", "interrupted", "finished", "failed"]
    """An interrupted run can be continued with `--resume`."""
    judging: bool
    """Whether a running run has ended its steps and is being judged."""
    base: str | None
    base_fingerprint: str | None
    step: int
    """The last step that has ended."""
    steps: int | None
    loss: float | None
    """Training loss of the last step."""
    best_evaluation: Evaluation | None
    started: int | None
    """Unix time in seconds."""
    ended: int | None
    """When it finished or failed."""
    updated: int
    """When it last wrote a figure."""
    passed: bool | None
    """Whether the judgement reached every threshold."""
    reason: str | None
    """Why it failed."""
    skipped_lines: int
    """Lines of its log that cannot be read."""
    skipped_bytes: int
    """Bytes in the middle of its log that were not read: of a log above 8 MiB, the beginning and the end are."""


class Runs(Listing):
    """Training runs, those whose logs were written last first."""

    data: list[Run]
    complete: bool
    """Whether every folder was searched: false if there are more than 10,000, or some that are nested too deeply."""


class RunSample(ResponseModel):
    """A held-out row with the answers of base and adapter."""

    source: str
    """File and row."""
    messages: list[dict[str, Any]]
    """The chat before the answer; empty for plain text."""
    prompt: str | None
    """Prompt of a completion."""
    wanted: str
    """The right answer."""
    base: str
    adapter: str


class RunDetails(Run):
    """A training run with all that is known of it."""

    settings: dict[str, Any] | None
    """Options of `manylora train` that affect the weights."""
    data: dict[str, Any] | None
    """Counts of rows and tokens."""
    curves: Curves
    samples: list[RunSample]
    evaluation: dict[str, Any] | None
    """The judgement: scores of base and adapter, and `failures`, one sentence for each missed threshold."""
    manifest: dict[str, Any] | None
    """`manylora.json` of the adapter."""
    published: list[str]
    """Versions on this server that have exactly this content."""


# --- data


def _number(value: object) -> object:
    """Convert a text of a form. What is no number is left to the field's own check."""
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
        with suppress(ValueError):
            return float(value)
    return value


OF_FORM = BeforeValidator(_number)


class DataForm(RegistrySchema):
    """Form of ``POST /v1/training/data``: a file, and options as of ``manylora train``."""

    rows: Annotated[int, OF_FORM] = Field(10, ge=0, le=100)
    """Number of rows to return as the model sees them."""
    format: Literal["auto", "alpaca", "sharegpt", "chat", "completion", "text"] = "auto"
    max_length: Annotated[int | None, OF_FORM] = Field(None, ge=2)
    """Maximum number of tokens of a row."""
    eval_share: Annotated[float | None, OF_FORM] = Field(None, ge=0, lt=1)
    """Share of the rows that is held out."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of the form including its file."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)
        described["properties"]["file"] = {
            "type": "string",
            "format": "binary",
            "description": "Examples, in a file whose name ends in .jsonl, .json, .csv or .parquet.",
        }
        described["required"] = ["file"]
        return schema


class DataFile(ResponseModel):
    """Counts of one file."""

    file: str
    format: str
    rows: int
    kept: int
    """Rows that were not left out; one with several answers may count as several."""
    unused_fields: list[str]


class Bin(ResponseModel):
    """A bar of the histogram of lengths, in tokens."""

    from_: int = Field(serialization_alias="from")
    to: int
    rows: int


class DataReport(ResponseModel):
    """The trainer's report. Tokens and lengths are those of the training rows."""

    files: list[DataFile]
    rows: int
    """Rows that were read."""
    train: int
    evaluation: int
    """Rows that are held out."""
    general: int
    mixed: int
    tokens: int
    trained_tokens: int
    trained_share: float
    longest: int
    max_length: int
    truncated: int
    left_out: dict[str, int]
    """Reason -> number of rows."""
    bad: list[str]
    """The first rows that cannot be trained on, each with the reason, and how many more there are."""
    histogram: list[Bin]
    advice: list[str]


class Span(ResponseModel):
    """A piece of a row."""

    text: str
    trained: bool
    """Whether the model learns to write it."""


class DataRow(ResponseModel):
    """A row as the model sees it. The texts of its spans make up the whole row."""

    source: str
    """File and row."""
    tokens: int
    trained: int
    """Number of tokens that are trained on."""
    spans: list[Span]


class TrainingData(ResponseModel):
    """What the trainer says of a file."""

    object: Literal["training_data"]
    report: DataReport
    rows: list[DataRow]
