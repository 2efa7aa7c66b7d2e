"""instructor: its modes, partial and repeated objects."""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import pytest
from instructor import Mode
from instructor.core import InstructorError
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ORDER: Any = [{"role": "user", "content": "Two lamps, please."}]


class Order(BaseModel):
    """An order from a shop."""

    model_config = ConfigDict(extra="forbid")  # else the schema admits further fields, and the model invents some
    item: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)
    note: str = Field(max_length=12)


def asked(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": ORDER, "temperature": 0, "max_tokens": 80, "max_retries": 0, **fields}


@pytest.fixture
def sdk(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA])
def test_modes_that_prescribe_the_schema(sdk: OpenAI, model: str, mode: Mode) -> None:
    order = instructor.from_openai(sdk, mode=mode).create(response_model=Order, **asked(model))
    assert isinstance(order, Order)


@pytest.mark.parametrize("mode", [Mode.JSON, Mode.MD_JSON])
def test_modes_that_only_ask_for_the_schema(sdk: OpenAI, model: str, mode: Mode) -> None:
    """The model writes what it likes: instructor may refuse it, but the server must not."""
    client = instructor.from_openai(sdk, mode=mode)
    answers: list[Any] = []
    client.on("completion:response", answers.append)
    with contextlib.suppress(InstructorError, ValidationError):
        assert isinstance(client.create(response_model=Order, **asked(model)), Order)
    assert answers[0].choices[0].message.content


def test_async(url: str, model: str) -> None:
    async def order() -> Order:
        client = instructor.from_openai(AsyncOpenAI(base_url=url, api_key="none"), mode=Mode.JSON_SCHEMA)
        return await client.create(response_model=Order, **asked(model))

    assert isinstance(asyncio.run(order()), Order)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_partial_objects(sdk: OpenAI, model: str, mode: Mode) -> None:
    client = instructor.from_openai(sdk, mode=mode)
    parts = list(client.create_partial(response_model=Order, **asked(model)))
    assert len(parts) > 1
    assert Order.model_validate(parts[-1].model_dump())


def test_a_list_of_objects(sdk: OpenAI, model: str) -> None:
    class Orders(BaseModel):
        model_config = ConfigDict(extra="forbid")
        orders: list[Order] = Field(min_length=2, max_length=2)

    client = instructor.from_openai(sdk, mode=Mode.JSON_SCHEMA)
    found = client.create(response_model=Orders, **asked(model, max_tokens=160))
    assert len(found.orders) == 2


def test_parallel_tools(sdk: OpenAI, model: str) -> None:
    """In this mode instructor lets the model decide whether to call anything; the demo model does not."""

    class Complaint(BaseModel):
        model_config = ConfigDict(extra="forbid")
        about: Literal["price", "delivery"]

    client = instructor.from_openai(sdk, mode=Mode.PARALLEL_TOOLS)
    answers: list[Any] = []
    client.on("completion:response", answers.append)
    with contextlib.suppress(InstructorError, ValidationError):
        found = list(client.create(response_model=Iterable[Order | Complaint], **asked(model)))
        assert all(isinstance(item, Order | Complaint) for item in found)
    assert answers[0].usage.completion_tokens
