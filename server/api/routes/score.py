"""``POST /v1/score``: the log probabilities of continuations, for evaluations."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.access.authentication import KeyDep
from server.api.generation.prompt_run import PromptRun
from server.api.generation.scores import Continuation, encode_continuations, score
from server.api.http.errors import JsonResponse
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.score import ScoreRequest, Scores
from server.api.service import ServiceDep
from server.engine.sequence import SamplingParams, Sequence

router = APIRouter(prefix="/v1", tags=["score"], route_class=JsonRoute)

ERRORS = error_statuses(400, 404, 409, 413, 422, 429, 503, 504, 507)

SAMPLING = SamplingParams(temperature=0.0, max_tokens=0)
"""Only the prompt counts."""


@router.post("/score", responses=returns(Scores, headers=ADAPTER_HEADER) | ERRORS)
async def create_scores(request: ScoreRequest, http: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Return how likely each continuation is after its prompt."""
    service.event_router.check_open()
    await fetch_named(service, key, request)
    continuations = await asyncio.to_thread(encode_continuations, service.codec, request)
    run = await PromptRun.of(
        service,
        key,
        request,
        [list(each.tokens) for each in continuations],
        lambda id_, tokens, adaptation: Sequence(id_, tokens, SAMPLING, adaptation, prompt_logprobs=0),
        prefix="score",
        param="continuations",
    )
    data = await run.complete(http, _scores(run, continuations, tokens=bool(request.return_tokens)))
    body = {**run.fields(request.model or service.base.name), "data": data}
    return JsonResponse(body, headers=run.adapters.header())


async def _scores(run: PromptRun, continuations: list[Continuation], *, tokens: bool) -> list[dict[str, Any]]:
    results = [result async for result in run]
    return [score(each, result, tokens=tokens) for each, result in zip(continuations, results, strict=True)]
