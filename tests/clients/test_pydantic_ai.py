"""pydantic-ai: text, streams, tools, and output types by tools, by schema and by prompt."""

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

GREEDY = ModelSettings(temperature=0, max_tokens=60)


class Order(BaseModel):
    """An order from a shop."""

    item: Literal["lamp", "chair", "table"]
    quantity: int = Field(ge=1, le=20)
    note: str = Field(max_length=12)


@pytest.fixture
def provider(url: str) -> OpenAIProvider:
    return OpenAIProvider(base_url=url, api_key="none")


@pytest.fixture
def chat(provider: OpenAIProvider, model: str) -> OpenAIChatModel:
    return OpenAIChatModel(model, provider=provider)


def test_run(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, instructions="Be brief.", model_settings=GREEDY)
    result = agent.run_sync("What is the capital of France?")
    assert result.output
    assert result.usage.output_tokens > 0
    again = agent.run_sync("And of Spain?", message_history=result.all_messages())
    assert again.output


def test_a_stream_gives_the_same_answer(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, model_settings=GREEDY)

    async def streamed() -> str:
        async with agent.run_stream("What is the capital of France?") as result:
            pieces = [piece async for piece in result.stream_text(delta=True)]
        return "".join(pieces)

    assert asyncio.run(streamed()) == agent.run_sync("What is the capital of France?").output


@pytest.mark.parametrize(
    "output", [Order, ToolOutput(Order, strict=True), NativeOutput(Order)], ids=["tool", "strict", "native"]
)
def test_output_types(chat: OpenAIChatModel, output: Any) -> None:
    result = Agent(chat, output_type=output, model_settings=GREEDY).run_sync("Two lamps, please.")
    assert isinstance(result.output, Order)


def test_a_choice_of_output_types(chat: OpenAIChatModel) -> None:
    class Question(BaseModel):
        about: Literal["price", "delivery"]

    agent: Agent[None, Order | Question] = Agent(chat, output_type=[Order, Question], model_settings=GREEDY)  # type: ignore[assignment]
    assert isinstance(agent.run_sync("When will my lamp come?").output, Order | Question)


def test_a_streamed_output_type(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, output_type=Order, model_settings=GREEDY)

    async def last() -> Any:
        async with agent.run_stream("Two lamps, please.") as result:
            return [each async for each in result.stream_output()][-1]

    assert isinstance(asyncio.run(last()), Order)


def test_a_tool_and_an_output_type(chat: OpenAIChatModel) -> None:
    """The model must call something each time: the tool, or the output that ends the run."""
    asked: list[str] = []
    agent = Agent(chat, output_type=Order, model_settings=GREEDY, retries=0)

    @agent.tool_plain
    def price(item: Literal["lamp", "chair", "table"]) -> int:
        """Return the price of an item in euros."""
        asked.append(item)
        if len(asked) > 3:  # a small model may ask for ever
            raise UnexpectedModelBehavior("enough")
        return 20

    try:
        result = agent.run_sync("Order two lamps.")
        assert isinstance(result.output, Order)
    except UnexpectedModelBehavior:
        assert asked


def test_the_responses_api(provider: OpenAIProvider, model: str) -> None:
    responses = OpenAIResponsesModel(model, provider=provider)
    assert Agent(responses, model_settings=GREEDY).run_sync("What is the capital of France?").output
    assert isinstance(Agent(responses, output_type=Order, model_settings=GREEDY).run_sync("Two lamps.").output, Order)
