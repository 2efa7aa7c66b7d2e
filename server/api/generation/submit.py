"""Submit a checked request: lease its adapters, give its sequences to the engine, return the response that writes."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from uuid import uuid4

from starlette.responses import Response

from server.access.key import ApiKey
from server.access.usage import METER
from server.api.formats.answer import Answer
from server.api.formats.format import AnswerFormat
from server.api.generation.adapters import LeasedAdapters
from server.api.generation.decoder import TextOptions
from server.api.generation.generation import Generation
from server.api.generation.responses import FullResponse, StreamResponse
from server.api.generation.sampling import params_of_choice, sampling_params
from server.api.schemas.generation import GenerationRequest
from server.api.service import Service
from server.engine.grammar import Grammar
from server.engine.sequence import Adaptation, SamplingParams, Sequence
from server.errors import ContextOverflow, InvalidRequest

SILENCE = 5.0
"""Seconds without anything to send after which a stream sends a keep-alive comment."""
MAX_LOGPROBS_IN_ALL = 4 << 20
"""Log probabilities that one request may ask for: about 100 bytes each, until the answer has been sent."""
PROGRESS = 0.5
"""Seconds between events with the progress of a prompt, if a stream asks for them."""


async def submit(
    service: Service,
    key: ApiKey,
    request: GenerationRequest,
    prompts: Seq[list[int]],
    max_tokens: int | None,
    make_format: Callable[[Answer], AnswerFormat],
    adapters: LeasedAdapters,
    *,
    prefix: str,
    param: str,
    grammar: Grammar | None,
    kept: frozenset[int] = frozenset(),
    ends: frozenset[int] = frozenset(),
) -> Response:
    """Return a response that writes the answers to ``prompts``, lists of token ids.

    ``max_tokens`` is the limit of each answer; None fills the context, and 0 returns the prompts only. ``key`` is the
    caller's. ``prefix`` begins the answer's id, and ``param`` is the field of the prompts, for errors. All answers
    follow ``grammar``, if there is one. ``kept`` are special tokens that stay in their text; ``ends`` end them, besides
    the model's own end tokens. The leases of ``adapters`` are taken over.
    Nothing here awaits once there is a generation, so the response always takes it over. Raises RequestError or
    EngineError.
    """
    base, meter = service.base, METER.get()
    with adapters.released_on_error():
        end_tokens = base.eos_token_ids | ends
        params = sampling_params(request, service.sampling_defaults, end_tokens, service.codec.vocabulary)
        limits = [_limit(len(prompt), max_tokens, base.max_model_len, param) for prompt in prompts]
        _check_logprobs(request, prompts, limits, params.logprobs)
        await meter.reserve(sum(map(len, prompts)), len(prompts) * request.samples, max_tokens)
    generation = Generation(
        _sequences(f"{prefix}-{uuid4().hex}", key, request, prompts, limits, params, adapters.adaptation, grammar),
        adapters,
        TextOptions(
            tuple(request.stop or ()),
            frozenset(request.stop_token_ids or ()),
            include_stop=bool(request.include_stop_str_in_output),
            min_tokens=params.min_tokens,
            prompt_only=max_tokens == 0,
            kept=service.codec.special if request.skip_special_tokens is False else kept,
        ),
        key=key,
        meter=meter,
        prompts=len(prompts),
        codec=service.codec,
        engine=service.engine,
        event_router=service.event_router,
        metrics=service.metrics,
    )
    with generation.closed_on_error():
        form = make_format(Answer(generation, request.model or base.name, service.fingerprint, bool(request.explain)))
        if not request.stream:
            return FullResponse(form)
        progress = request.stream_options is not None and request.stream_options.progress
        return StreamResponse(form, PROGRESS if progress else SILENCE)


def _limit(prompt_tokens: int, max_tokens: int | None, context: int, param: str) -> int:
    """Return the limit of an answer: ``max_tokens``, or what is left of the context. Raises ContextOverflow."""
    if max_tokens is None:
        max_tokens = max(context - prompt_tokens, 1)
    # The engine samples a token after every prompt. If the answer is to be empty, it needs no place in the context.
    if prompt_tokens + max_tokens > context:
        raise ContextOverflow(context, prompt_tokens, max_tokens, param)
    return max(max_tokens, 1)


def _check_logprobs(
    request: GenerationRequest, prompts: Seq[list[int]], limits: Seq[int], of_tokens: int | None
) -> None:
    """Raise InvalidRequest if an answer could have more than :data:`MAX_LOGPROBS_IN_ALL` log probabilities."""
    of_prompts = request.needed_prompt_logprobs
    copies = request.samples if request.stream else 1  # each choice of a stream begins with its own
    in_prompts = 0 if of_prompts is None else sum(map(len, prompts)) * copies * (1 + of_prompts)
    in_answers = 0 if of_tokens is None else sum(limits) * request.samples * (1 + of_tokens)
    if in_prompts + in_answers > MAX_LOGPROBS_IN_ALL:
        chat = "top_logprobs" in type(request).model_fields
        param = "prompt_logprobs" if in_prompts > in_answers else "top_logprobs" if chat else "logprobs"
        raise InvalidRequest(
            f"The answer could have {in_prompts + in_answers} log probabilities over all of its choices and tokens; at "
            f"most {MAX_LOGPROBS_IN_ALL} are served. Ask for fewer, or for a smaller `max_tokens` or `n`.",
            param=param,
        )


def _sequences(
    id_: str,
    key: ApiKey,
    request: GenerationRequest,
    prompts: Seq[list[int]],
    limits: Seq[int],
    params: SamplingParams,
    adaptation: Adaptation,
    grammar: Grammar | None,
) -> list[Sequence]:
    """Return the sequences of all choices, those of the first prompt first."""
    sequences: list[Sequence] = []
    for prompt, limit in zip(prompts, limits, strict=True):
        for number in range(request.samples):
            of_prompt = request.needed_prompt_logprobs if number == 0 or request.stream else None
            sequences.append(
                Sequence(
                    f"{id_}-{len(sequences)}" if sequences else id_,
                    list(prompt),  # the engine appends the answer to it
                    params_of_choice(replace(params, max_tokens=limit), number),
                    adaptation,
                    prompt_logprobs=of_prompt,
                    grammar=grammar,
                    tenant=key.id,
                    weight=key.weight,
                    priority=request.urgency,
                    deadline=request.deadline,
                )
            )
    return sequences
