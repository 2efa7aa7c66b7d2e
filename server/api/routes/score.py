"""``POST /v1/score``: the log probabilities of continuations, for evaluations."""

import asyncio
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.generation.adapters import lease_adapters
from server.api.generation.prompt_run import PromptRun
from server.api.generation.scores import Continuation, encode_continuations, score
from server.api.http.disconnect import until_disconnect
from server.api.http.errors import JsonResponse
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.score import ScoreRequest, Scores
from server.api.service import ServiceDep
from server.engine.sequence import Adaptation, SamplingParams, Sequence
from server.errors import ContextOverflow

router = APIRouter(prefix="/v1", tags=["score"], route_class=JsonRoute)

ERRORS = error_statuses(400, 404, 409, 413, 422, 429, 503, 507)


@router.post("/score", responses=returns(Scores, headers=ADAPTER_HEADER) | ERRORS)
async def create_scores(request: ScoreRequest, http: Request, service: ServiceDep) -> Response:
    """Return how likely each continuation is after its prompt."""
    service.event_router.check_open()
    await fetch_named(service, request)
    continuations = await asyncio.to_thread(encode_continuations, service.codec, request)
    for each in continuations:
        if len(each.tokens) > service.base.max_model_len:
            raise ContextOverflow(service.base.max_model_len, len(each.tokens), 0, "continuations")
    adapters = lease_adapters(service.registry, service.base.name, request)
    id_ = f"score-{uuid4().hex}"
    run = PromptRun(_sequences(id_, continuations, adapters.adaptation), adapters, service)
    http.state.generation = run  # for the access log
    try:
        data = await until_disconnect(http.receive, _scores(run, continuations, tokens=bool(request.return_tokens)))
    finally:
        run.close()
    body = {
        "id": id_,
        "object": "list",
        "created": int(time()),
        "model": request.model or service.base.name,
        "adapter": adapters.to_json(),
        "data": data,
        "usage": {"prompt_tokens": run.prompt_tokens, "total_tokens": run.prompt_tokens},
    }
    return JsonResponse(body, headers=adapters.header())


def _sequences(id_: str, continuations: list[Continuation], adaptation: Adaptation) -> list[Sequence]:
    sampling = SamplingParams(temperature=0.0, max_tokens=0)
    return [
        Sequence(f"{id_}-{index}", list(each.tokens), sampling, adaptation, prompt_logprobs=0)
        for index, each in enumerate(continuations)
    ]


async def _scores(run: PromptRun, continuations: list[Continuation], *, tokens: bool) -> list[dict[str, Any]]:
    results = [result async for result in run]
    return [score(each, result, tokens=tokens) for each, result in zip(continuations, results, strict=True)]
