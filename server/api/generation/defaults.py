"""SamplingDefaults: what the model's generation_config.json says about sampling, for requests that do not say it."""

from dataclasses import asdict, dataclass, fields
from typing import Self

from pydantic import ValidationError
from transformers import GenerationConfig

from bases.errors import ConfigError
from server.api.schemas.generation import GenerationRequest


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Defaults of a model, for those of vLLM's sampling parameters that a generation config may have.

    None leaves OpenAI's default.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    """Limit of answers to chat requests without a limit of their own; None fills the context."""

    @classmethod
    def of(cls, config: GenerationConfig | None) -> Self:
        """Return the defaults of a generation config. Raises ConfigError if a request could not have one of them.

        As in vLLM, ``do_sample`` has no effect.
        """
        given = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        try:
            GenerationRequest.model_validate(
                {{"max_new_tokens": "max_tokens"}.get(name, name): value for name, value in given.items()}
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"the model's generation_config.json: {first['loc'][0]}: {first['msg']} (got {first['input']!r}); "
                "--generation-config off ignores that file"
            ) from error
        return cls(**given)

    def describe(self) -> str:
        """Return one line that names the defaults, for the start."""
        given = [f"{name} {value}" for name, value in asdict(self).items() if value is not None]
        return f"sampling defaults of the model's generation_config.json: {', '.join(given) or 'none'}"
