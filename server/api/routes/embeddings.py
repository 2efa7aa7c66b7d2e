"""``POST /v1/embeddings``: texts to vectors, from the base or an adapter."""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.access.authentication import KeyDep
from server.api.generation.prompt_run import PromptRun, Result
from server.api.generation.prompts import encode_prompts
from server.api.generation.vectors import encode_vector, unit_vector
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ADAPTER_HEADER, error_statuses, returns
from server.api.registry.on_request import fetch_named
from server.api.schemas.embeddings import EmbeddingRequest, Embeddings
from server.api.service import Service, ServiceDep
from server.engine.sequence import Pooled, SamplingParams, Sequence
from server.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=JsonRoute)

ERRORS = error_statuses(400, 404, 409, 413, 422, 429, 503, 504, 507)

SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)
"""Nothing is sampled."""


@router.post(
    "/embeddings",
    responses=returns(Embeddings, headers=ADAPTER_HEADER) | ERRORS,
)
async def create_embeddings(request: EmbeddingRequest, http: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Return the vectors of texts: the model's last hidden states, pooled and normalised."""
    service.event_router.check_open()
    await fetch_named(service, key, request)
    _check_dimensions(request, service)
    prompts = await encode_prompts(service.codec, request.input, "input")
    pooling = request.pooling or service.pooling
    run = await PromptRun.of(
        service,
        key,
        request,
        prompts,
        lambda id_, tokens, adaptation: Sequence(id_, tokens, SAMPLING, adaptation, pooling=pooling),
        prefix="embd",
        param="input",
    )
    vectors = await run.complete(http, _vectors(run, request))
    fields = {**run.fields(request.model or service.base.name), "pooling": pooling}
    return Response(_body(fields, vectors), media_type="application/json", headers=run.adapters.header())


def _check_dimensions(request: EmbeddingRequest, service: Service) -> None:
    size = service.base.model.config.get_text_config().hidden_size
    if request.dimensions is not None and request.dimensions > size:
        raise InvalidRequest(
            f"Vectors of this model have {size} dimensions (got {request.dimensions}).", param="dimensions"
        )


async def _vectors(run: PromptRun, request: EmbeddingRequest) -> list[bytes]:
    """Return the vectors in JSON. Each is encoded as it comes: thousands at once would stall other requests."""
    encoding = request.encoding_format or "float"
    return [encode_vector(unit_vector(_pooled(result), request.dimensions), encoding) async for result in run]


def _pooled(result: Result) -> bytes:
    assert isinstance(result, Pooled)
    return result.vector


def _body(fields: dict[str, Any], vectors: list[bytes]) -> bytes:
    """Return the JSON object of the answer."""
    head = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    data = [b'{"object":"embedding","index":%d,"embedding":%b}' % each for each in enumerate(vectors)]
    return b'%b,"data":[%b]}' % (head, b",".join(data))
